"""mSAM: a perturbation of its own for every chunk of the batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robustflat.bounds import Count
from robustflat.perturb import gradients
from robustflat.perturb.perturbation import Perturbation, Sync
from robustflat.perturb.weights import WeightPerturbation

RowLoss = Callable[[slice], Tensor]


@dataclass(frozen=True)
class msam(Perturbation):  # noqa: N801 - a constructor of the library's surface, like rf.sam
    """mSAM: perturb for each chunk of ``chunk`` rows separately and average the gradients.

    m-sharpness as in Foret et al. 2021, section 4.1, in one process: the chunks run one after
    another. (Under DistributedDataParallel every process perturbs for its own rows already, so m
    is the smaller of ``chunk`` and the rows of one process.) A last, smaller chunk counts by its
    rows. Other meanings of the name: see ``docs/conventions.md``. One chunk of the whole batch is
    ``inner``.

    Passes: those of ``inner``.
    Source: Foret et al. 2021, section 4.1; Andriushchenko & Flammarion 2022.

    Args:
        inner: the perturbation of each chunk, such as ``sam(rho)``.
        chunk: rows in a chunk, m.

    Raises:
        ValueError: if ``chunk`` is below 1, or ``inner`` cannot work on the parts of a batch.
    """

    inner: WeightPerturbation
    chunk: Count

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"msam needs chunk >= 1 rows, got {self.chunk}.")
        inner = self.inner
        single = isinstance(inner, WeightPerturbation)
        reasons = {
            "is a wrapper already": not single,
            f"climbs {inner.batches} batches at once": inner.batches > 1,
            "remembers one perturbation a step, and every chunk makes one": inner.remembers,
            "climbs the loss of all processes (sync='global')": single and inner.sync == "global",
        }
        for reason, holds in reasons.items():
            if holds:
                raise ValueError(
                    f"msam splits one batch, and {inner.name} {reason}: the two contradict each "
                    "other. Use one of them."
                )
        object.__setattr__(self, "name", f"msam-{inner.name}")
        object.__setattr__(self, "parameters", inner.parameters)

    @property
    def is_off(self) -> bool:
        """Whether nothing is perturbed."""
        return self.inner.is_off

    @property
    def wants_rows(self) -> bool:
        """Whether the closure must return one loss a row."""
        return self.inner.wants_rows

    @property
    def passes(self) -> int:
        """Forward and backward passes over the whole batch in one step."""
        return self.inner.passes

    @property
    def splits(self) -> bool:
        """Every chunk has perturbed weights of its own."""
        return True

    @property
    def least_rows(self) -> int:
        """A chunk is part of the batch."""
        return self.chunk

    def scaled(self, factor: float) -> msam:
        """The same with ``factor`` times the radius."""
        return replace(self, inner=self.inner.scaled(factor))

    def synchronised(self, sync: Sync) -> msam:
        """The same with another ``sync``; only "local" goes with chunks."""
        return replace(self, inner=self.inner.synchronised(sync))

    def backward(
        self,
        loss: RowLoss,
        model: nn.Module,
        *,
        rows: int | None = None,
        generator: torch.Generator | None = None,
        scaler: torch.amp.GradScaler | None = None,
        step: Callable[[], object] | None = None,
    ) -> Tensor:
        """Add the mean of the chunks' gradients to ``.grad``; the weights are untouched.

        Args:
            loss: maps a slice of the batch's rows to their mean loss.
            model: holds the parameters.
            rows: rows in the batch. If None, taken from the first tensor that ``loss`` indexes
                with the first slice it is given, which slows that one call down.
            generator: as in :meth:`WeightPerturbation.backward`.
            scaler: as there.
            step: must be None: every chunk has perturbed weights of its own.

        Returns:
            The mean loss at the chunks' perturbed weights, a detached scalar.

        Raises:
            ValueError: if the chunk is larger than the batch, the batch cannot be seen, or
                ``step`` is given.
        """
        if step is not None:
            raise ValueError(
                "msam gives every chunk of the batch its own perturbed weights, so no step can be "
                "taken at them. Leave `step` out."
            )
        closure = loss
        if rows is None:
            closure = seen = _SeeRows(loss)
        parameters = [p for p in model.parameters() if p.requires_grad]
        totals: dict[nn.Parameter, Tensor] = {}
        values: list[Tensor] = []
        start = 0
        with gradients.set_aside(model):
            with gradients.unsynchronised(model):
                while rows is None or start < rows:
                    chunk = slice(start, start + self.chunk)
                    value = self.inner.backward(
                        lambda chunk=chunk: closure(chunk),
                        model,
                        generator=generator,
                        scaler=scaler,
                    )
                    rows = self._checked(rows if rows is not None else seen.rows)
                    share = (min(chunk.stop, rows) - start) / rows
                    values.append(value * share)
                    for parameter in parameters:
                        if parameter.grad is not None:
                            part = parameter.grad * share
                            totals[parameter] = (
                                part.add_(totals[parameter]) if parameter in totals else part
                            )
                            parameter.grad = None
                    start = chunk.stop
            for parameter in parameters:
                parameter.grad = totals.get(parameter)
        if gradients.synchronises(model):
            gradients.average_grads(model)
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


class _SeeRows:
    """A loss that, the first time it is called, notes how many rows its slice is taken from."""

    def __init__(self, loss: RowLoss) -> None:
        self._loss = loss
        self._called = False
        self.rows: int | None = None

    def __call__(self, rows: slice) -> Tensor:
        look = nullcontext() if self._called else _Indexing(rows, self._note)
        self._called = True
        with look:
            return self._loss(rows)

    def _note(self, rows: int) -> None:
        self.rows = rows if self.rows is None else self.rows


class _Indexing(TorchFunctionMode):
    """Tells the length of tensors that are indexed with one particular slice."""

    def __init__(self, rows: slice, tell: Callable[[int], None]) -> None:
        super().__init__()
        self._slice, self._tell = rows, tell

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if index and index[0] is self._slice:
                self._tell(args[0].shape[0])
        return func(*args, **(kwargs or {}))
