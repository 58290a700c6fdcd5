"""Tensors that prolora does not know never pass unseen: the update they stand beside is refused."""

import json
import re
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_files import pair, random, relative_error
from property_examples import examples
from safetensors.torch import load_file

import prolora
from prolora import Lora
from prolora.adapters import read_adapter
from prolora.adapters.keys.codec import Codec
from prolora.architectures.families import known_families
from prolora.architectures.family import Spelling
from prolora.architectures.layouts import load_layout
from prolora.errors import ProLoRAError, UnsupportedFormat

KOHYA = "lora_unet_mid_block_attentions_0_proj_in"
PROJ_IN = "mid_block.attentions.0.proj_in"
PROJ_OUT = "mid_block.attentions.0.proj_out"

FURTHER = (Spelling("", "diffusers"), Spelling("lycoris_", "diffusers", dotted=False))
# The spelling of every file that a program reads, with its family.
SPELLED = [
    (family, spelling)
    for family in known_families().values()
    if not family.unet
    for spelling in (*family.spellings.values(), *FURTHER)
]
PEFT = {"lora_B.weight": (14, 4), "lora_A.weight": (4, 12)}
PLAIN = {"lora_up.weight": (14, 4), "lora_down.weight": (4, 12), "alpha": ()}
HALVES = {
    f"hada_w{i}_{side}": shape for i in "12" for side, shape in (("a", (14, 4)), ("b", (4, 12)))
}
CORES = {f"hada_t{i}": (4, 4, 3, 3) for i in "12"}
TUCKER = {"lora_up.weight": (14, 4, 1, 1), "lora_mid.weight": (4, 4, 3, 3)}
KINDS = (
    PLAIN,
    PEFT,
    PLAIN | {"dora_scale": (14, 1)},
    PEFT | {"lora_magnitude_vector": (14,)},
    PEFT | {"magnitude": (14,)},
    PLAIN | {"scale": ()},
    PEFT | {"lora_gate": (14,)},
    TUCKER | {"lora_down.weight": (4, 12, 1, 1)},
    HALVES | {"alpha": ()},
    HALVES | CORES | {f"hada_w{i}_a": (4, 14) for i in "12"},
    {"lokr_w1": (2, 4), "lokr_w2_a": (7, 2), "lokr_w2_b": (2, 3), "alpha": ()},
    {"lokr_w1_a": (2, 2), "lokr_w1_b": (2, 4), "lokr_w2": (7, 3), "alpha": ()},
    {"lokr_w1": (2, 4), "lokr_w2_a": (2, 7), "lokr_w2_b": (2, 3), "lokr_t2": (2, 2, 3, 3)},
    PEFT | {"lora_B.weight": (84, 4)},
    PLAIN | {"lora_up.weight": (84, 4)},
    {"diff": (14, 12), "diff_b": (14,), "w_norm": (14,)},
    {"w_norm": (14,), "b_norm": (14,)},
    {"diff": (14,), "diff_b": (14,)},
    PEFT | {"lora_B.bias": (14,)},
    PLAIN | {"alpha": (1,), "scalar": ()},
    {"a1.weight": (12, 4), "a2.weight": (4, 12), "b1.weight": (14, 4), "b2.weight": (4, 12)},
    {"oft_blocks": (7, 2, 2), "rescale": (14, 1), "alpha": ()},
)


@cache
def early_modules(layout):
    """What lies in the first two blocks, and outside them."""
    names = load_layout(layout).shapes
    return [name for name in names if all(int(n) < 2 for n in re.findall(r"\.(\d+)\.", name))]


def two_modules(out=6, inputs=5, **beside):
    """A LoRA of proj_in, with tensors beside it, and of proj_out."""
    tensors = pair(KOHYA, (out, inputs)) | pair(f"{KOHYA[:-2]}out", (out, inputs))
    return tensors | {f"{KOHYA}.{suffix}": tensor for suffix, tensor in beside.items()}


def list_refused(made):
    """Module that was refused -> the reason; the others are not in it."""
    return {row.source: row.reason for row in made.report.modules if row.status == "refused"}


