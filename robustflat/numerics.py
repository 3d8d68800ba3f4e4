"""Owns how numbers are computed: TF32 or full float32, deterministic kernels, emulated bfloat16."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_log = logging.getLogger(__name__)


@contextmanager
def float32(*, tf32: bool = False) -> Iterator[None]:
    """Compute float32 in full float32 on every device; what was set before comes back on exit.

    GPUs since Ampere offer TF32, products of 10 bits in place of 23, and cuDNN's convolutions use
    it unless told not to.

    Args:
        tf32: Allow it, for convolutions and matrix products alike.
    """
    products, convolutions = torch.get_float32_matmul_precision(), _convolutions()
    try:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def _convolutions() -> bool:
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set by the newer API, and not alike for all kinds of layers
        return True


@contextmanager
def deterministic(wanted: bool = True) -> Iterator[None]:
    """Use deterministic kernels where there are any; if not ``wanted``, the fastest ones.

    cuDNN then tries its convolutions out on the first batch of each shape. What was set before
    comes back on exit.
    """
    if not wanted:
        tuned = torch.backends.cudnn.benchmark
        try:
            torch.backends.cudnn.benchmark = True
            yield
        finally:
            torch.backends.cudnn.benchmark = tuned
        return
    # cuBLAS reads it when it is first used; without it its sums depend on what else is running.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
    )
    try:
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = before[2]


def emulates_bfloat16(device: torch.device) -> bool:
    """Whether a device has no bfloat16 arithmetic and computes it by way of float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return not torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and not _cpu_has_bfloat16()


def _cpu_has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def warn_of_emulation(device: torch.device) -> None:
    """Say what bfloat16 costs where it is emulated."""
    if emulates_bfloat16(device):
        _log.warning(
            "bf16 is asked for, but %s only emulates it, which was 15 times slower than fp32 where "
            "it was measured. Use fp32 here.",
            "this processor" if device.type == "cpu" else f"the GPU {device}",
        )
