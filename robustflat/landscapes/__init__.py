"""The loss around a model's weights, or between models: drawn on a grid, kept, read again."""

from robustflat.landscapes.draw import between, landscape
from robustflat.landscapes.record import Landscape, drawn_in
from robustflat.landscapes.scene import Common

__all__ = ["Common", "Landscape", "between", "drawn_in", "landscape"]
