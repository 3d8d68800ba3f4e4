"""Studies: a grid of runs, and how well each flatness measure ranks their robust gaps."""

from robustflat.study.reading import read_study
from robustflat.study.result import StudyResult
from robustflat.study.run import run_study
from robustflat.study.schedule import Event
from robustflat.study.schema import StudyConfig

__all__ = ["Event", "StudyConfig", "StudyResult", "read_study", "run_study"]
