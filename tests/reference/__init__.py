"""Plain, slow, independent writings-out of the published updates, to hold robustflat against.

Nothing here imports robustflat. Every function is written from the formula of its paper, or from a
description of what the released code does, for plain Python loops over plain tensors.
"""
