"""The training objectives: standard, adversarial, TRADES and MART."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustflat.perturb.inputs import LossName


class Objective(Protocol):
    """What is climbed by the weight adversary and descended by the optimizer: one closure."""

    # The loss that the objective's own inner maximisation over inputs climbs.
    attack_loss: ClassVar[LossName]
    # Whether it looks at adversarial images, and whether it looks at clean ones.
    needs_attack: ClassVar[bool]
    sees_clean: ClassVar[bool]

    def __call__(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """The mean loss of a batch, a scalar with gradient."""
        ...


def _check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}.")


def _check_beta(beta: float) -> None:
    if not 0 <= beta < float("inf"):
        raise ValueError(
            f"beta weighs the robust term and must be finite and >= 0, got {beta}. "
            "The papers use 6."
        )


@dataclass(frozen=True, kw_only=True)
class standard:  # noqa: N801 - a constructor of the library's surface, like rf.pgd
    """Cross-entropy of the clean images.

    Args:
        label_smoothing: share of the label spread over all classes.
    """

    label_smoothing: float = 0.0
    attack_loss: ClassVar[LossName] = "ce"
    needs_attack: ClassVar[bool] = False
    sees_clean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_smoothing(self.label_smoothing)

    def __call__(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """CE(f(x), y); ``y`` int64 ``[N]`` or soft ``[N, C]``."""
        return F.cross_entropy(model(x), y, label_smoothing=self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class adversarial:  # noqa: N801
    """Cross-entropy of the adversarial images (AT, Madry et al. 2018, eq. 2.1).

    Args:
        label_smoothing: share of the label spread over all classes.
    """

    label_smoothing: float = 0.0
    attack_loss: ClassVar[LossName] = "ce"
    needs_attack: ClassVar[bool] = True
    sees_clean: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_smoothing(self.label_smoothing)

    def __call__(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """CE(f(x_adv), y); ``y`` int64 ``[N]`` or soft ``[N, C]``."""
        return F.cross_entropy(model(x_adv), y, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class trades:  # noqa: N801
    """TRADES (Zhang et al. 2019, eq. 5): CE(clean) + beta * KL(clean || adversarial).

    As in the released code, the clean output in the divergence is not detached. The released code
    computes the clean output twice; here once, which changes only how often BatchNorm sees it.

    Args:
        beta: weight of the divergence, 1 / lambda in the paper.
    """

    beta: float = 6.0
    attack_loss: ClassVar[LossName] = "kl"
    needs_attack: ClassVar[bool] = True
    sees_clean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_beta(self.beta)

    def __call__(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """The loss of a batch; ``y`` int64 ``[N]`` or soft ``[N, C]``."""
        clean = model(x)
        natural = F.cross_entropy(clean, y)
        if self.beta == 0:
            return natural
        # Of logarithms: a clean probability that underflows to 0 would have a gradient of nan.
        divergence = F.kl_div(
            F.log_softmax(model(x_adv), 1),
            F.log_softmax(clean, 1),
            reduction="batchmean",
            log_target=True,
        )
        return natural + self.beta * divergence


@dataclass(frozen=True)
class mart:  # noqa: N801
    """MART (Wang et al. 2020, eq. 11): boosted CE + beta * KL weighted by 1 - p_clean(y).

    The constants that keep logarithms finite are those of the released code.

    Args:
        beta: weight of the divergence, lambda in the paper.
    """

    beta: float = 6.0
    attack_loss: ClassVar[LossName] = "ce"
    needs_attack: ClassVar[bool] = True
    sees_clean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_beta(self.beta)

    def __call__(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """The loss of a batch.

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
        boosted = F.cross_entropy(attacked, y) - torch.log(1.0001 - strongest_wrong + 1e-12).mean()
        p_clean = F.softmax(clean, 1)
        divergence = F.kl_div(
            torch.log(p_attacked + 1e-12),
            F.log_softmax(clean, 1),
            reduction="none",
            log_target=True,
        ).sum(1)
        doubt = 1.0000001 - p_clean.gather(1, y[:, None]).squeeze(1)
        return boosted + self.beta * (divergence * doubt).mean()


OBJECTIVES: dict[str, type[Objective]] = {
    "standard": standard,
    "adversarial": adversarial,
    "trades": trades,
    "mart": mart,
}