def toolkit_dora(out=48, inputs=36):
    """(base weights, tensors as ai-toolkit saves them, module -> ΔW of its own formula).

    A layer gives its own output, the plain LoRA's, and (m/‖V‖ − 1)·V·x with V = W + up·down.
    """
    weights, tensors, updates = {}, {}, {}
    for i, leaf in enumerate("qkv"):
        name = f"transformer_blocks.0.attn.to_{leaf}"
        weight = weights[f"{name}.weight"] = random(out, inputs, seed=i)
        factors = pair(f"diffusion_model.{name}", (out, inputs), 4, i, ends=("lora_B", "lora_A"))
        up, down = factors.values()
        magnitude = weight.norm(dim=1) * (1 + 0.3 * random(out, seed=i))
        tensors |= factors | {f"diffusion_model.{name}.magnitude": magnitude}
        merged = weight.double() + up.double() @ down.double()
        factor = magnitude / merged.norm(dim=1) - 1
        updates[name] = up @ down + factor[:, None] * merged
    return weights, tensors, updates


@pytest.mark.parametrize("shape", [(48, 36), (40, 40)])
def test_a_dora_of_ai_toolkit_is_what_its_layer_does(shape):
    base, tensors, updates = toolkit_dora(*shape)
    checked = prolora.check(tensors)
    assert checked.algorithms == {"lora+dora": 3} and checked.needs_base and not checked.reason
    converted = prolora.convert(tensors, base)
    moved = prolora.transfer(tensors, base, base, method="copy", again=True)
    assert moved.report.coverage == 1 and not converted.report.left_out
    assert converted.adapter.updates.keys() == updates.keys()
    for name, wanted in updates.items():
        assert relative_error(converted.adapter.updates[name].dense(), wanted) < 1e-5
        assert relative_error(moved.adapter.updates[name].dense(), wanted) < 1e-3
    with pytest.raises(UnsupportedFormat, match=r"to_\w is rescaled .*\(DoRA\).*give the base"):
        prolora.convert(tensors)
    tensors["diffusion_model.transformer_blocks.0.attn.to_q.magnitude"] = torch.ones(35)
    with pytest.raises(ProLoRAError, match="DoRA magnitudes of a weight"):
        prolora.convert(tensors, base)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_a_scale_stands_for_alpha_over_rank(shape, alpha):
    """As stable-diffusion.cpp, A1111 and SD.Next read it, alpha or not."""
    tensors = two_modules(scale=torch.full(shape, 0.25))
    if alpha is not None:
        tensors[f"{KOHYA}.alpha"] = torch.tensor(alpha)
    adapter = prolora.convert(tensors).adapter
    wanted = 0.25 * tensors[f"{KOHYA}.lora_up.weight"] @ tensors[f"{KOHYA}.lora_down.weight"]
    assert relative_error(adapter.updates[PROJ_IN].dense(), wanted) < 1e-6
    assert relative_error(adapter.updates[PROJ_OUT].dense(), 4 * wanted) < 1e-6


def test_a_scale_is_shown_and_may_not_contradict_the_configuration():
    part = prolora.check(two_modules(scale=torch.tensor(0.25))).parts["unet"]
    assert part.scales == {"0.25": 1, "1": 1}
    table = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 4})}
    stem = "unet.mid_block.attentions.0.proj_in"
    tensors = pair(stem, (6, 5), ends=("lora_B", "lora_A")) | {f"{stem}.scale": torch.tensor(0.25)}
    words = rf"{stem}\.scale asks for the scale 0\.25, the PEFT"
    with pytest.raises(UnsupportedFormat, match=words):
        prolora.convert(Lora.open(tensors, table))


@pytest.mark.parametrize(
    ("scale", "message"),
    [(torch.ones(6), "not one number"), (torch.tensor(float("nan")), "is nan")],
)
def test_a_scale_that_is_no_number_is_refused(scale, message):
    with pytest.raises(ProLoRAError, match=rf"proj_in\.scale .*{message}"):
        prolora.convert(two_modules(scale=scale))


BASE = {f"{PROJ_IN}.weight": random(6, 5), f"{PROJ_OUT}.weight": random(6, 5, seed=1)}


def test_a_scale_that_programs_read_differently_refuses_its_update():
    """Beside a DoRA and beside LoHa, where stable-diffusion.cpp and A1111 disagree."""
    dora = two_modules(scale=torch.tensor(0.25), dora_scale=torch.ones(6, 1))
    loha = {f"{KOHYA}.hada_w{i}_{x}": random(5, 5) for i in (1, 2) for x in "ab"}
    plain = {key: tensor for key, tensor in two_modules().items() if KOHYA not in key}
    for tensors in (dora, plain | loha | {f"{KOHYA}.scale": torch.tensor(0.25)}):
        report = prolora.transfer(tensors, BASE, BASE, again=True, dry_run=True).report
        assert [row.source for row in report.modules if row.status == "mapped"] == [PROJ_OUT]
        (refused,) = (row for row in report.modules if row.status == "refused")
        assert refused.source == PROJ_IN and "'scale'" in refused.reason


