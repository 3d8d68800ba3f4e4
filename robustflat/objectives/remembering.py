"""Objectives with a memory: IKL and GKL (class priors), ReBAT (an averaged model)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Gt
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from robustflat.bounds import BelowOne, Weight, Whole
from robustflat.objectives.base import Mean, Objective, alone
from robustflat.objectives.plain import divergence


class _Priors:
    """For each class the mean softened clean output of its images in the epoch before, ``[C, C]``.

    ``seen`` are the logits and labels of the last forward pass, which in every step is the one
    that is descended, whatever the weight adversary asked for before.
    """

    def __init__(self) -> None:
        self.prior: Tensor | None = None
        self.total: Tensor | None = None
        self.seen: tuple[Tensor, Tensor] | None = None
        self.parts: list[tuple[Tensor, Tensor]] | None = None

    def see(self, logits: Tensor, y: Tensor) -> None:
        """A forward pass of a batch, or of a part of one."""
        if self.parts is not None:
            self.parts.append((logits, y))
        else:
            self.seen = logits, y

    @contextmanager
    def together(self) -> Iterator[None]:
        """Take the forward passes inside for one."""
        parts: list[tuple[Tensor, Tensor]] = []
        self.parts = parts
        try:
            yield
        finally:
            self.parts = None
        self.seen = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def of(self, y: Tensor, logits: Tensor) -> Tensor:
        """The prior of every row's label, ``[N, C]``; 1 / C before the first epoch has ended."""
        classes = logits.shape[1]
        if self.prior is None:
            return torch.full_like(logits, 1 / classes)
        return _spread(y, logits) @ self.prior.to(logits)

    def add(self, temperature: float, mean: Mean) -> None:
        """Count the rows of ``seen``, of all processes."""
        if self.seen is None:
            return
        logits, y = self.seen
        counted = mean(_spread(y, logits).T.double() @ F.softmax(logits / temperature, 1).double())
        counted = torch.where(counted.isfinite().all(), counted, 0)  # of a step that was skipped
        self.total = counted if self.total is None else self.total.to(counted) + counted
        self.seen = None

    def turn(self) -> None:
        """Use what was counted from here on; a class without an image keeps its prior."""
        if self.total is None:
            return
        size = self.total.sum(1, keepdim=True)
        before = torch.full_like(self.total, 1 / len(size))
        before = before if self.prior is None else self.prior.to(before)
        self.prior = torch.where(size > 0, self.total / size, before)
        self.total = None


def _spread(y: Tensor, logits: Tensor) -> Tensor:
    """Labels as distributions over the classes, in the dtype of ``logits``."""
    return y.to(logits) if y.is_floating_point() else F.one_hot(y, logits.shape[1]).to(logits)


