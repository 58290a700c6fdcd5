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
from published_models import PUBLISHED
from published_unets import UNETS

from prolora import Adapter, LowRank
from prolora.adapters import encode_state_dict, read_adapter, write_adapter
from prolora.architectures.families import known_families
from prolora.architectures.identify import Model
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
    for path, factors in modules.items():
        assert factors.keys() == {"down", "up"}, path
        alpha = (alphas or {}).get(f"{prefix}{path}.alpha", factors["down"].shape[0])
        up, down = factors["up"].flatten(1), factors["down"].flatten(1)
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
    written = encode_state_dict(Adapter(updates, origin=Model.of(id_)), format=format)
    read = read_by_diffusers(id_, layout, written)
    assert read.keys() == updates.keys()
    for name, update in updates.items():
        assert measure_difference(read[name], update) < 1e-6, name


@pytest.mark.parametrize(
    ("id_", "layout", "format"),
    [("chroma", "chroma", "kohya"), ("wan", "wan2.1-vace-14b", "comfy")],
)
def test_what_a_reader_of_diffusers_stopped_at_still_stops_it(id_, layout, format):
    """Where this fails, diffusers has learned it, and the table is to be made again."""
    updates = make_updates(layout)
    written = encode_state_dict(Adapter(updates, origin=Model.of(id_)), format=format)
    with pytest.raises(ValueError, match=r"Incompatible keys|should be empty"):
        read_by_diffusers(id_, layout, written)


@pytest.mark.parametrize("format", ["comfy", "diffusers"])
@pytest.mark.parametrize("ranks", [(2, 2), (2, 3)])  # of several, a file tells in its header
def test_anima_s_adapter_of_text_reaches_the_model_that_diffusers_makes_of_it(
    format, ranks, tmp_path
):
    generator = torch.Generator().manual_seed(0)
    names = ["transformer_blocks.0.attn1.to_q", "llm_adapter.blocks.0.cross_attn.q_proj"]
    names += ["llm_adapter.blocks.1.mlp.0", "llm_adapter.out_proj"]
    model = diffusers.AnimaTextConditioner(
        source_dim=8, target_dim=8, model_dim=8, num_layers=2, num_attention_heads=2
    )
    layers = dict(model.named_modules())
    updates = {}
    for i, name in enumerate(names):
        layer = layers.get(name.removeprefix("llm_adapter."))
        m, n = layer.weight.shape if layer else (2048, 2048)
        rank = ranks[i % 2]
        factors = (torch.randn(*size, generator=generator) for size in ((m, rank), (rank, n)))
        updates[name] = LowRank(*factors)
    path = tmp_path / "anima.safetensors"
    adapter = Adapter(updates, format=format, origin=Model.of("cosmos"))
    write_adapter(adapter, path, format=format, dtype=torch.float32)
    back = read_adapter(path)
    assert back.updates.keys() == updates.keys() and not back.left_out
    pipeline = diffusers.AnimaModularPipeline
    state, metadata = pipeline.lora_state_dict(path, return_lora_metadata=True)
    assert {key.split(".")[0] for key in state} == {"transformer", "text_conditioner"}
    assert (metadata is not None) == (format == "diffusers" and len({*ranks}) > 1)
    pipeline.load_lora_into_text_conditioner(state, model, metadata=metadata)
    for name in names[1:]:
        layer = model.get_submodule(name.removeprefix("llm_adapter."))
        added = layer.get_delta_weight("default_0")
        assert torch.allclose(added, updates[name].dense(), atol=1e-5), name


def test_what_diffusers_reads_with_its_rows_in_another_order_is_not_called_whole():
    """FLUX.2 by its authors' names: the halves of the last modulation are not swapped."""
    family = FAMILIES["flux2"]
    update = LowRank(torch.arange(24.0)[:, None], torch.ones(1, 12))
    adapter = Adapter({"norm_out.linear": update}, origin=Model.of("flux2"))
    for format, reach in (("comfy", "none"), ("diffusers", "whole")):
        tensors = encode_state_dict(adapter, format=format, dtype=torch.float32)
        read = read_by_diffusers("flux2", "flux2-dev", tensors)["norm_out.linear"]
        assert torch.equal(read.dense(), update.dense()) == (reach == "whole")
        row = name_row(family, format, family.spellings[format])
        assert find_reach(family, row, ["norm_out.linear"]).get("diffusers", "none") == reach
    usual = [*load_layout("flux2-dev").adapted, "norm_out.linear"]
    row = name_row(family, "comfy", family.spellings["comfy"])
    assert find_reach(family, row, usual)["diffusers"] == "part"
