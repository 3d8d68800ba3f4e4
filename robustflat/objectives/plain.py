"""Objectives without a memory: standard, adversarial, TRADES, MART and MLCAT's lifted losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustflat.bounds import BelowOne, Weight
from robustflat.objectives.base import Objective


@dataclass(frozen=True, kw_only=True)
class standard(Objective):  # noqa: N801 - a constructor of the library's surface, like rf.pgd
    """Cross-entropy of the clean images.

    Args:
        label_smoothing: share of the label spread over all classes.
    """

    label_smoothing: BelowOne = 0.0
    needs_attack: ClassVar[bool] = False

    def rows(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """CE(f(x), y) of every row; see :meth:`Objective.rows`."""
        return F.cross_entropy(model(x), y, reduction="none", label_smoothing=self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class adversarial(Objective):  # noqa: N801
    """Cross-entropy of the adversarial images (AT, Madry et al. 2018, eq. 2.1).

    Args:
        label_smoothing: share of the label spread over all classes.
    """

    label_smoothing: BelowOne = 0.0
    attack_options: ClassVar[Mapping[str, Any]] = {"loss": "ce", "start": "uniform"}
    sees_clean: ClassVar[bool] = False

    def rows(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """CE(f(x_adv), y) of every row; see :meth:`Objective.rows`."""
        logits = model(x_adv)
        return F.cross_entropy(logits, y, reduction="none", label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class trades(Objective):  # noqa: N801
    """TRADES (Zhang et al. 2019, eq. 5): CE(clean) + beta * KL(clean || adversarial).

    As in the released code, the clean output in the divergence is not detached. The released code
    computes the clean output twice; here once, which changes only how often BatchNorm sees it. With
    ``label_smoothing`` it is the objective of Gowal et al. 2020 and of the recipes with generated
    images after it (Wang et al. 2023: beta 5, smoothing 0.1).

    Args:
        beta: weight of the divergence, 1 / lambda in the paper.
        label_smoothing: share of the label spread over all classes in the cross-entropy.
    """

    beta: Weight = 6.0
    label_smoothing: BelowOne = 0.0
    attack_options: ClassVar[Mapping[str, Any]] = {"loss": "kl", "start": "normal"}

    def rows(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """The loss of every row; see :meth:`Objective.rows`."""
        clean = model(x)
        natural = F.cross_entropy(clean, y, reduction="none", label_smoothing=self.label_smoothing)
        if self.beta == 0:
            return natural
        return natural + self.beta * divergence(clean, model(x_adv))


@dataclass(frozen=True)
class mart(Objective):  # noqa: N801
    """MART (Wang et al. 2020, eq. 11): boosted CE + beta * KL weighted by 1 - p_clean(y).

    The constants that keep logarithms finite are those of the released code.

    Args:
        beta: weight of the divergence, lambda in the paper.
    """

    beta: Weight = 6.0
    takes_soft_labels: ClassVar[bool] = False

    def rows(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """The loss of every row; see :meth:`Objective.rows`.

        Raises:
            ValueError: for soft labels, for which MART's margin term is not defined.
        """
        if y.is_floating_point():
            raise ValueError(
                "MART needs one class a row, got soft labels: its boosted cross-entropy looks for "
                "the strongest wrong class. Turn mixup and cutmix off, or use adversarial()."
            )
        clean, attacked = model(x), model(x_adv)
        p_attacked = F.softmax(attacked, 1)
        strongest_wrong = p_attacked.scatter(1, y[:, None], 0.0).amax(1)
        margin = -torch.log(1.0001 - strongest_wrong + 1e-12)
        boosted = F.cross_entropy(attacked, y, reduction="none") + margin
        p_clean = F.softmax(clean, 1)
        kl = F.kl_div(
            torch.log(p_attacked + 1e-12),
            F.log_softmax(clean, 1),
            reduction="none",
            log_target=True,
        ).sum(1)
        doubt = 1.0000001 - p_clean.gather(1, y[:, None]).squeeze(1)
        return boosted + self.beta * kl * doubt


@dataclass(frozen=True)
class mlcat(Objective):  # noqa: N801
    """MLCAT by loss scaling (Yu et al. 2022): adversarial losses are lifted to a least loss.

    A loss l below ``threshold`` c is replaced by l * (c / l). With the factor held fixed, such an
    example counts with the weight c / l. The released code (train_step4_scale_15.py) lets the
    gradient run through the factor too: the lifted loss is then the constant c, and such an example
    has no gradient at all.

    Args:
        threshold: the least loss, 1.5 in the released code for CIFAR-10.
        hold_factor: whether c / l is held fixed; false is the released code.
    """

    threshold: Weight = 1.5
    hold_factor: bool = True
    attack_options: ClassVar[Mapping[str, Any]] = {"loss": "ce", "start": "uniform"}
    sees_clean: ClassVar[bool] = False

    def rows(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """The lifted loss of every row; see :meth:`Objective.rows`."""
        loss = F.cross_entropy(model(x_adv), y, reduction="none")
        if not self.hold_factor:
            return loss.clamp_min(self.threshold)
        # A loss of exactly 0 has no gradient to weigh.
        held = loss.detach().clamp_min(torch.finfo(loss.dtype).tiny)
        return loss * (self.threshold / held).clamp_min(1.0)


def divergence(clean: Tensor, attacked: Tensor) -> Tensor:
    """KL(clean || attacked) of every row, ``[N]``, from logits ``[N, C]``."""
    # Of logarithms: a clean probability that underflows to 0 would have a gradient of nan.
    return F.kl_div(
        F.log_softmax(attacked, 1), F.log_softmax(clean, 1), reduction="none", log_target=True
    ).sum(1)
