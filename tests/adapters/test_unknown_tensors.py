"""Tensors that prolora does not know never pass unseen: the update they stand beside is refused."""

import json
import re
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_files import relative_error, save
from property_examples import examples
from torch import nn

import prolora
from prolora import Lora
from prolora.adapters import read_adapter
from prolora.adapters.contents import parse_contents
from prolora.adapters.keys.codec import Codec
from prolora.adapters.keys.tensor_keys import StoredTensor
from prolora.architectures.families import known_families
from prolora.architectures.family import Spelling
from prolora.architectures.layouts import load_layout
from prolora.core.grouping import group_by
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


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def two_modules(out=6, inputs=5, **beside):
    """A LoRA of proj_in, with tensors beside it, and of proj_out."""
    tensors = {}
    for stem in (KOHYA, f"{KOHYA[:-2]}out"):
        tensors[f"{stem}.lora_up.weight"] = random(out, 4)
        tensors[f"{stem}.lora_down.weight"] = random(4, inputs, seed=1)
    return tensors | {f"{KOHYA}.{suffix}": tensor for suffix, tensor in beside.items()}


def list_refused(made):
    """Module that was refused -> the reason; the others are not in it."""
    return {row.source: row.reason for row in made.report.modules if row.status == "refused"}


@pytest.mark.parametrize("suffix", [".gain", "_gain", "_gain.weight"])
def test_a_tensor_beside_an_update_refuses_it_however_its_name_is_joined(suffix):
    made = prolora.convert(two_modules() | {f"{KOHYA}{suffix}": random(6)})
    assert list(list_refused(made)) == [PROJ_IN] and set(made.adapter.updates) == {PROJ_OUT}


def test_one_update_with_many_unknown_tensors_refuses_no_other():
    """They are of that update, and not what most of the file is."""
    made = prolora.convert(two_modules(**{f"gain{i}": random(6) for i in range(7)}))
    assert list(list_refused(made)) == [PROJ_IN] and set(made.adapter.updates) == {PROJ_OUT}


class ToolkitDoRA(nn.Module):
    """A layer as ai-toolkit's DoRA module applies it: the norm is of rows, the scale is 1.

    The layer's own output, the plain LoRA's, and (m/‖V‖ − 1)·V·x with V = W + up·down.
    """

    def __init__(self, layer, rank):
        super().__init__()
        self.layer = layer
        self.lora_down = nn.Linear(layer.in_features, rank, bias=False)
        self.lora_up = nn.Linear(rank, layer.out_features, bias=False)
        self.magnitude = nn.Parameter(torch.linalg.norm(layer.weight.detach(), dim=1))

    def forward(self, x):
        merged = self.layer.weight + self.lora_up.weight @ self.lora_down.weight
        factor = (self.magnitude / torch.linalg.norm(merged, dim=1) - 1).view(1, -1)
        plain = nn.functional.linear(x, self.layer.weight) + self.lora_up(self.lora_down(x))
        return plain + factor * nn.functional.linear(x, merged)


def toolkit_dora(out=48, inputs=36, prefix="diffusion_model."):
    """(base weights, tensors as ai-toolkit saves them, module -> ΔW of its own formula)."""
    weights, tensors, updates = {}, {}, {}
    with torch.no_grad():
        for i, leaf in enumerate("qkv"):
            name = f"transformer_blocks.0.attn.to_{leaf}"
            torch.manual_seed(i)
            module = ToolkitDoRA(nn.Linear(inputs, out, bias=False), 4)
            module.magnitude.mul_(1 + 0.3 * random(out, seed=i))
            weights[name] = module.layer.weight
            tensors[f"{prefix}{name}.magnitude"] = module.magnitude
            tensors[f"{prefix}{name}.lora_A.weight"] = module.lora_down.weight
            tensors[f"{prefix}{name}.lora_B.weight"] = module.lora_up.weight
            unit = torch.eye(inputs)
            updates[name] = (module(unit) - module.layer(unit)).mT
    return weights, {key: tensor.detach().clone() for key, tensor in tensors.items()}, updates


@pytest.mark.parametrize("shape", [(48, 36), (40, 40)])
def test_a_dora_of_ai_toolkit_is_what_its_layer_does(shape):
    weights, tensors, updates = toolkit_dora(*shape)
    made = prolora.convert(tensors, weights)
    assert {row.source: row.reason for row in made.report.modules} == dict.fromkeys(
        updates, "lora+dora"
    )
    assert made.adapter.updates.keys() == updates.keys() and not made.report.left_out
    for name, wanted in updates.items():
        assert relative_error(made.adapter.updates[name].dense(), wanted) < 1e-5
        plain = tensors[f"diffusion_model.{name}.lora_B.weight"]
        plain = plain @ tensors[f"diffusion_model.{name}.lora_A.weight"]
        assert relative_error(plain, wanted) > 0.3  # what a loader does that drops the magnitudes


