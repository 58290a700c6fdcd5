"""Strength by block: what is written is the LoRA with every block times its factor."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mini import source_weights, write_case
from property_examples import examples
from safetensors.torch import load_file, save_file

import prolora
from prolora import LowRank
from prolora.architectures.depth import DepthTable
from prolora.architectures.families import known_families
from prolora.architectures.identify import Model
from prolora.architectures.layouts import load_layout
from prolora.errors import InvalidOption
from prolora.verbs.block_weights import BlockWeights

LEFT_OUT = "left out as asked: its block has the factor 0"
TWELVE = ("BASE", "IN04", "IN05", "IN07", "IN08", "M00", *(f"OUT0{i}" for i in range(6)))


def dense(adapter):
    return {name: x.up.double() @ x.down.double() for name, x in adapter.updates.items()}


def sdxl_lora(vectors=None):
    """One update in each block with attention, and one in the first text encoder."""
    shapes = load_layout("sdxl").shapes
    names = [n for n in shapes if n.endswith("0.attn1.to_q") and ".transformer_blocks.0." in n]
    names.append("text_encoder.text_model.encoder.layers.0.self_attn.q_proj")
    generator = torch.Generator().manual_seed(0)
    updates = {
        n: LowRank(torch.randn(8, 2, generator=generator), torch.randn(2, 8, generator=generator))
        for n in names
    }
    return prolora.Adapter(updates, vectors=vectors or {}, origin=Model.of("sdxl"))


def place(name):
    return DepthTable(tuple(load_layout("sdxl").shapes)).find_place(name)


def resolve(blocks, layout, names=None, *more):
    """Factors of modules of a layout, by default of all of them, and its table of blocks."""
    family = next(one for one in known_families().values() if layout in one.layouts)
    table = DepthTable((*load_layout(layout).shapes, *more), family)
    return BlockWeights.read(blocks).resolve(table, names or table.modules, "the model"), table


@settings(deadline=None, max_examples=examples(25))
@given(st.lists(st.floats(-2, 2, width=32), min_size=12, max_size=12))
def test_a_number_for_each_block_multiplies_its_modules(numbers):
    before = sdxl_lora()
    factors = dict(zip(TWELVE, numbers, strict=True))
    if not any(factors[place(name)] for name in before.updates):
        return
    done = prolora.convert(before, blocks=",".join(map(repr, numbers)), dtype="float32")
    wanted = {n: x * factors[place(n)] for n, x in dense(before).items() if factors[place(n)]}
    found = dense(done.adapter)
    assert set(found) == set(wanted)
    for name, update in wanted.items():
        assert torch.allclose(found[name], update, rtol=1e-5, atol=1e-6)
    gone = {row.source for row in done.report.modules if row.reason == LEFT_OUT}
    assert gone == set(before.updates) - set(wanted)


@pytest.mark.parametrize(
    ("blocks", "kept"),
    [
        ("IN04-IN08=0", {"BASE", "M00", *TWELVE[6:]}),
        ("OUT*=0, MID=0", {*TWELVE[:5]}),
        ("base=0", {*TWELVE[1:]}),
        ("*=0, M00=1", {"M00"}),
        ("down_blocks.*=0", {"BASE", *TWELVE[5:]}),
        ("input_blocks.4-7=0", {"BASE", "IN08", *TWELVE[5:]}),
        ("middle_block=0", {*TWELVE} - {"M00"}),
        ({"OUT00-OUT05": 0}, {*TWELVE[:6]}),
        ([1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], {"BASE", "IN04"}),
        ("1,0,0,0,0,1,0,0,0,1,0,0,0,0,0,0,0,0,0,0", {"BASE", "IN04", "IN08"}),
    ],
)
def test_names_ranges_and_patterns_say_which_blocks_are_meant(blocks, kept):
    done = prolora.convert(sdxl_lora(), blocks=blocks)
    assert {place(name) for name in done.adapter.updates} == kept


def test_twelve_numbers_leave_out_what_has_another_block():
    """As kohya's notation for LoRAs of attention does with residual blocks."""
    lora, other = sdxl_lora(), "down_blocks.0.resnets.0.conv1"
    before = {*lora.updates}
    lora.updates[other] = LowRank(torch.ones(8, 1), torch.ones(1, 8))
    assert other in prolora.convert(lora, blocks="IN04=0.5").adapter.updates
    assert {*prolora.convert(lora, blocks=[1] * 12).adapter.updates} == before


