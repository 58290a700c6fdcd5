"""CuPy: arrays on a GPU in, arrays on the same GPU out; nothing is copied to the CPU."""

import cupy

from prolora.core import project


def move_update(up, down, source, target):
    """up [out, rank], down [rank, in] and both weights [out, in] are cupy.ndarray on one GPU.

    They are read in place, by their device pointers; so is the result, (up, down).
    """
    moved = project((up, down), source, target, rank=0.99, method="prolora")
    return [cupy.asarray(factor) for factor in moved]
