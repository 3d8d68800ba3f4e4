"""Measures of complexity: what the literature ranks generalization by beside sharpness."""

from robustflat.flatness.complexity.table import COMPLEXITY, Complexity

__all__ = ["COMPLEXITY", "Complexity"]
