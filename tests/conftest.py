"""One thread, fixed seeds and reproducible examples for every test."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("robustflat", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("robustflat")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
