"""The report that a GPU is asked for runs, at a tiny size, on the CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from train_support import python

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import gpu_report  # type: ignore[import-not-found]


def test_the_report_is_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    said = "--device cpu --batch 4 --images 2 --rounds 1 --width 1 --networks preact_resnet18"
    said += " --settings fp32 bf16+channels_last"
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", *said.split(), "--output", str(output)])
    gpu_report.main()
    report = json.loads(output.read_text())
    assert [row["setting"] for row in report["steps"]] == ["fp32", "bf16+channels_last"]
    for row in report["steps"]:
        assert set(row["seconds"]) == {"to_images", "to_weights", "step", "step_awp"}
        assert row["seconds"]["step"] > row["seconds"]["to_weights"] > 0
        bare = 10 * row["seconds"]["to_images"] + row["seconds"]["to_weights"]
        assert row["over"] == pytest.approx(row["seconds"]["step"] / bare - 1)
    assert report["autoattack"]["images_per_second"] > 0


def test_the_networks_are_those_they_are_called() -> None:
    count = {
        name: sum(p.numel() for p in gpu_report.network(name, None).parameters())
        for name in gpu_report.NETWORKS
    }
    # The released ones have 11.17 and 46.16 million weights.
    assert count == {"preact_resnet18": 11_172_170, "wrn-34-10": 46_160_474}
    narrow = gpu_report.network("wrn-34-10", 1)
    assert sum(p.numel() for p in narrow.parameters()) < 500_000


def test_the_report_needs_no_packages_beside_torch_numpy_and_scipy() -> None:
    others = ["pydantic", "yaml", "typer", "rich", "pyautoattack", "sklearn", "matplotlib"]
    others += ["tensorboard", "torchvision"]
    hide = f"import sys; sys.modules.update(dict.fromkeys({others}))"
    run = f"sys.path.insert(0, {gpu_report.__file__.rpartition('/')[0]!r}); import gpu_report"
    process = python("-c", f"{hide}; {run}; from robustflat.evaluate import evaluation")
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0
