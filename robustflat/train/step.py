"""One training step: attack the inputs, climb and descend one closure, step the optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from robustflat.objectives import Objective
from robustflat.perturb import InputPerturbation, Perturbation
from robustflat.perturb.parts import accumulated, slices
from robustflat.perturb.watch import Watch, watching

Batch = tuple[Tensor, Tensor]
Reattack = Literal["never", "ascent", "descent"]


class Autocast(nn.Module):
    """A model whose every forward pass is one autocast region of its own, with float32 logits.

    One region a pass, because a region caches the low-precision copies of the weights and would
    not see them move. Only an attack, during which they stand still, is one region as a whole.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ``x``."""
        if self.dtype is None:
            logits: Tensor = self.model(x)
            return logits
        with torch.autocast(x.device.type, self.dtype):
            logits = self.model(x)
        return logits.float()


class Shown(nn.Module):
    """A model that shows what it makes of the attacked images to whoever watches."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, watch: Watch) -> None:
        super().__init__()
        self.model = model
        self._of = images, labels
        self._watch = watch

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ``x``."""
        logits: Tensor = self.model(x)
        images, labels = self._of
        if x is images:
            self._watch.classified(logits, labels)
        return logits


@dataclass(frozen=True, kw_only=True)
class TrainStep:
    """What every step of a run does.

    Args:
        attack: inner maximisation over inputs, or None to train on the images as they are.
        objective: the loss that is both climbed by the weight adversary and descended.
        optimizer: any optimizer of the model's parameters.
        clip: largest global L2 norm of the gradient, or None.
        scaler: gradient scaler for float16.
        precision: dtype of autocast, or None for float32.
        step_at: "centre", or "perturbed" to let the optimizer step before the weights are restored.
        reattack: "never" attacks once, at the centre; "ascent" anew before every ascent step but
            the first; "descent" also before the descent.
        skip_nonfinite: leave weights and buffers alone where loss or gradient is not finite.
            Looking waits for the device.
        attacked: computes what the model does, in the passes of the attack; the model if None.
        accumulate: how many parts of a batch pass through the network one after the other. Losses
            and perturbations are those of the whole batch; BatchNorm sees each part by itself. The
            objective must be a mean over rows, of which the weight perturbation chooses none.
    """

    attack: InputPerturbation | None
    objective: Objective
    optimizer: torch.optim.Optimizer
    clip: float | None = None
    scaler: torch.amp.GradScaler | None = None
    precision: torch.dtype | None = None
    step_at: Literal["centre", "perturbed"] = "centre"
    reattack: Reattack = "never"
    skip_nonfinite: bool = False
    attacked: nn.Module | None = None
    accumulate: int = 1

    def __call__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        weights: Perturbation,
        generator: torch.Generator | None = None,
        weights_generator: torch.Generator | None = None,
        share: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Take one step.

        Args:
            model: the network, or DistributedDataParallel around it, in train mode.
            batches: ``(x, y)``; more than one only for n-SAM, the first is descended.
            weights: inner maximisation over weights.
            generator: source of the attack's randomness, on the model's device.
            weights_generator: of the weights' randomness; ``generator`` if None.
            share: what this process's rows count in the mean over all processes; 1 where all have
                equally many.

        Returns:
            The loss at the perturbed weights and the global L2 norm of the gradient before
            clipping, detached scalars on the device.
        """
        bare = model.module if isinstance(model, DistributedDataParallel) else model
        seen = Autocast(model, self.precision)
        attacked = Autocast(self.attacked or bare, self.precision)
        adversarial = [self._attack(attacked, x, y, generator) for x, y in batches]
        found = self.objective.rows if weights.wants_rows else self.objective
        watch = watching()

        def loss(part: int | slice = 0) -> Tensor:
            """Of a batch by its number, or of some rows of the first."""
            at, rows = (0, part) if isinstance(part, slice) else (part, slice(None))
            (x, y), attacked_x = batches[at], adversarial[at]
            x, y, attacked_x = x[rows], y[rows], attacked_x[rows]

            def of(part: slice) -> Tensor:
                images, labels = attacked_x[part], y[part]
                shown: nn.Module = seen
                if watch is not None and self.attack is not None and self.objective.needs_attack:
                    shown = Shown(seen, images, labels, watch)
                return found(shown, x[part], images, labels)

            # Of a chunk of mSAM so many as make parts of the same size.
            parts = slices(len(x), math.ceil(self.accumulate * len(x) / len(batches[at][0])))
            if len(parts) == 1:
                value = of(parts[0])
            else:
                with self.objective.together():
                    value = accumulated(of, parts, bare, self.scaler)
            return value if share == 1 else value * share

        buffers = [b.clone() for b in bare.buffers()] if self.skip_nonfinite else []
        remembered = weights.state_dict()
        norm: list[Tensor] = []

        def finish() -> None:
            norm.append(self._finish(bare))

        self.optimizer.zero_grad()
        value = weights.backward(
            self._reattacking(loss, weights, batches[0], adversarial, attacked, generator),
            model,
            rows=len(batches[0][0]),
            generator=generator if weights_generator is None else weights_generator,
            scaler=self.scaler,
            step=finish if self.step_at == "perturbed" else None,
        )
        if not norm:
            finish()
        if self.skip_nonfinite and not torch.isfinite(norm[0]):
            # In BatchNorm's statistics nan would outlast the step, and every later attack see it.
            with torch.no_grad():
                for buffer, before in zip(bare.buffers(), buffers, strict=True):
                    buffer.copy_(before)
            weights.load_state_dict(remembered)
        return value, norm[0]

    def _attack(
        self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        if self.attack is None or not self.objective.needs_attack:
            return x
        attack: Callable[..., Tensor] = self.attack
        # The weights stand still, so that their low-precision copies may outlast a pass: a region
        # around those of the passes keeps them. Not enabled, as the arithmetic between is exact.
        whole = self.precision and torch.autocast(x.device.type, enabled=False)
        with whole or nullcontext():
            if isinstance(attack, InputPerturbation):
                return attack(model, x, y, generator=generator, parts=self.accumulate)
            parts = slices(len(x), self.accumulate)
            return torch.cat([attack(model, x[p], y[p], generator=generator) for p in parts])

    def _reattacking(
        self,
        loss: Callable[..., Tensor],
        weights: Perturbation,
        batch: Batch,
        adversarial: list[Tensor],
        attacked: nn.Module,
        generator: torch.Generator | None,
    ) -> Callable[..., Tensor]:
        """``loss``, attacking anew first wherever ``reattack`` says so."""
        if self.reattack == "never":
            return loss
        last, calls = weights.passes - 1, 0

        def closure() -> Tensor:
            nonlocal calls
            descends = calls == last and self.reattack == "descent" and not weights.is_off
            again = 0 < calls < last or descends
            calls += 1
            if again:
                adversarial[0] = self._attack(attacked, *batch, generator)
            return loss()

        return closure

    def _finish(self, model: nn.Module) -> Tensor:
        """Clip and step; return the gradient's norm, which is not finite if the loss was not."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        if self.scaler is not None:
            # It skips by itself, and lowers its scale only if it is told of what it skipped.
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif not self.skip_nonfinite or torch.isfinite(norm):
            self.optimizer.step()
        return norm