def test_a_transformers_blocks_are_meant_by_ranges_and_by_the_authors_names():
    names = [f"transformer_blocks.{i}.attn.to_q" for i in range(19)]
    names += [f"single_transformer_blocks.{i}.attn.to_q" for i in range(38)]
    for text in ("double_blocks.*=0.5", "transformer_blocks.0-18=0.5", "D00-D18=0.5"):
        assert resolve(text, "flux1-dev", names)[0] == dict.fromkeys(names[:19], 0.5), text
    numbers = [1.0] * 61
    numbers[3], numbers[59] = 0.25, 0.5
    assert resolve(numbers, "flux1-dev", names)[0] == {names[0]: 0.25, names[-1]: 0.5}


def test_the_numbers_of_a_transformer_are_of_its_blocks_and_leave_text_encoders_alone():
    encoder = "text_encoder.layers.0.self_attn.q_proj"
    names = [encoder, "transformer_blocks.59.attn.to_q", "transformer_blocks.0.attn.to_q"]
    factors, table = resolve([1.0] * 59 + [0.5], "qwen-image", names, encoder)
    assert [len(places) for places in table.notations] == [60]
    assert factors == {names[1]: 0.5}
    assert resolve("BASE=0", "qwen-image", names, encoder)[0] == {encoder: 0}


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("1,1,1", r"3 numbers, and .* takes 20 \(BASE, IN00-IN08, M00, OUT00-OUT08\) or 12 "),
        ("1,1,1", r" or 12 \(BASE, IN04-IN05, IN07-IN08, M00, OUT00-OUT05\); names take"),
        ("IN99=1", "names 'IN99', which is not a block or module"),
        ("IN99=1", "its blocks are BASE, IN00-IN08, M00, OUT00-OUT08$"),
        ("double_blocks.*=1", "not a block or module of"),
        ("1,IN04=1", "mixes numbers and names"),
        ("IN04=x", "'x', which is not a number"),
        ("nan", "not a number"),
        ("1,,1", "empty item"),
        ("", "empty item"),
        ("*=0", "leaves no module"),
        ({"IN04": None}, "not a number"),
        ({"down_blocks.1": True}, "True, which is not a number"),
        ([True] * 12, "True, which is not a number"),
    ],
)
def test_what_fits_no_blocks_is_refused_with_what_there_are(blocks, message):
    with pytest.raises(InvalidOption, match=message):
        prolora.convert(sdxl_lora(), blocks=blocks)


@pytest.mark.parametrize("layout", ["sd15", "sdxl", "bk-sdm-small", "flux1-dev", "qwen-image"])
def test_the_blocks_that_are_told_are_taken_as_they_are_told(layout):
    with pytest.raises(InvalidOption, match="its blocks are ") as refused:
        resolve("nothing=1", layout)
    told = str(refused.value).partition("its blocks are ")[2].split(", ")
    factors, table = resolve(dict.fromkeys(told, 0.5), layout)
    placed = {name for name in table.modules if table.find_place(name) in table.places}
    assert set(factors) == placed and len(told) < 12


@settings(deadline=None, max_examples=examples(200))
@given(st.text(alphabet="INOUTDSM0123456789-=,.* ", max_size=30))
def test_any_text_is_factors_or_a_refusal(text):
    try:
        resolve(text, "sdxl", ["down_blocks.1.attentions.0.proj_in"])
    except InvalidOption as error:
        assert "`blocks`" in str(error)


def test_the_notation_that_is_told_is_read_as_the_same():
    for text in ("1,0.5,0", "IN04=0.5, OUT*=0"):
        assert BlockWeights.read(str(BlockWeights.read(text))) == BlockWeights.read(text)


def test_a_transfer_writes_its_blocks_at_their_factors(tmp_path):
    lora, source, target = write_case(tmp_path)
    plain = prolora.transfer(lora, source, target, method="copy")
    text = "down_blocks.1.attentions.0.transformer_blocks.1=0.5"
    done = prolora.transfer(lora, source, target, method="copy", blocks=text)
    before = dense(plain.adapter)
    assert set(dense(done.adapter)) == set(before)
    for name, update in dense(done.adapter).items():
        factor = 0.5 if ".transformer_blocks.1." in name else 1
        assert torch.allclose(update, before[name] * factor)
    halved = [row for row in done.report.modules if row.strength == 0.5]
    assert halved and all(row.norm_ratio == 0.5 for row in halved)
    assert f"Factors by block, as asked: {text}" in str(done.report)