@dataclass(frozen=True)
class ikl(Objective):  # noqa: N801
    """IKL-AT, the improved KL loss (Cui et al. 2024, "Decoupled Kullback-Leibler Divergence Loss").

    CE(n, y) + beta / 4 * sum_jk w_j w_k ((n_j - n_k) - (a_j - a_k))^2
    + alpha * CE(a, softmax(n)), the mean over rows; n are the clean logits, a the adversarial ones,
    softmax(n) is held fixed, and w is the prior of the row's class: the mean of softmax(n /
    temperature) over the images of that class in the epoch before (1 / C in the first). As in the
    released code (DKLv1, train_dkl_cifar10.py) the adversarial images are seen first, and what is
    counted are the outputs of the descent pass. That its radius grows is a matter of the attack.

    The double sum is computed as 2 * sum(w) * sum_j w_j (d_j - m)^2, with d = n - a and m its mean
    under w, which needs no ``[N, C, C]``.

    Under chunks (mSAM) the priors are counted over the last chunk of every batch.

    Args:
        alpha: weight of the cross-entropy between the outputs.
        beta: weight of the squared differences.
        temperature: softens the outputs that make the priors.
    """

    alpha: Weight = 4.0
    beta: Weight = 20.0
    temperature: Annotated[Weight, Gt(0)] = 4.0
    _priors: _Priors = field(default_factory=_Priors, init=False, repr=False, compare=False)
    attack_options: ClassVar[Mapping[str, Any]] = {"loss": "kl", "start": "normal"}

    def rows(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """The loss of every row; see :meth:`Objective.rows`."""
        outputs, squared, _ = self._terms(model, x, x_adv, y)
        return outputs + self.beta / 4 * squared

    def _terms(
        self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, gamma: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of every row the two cross-entropies, the double sum, and the sum of its weights."""
        attacked, clean = model(x_adv), model(x)
        self._priors.see(clean.detach(), y)
        outputs = F.cross_entropy(clean, y, reduction="none") + self.alpha * F.cross_entropy(
            attacked, F.softmax(clean, 1).detach(), reduction="none"
        )
        w, d = self._priors.of(y, clean).pow(gamma), clean - attacked
        size = w.sum(1)
        centred = d - ((w * d).sum(1) / size)[:, None]
        return outputs, 2 * size * (w * centred.square()).sum(1), size.square()

    @contextmanager
    def together(self) -> Iterator[None]:
        """See :meth:`Objective.together`."""
        with self._priors.together():
            yield

    def after_step(self, model: nn.Module, epoch: int = 0, mean: Mean = alone) -> None:
        """Count the outputs of the step; see :meth:`Objective.after_step`."""
        self._priors.add(self.temperature, mean)

    def after_epoch(self, model: nn.Module, epoch: int = 0) -> None:
        """Use the priors that were counted; see :meth:`Objective.after_epoch`."""
        self._priors.turn()

    def state_dict(self) -> dict[str, Any]:
        """Priors and counts; see :meth:`Objective.state_dict`."""
        return {"prior": self._priors.prior, "total": self._priors.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._priors.prior, self._priors.total = state["prior"], state["total"]
        self._priors.seen = None


@dataclass(frozen=True)
class gkl(ikl):  # noqa: N801
    """GKL-AT, the generalised KL loss (released code DKLv2): IKL with w = prior^gamma.

    The squared differences of the batch are divided by the sum of all w_j w_k in it, in place of
    its number of rows: so the objective is no mean over rows, and several processes, each with its
    own part of a batch, are not one process with all of it. With ``gamma=1`` it is IKL.

    Args:
        alpha: weight of the cross-entropy between the outputs.
        beta: weight of the squared differences.
        temperature: softens the outputs that make the priors.
        gamma: power of the priors (released: 0.2 for CIFAR-10, 0.4 for CIFAR-100, both with
            temperature 1).
    """

    temperature: Annotated[Weight, Gt(0)] = 1.0
    gamma: Weight = 0.2
    has_rows: ClassVar[bool] = False

    def __call__(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """The loss of a batch, a scalar with gradient."""
        outputs, squared, sizes = self._terms(model, x, x_adv, y, self.gamma)
        return outputs.mean() + self.beta / 4 * squared.sum() / sizes.sum()

    def rows(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """Always refuses.

        Raises:
            ValueError: because there is no loss of a row.
        """
        raise ValueError(
            "gkl has no loss of a single row: it divides by a sum over the whole batch. Use ikl, "
            "which is a mean over rows, with methods that choose examples."
        )


class _Averaged:
    """The averaged model, and whether it differs from the model yet."""

    def __init__(self) -> None:
        self.model: AveragedModel | None = None
        self.differs = False


@dataclass(frozen=True)
class rebat(Objective):  # noqa: N801
    """ReBAT (Wang et al. 2023): CE(a) + beta * KL(averaged model || model), on adversarial images.

    The averaged model is an exponential moving average of the weights (and of BatchNorm's
    statistics), updated after every step from ``start_epoch`` on, and without gradient. Before,
    it is the model itself and the second term is left out. The released code
    (train_cifar_wa.py) has it in train mode in its first epoch and in eval mode afterwards; here it
    is in eval mode throughout. The learning rate's milder decay is a matter of the schedule, and
    the averaged model is what the paper evaluates: set ``train.average`` to the same average.

    Args:
        beta: weight of the divergence.
        decay: of the moving average.
        start_epoch: first epoch (from 0) with the average; released: 105 of 200, with the
            milestones at 100 and 150.
    """

    beta: Weight = 1.0
    decay: BelowOne = 0.999
    start_epoch: Whole = 0
    _average: _Averaged = field(default_factory=_Averaged, init=False, repr=False, compare=False)
    attack_options: ClassVar[Mapping[str, Any]] = {"loss": "ce", "start": "uniform"}
    sees_clean: ClassVar[bool] = False

    def rows(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """The loss of every row; see :meth:`Objective.rows`.

        Raises:
            ValueError: before :meth:`start`.
        """
        if self._average.model is None:
            raise ValueError(
                "rebat does not know the model that it shall average. Call "
                "objective.start(model) before the first step, and objective.after_step(model) "
                "after each."
            )
        logits = model(x_adv)
        loss = F.cross_entropy(logits, y, reduction="none")
        if not self._average.differs or self.beta == 0:
            return loss
        with torch.no_grad():
            averaged = self._average.model(x_adv)
        return loss + self.beta * divergence(averaged, logits)

    def start(self, model: nn.Module) -> None:
        """Copy the model; see :meth:`Objective.start`."""
        average = AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(self.decay), use_buffers=True
        )
        self._average.model = average.eval().requires_grad_(False)
        self._average.differs = False
        if self.start_epoch == 0:
            average.update_parameters(model)

    def after_step(self, model: nn.Module, epoch: int = 0, mean: Mean = alone) -> None:
        """Update the average; see :meth:`Objective.after_step`."""
        if self._average.model is not None and epoch >= self.start_epoch:
            self._average.model.update_parameters(model)
            self._average.differs = True

    def after_epoch(self, model: nn.Module, epoch: int = 0) -> None:
        """Take over the weights with which the average begins; see :meth:`Objective.after_epoch`.

        The first update of torch's average copies.
        """
        if self._average.model is not None and epoch == self.start_epoch - 1:
            self._average.model.update_parameters(model)

    def state_dict(self) -> dict[str, Any]:
        """The averaged model; see :meth:`Objective.state_dict`."""
        average = self._average.model
        return {
            "average": None if average is None else average.state_dict(),
            "differs": self._average.differs,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, after :meth:`start`."""
        if self._average.model is None:
            raise ValueError("rebat must be started before its state is loaded.")
        self._average.model.load_state_dict(state["average"])
        self._average.differs = state["differs"]
