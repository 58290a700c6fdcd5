"""One answer to "which model is it for?", over the headers of all published sizes."""

from __future__ import annotations

import pytest
import torch
from property_examples import AT_NIGHT

from prolora.adapters import Adapter, outline_adapter
from prolora.adapters.formats.groups import lay_out
from prolora.adapters.fused_updates import fused_height
from prolora.adapters.keys.tensor_keys import StoredTensor
from prolora.adapters.lora import Lora
from prolora.architectures.families import known_families
from prolora.architectures.identify import Model
from prolora.architectures.layouts import load_layout
from prolora.architectures.modules import (
    is_adaptable,
    is_attention,
    is_in_text_encoder,
    matrix_shape,
)
from prolora.checking.file_facts import check_tensors
from prolora.core.lowrank import LowRank
from prolora.errors import UnsupportedFormat
from prolora.verbs.block_weights import list_lora_blocks

ZERO = torch.zeros(())


def make_header(family: str, size: str, picks, format: str) -> Lora | None:
    """The header of a LoRA of rank 4; None where the format has no names for it."""
    shapes = {m: matrix_shape(s) for m, s in load_layout(size).shapes.items() if len(s) > 1}
    updates = {
        module: LowRank(ZERO.expand(out, 4), ZERO.expand(4, inputs))
        for module, (out, inputs) in shapes.items()
        if picks(module) and not is_in_text_encoder(module)
    }
    try:
        groups = lay_out(Adapter(updates, origin=Model.of(family), format=format), format).groups
    except UnsupportedFormat:
        return None
    up, down = ("lora_up", "lora_down") if format == "kohya" else ("lora_B", "lora_A")
    headers = {}
    for group in groups:
        out, inputs = group.parts[group.modules[0]].shape
        out = fused_height(group.matrix, group.parts) if group.matrix else out
        headers[f"{group.path}.{up}.weight"] = (out, 4)
        headers[f"{group.path}.{down}.weight"] = (4, inputs)
    tensors = {key: StoredTensor.of(key, "F16", shape) for key, shape in headers.items()}
    return Lora("x", tensors, lambda key: torch.zeros(headers[key]), {})


def name_case(value: object) -> str:
    return getattr(value, "__name__", str(value))


CASES = [
    (id_, size, picks, format)
    for id_, family in known_families().items()
    for size in family.layouts
    for picks in (is_adaptable, is_attention)
    for format in family.spellings
    if format != "peft"
]


@pytest.mark.parametrize(
    ("family", "size", "picks", "format"), CASES if AT_NIGHT else CASES[::11], ids=name_case
)
def test_every_place_has_the_same_answer_and_it_has_the_true_family(family, size, picks, format):
    lora = make_header(family, size, picks, format)
    if lora is None:
        raise AssertionError
    adapter = outline_adapter(lora, {}, headers_only=True)
    answer = lora.model.families
    assert family in answer and size in lora.model.sizes
    assert answer == check_tensors(lora).families == adapter.model.families
    blocks = list_lora_blocks(adapter).family
    assert blocks is not None and blocks.id == answer[0]


@pytest.mark.slow
def test_the_true_family_is_alone_for_all_but_a_few_headers():
    """FLUX.1 and Chroma, and some first blocks of others, differ in nothing that a LoRA has."""
    loras = [(case[0], make_header(*case)) for case in CASES]
    answers = [(family, lora.model.families) for family, lora in loras if lora]
    assert len(answers) == 524
    assert all(family in found for family, found in answers)
    assert sum(found == (family,) for family, found in answers) >= 483
