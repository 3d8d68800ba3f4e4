"""Measures of complexity: what the literature ranks generalization by beside sharpness."""
