"""Compare traces and sharpness, and their cost, with other packages, in one run on one thread.

Eigenvalues are compared by benchmark_curvature.py.

Each line is a figure by robustflat and by a peer, on the same float64 model and images, with the
exact value of the full Hessian, and the ratio of the peer's time to ours. Peers that are not
installed are left out: pip install curvlinops-for-pytorch pyhessian hessian-eigenthings.

    python scripts/benchmark_flatness.py
"""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call

from robustflat.flatness import flatness

PROBES = 60
RADIUS, STEPS = 0.05, 10
# 300 examples in batches of 128: the last is smaller, which some packages weigh wrongly.
EXAMPLES, BATCH = 300, 128


def main() -> None:
    """Print the comparison."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    digits = load_digits()
    x = torch.tensor(digits.images[:EXAMPLES])[:, None] / 16
    y = torch.tensor(digits.target[:EXAMPLES])
    model = _trained(x, y)
    batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    exact = _hessian(model, x, y)
    values = torch.linalg.eigvalsh(exact)
    print(f"{len(exact)} weights, {EXAMPLES} examples in batches of {BATCH}, one thread, float64")
    _lines("hessian_trace", float(values.sum()), model, x, y, _trace_peers(model, batches))
    sharp: dict[str, Callable[[], float]] = {"plain loop": lambda: _worst(model, batches)}
    _lines("worst_clean", None, model, x, y, sharp)


def _lines(
    measure: str,
    exact: float | None,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    peers: dict[str, Callable[[], float]],
) -> None:
    options: dict[str, Any] = {"batch_size": BATCH, "probes": PROBES}
    if measure == "worst_clean":
        options |= {"ball": "global", "radius": RADIUS, "parameters": "all"}
        options |= {"steps": STEPS, "restarts": 1}
    known = "" if exact is None else f"exact {exact:.6g}"
    print(f"\n{measure} {known}")

    def ours() -> float:
        return flatness(model, (x, y), [measure], **options)[measure].value

    value, mine = _timed(ours)
    print(f"  {'robustflat':22s} {value:12.6g} {_error(value, exact)} {mine:7.2f} s")
    for name, call in peers.items():
        try:
            value, seconds = _timed(call)
        except Exception as error:  # a peer's failure is a finding
            print(f"  {name:22s} failed: {type(error).__name__}: {error}")
            continue
        ratio = seconds / mine
        print(f"  {name:22s} {value:12.6g} {_error(value, exact)} {seconds:7.2f} s, x{ratio:.2f}")


def _timed(call: Callable[[], float]) -> tuple[float, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        call()
        start = time.perf_counter()
        value = call()
    return value, time.perf_counter() - start


def _error(value: float, exact: float | None) -> str:
    return "" if exact is None else f"(off by {abs(value / exact - 1):.1e})"


def _trace_peers(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]]
) -> dict[str, Callable[[], float]]:
    peers: dict[str, Callable[[], float]] = {}
    with contextlib.suppress(ImportError):
        from curvlinops import HessianLinearOperator, hutchinson_trace

        def by_curvlinops() -> float:
            weights = list(model.parameters())
            operator = HessianLinearOperator(model, nn.CrossEntropyLoss(), weights, batches)
            return float(hutchinson_trace(operator, PROBES))

        peers["curvlinops"] = by_curvlinops
    with contextlib.suppress(ImportError):
        import numpy as np
        import pyhessian  # type: ignore[import-not-found,unused-ignore]

        peers["pyhessian"] = lambda: float(
            np.mean(
                pyhessian.hessian(model, nn.CrossEntropyLoss(), dataloader=batches, cuda=False)
                .trace(maxIter=PROBES, tol=0.0)
            )
        )  # fmt: skip
    with contextlib.suppress(ImportError):
        import hessian_eigenthings as things  # type: ignore[import-not-found,unused-ignore]

        peers["hessian-eigenthings"] = lambda: float(
            things.hutchinson(_things_operator(model, batches), num_samples=PROBES, seed=0).estimate
        )
    return peers


def _things_operator(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Any:
    import hessian_eigenthings as things  # type: ignore[import-not-found,unused-ignore]

    return things.HessianOperator(model, batches, things.supervised_loss(F.cross_entropy))


def _worst(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Worst-direction sharpness as papers' scripts have it: normalised steps, then projection."""
    parameters = list(model.parameters())
    centre = [p.detach().clone() for p in parameters]
    total = sum(len(y) for _, y in batches)

    def loss_and_gradient() -> tuple[float, list[Tensor]]:
        loss, gradient = 0.0, [torch.zeros_like(p) for p in parameters]
        for x, y in batches:
            part = F.cross_entropy(model(x), y, reduction="sum") / total
            for g, new in zip(gradient, torch.autograd.grad(part, parameters), strict=True):
                g.add_(new)
            loss += part.item()
        return loss, gradient

    start, gradient = loss_and_gradient()
    best = 0.0
    for _ in range(STEPS + 1):
        length = torch.stack([g.norm() for g in gradient]).norm()
        with torch.no_grad():
            for p, g in zip(parameters, gradient, strict=True):
                p.add_(RADIUS * g / length)
            far = [p - c for p, c in zip(parameters, centre, strict=True)]
            excess = max(float(torch.stack([v.norm() for v in far]).norm()) / RADIUS, 1.0)
            for p, c, v in zip(parameters, centre, far, strict=True):
                p.copy_(c + v / excess)
        loss, gradient = loss_and_gradient()
        best = max(best, loss - start)
    with torch.no_grad():
        for p, c in zip(parameters, centre, strict=True):
            p.copy_(c)
    return best


def _trained(x: Tensor, y: Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 12, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 10),
    ).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(15):
        for rows in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    model.zero_grad()
    return model.eval()


def _hessian(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    named = dict(model.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = torch.split(flat, sizes)
        values = {k: v.view(p.shape) for (k, p), v in zip(named.items(), parts, strict=True)}
        return F.cross_entropy(functional_call(model, values, (x,)), y)

    # Row by row: slower than vectorised, but in little memory.
    point = torch.cat([p.detach().flatten() for p in named.values()]).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(point), point, create_graph=True)
    rows = [torch.autograd.grad(g, point, retain_graph=True)[0] for g in gradient]
    return torch.stack(rows)


if __name__ == "__main__":
    main()
