"""Owns one run of a study in a process of its own: claimed, trained, attacked, measured.

Started as ``python -m robustflat.study.worker RUNS/NAME.job.json``.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from robustflat.config import RunConfig, check_config
from robustflat.errors import UserError
from robustflat.files import write_json
from robustflat.runs.evaluation import Wanted, evaluate_subject
from robustflat.runs.flatness import measure_subject
from robustflat.study.claims import Heartbeat, release, take
from robustflat.study.ending import CLAIMED, DONE, FAILED, STOPPED
from robustflat.study.folder import RunFiles, begun, read_json
from robustflat.subject import open_subject
from robustflat.train import TrainingDivergedError, train


def work(job: Path) -> int:
    """Do what a job file says, unless another process is at it. Returns the exit code.

    Training goes on from the last checkpoint, attacks and measurements from their saved parts, so
    that a worker that was killed is simply started again.
    """
    files = RunFiles.of_job(job)
    owner = take(files.lock)
    if owner is None:
        return CLAIMED
    try:
        with Heartbeat(files.lock, owner, _leave):
            return DONE if _run(files) else STOPPED
    except (UserError, TrainingDivergedError) as error:
        _say(str(error))
        files.fail(str(error))
    except Exception as error:
        _say(traceback.format_exc())
        files.fail(f"{type(error).__name__}: {error}. The traceback is in {files.log}.")
    finally:
        release(files.lock, owner)
    return FAILED


def _run(files: RunFiles) -> bool:
    """Train and measure. Returns False if a SIGTERM stopped the training."""
    began = time.monotonic()
    job = read_json(files.job)
    if job is None:
        raise UserError(f"{files.job} is no job of a study. Repeat `robustflat study`.")
    config: RunConfig = check_config(job["config"], source=str(files.job))
    files.failure.unlink(missing_ok=True)
    if files.folder.root.exists() and not begun(files.folder):
        shutil.rmtree(files.folder.root)
    _say(f"training {config.name}")
    _, finished = train(config, resume=True)
    if not finished:
        _say("stopped and saved")
        return False
    subject = open_subject(files.folder.root, device=config.device)
    _say(f"attacking with {', '.join(job['attacks'])}")
    wanted = Wanted(attacks=job["attacks"], checkpoints=subject.checkpoints[:1])
    evaluation = evaluate_subject(subject, wanted)
    _say(f"measuring {', '.join(job['measures'])}")
    flatness = measure_subject(subject, job["measures"])
    write_json(files.measured, _summary(job, evaluation, flatness, time.monotonic() - began))
    _say("done")
    return True


def _summary(
    job: dict[str, Any], evaluation: dict[str, Any], flatness: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """What the study needs to know of a run: all of it at the last checkpoint."""
    last = evaluation["checkpoints"]["last"]
    tested = [entry["test"] for entry in evaluation["checkpoints"].values() if entry["test"]]
    return {
        "run": evaluation["run"],
        "epoch": flatness["epoch"],
        "weights": flatness["weights"],
        "norm": evaluation["norm"],
        "eps": evaluation["eps"],
        "attacks": list(job["attacks"]),
        "test": {name: attack["alone"] for name, attack in tested[0]["attacks"].items()},
        "gap_attack": evaluation["gap_attack"],
        "gap": last["gap"]["gaps"]["train-test"],
        "splits": last["gap"]["splits"],
        "flatness_samples": flatness["samples"],
        "measures": {
            name: {"value": figure["value"], "standard_error": figure["standard_error"]}
            for name, figure in flatness["measures"].items()
        },
        "seconds": seconds,
    }


def _leave(why: str) -> None:
    """Stop at once, touching nothing more: checkpoints and parts are whole at any moment."""
    _say(f"leaving, for {why}")
    os._exit(STOPPED)


def _say(text: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()


def _stop(signum: int, frame: FrameType | None) -> None:
    # Outside of the training, which saves first, a SIGTERM ends the process as an exception does.
    sys.exit(STOPPED)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(work(Path(sys.argv[1])))