@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_moved_lora_has_its_scale_in_the_factors(scale, tmp_path):
    """Between bases that are alike, so that the updates are copied."""
    tensors = two_modules(scale=torch.tensor(scale))
    out = tmp_path / "moved.safetensors"
    moved = prolora.transfer(tensors, BASE, BASE, again=True, out=out)
    assert moved.report.unread == ()
    written = load_file(out)
    assert not any(key.endswith(".scale") for key in written)
    before, after = (prolora.convert(x).adapter.updates for x in (tensors, written))
    assert before.keys() == after.keys() and len(before) == 2
    for name, update in before.items():
        assert relative_error(after[name].dense(), update.dense()) < 1e-6


def test_scale_that_a_program_ignores_is_a_defect():
    tensors = two_modules(scale=torch.tensor(0.25))
    for program in (None, "comfyui", "diffusers"):
        (defect,) = prolora.check(tensors, program=program).defects
        assert defect.mark == "⚠" and f"{KOHYA}.scale" in defect.text
    for program in ("sdcpp", "a1111", "sdnext"):
        assert not prolora.check(tensors, program=program).defects
    assert not prolora.check(two_modules(scale=torch.tensor(1.0)), program="comfyui").defects
    assert not prolora.check(prolora.convert(tensors).state_dict(), program="comfyui").defects


def test_a_scale_of_a_module_without_an_update_is_left_out():
    made = prolora.convert(two_modules() | {"lora_unet_conv_in.scale": torch.tensor(2.0)})
    assert len(made.adapter.updates) == 2 and not list_refused(made)
    assert made.report.unread == ("lora_unet_conv_in.scale",)


DOTTED = ["lora_gate", "lora_magnitude", "weight", "bias", "lora_C.turbo.weight", "lora.gate"]
SUFFIXES = [[f".{suffix}"] for suffix in DOTTED]
SUFFIXES += [["_gain"], ["_gain.weight"], [f".gain{i}" for i in range(7)]]


@pytest.mark.parametrize("suffixes", SUFFIXES)
def test_an_update_with_an_unknown_tensor_is_refused_by_name_and_no_other(suffixes):
    """However its name is joined, and though they are many."""
    lora = two_modules() | {f"{KOHYA}{suffix}": random(6) for suffix in suffixes}
    suffix = suffixes[-1][1:]
    for how in ({"method": "copy"}, {"dry_run": True}):
        moved = prolora.transfer(lora, BASE, BASE, again=True, **how).report
        assert moved.coverage == 0.5 and moved.totals["refused"] == 1
        (row,) = (row for row in moved.modules if row.status == "refused")
        assert row.source == PROJ_IN and repr(suffix) in row.reason
        assert (row.shape, row.rank_in) == ((6, 5), 4)
    assert any(repr(suffix) in reason for reason in prolora.check(lora).left_out)


def test_a_file_whose_every_update_has_an_unknown_tensor_is_refused():
    tensors = two_modules(lora_gate=random(6)) | {f"{KOHYA[:-2]}out.lora_gate": random(6)}
    with pytest.raises(UnsupportedFormat, match=r"no update of a weight.*'lora_gate'.*not read"):
        prolora.convert(tensors)
    assert "'lora_gate'" in prolora.check(tensors).reason


def test_vectors_of_a_refused_update_are_not_moved_either():
    """They may have the scale of the update in front of them."""
    stem, tensors = "unet.mid_block.attentions.0.proj_in", {}
    for path in (stem, f"{stem[:-2]}out"):
        tensors |= pair(path, (6, 5), ends=("lora_B", "lora_A"))
        tensors[f"{path}.lora_B.bias"] = random(6)
    assert len(prolora.convert(tensors).adapter.vectors) == 2
    made = prolora.convert(tensors | {f"{stem}.gate": random(6)})
    assert list(made.adapter.vectors) == [f"{PROJ_OUT}.bias"]
    assert list(list_refused(made)) == [PROJ_IN] and not made.report.left_out


def test_the_bias_of_an_update_over_time_is_moved_at_its_scale():
    stem = "diffusion_model.patch_embedding"
    tensors = pair(stem, (8, 4, 1, 2, 2), 2)
    tensors |= {f"{stem}.alpha": torch.tensor(1.0), f"{stem}.lora_up.bias": random(8)}
    tensors |= pair("diffusion_model.blocks.0.self_attn.q", (8, 8), 2)
    vectors = prolora.convert(tensors).adapter.vectors
    assert torch.equal(vectors["patch_embedding.bias"], random(8) / 2)


