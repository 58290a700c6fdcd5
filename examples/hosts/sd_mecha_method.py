"""sd-mecha: what training added to one model, projected onto another, weight by weight."""

from sd_mecha import Parameter, Return, merge_method
from torch import Tensor

from prolora.core import project


@merge_method
def add_moved(
    target: Parameter(Tensor),
    source: Parameter(Tensor),
    tuned: Parameter(Tensor),
) -> Return(Tensor):
    if target.ndim < 2 or target.shape != source.shape:
        return target
    return target + project(tuned - source, source, target, rank=0.99, method="prolora")