def test_a_dora_of_ai_toolkit_is_moved_to_within_a_thousandth(tmp_path):
    weights, tensors, updates = toolkit_dora()
    lora = save(tmp_path / "dora.safetensors", tensors)
    base = {f"{name}.weight": weight for name, weight in weights.items()}
    found = prolora.check(lora)
    assert found.algorithms == {"lora+dora": 3} and found.needs_base and (not found.reason)
    result = prolora.transfer(lora, base, base, method="copy", again=True)
    assert result.report.coverage == 1
    for name, wanted in updates.items():
        assert relative_error(result.adapter.updates[name].dense(), wanted) < 1e-3
    with pytest.raises(UnsupportedFormat, match=r"to_\w is rescaled .*\(DoRA\).*give the base"):
        prolora.convert(lora)
    tensors["diffusion_model.transformer_blocks.0.attn.to_q.magnitude"] = torch.ones(36)
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


def test_a_scale_is_shown_and_may_not_contradict_the_configuration(tmp_path):
    tensors = two_modules(scale=torch.tensor(0.25))
    path = save(tmp_path / "lora.safetensors", tensors)
    assert prolora.check(path).parts["unet"].scales == {"0.25": 1, "1": 1}
    table = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 4})}
    stem = "unet.mid_block.attentions.0.proj_in"
    factors = {f"{stem}.lora_B.weight": random(6, 4), f"{stem}.lora_A.weight": random(4, 5)}
    with pytest.raises(
        UnsupportedFormat, match=rf"{stem}\.scale asks for the scale 0\.25, the PEFT"
    ):
        prolora.convert(Lora.open(factors | {f"{stem}.scale": torch.tensor(0.25)}, table))


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


def test_a_scale_of_a_module_without_an_update_is_left_out():
    made = prolora.convert(two_modules() | {"lora_unet_conv_in.scale": torch.tensor(2.0)})
    assert len(made.adapter.updates) == 2 and not list_refused(made)
    assert made.report.unread == ("lora_unet_conv_in.scale",)


