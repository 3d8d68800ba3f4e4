"""Data sets as splits of uint8 images, their augmentation, and the batches of an epoch."""

from __future__ import annotations

from robustflat.data.augment import Augment
from robustflat.data.corruptions import CORRUPTIONS, corrupted
from robustflat.data.epochs import Extra, batch_count, batches, share
from robustflat.data.extra import load_extra
from robustflat.data.images import FileImages, Images, MemoryImages
from robustflat.data.mix import cutmix, mixup
from robustflat.data.named import DESCRIPTIONS, Data, load
from robustflat.data.noise import LabelNoise
from robustflat.data.seeding import generator_for
from robustflat.data.shards import StoredArray
from robustflat.data.sources import PACKAGED
from robustflat.data.split import balanced, mixed, proportional
from robustflat.data.workers import usual_workers

__all__ = [
    "CORRUPTIONS", "DESCRIPTIONS", "PACKAGED", "Augment", "Data", "Extra", "FileImages",
    "Images", "LabelNoise", "MemoryImages", "StoredArray", "balanced", "batch_count", "batches",
    "corrupted", "cutmix", "generator_for", "load", "load_extra", "mixed", "mixup",
    "proportional", "share", "usual_workers",
]  # fmt: skip
