"""Owns the loss over a fixed set of examples, as a function of the model's present weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustflat.errors import UserError
from robustflat.evaluate.attacks.ascent import pgd_by_name
from robustflat.evaluate.team import Team
from robustflat.evaluate.threat import Threat
from robustflat.perturb import InputPerturbation, maximise

Kind = Literal["forward", "input_gradient", "gradient", "hvp"]
# Told how many examples a pass of some kind went over.
Count = Callable[[Kind, int], None]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Closure:
    """The mean loss of some examples, summed batch by batch and weighted by example.

    It is a function of the weights alone: every random number of the attack is drawn in advance
    (``starts``), so two evaluations at the same weights are the same, whatever lies between them,
    and do not depend on the batch size. Differences between weights are then due to the weights.

    Attributes:
        model: in eval mode.
        x: images ``[N, ...]``.
        y: labels ``[N]`` or ``[N, C]``.
        batch_size: examples in a pass; the last batch may be smaller.
        count: told of every pass.
        attack: makes adversarial examples anew at the present weights; None takes ``x`` as it is.
        starts: where each restart of the attack begins, each of the shape of ``x``; empty for an
            attack that starts at the image.
        searched: what the attack is given in place of the model: the same, compiled.
        normalise_logits: take the loss of the centred logits divided by their norm.
        team: processes that share the batches. What each found is joined in the order of the
            batches, so that every one has, to the last bit, what one process alone would have.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    batch_size: int
    count: Count
    attack: InputPerturbation | None = None
    starts: tuple[Tensor, ...] = ()
    searched: nn.Module | None = None
    normalise_logits: bool = False
    team: Team = field(default_factory=Team)

    def __len__(self) -> int:
        return len(self.x)

    def part(self, rows: slice) -> Closure:
        """The same loss over some of the examples."""
        return replace(
            self, x=self.x[rows], y=self.y[rows], starts=tuple(s[rows] for s in self.starts)
        )

    def attacked(self) -> Tensor:
        """The adversarial examples at the present weights, ``[N, ...]``, where ``x`` lies."""
        return torch.cat([x.to(self.x.device) for x in self._attacked(lambda rows, x, y: x)])

    def losses(self) -> Tensor:
        """The loss of every example, ``[N]``, float64 on the host."""
        return self.outcomes()[0]

    @torch.no_grad()
    def outcomes(self) -> tuple[Tensor, Tensor]:
        """The loss of every example and whether it is classified rightly, ``[N]`` each."""

        def look(rows: slice, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.model(x)
            labels = y.argmax(1) if y.is_floating_point() else y
            return self._losses(logits, y), logits.argmax(1) == labels

        losses, right = zip(*self._attacked(look, forward=1), strict=True)
        return _to_host(losses), torch.cat(right).cpu()

    def value_and_grad(self, parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The loss of every example, and the gradient of their mean.

        With adversarial examples remade, the gradient is that at the examples found (Danskin).

        Returns:
            Losses ``[N]`` as :meth:`losses`; gradients, one a parameter.
        """
        found: list[Tensor] = []
        total = [torch.zeros_like(p) for p in parameters]

        def climb(rows: slice, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
            with torch.enable_grad():
                losses = self._losses(self.model(x), y)
                return losses.detach(), _gradient(losses.sum() / len(self), parameters)

        for losses, gradient in self._attacked(climb, gradient=1):
            torch._foreach_add_(total, gradient)
            found.append(losses)
        return _to_host(found), total

    def hvps(self, parameters: Sequence[Tensor], vectors: list[list[Tensor]]) -> list[list[Tensor]]:
        """The Hessian of the mean loss times each of ``vectors`` (differentiating the gradient)."""
        assert self.attack is None, "the Hessian is taken at fixed adversarial examples"
        totals = [[torch.zeros_like(v) for v in vector] for vector in vectors]

        def multiply(rows: slice, x: Tensor, y: Tensor) -> list[list[Tensor]]:
            with torch.enable_grad():
                loss = self._losses(self.model(x), y).sum() / len(self)
                slopes = torch.autograd.grad(
                    loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True
                )
                products = []
                for index, vector in enumerate(vectors):
                    along = sum(
                        ((s * v).sum() for s, v in zip(slopes, vector, strict=True)),
                        loss.new_zeros(()),
                    )
                    last = index == len(vectors) - 1
                    products.append(_gradient(along, parameters, keep_graph=not last))
                return products

        for products in self.each(multiply, gradient=1, hvp=len(vectors)):
            for total, product in zip(totals, products, strict=True):
                torch._foreach_add_(total, product)
        return totals

    def weighted_gradient(
        self, parameters: Sequence[Tensor], weigh: Callable[[slice, Tensor], Tensor]
    ) -> list[Tensor]:
        """The gradient of the sum over all batches of ``weigh(rows, logits)``, a scalar."""
        total = [torch.zeros_like(p) for p in parameters]

        def climb(rows: slice, x: Tensor, y: Tensor) -> list[Tensor]:
            with torch.enable_grad():
                return _gradient(weigh(rows, self.model(x)), parameters)

        for gradient in self._attacked(climb, gradient=1):
            torch._foreach_add_(total, gradient)
        return total

    def each(self, work: Callable[[slice, Tensor, Tensor], T], **passes: int) -> Iterator[T]:
        """Do ``work`` for every batch, some of them in each process of the team.

        Args:
            work: from the rows, images and labels of a batch, on the model's device, to tensors,
                or tuples or lists of them.
            **passes: what it costs, by kind.

        Yields:
            The results for all batches, in their order, in every process, on the model's device.
        """
        device, dtype = _place(self.model)
        starts = range(0, len(self), self.batch_size)
        shared = self.team.size > 1

        def at(number: int) -> Any:
            rows = slice(starts[number], min(starts[number] + self.batch_size, len(self)))
            found = work(rows, self.x[rows].to(device, dtype), self.y[rows].to(device))
            return _moved(found, torch.device("cpu")) if shared else found

        done = 0
        for results in self.team.each(at, range(len(starts))):
            for result in results:
                rows = min(self.batch_size, len(self) - done)
                done += rows
                for kind, number in passes.items():
                    if number:
                        self.count(kind, number * rows)  # type: ignore[arg-type]
                yield _moved(result, device) if shared else result

    def per_example(
        self, work: Callable[[slice, Tensor, Tensor], Tensor], **passes: int
    ) -> list[float]:
        """A number of every example, where ``work`` gives those of a batch, as :meth:`each`."""
        values: list[float] = _to_host(list(self.each(work, **passes))).tolist()
        return values

    def example_losses(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of every row of one batch, with gradient."""
        return self._losses(self.model(x), y)

    def _attacked(self, work: Callable[[slice, Tensor, Tensor], T], **passes: int) -> Iterator[T]:
        """:meth:`each`, of adversarial examples if there is an attack."""
        attack = self.attack
        if attack is None:
            return self.each(work, **passes)
        cost = attack_cost(attack)

        def attacked(rows: slice, x: Tensor, y: Tensor) -> T:
            # Each restart from its own fixed start.
            starts = [start[rows].to(x) for start in self.starts]
            return work(rows, attack(self.searched or self.model, x, y, starts=starts), y)

        return self.each(
            attacked,
            **{k: passes.get(k, 0) + cost.get(k, 0) for k in {**passes, **cost}},  # type: ignore
        )

    def _losses(self, logits: Tensor, y: Tensor) -> Tensor:
        if self.normalise_logits:
            centred = logits - logits.mean(1, keepdim=True)
            logits = centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-10)
        return F.cross_entropy(logits, y, reduction="none")


def attack_of(said: InputPerturbation | str, threat: Threat) -> InputPerturbation:
    """The attack of a robust loss, by name or as it is made.

    Raises:
        UserError: if it is none whose images have a loss as high as was found.
    """
    attack = pgd_by_name(said, threat) if isinstance(said, str) else said
    if not isinstance(attack, InputPerturbation):
        raise UserError(
            f"Unknown attack {said!r} of a robust loss: there are fgsm, pgd-STEPS and "
            "pgd-STEPS-RESTARTS, each also with :LOSS, and what rf.pgd returns. A robust loss is "
            "a loss at its highest, and other attacks stop where an image is misclassified."
        )
    return attack


def attack_starts(
    attack: InputPerturbation, blank: list[Tensor], generator: torch.Generator
) -> list[Tensor]:
    """A starting perturbation of every image for every restart, drawn for all images at once.

    Args:
        attack: tells how to start.
        blank: a tensor of the images' shape ``[N, ...]`` for each restart.
        generator: source of randomness, on their device.
    """
    start = replace(attack.ascent, steps=0, keep="last")

    def unused(u: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        raise AssertionError("an ascent of no steps evaluates nothing")

    return [maximise(unused, attack.ball, start, [t], generator)[0] for t in blank]


def starts_of(attack: InputPerturbation) -> int:
    """How many random starts an attack takes: none where it begins at the image itself."""
    return 0 if attack.ball.radius == 0 or attack.ascent.start == "zero" else attack.restarts


def attack_cost(attack: InputPerturbation) -> dict[Kind, int]:
    """Passes that remaking the adversarial examples costs."""
    if attack.ball.radius == 0:
        return {"input_gradient": 0, "forward": 0}
    gradients = attack.ascent.steps + (attack.ascent.keep == "best")
    choices = attack.restarts if attack.restarts > 1 else 0
    return {
        "input_gradient": gradients * attack.restarts,
        "forward": choices + (attack.loss == "kl"),
    }


def _gradient(
    value: Tensor, parameters: Sequence[Tensor], *, keep_graph: bool = False
) -> list[Tensor]:
    # Not .backward(): the user's .grad is none of our business.
    found = torch.autograd.grad(
        value, parameters, retain_graph=keep_graph, allow_unused=True, materialize_grads=True
    )
    return list(found)


def _to_host(values: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(values)).to("cpu", torch.float64)


def _moved(found: Any, device: torch.device) -> Any:
    if isinstance(found, Tensor):
        return found.to(device)
    return [_moved(part, device) for part in found]


def _place(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    first = next(p for p in model.parameters() if p.is_floating_point())
    return first.device, first.dtype
