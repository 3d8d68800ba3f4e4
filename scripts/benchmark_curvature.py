"""The largest Hessian eigenvalue, by robustflat and by others: value, seconds and products of each.

Two networks on real digits, in float32 on one thread, with an uneven last batch; all solvers take
turns for some rounds. Each is asked for the tolerance 1e-4 where it takes one. The reference is
SciPy's eigsh to 1e-9 on the float64 Hessian. Peers that are not installed are left out: pip install
curvlinops-for-pytorch pyhessian hessian-eigenthings.

    python scripts/benchmark_curvature.py
    python scripts/benchmark_curvature.py --weights 85002 --rounds 5
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.datasets import load_digits
from torch import Tensor, nn

from robustflat import models
from robustflat.flatness import flatness
from robustflat.flatness.spectrum import basis_of

TOLERANCE, MOST = 1e-4, 100
Batches = list[tuple[Tensor, Tensor]]
# Its eigenvalue, and the products that it took.
Found = tuple[float, int]
# By the number of weights: the model, its options, the images and the size of batches.
NETWORKS: dict[int, tuple[str, dict[str, Any], int, int]] = {
    85_002: ("mlp", {"hidden": [256, 256]}, 300, 128),
    2_796_138: ("preact_resnet18", {"width": 32}, 128, 50),
}


def main() -> None:
    """Print a table for each network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=int, choices=NETWORKS, help="of one network alone")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for weights in [asked.weights] if asked.weights else NETWORKS:
        compare(weights, asked.rounds)


def compare(weights: int, rounds: int) -> None:
    """Let all solvers take turns on one network, and print what they found."""
    name, options, count, size = NETWORKS[weights]
    digits = load_digits()
    x = torch.tensor(digits.images[:count], dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target[:count])
    model = trained(name, options, x, y)
    batches = list(zip(x.split(size), y.split(size), strict=True))
    exact = reference(model, batches)
    found: dict[str, Found] = {}
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for solver, solve in solvers(model, x, y, size).items():
            began = time.perf_counter()
            found[solver] = solve()
            seconds.setdefault(solver, []).append(time.perf_counter() - began)
    mine = seconds["robustflat"]
    print(f"\n{name} of {weights:,} weights, {count} images in batches of {size}: {exact:.6g}")
    print("| solver | value off by | products | seconds | of ours | seconds a product |")
    print("|---|---|---|---|---|---|")
    for solver, (value, products) in found.items():
        taken = statistics.median(seconds[solver])
        ratio = statistics.median(t / own for t, own in zip(seconds[solver], mine, strict=True))
        off = abs(value / exact - 1)
        print(
            f"| {solver} | {off:.0e} | {products} | {taken:.2f} | {ratio:.2f} "
            f"| {taken / products:.3f} |"
        )
    sys.stdout.flush()


def solvers(model: nn.Module, x: Tensor, y: Tensor, size: int) -> dict[str, Callable[[], Found]]:
    """Every solver that is installed, on the mean loss of all images."""
    batches = list(zip(x.split(size), y.split(size), strict=True))

    def ours() -> Found:
        figure = flatness(
            model, (x, y), ["hessian_max"], batch_size=size, tolerance=TOLERANCE, max_hvps=MOST
        )["hessian_max"]
        return figure.value, figure.details["products"]

    found: dict[str, Callable[[], Found]] = {"robustflat": ours}
    with suppress(ImportError):
        import curvlinops  # noqa: F401

        found["eigsh on curvlinops, as many vectors"] = lambda: by_scipy(
            model, batches, basis_of(1, "top")
        )
        found["eigsh on curvlinops"] = lambda: by_scipy(model, batches, None)
    with suppress(ImportError):
        import pyhessian  # type: ignore[import-not-found,unused-ignore]  # noqa: F401

        found["pyhessian"] = lambda: by_pyhessian(model, batches)
    with suppress(ImportError):
        import hessian_eigenthings  # type: ignore[import-not-found,unused-ignore]  # noqa: F401

        found["hessian-eigenthings"] = lambda: by_eigenthings(model, batches)
    return found


def by_scipy(
    model: nn.Module, batches: Batches, vectors: int | None, tolerance: float = TOLERANCE
) -> Found:
    """SciPy's Lanczos (ARPACK, on the host) over curvlinops' operator."""
    from curvlinops import HessianLinearOperator

    operator = HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), batches,
        check_deterministic=False,
    ).to_scipy()  # fmt: skip
    products = 0

    def times(vector: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return operator @ vector

    counted = LinearOperator(operator.shape, matvec=times, dtype=operator.dtype)
    values = eigsh(
        counted, k=1, which="LA", tol=tolerance, ncv=vectors, return_eigenvectors=False, rng=0
    )
    return float(values[0]), products


def by_pyhessian(model: nn.Module, batches: Batches) -> Found:
    """Power iteration until two values in a row are alike to the tolerance."""
    import pyhessian

    torch.manual_seed(0)
    hessian = pyhessian.hessian(model, nn.CrossEntropyLoss(), dataloader=batches, cuda=False)
    product, products = hessian.dataloader_hv_product, 0

    def times(vector: list[Tensor]) -> tuple[float, list[Tensor]]:
        nonlocal products
        products += 1
        result: tuple[float, list[Tensor]] = product(vector)
        return result

    hessian.dataloader_hv_product = times
    (value,), _ = hessian.eigenvalues(maxIter=MOST, tol=TOLERANCE, top_n=1)
    model.zero_grad()
    return float(value), products


def by_eigenthings(model: nn.Module, batches: Batches, steps: int = 20) -> Found:
    """Lanczos of a number of steps that is said beforehand."""
    import hessian_eigenthings as things

    operator = things.HessianOperator(model, batches, things.supervised_loss(F.cross_entropy))
    result = things.lanczos(operator, k=1, max_iter=steps, which="LA", seed=0)
    return float(result.eigenvalues[0]), result.iterations


def reference(model: nn.Module, batches: Batches) -> float:
    """The eigenvalue of the float64 Hessian."""
    double = copy.deepcopy(model).double()
    return by_scipy(double, [(x.double(), y) for x, y in batches], 20, 1e-9)[0]


def trained(name: str, options: dict[str, Any], x: Tensor, y: Tensor) -> nn.Module:
    """A network that has learned the digits in part."""
    torch.manual_seed(0)
    model = models.build(
        name, num_classes=10, in_channels=1, mean=(0.3,), std=(0.4,), image_size=(8, 8),
        options=options,
    ).train()  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(3):
        for rows in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    model.zero_grad(set_to_none=True)
    return model.eval()


if __name__ == "__main__":
    main()
