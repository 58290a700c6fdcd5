"""What prolora writes for diffusers, read by diffusers' own pipelines: nothing lost, same ΔW.

`lora_state_dict` is what `load_lora_weights` calls first; `test_peft_injection` has the rest of its
way. The pipelines need no model for it.
"""

from __future__ import annotations

import pytest
import torch
from diagonal import mark_size
from family_loras import make_updates, measure_difference
from loader_programs.diffusers import DIFFUSERS_PIPELINES
from lora_files import adapter_for, factors
from published_models import PUBLISHED
from published_unets import UNETS

import prolora
from prolora import LowRank
from prolora.architectures.families import known_families
from prolora.architectures.layouts import load_layout
from prolora.architectures.loaders import find_reach, name_row

diffusers = pytest.importorskip("diffusers")
from diffusers.configuration_utils import FrozenDict  # noqa: E402
from diffusers.utils import convert_unet_state_dict_to_peft  # noqa: E402

FAMILIES = known_families()
CASES = [
    pytest.param(id_, layout, format, marks=mark_size(layout))
    for id_, family in FAMILIES.items()
    for layout in family.layouts
    for format, spelling in family.spellings.items()
    if find_reach(family, name_row(family, format, spelling), load_layout(layout).adapted).get(
        "diffusers"
    )
    == "whole"
    if layout in UNETS or not family.unet or layout in PUBLISHED
]


def write(id_, updates, format):
    """The tensors of a family's LoRA, as prolora writes them."""
    adapter = adapter_for(id_, updates)
    return prolora.convert(adapter, format=format, dtype="float32").state_dict()


def read_by_diffusers(id_, layout, tensors):
    """Canonical module -> update, as the pipeline of the family reads the tensors."""
    pipeline = getattr(diffusers, DIFFUSERS_PIPELINES[id_], None)
    if pipeline is None:
        pytest.skip(f"this diffusers has no {DIFFUSERS_PIPELINES[id_]}")
    config, prefix = {}, "transformer."
    if FAMILIES[id_].unet:
        config, prefix = {"unet_config": make_config(layout)}, "unet."
    state = pipeline.lora_state_dict(dict(tensors), **config)
    state, alphas = state if isinstance(state, tuple) else (state, None)
    if FAMILIES[id_].unet:
        state = convert_unet_state_dict_to_peft(state)  # as `load_lora_adapter` does
    modules = {}
    for key, tensor in state.items():
        key = key.replace("text_conditioner.", "transformer.llm_adapter.")
        assert key.startswith(prefix), key
        path, _, suffix = key.removeprefix(prefix).partition(".lora")
        end = suffix.removesuffix(".weight").lstrip("._")
        modules.setdefault(path, {})[{"A": "down", "B": "up"}.get(end, end)] = tensor
    updates = {}
    for path, given in modules.items():
        assert given.keys() == {"down", "up"}, path
        alpha = (alphas or {}).get(f"{prefix}{path}.alpha", given["down"].shape[0])
        up, down = given["up"].flatten(1), given["down"].flatten(1)
        updates[path] = LowRank(up * (float(alpha) / len(down)), down)
    return updates


def make_config(layout):
    """The configuration of a published UNet, as the pipeline gives it to the reader."""
    config = {**UNETS, **PUBLISHED}[layout].config
    return FrozenDict({"layers_per_block": 2, "down_block_types": [""] * 4, **config})


@pytest.mark.parametrize(("id_", "layout", "format"), CASES)
def test_a_pipeline_of_diffusers_reads_every_module_with_the_same_update(id_, layout, format):
    """Of those that the table of loaders says it reads."""
    family = FAMILIES[id_]
    row = name_row(family, format, family.spellings[format])

    def is_read(module):
        return find_reach(family, row, [module]).get("diffusers") == "whole"

    updates = make_updates(layout, is_read)
    read = read_by_diffusers(id_, layout, write(id_, updates, format))
    assert read.keys() == updates.keys()
    for name, update in updates.items():
        assert measure_difference(read[name], update) < 1e-6, name


@pytest.mark.parametrize(
    ("id_", "layout", "format"),
    [("chroma", "chroma", "kohya"), ("wan", "wan2.1-vace-14b", "comfy")],
)
def test_what_a_reader_of_diffusers_stopped_at_still_stops_it(id_, layout, format):
    """Where this fails, diffusers has learned it, and the table is to be made again."""
    written = write(id_, make_updates(layout), format)
    with pytest.raises(ValueError, match=r"Incompatible keys|should be empty"):
        read_by_diffusers(id_, layout, written)


@pytest.mark.parametrize("format", ["comfy", "diffusers"])
@pytest.mark.parametrize("ranks", [(2, 2), (2, 3)])  # of several, a file tells in its header
def test_anima_s_adapter_of_text_reaches_the_model_that_diffusers_makes_of_it(
    format, ranks, tmp_path
):
    names = ["transformer_blocks.0.attn1.to_q", "llm_adapter.blocks.0.cross_attn.q_proj"]
    names += ["llm_adapter.blocks.1.mlp.0", "llm_adapter.out_proj"]
    sizes = {"source_dim": 8, "target_dim": 8, "model_dim": 8}
    model = diffusers.AnimaTextConditioner(**sizes, num_layers=2, num_attention_heads=2)
    layers, updates = dict(model.named_modules()), {}
    for i, name in enumerate(names):
        layer = layers.get(name.removeprefix("llm_adapter."))
        shape = layer.weight.shape if layer else (2048, 2048)
        updates[name] = LowRank(*factors(shape, ranks[i % 2], i))
    path, adapter = tmp_path / "anima.safetensors", adapter_for("cosmos", updates)
    prolora.convert(adapter, out=path, format=format, dtype="float32")
    back = prolora.convert(path)
    assert back.adapter.updates.keys() == updates.keys() and not back.report.left_out
    pipeline = diffusers.AnimaModularPipeline
    state, metadata = pipeline.lora_state_dict(path, return_lora_metadata=True)
    assert {key.split(".")[0] for key in state} == {"transformer", "text_conditioner"}
    assert (metadata is not None) == (format == "diffusers" and len({*ranks}) > 1)
    pipeline.load_lora_into_text_conditioner(state, model, metadata=metadata)
    for name in names[1:]:
        layer = model.get_submodule(name.removeprefix("llm_adapter."))
        added = layer.get_delta_weight("default_0")
        assert torch.allclose(added, updates[name].dense(), atol=1e-5), name


@pytest.mark.parametrize(("format", "right"), [("comfy", False), ("diffusers", True)])
def test_what_diffusers_reads_with_its_rows_in_another_order_is_not_called_whole(format, right):
    """FLUX.2 by its authors' names: the halves of the last modulation are not swapped."""
    last, update = "norm_out.linear", LowRank(torch.arange(24.0)[:, None], torch.ones(1, 12))
    read = read_by_diffusers("flux2", "flux2-dev", write("flux2", {last: update}, format))
    assert torch.equal(read[last].dense(), update.dense()) == right
    lora = write("flux2", {last: LowRank(torch.ones(12288, 1), torch.ones(1, 6144))}, format)
    usual = write("flux2", make_updates("flux2-dev"), format)
    for tensors, fallen in ((lora, "none"), (lora | usual, "part")):
        checked = prolora.check(prolora.Lora.open(tensors, {"ss_base_model_version": "flux2"}))
        assert "diffusers" in getattr(checked.readers, "whole" if right else fallen)