def test_a_block_of_factor_0_is_reported_as_left_out_on_purpose(tmp_path):
    lora, source, target = write_case(tmp_path)
    text = "down_blocks.1.attentions.0.transformer_blocks.1=0"
    how = {"method": "copy", "blocks": text}
    report = prolora.transfer(lora, source, target, out=tmp_path / "out.safetensors", **how).report
    gone = [row.source for row in report.modules if row.reason == LEFT_OUT]
    assert len(gone) == 4 and all(".transformer_blocks.1." in name for name in gone)
    assert "4 modules have the factor 0 and are left out as asked" in str(report)
    written = load_file(tmp_path / "out.safetensors")
    assert not any("transformer_blocks_1_" in key for key in written)
    planned = prolora.transfer(lora, source, target, dry_run=True, **how).report
    assert [row.source for row in planned.modules if row.reason == LEFT_OUT] == gone


def test_a_wrong_number_of_factors_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    lora, source, target = write_case(tmp_path)
    monkeypatch.setattr("prolora.bases.Base.read", None)
    with pytest.raises(InvalidOption, match="5 numbers"):
        prolora.transfer(lora, source, target, blocks="1,1,1,1,1")


def test_trained_biases_follow_their_block():
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = sdxl_lora({f"{name}.bias": torch.ones(8)})
    half = prolora.convert(lora, blocks="IN04=0.5")
    assert torch.equal(half.adapter.vectors[f"{name}.bias"], torch.full((8,), 0.5))
    none = prolora.convert(lora, blocks="IN04=0")
    assert not none.adapter.vectors and none.report.left_out == {f"{name}.bias": LEFT_OUT}


def test_norms_without_an_update_follow_their_block():
    norm = "down_blocks.1.attentions.0.transformer_blocks.0.norm1.weight"
    lora = sdxl_lora({norm: torch.ones(8)})
    half = prolora.convert(lora, blocks="IN04=0.5")
    assert torch.equal(half.adapter.vectors[norm], torch.full((8,), 0.5))
    none = prolora.convert(lora, blocks="IN04=0")
    assert not none.adapter.vectors and none.report.left_out == {norm: LEFT_OUT}


def test_the_order_of_names_is_part_of_what_a_result_is_made_of(tmp_path):
    """The last name that fits a module decides, so another order is another result."""
    lora, *bases = write_case(tmp_path)
    names = {"down_blocks*": 0.5, "down_blocks.1.attentions.0.transformer_blocks.0": 1.0}
    for blocks, kept in ((names, False), (names, True), (dict(reversed(names.items())), False)):
        options = {"method": "copy", "blocks": blocks}
        (outcome,) = prolora.transfer_many([lora], *bases, tmp_path / "out", **options)
        assert outcome.kept is kept


def test_every_verb_silences_a_bias_with_its_block(tmp_path):
    """A `diff_b` acts without the matrix of its module, so it must go with it."""
    lora, source, target = write_case(tmp_path)
    silent, kept = (f"down_blocks.1.attentions.0.transformer_blocks.{i}.attn1.to_q" for i in (0, 1))
    tensors = load_file(lora)
    for name in (silent, kept):
        tensors[f"lora_unet_{name.replace('.', '_')}.diff_b"] = torch.full((24,), 3.0)
    save_file(tensors, lora)
    blocks, other = f"{silent}=0, {kept}=0.5", shutil.copyfile(lora, tmp_path / "b.safetensors")
    for done, size, gone in (
        (prolora.convert(lora, blocks=blocks), 1.5, [f"{silent}.bias"]),
        (prolora.transfer(lora, source, target, blocks=blocks), 1.5, [f"{silent}.bias"]),
        (
            prolora.merge([lora, other], blocks=[blocks, blocks]),
            3.0,
            [f"{name}: {silent}.bias" for name in ("lora", "b")],
        ),
    ):
        assert silent not in done.adapter.updates and list(done.adapter.vectors) == [f"{kept}.bias"]
        assert torch.equal(done.adapter.vectors[f"{kept}.bias"], torch.full((24,), size))
        assert done.report.vectors == 1 and list(done.report.left_out) == gone
        assert all(reason.endswith(LEFT_OUT) for reason in done.report.left_out.values())
    weights = {f"{name}.weight": x for name, x in source_weights().items()}
    weights |= {f"{name}.bias": torch.zeros(24) for name in (silent, kept)}
    baked = prolora.bake([lora], weights, blocks=[blocks]).tensors
    changed = [key for key in baked if not torch.equal(baked[key], weights[key])]
    assert len(changed) == len(weights) - 2 and not any(key.startswith(silent) for key in changed)
    assert torch.equal(baked[f"{kept}.bias"], torch.full((24,), 1.5))
