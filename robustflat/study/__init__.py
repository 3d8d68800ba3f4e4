"""Studies: a grid of runs, and which measure ranks their robustness, where, and how surely."""

from robustflat.study.engine import Event
from robustflat.study.reading import read_study
from robustflat.study.result import StudyResult
from robustflat.study.run import run_study, status
from robustflat.study.schema import StudyConfig

__all__ = ["Event", "StudyConfig", "StudyResult", "read_study", "run_study", "status"]