@pytest.mark.parametrize(("suffix", "shape"), [("gate", (6,)), ("diff", (6, 1, 2))])
def test_a_trained_vector_with_a_tensor_that_is_not_read_is_left_out(suffix, shape):
    norm = "lora_unet_mid_block_attentions_0_norm"
    tensors = two_modules() | {f"{norm}.diff_b": random(6), f"{norm}.{suffix}": random(*shape)}
    made = prolora.convert(tensors)
    assert len(made.adapter.updates) == 2 and not made.adapter.vectors
    assert made.report.unread == ("mid_block.attentions.0.norm",)
    unread = {row.source: row.reason for row in made.report.modules} | made.report.left_out
    assert repr(suffix) in unread["mid_block.attentions.0.norm"]


# Beside every spelling that a program reads: modules of UNets and text encoders in theirs.
STEMS = [
    KOHYA,
    "lora_unet_middle_block_1_proj_in",
    "unet.mid_block.attentions.0.proj_in",
    "diffusion_model.middle_block.1.proj_in",
    "base_model.model.mid_block.attentions.0.proj_in",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
    "my_model.blocks.0.attention.query",
]
WORDS = "scale magnitude gate lora_gate lora_magnitude lora_A lora_B weight default turbo bias "
WORDS += "diff_m emb_params norm query_norm 0 lora_E ranknum dora_scale alpha rank w_norm b_norm "
WORDS += "diff diff_b scalar rescale lora_mid on_input lokr_t1 hada_w3_a bm set_weight lora up"
SUFFIXES_OF_ALL_KINDS = sorted({suffix for kind in KINDS for suffix in kind})
ANY_SUFFIX = st.one_of(
    st.lists(st.sampled_from(WORDS.split()), min_size=1, max_size=3).map(".".join),
    st.sampled_from(SUFFIXES_OF_ALL_KINDS),
    st.text("abz_.0", min_size=1, max_size=6),
)
OTHER = "lora_unet_conv_in"
ANY_SHAPE = st.sampled_from([(), (1,), (14,), (12,), (14, 1), (1, 12), (14, 12), (3, 7), (2, 3, 4)])


@st.composite
def files(draw):
    """(tensors of an update of any kind and of a plain LoRA, the stem of the former)."""
    kind, stem = draw(st.sampled_from(KINDS)), draw(st.sampled_from(STEMS))
    if draw(st.booleans()):
        family, spelling = draw(st.sampled_from(SPELLED))
        names = early_modules(draw(st.sampled_from(family.layouts)))
        stem = Codec(family, spelling=spelling).write(draw(st.sampled_from(names))) or stem
    shapes = {f"{stem}.{suffix}": shape for suffix, shape in kind.items()}
    shapes |= {f"{OTHER}.lora_up.weight": (6, 4), f"{OTHER}.lora_down.weight": (4, 5)}
    tensors = {k: 1 + random(*shape, seed=i).abs() for i, (k, shape) in enumerate(shapes.items())}
    return tensors, stem


def read_all(tensors):
    """Every update and vector that is read of a file; None if it is refused."""
    try:
        adapter = read_adapter(tensors, read_weight=lambda name: random(14, 12, seed=3))
    except ProLoRAError as error:
        assert len(str(error)) > 20
        return None
    return {name: update.dense() for name, update in adapter.updates.items()} | adapter.vectors


def test_a_tensor_under_any_suffix_of_an_update_refuses_it_or_changes_the_result():
    """One tensor more, or one of the update's own that is renamed."""
    tried = []

    @settings(max_examples=examples(800), deadline=None)
    @given(files(), st.data(), st.booleans())
    def check(file, data, renamed):
        tensors, stem = file
        before = read_all(tensors)
        if before is None or before.keys() == {"conv_in"}:
            return  # it is refused as it is
        old = data.draw(st.sampled_from([k for k in tensors if k.startswith(stem)]))
        key = f"{old}x" if renamed else f"{stem}.{data.draw(ANY_SUFFIX)}"
        if key in tensors:
            return
        tried.append(key)
        value = tensors[old] if renamed else torch.full(data.draw(ANY_SHAPE), 0.3)
        after = read_all(
            {k: x for k, x in tensors.items() if k != old or not renamed} | {key: value}
        )
        if after is None or ("alpha" in (old if renamed else key) and f"{stem}.diff" in tensors):
            return  # no program scales a difference of weights by its alpha
        same = before.keys() == after.keys()
        assert not (same and all(torch.equal(before[n], after[n]) for n in before)), (tensors, key)

    check()
    assert len(tried) > examples(800) // 4  # most files are read before
