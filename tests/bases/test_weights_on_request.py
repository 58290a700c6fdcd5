"""`open_base(read=)`: what its owner returns is checked like a file."""

import pytest
import torch
from mini import lora_tensors, source_weights

import prolora
from prolora.bases import open_base
from prolora.errors import ShapeMismatch, UnsupportedFormat, UnsupportedTensor

WEIGHTS = {f"{name}.weight": weight for name, weight in source_weights().items()}
SHAPES = {name: tuple(weight.shape) for name, weight in WEIGHTS.items()}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda x: x.to_sparse(), "is sparse_coo"),
        (lambda x: x.to("meta"), "is on the meta device"),
        (lambda x: x.to(torch.complex64) + 1j, "is torch.complex64"),
        (lambda x: x.mul(9).int(), "is torch.int32"),
        (lambda x: x > 0, "is torch.bool"),
    ],
)
def test_returned_weight_of_another_kind_is_refused(spoil, words):
    base = open_base(SHAPES, read=lambda name: spoil(WEIGHTS[name]))
    with pytest.raises(UnsupportedTensor, match=rf"the base:\S+attn1.to_q.weight {words}"):
        prolora.transfer(lora_tensors(), base, WEIGHTS, method="prolora")


def test_returned_weight_of_another_shape_is_refused():
    base = open_base(SHAPES, read=lambda name: WEIGHTS[name][:-1])
    with pytest.raises(ShapeMismatch, match=r"`read` returned \[\d+, 24\], not"):
        prolora.transfer(lora_tensors(), base, WEIGHTS, method="prolora")


@pytest.mark.parametrize("key", [1, ("a",)])
def test_name_that_is_no_text_is_refused(key):
    with pytest.raises(UnsupportedFormat, match=r"is no name of a weight"):
        open_base({key: torch.ones(3, 3)})
    with pytest.raises(UnsupportedFormat, match=r"is no name of a weight"):
        open_base({key: (3, 3)}, read=WEIGHTS.__getitem__)
    with pytest.raises(UnsupportedFormat, match="names and arrays only"):
        prolora.convert({key: torch.ones(3, 3)})


def test_sparse_weight_in_a_mapping_is_refused():
    with pytest.raises(UnsupportedTensor, match="is sparse_coo"):
        open_base({name: weight.to_sparse() for name, weight in WEIGHTS.items()})
