"""mSAM: a perturbation of its own for every chunk of the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robustflat.perturb.weights import WeightPerturbation

RowLoss = Callable[[slice], Tensor]


@dataclass(frozen=True)
class msam:  # noqa: N801 - a constructor of the library's surface, like rf.sam
    """Perturb for each chunk of ``chunk`` rows separately and average the gradients.

    m-sharpness as in Foret et al. 2021, section 4.1, in one process: the chunks run one after
    another. (Under DistributedDataParallel every process perturbs for its own rows already, so m
    is the smaller of ``chunk`` and the rows of one process.) A last, smaller chunk counts by its
    rows. Other meanings of the name: see the README.

    Args:
        inner: the perturbation of each chunk, such as ``sam(rho)``.
        chunk: rows in a chunk, m.

    Raises:
        ValueError: if ``chunk`` is below 1.
    """

    inner: WeightPerturbation
    chunk: int

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"msam needs chunk >= 1 rows, got {self.chunk}.")
        if self.inner.batches > 1:
            raise ValueError(
                f"msam splits one batch, and {self.inner.name} climbs {self.inner.batches} batches "
                "at once: the two contradict each other. Use one of them."
            )

    @property
    def name(self) -> str:
        """As reports call it."""
        return f"msam-{self.inner.name}"

    @property
    def is_off(self) -> bool:
        """Whether nothing is perturbed."""
        return self.inner.is_off

    def backward(
        self,
        loss: RowLoss,
        model: nn.Module,
        *,
        rows: int | None = None,
        generator: torch.Generator | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """Leave the mean of the chunks' gradients in ``.grad``; the weights are untouched.

        Args:
            loss: maps a slice of the batch's rows to their mean loss.
            model: holds the parameters.
            rows: rows in the batch. If None, taken from the first tensor that ``loss`` indexes
                with the slice it is given.
            generator: as in :meth:`WeightPerturbation.backward`.
            scaler: as there.

        Returns:
            The mean loss at the chunks' perturbed weights, a detached scalar.

        Raises:
            ValueError: if the chunk is larger than the batch, or the batch cannot be seen.
        """
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients: dict[nn.Parameter, Tensor] = {}
        values: list[Tensor] = []
        start = 0
        while rows is None or start < rows:
            chunk = slice(start, start + self.chunk)
            with _SeeRows(chunk) as seen:
                value = self.inner.backward(
                    lambda chunk=chunk: loss(chunk), model, generator=generator, scaler=scaler
                )
            rows = self._checked(rows if rows is not None else seen.rows)
            share = (min(chunk.stop, rows) - start) / rows
            values.append(value * share)
            for parameter in parameters:
                if parameter.grad is not None:
                    part = parameter.grad * share
                    gradients[parameter] = (
                        part.add_(gradients[parameter]) if parameter in gradients else part
                    )
            start = chunk.stop
        for parameter in parameters:
            parameter.grad = gradients.get(parameter)
        return torch.stack(values).sum()

    def _checked(self, rows: int | None) -> int:
        if rows is None:
            raise ValueError(
                "msam could not see how many rows the batch has: the loss closure indexed no "
                "tensor with the slice it was given. Pass backward(..., rows=N)."
            )
        if self.chunk > rows:
            raise ValueError(
                f"msam's chunk of {self.chunk} rows is larger than the batch of {rows}, so it "
                "would be plain SAM. Choose a chunk of at most the batch's rows."
            )
        return rows


class _SeeRows(TorchFunctionMode):
    """Notes the length of the first tensor that is indexed with one particular slice."""

    def __init__(self, rows: slice) -> None:
        super().__init__()
        self._slice = rows
        self.rows: int | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if self.rows is None and func is Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if index and index[0] is self._slice:
                self.rows = args[0].shape[0]
        return func(*args, **(kwargs or {}))
