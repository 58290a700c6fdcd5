"""One answer to "which model is it for?", over the headers of all published sizes."""

from __future__ import annotations

import pytest
import torch
from property_examples import AT_NIGHT

from prolora import Adapter, Lora, LowRank, check
from prolora.adapters import outline_adapter
from prolora.adapters.formats.groups import lay_out
from prolora.adapters.fused_updates import fused_height
from prolora.adapters.keys.tensor_keys import StoredTensor
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
        out, inputs = next(iter(group.parts.values())).shape
        out = fused_height(group.matrix, group.parts) if group.matrix else out
        headers[f"{group.path}.{up}.weight"] = (out, 4)
        headers[f"{group.path}.{down}.weight"] = (4, inputs)
    tensors = {key: StoredTensor.of(key, "F16", shape) for key, shape in headers.items()}
    return Lora("x", tensors, lambda key: torch.ones(headers[key]), {})


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
    ("family", "size", "picks", "format"), CASES if AT_NIGHT else CASES[::37], ids=name_case
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


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("anima-2.9b", "✔ diffusers applies all of it"),
        ("cosmos-predict2-14b", "✖ diffusers reads nothing of it"),
        ("cosmos-predict2-2b", "⚠ diffusers (as Anima) applies all of it; as another model's"),
    ],
)
def test_a_program_is_asked_for_each_size_that_it_loads_by_different_code(size, said):
    lora = make_header("cosmos", size, is_attention, "comfy")
    assert str(check_tensors(lora, "diffusers")).startswith(said)


@pytest.mark.parametrize(
    ("start", "said"), [("lora_te", "✔ ComfyUI applies all"), ("lora_te1", "⚠ ComfyUI applies its")]
)
def test_a_text_encoder_is_read_under_the_names_that_were_tried(start, said):
    headers = {f"{start}_layers_0_self_attn_q_proj": (2048, 1024)}
    headers["lora_unet_llm_adapter_blocks_0_self_attn_q_proj"] = (1024, 1024)
    shapes = {f"{path}.lora_up.weight": (out, 4) for path, (out, _) in headers.items()}
    shapes |= {f"{path}.lora_down.weight": (4, inputs) for path, (_, inputs) in headers.items()}
    shapes |= {f"{path}.alpha": () for path in headers}
    tensors = {key: torch.ones(shape) for key, shape in shapes.items()}
    assert str(check(tensors, program="comfyui")).startswith(said)


def test_whole_differences_are_read_where_a_program_was_tried_with_them():
    """ComfyUI's own loader took all of them; diffusers' takes none."""
    one = torch.ones(1, 1)
    tensors = {
        f"diffusion_model.blocks.{number}.self_attn.q.diff": one.expand(5120, 5120)
        for number in range(40)
    }
    assert str(check(tensors, program="comfyui")).startswith("✔ ComfyUI applies all of it")
    assert str(check(tensors, program="diffusers")).startswith("✖ diffusers reads nothing of it")