SUFFIXES = ["lora_gate", "lora_magnitude", "weight", "bias", "lora_A.turbo.weight", "lora.gate"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_update_with_an_unknown_tensor_is_refused_by_name_and_no_other(suffix, tmp_path):
    tensors = two_modules(8, 8, **{suffix: random(8)})
    lora = save(tmp_path / "lora.safetensors", tensors)
    base = {f"{PROJ_IN}.weight": random(8, 8), f"{PROJ_OUT}.weight": random(8, 8, seed=1)}
    report = prolora.transfer(lora, base, base, again=True, dry_run=True).report
    for found in (prolora.transfer(lora, base, base, method="copy", again=True).report, report):
        assert found.coverage == 0.5 and found.totals["refused"] == 1
        (row,) = (row for row in found.modules if row.status == "refused")
        assert row.source == PROJ_IN and repr(suffix) in row.reason
        assert (row.shape, row.rank_in) == ((8, 8), 4)
    described = prolora.check(lora)
    assert any(repr(suffix) in reason for reason in described.left_out)


def test_a_file_whose_every_update_has_an_unknown_tensor_is_refused(tmp_path):
    tensors = two_modules(lora_gate=random(6))
    tensors[f"{KOHYA[:-2]}out.lora_gate"] = random(6)
    with pytest.raises(UnsupportedFormat, match=r"no update of a weight.*'lora_gate'.*not read"):
        prolora.convert(tensors)
    found = prolora.check(save(tmp_path / "lora.safetensors", tensors))
    assert found.reason and "'lora_gate'" in found.reason


def test_vectors_of_a_refused_update_are_not_moved_either():
    """They may have the scale of the update in front of them."""
    stem = "unet.mid_block.attentions.0.proj_in"
    tensors = {
        f"{stem}.lora_B.weight": random(6, 4),
        f"{stem}.lora_A.weight": random(4, 5),
        f"{stem}.lora_B.bias": random(6),
    }
    tensors |= {key.replace("proj_in", "proj_out"): tensor for key, tensor in tensors.items()}
    assert len(prolora.convert(tensors).adapter.vectors) == 2
    made = prolora.convert(tensors | {f"{stem}.gate": random(6)})
    assert list(made.adapter.vectors) == [f"{PROJ_OUT}.bias"]
    assert list(list_refused(made)) == [PROJ_IN] and not made.report.left_out


def test_the_bias_of_an_update_over_time_is_moved_at_its_scale():
    stem = "diffusion_model.patch_embedding"
    block = "diffusion_model.blocks.0.self_attn.q"
    tensors = {
        f"{stem}.lora_up.weight": random(8, 2, 1, 1, 1),
        f"{stem}.lora_down.weight": random(2, 4, 1, 2, 2),
        f"{stem}.alpha": torch.tensor(1.0),
        f"{stem}.lora_up.bias": random(8),
        f"{block}.lora_up.weight": random(8, 2),
        f"{block}.lora_down.weight": random(2, 8),
    }
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


def list_used(contents):
    """The keys that are read."""
    slots = {key for slot in contents.slots for key in slot.keys.values()}
    return slots | {vector.key for vector in contents.vectors}


def account(shapes):
    """(keys that are read, what is said of the rest); a file that is refused reads none."""
    headers = {key: StoredTensor.of(key, "F32", shape) for key, shape in shapes.items()}
    try:
        contents = parse_contents(Lora("file", headers, None, {}))
    except ProLoRAError as error:
        return set(), str(error)
    assert contents.unread.keys() <= contents.left_out.keys()
    return list_used(contents), str(contents.left_out)


# Without those that are of two kinds, or have an unknown tensor.
WHOLE = [
    kind for kind in KINDS if "lora_gate" not in kind and not {"diff", "w_norm"} <= kind.keys()
]


@pytest.mark.parametrize("kind", WHOLE, ids=" ".join)
def test_in_every_family_each_tensor_is_used_or_named(kind):
    """One tensor more beside an update of any kind, alone, or one that is renamed."""
    tried = 0
    spelled = group_by(SPELLED, lambda one: one[0].id).values()
    for family, spelling in (one[WHOLE.index(kind) % len(one)] for one in spelled):
        first, other = early_modules(family.layouts[0])[:2]
        stem, further = (Codec(family, spelling=spelling).write(name) for name in (first, other))
        if not stem or not further or stem == further:
            continue
        shapes = {f"{stem}.{suffix}": shape for suffix, shape in kind.items()}
        shapes |= {f"{further}.lora_up.weight": (84, 4), f"{further}.lora_down.weight": (4, 12)}
        if account(shapes)[0] != shapes.keys():
            continue  # of a weight that such shapes do not fit
        tried += 1
        for odd in (f"{stem}.gate", f"{stem}_gain", "odd", f"{further}.diff_m"):
            used, told = account(shapes | {odd: (14,)})
            assert odd not in used
            assert odd in told or odd.removeprefix(stem)[1:] in told or "diff_m" in told, (
                odd,
                told,
            )
        for key in shapes:
            rest = {k: shape for k, shape in shapes.items() if k != key}
            used, told = account(rest | {f"{key}x": shapes[key]})
            path = stem if key.startswith(f"{stem}.") else further
            known = [f"{key}x", f"{key}x".removeprefix(path)[1:], path, first, other]
            assert f"{key}x" not in used and any(name in told for name in known), (key, told)
    assert tried > len(spelled) / 4


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
WORDS = (
    "scale magnitude gate lora_gate lora_magnitude lora_A lora_B weight default turbo bias diff_m "
)
WORDS += (
    "emb_params norm query_norm 0 lora_E ranknum dora_scale alpha rank w_norm b_norm diff diff_b "
)
WORDS += "scalar rescale lora_mid on_input lokr_t1 hada_w3_a bm set_weight lora up"
SUFFIXES_OF_ALL_KINDS = sorted({suffix for kind in KINDS for suffix in kind})
ANY_SUFFIX = st.one_of(
    st.lists(st.sampled_from(WORDS.split()), min_size=1, max_size=3).map(".".join),
    st.sampled_from(SUFFIXES_OF_ALL_KINDS),
    st.text("abz_.0", min_size=1, max_size=6),
)
ANY_SHAPE = st.sampled_from([(), (1,), (14,), (12,), (14, 1), (1, 12), (14, 12), (3, 7), (2, 3, 4)])


OTHER = "lora_unet_conv_in"


@st.composite
def files(draw):
    """(tensors of an update of any kind and of a plain LoRA, the stem of the former)."""
    kind = draw(st.sampled_from(KINDS))
    stem = draw(st.sampled_from(STEMS))
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
    weight = torch.randn(14, 12, generator=torch.Generator().manual_seed(3))
    try:
        adapter = read_adapter(tensors, read_weight=lambda name: weight)
    except ProLoRAError as error:
        assert len(str(error)) > 20
        return None
    return {name: update.dense() for name, update in adapter.updates.items()} | adapter.vectors


def test_a_tensor_under_any_suffix_of_an_update_refuses_it_or_changes_the_result():
    tried = []

    @settings(max_examples=examples(800), deadline=None)
    @given(files(), ANY_SUFFIX, ANY_SHAPE)
    def check(file, suffix, shape):
        tensors, stem = file
        key = f"{stem}.{suffix}"
        before = read_all(tensors) if key not in tensors else None
        if before is None or before.keys() == {"conv_in"}:
            return  # it is refused as it is
        tried.append(key)
        after = read_all(tensors | {key: torch.full(shape, 0.3)})
        if after is None or (suffix == "alpha" and f"{stem}.diff" in tensors):
            return  # no program scales a difference of weights by its alpha
        same = before.keys() == after.keys()
        assert not (same and all(torch.equal(before[n], after[n]) for n in before)), (tensors, key)

    check()
    assert len(tried) > examples(800) // 4  # most files are read before
