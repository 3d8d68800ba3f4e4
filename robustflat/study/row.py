"""Owns one run of a study in a process of its own: trained, attacked, measured.

Started as ``python -m robustflat.study.row RUNS/NAME.job.json`` with a pipe as its standard input:
when that closes, because the process that started it is gone, it saves and ends, as at a SIGTERM.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from robustflat.allocator import keep_freed_memory
from robustflat.config import RunConfig, check_config
from robustflat.errors import TrainingDivergedError, UserError
from robustflat.evaluate import Work, evaluate, gap, scores
from robustflat.files import locked, write_json
from robustflat.flatness import Figure, flatness
from robustflat.perturb import pgd
from robustflat.study.folder import RunFiles, circumstances, read_json
from robustflat.study.targets import ATTACKED, figures
from robustflat.subject import Network, Subject, open_subject
from robustflat.train import train
from robustflat.train.setup import build_model, load_data

DONE, FAILED, STOPPED = 0, 1, 3


def work(job: Path) -> int:
    """Do what a job file says. Returns the exit code.

    Training goes on from the last checkpoint, measurements from their saved parts, so that a run
    that was killed is simply started again. Another process that is still at it (its machine may
    only have been cut off) is waited for.
    """
    keep_freed_memory()
    files = RunFiles.of_job(job)
    try:
        with locked(job):
            told = read_json(job)
            if told is None:
                raise UserError(f"{job} is no job of a study. Repeat `robustflat study`.")
            if files.result(told) is not None:
                return DONE
            return DONE if _run(files, told) else STOPPED
    except (UserError, TrainingDivergedError) as error:
        _say(str(error))
    except Exception:
        _say(traceback.format_exc())
    return FAILED


def _run(files: RunFiles, job: dict[str, Any]) -> bool:
    """Train and measure. Returns False if a SIGTERM stopped the training."""
    began = time.monotonic()
    config: RunConfig = check_config(job["config"], source=str(files.job))
    files.failure.unlink(missing_ok=True)
    if files.folder.root.exists() and not files.begun():
        shutil.rmtree(files.folder.root)
    _say(f"training {config.name}")
    _, finished = train(config, resume=True)
    if not finished:
        _say("stopped and saved")
        return False
    subject = open_subject(files.folder.root, device=config.device)
    network = subject.network("last")
    _say(f"attacking with {', '.join([job['attack'], *job['attacks']])}")
    targets, images = _targets(subject, network, job, config)
    _say(f"measuring {', '.join(job['measures'])}")
    measures, passes = _measures(subject, network, job, config)
    rows = files.folder.metrics()
    row = {
        "run": config.name,
        "epoch": network.epoch,
        "weights": network.weights,
        "reached_loss": _reached(config, rows),
        "circumstances": circumstances(job),
        "images": images,
        "targets": targets,
        "measures": measures,
        "passes": passes,
        "train_steps": rows[-1]["steps"],
        "train_seconds": sum(r["seconds"] for r in rows),
        "measure_seconds": time.monotonic() - began,
    }
    write_json(files.row, row)
    _say("done")
    return True


def _reached(config: RunConfig, rows: list[dict[str, Any]]) -> bool | None:
    """Whether training ended at the common loss; None if none was asked for."""
    return None if config.train.stop_at_loss is None else rows[-1]["ended"] == "stop_at_loss"


def _targets(
    subject: Subject, network: Network, job: dict[str, Any], config: RunConfig
) -> tuple[dict[str, dict[str, float | None]], dict[str, int]]:
    """Robustness on training and test images at the last checkpoint."""
    norm, eps = job["threat"]["norm"], job["threat"]["eps"]
    _, steps, *restarts = job["attack"].split("-")
    attack = pgd(norm, eps, int(steps), restarts=int(restarts[0]) if restarts else 1)
    # The job's own: the run's folder may have been made to be evaluated otherwise.
    size = config.evaluate.batch_size
    splits = subject.splits(config.evaluate.gap_samples)
    measured = {
        name: scores(network.model, splits[name].tensors(), attack, batch_size=size)
        for name in ("train", "test")
    }
    found = gap(measured).to_dict()
    targets = figures(found)
    if job["attacks"]:
        result = evaluate(
            network.model,
            splits["test"].tensors(),
            job["attacks"],
            norm,
            eps,
            store=subject.home.root / "attacked",
            work=Work(batch_size=size),
        )
        low, high = result.robust_interval
        targets[ATTACKED] = {"value": result.robust_accuracy, "low": low, "high": high}
    return targets, found["counts"]


def _measures(
    subject: Subject, network: Network, job: dict[str, Any], config: RunConfig
) -> tuple[dict[str, dict[str, Any]], float]:
    """Every measure, or why it could not be taken; and the forward passes that they cost."""
    x, y = subject.tensors("train", config.flatness.samples)
    initial = build_model(config, load_data(config), torch.device("cpu")).state_dict()
    data = (x.to(subject.device), y.to(subject.device))
    found: dict[str, dict[str, Any]] = {}
    passes = 0.0
    try:
        taken = _flatness(subject, network, job, config, job["measures"], data, initial)
    except UserError:
        # One that cannot be taken shall not cost the others; what is finished is in the store.
        taken = {}
    for name in job["measures"]:
        try:
            figure = (
                taken.get(name)
                or _flatness(subject, network, job, config, [name], data, initial)[name]
            )
        except UserError as error:
            _say(f"{name}: {error}")
            found[name] = {"value": None, "standard_error": None, "error": str(error)}
            continue
        whole = figure.to_dict()
        passes += whole["details"]["passes"]["units"]
        found[name] = {"value": whole["value"], "standard_error": whole["standard_error"]}
    return found, passes


def _flatness(
    subject: Subject,
    network: Network,
    job: dict[str, Any],
    config: RunConfig,
    measures: list[str],
    data: tuple[Tensor, Tensor],
    initial: dict[str, Any],
) -> dict[str, Figure]:
    options: dict[str, Any] = {
        "train_size": len(subject.images().train), **config.flatness.options,
    }  # fmt: skip
    figures = flatness(
        network.model,
        data,
        measures,
        job["threat"]["eps"],
        job["threat"]["norm"],
        config.seed,
        batch_size=config.evaluate.batch_size,
        usual_attack=config.flatness.attack,
        initial=initial,
        store=subject.home.root / f"row-{network.epoch}-{len(data[1])}.parts.json",
        **options,
    )
    if len(figures) < len(measures):
        raise UserError(f"Of {', '.join(measures)} two are the same measure, said in two ways.")
    # In the order asked for: a preset with the study's options has these in its name.
    return dict(zip(measures, figures.values(), strict=True))


def _say(text: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()


def _stop(signum: int, frame: FrameType | None) -> None:
    # Outside of the training, which saves first, a SIGTERM ends the process as an exception does.
    sys.exit(STOPPED)


def _end_with_parent() -> None:
    """Wait in a thread for the end of the process that holds the other end of the pipe."""

    def wait() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    _end_with_parent()
    sys.exit(work(Path(sys.argv[1])))
