"""Whether a LoRA is for a base is told by headers alone, in one line and by an exit code."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from checkpoints import sparse_file
from lora_files import attention_lora, empty_base, save, usual_lora

import prolora


@pytest.fixture(autouse=True)
def unread(monkeypatch):
    monkeypatch.setattr(prolora.Base, "read", lambda *x: pytest.fail("a weight was read"))


def test_a_lora_fits_its_own_base():
    answer = prolora.check(usual_lora("sdxl", "unet."), base=empty_base("sdxl"))
    assert answer and answer.base_match.answer == "fits" and answer.base_match.coverage == 1
    assert str(answer).startswith(
        "✔ for this base, by names and shapes: 700 of 700 modules have their place\n"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        answer.reason = "other"


@pytest.mark.parametrize(
    ("lora", "base", "text"),
    [
        ("sd15", "sdxl", "Stable Diffusion 1.5; this base is Stable Diffusion XL"),
        ("sdxl", "ssd-1b", "Stable Diffusion XL; this base is SSD-1B"),
        ("wan-t2v-14b", "wan-t2v-1.3b", "Wan 2.1 .*14B; this base is Wan 2.1 .*1.3B"),
    ],
)
def test_a_lora_of_another_model_is_said_to_be_one(lora, base, text):
    prefix = "transformer." if "wan" in lora else "unet."
    answer = prolora.check(usual_lora(lora, prefix), base=empty_base(base))
    assert not answer and answer.base_match.answer == "other"
    said = f"{answer.mark} {answer.headline}"
    assert re.fullmatch(f"✖ this LoRA is for {text}", said), str(answer)


def test_a_module_of_another_width_has_no_place():
    lora = usual_lora("sdxl", "unet.")
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    lora[f"{key}.lora_B.weight"] = torch.zeros(1279, 1)
    answer = prolora.check(lora, base=empty_base("sdxl"))
    assert answer.base_match.answer == "in part" and "1279×1280" in str(answer)


def test_few_modules_that_both_have_but_that_look_like_anothers_are_unclear():
    lora = {k: v for k, v in usual_lora("sdxl", "unet.").items() if ".down_blocks.1." in k}
    answer = prolora.check(lora, base=empty_base("ssd-1b"))
    assert (answer.base_match.answer, answer.mark) == ("unclear", "⚠") and not answer


def test_modules_that_several_families_have_are_said_to_be_theirs_too():
    lora = {k: v for k, v in usual_lora("flux1-dev", "transformer.").items() if "_blocks.0." in k}
    for layout, also in (("flux1-dev", "Chroma"), ("chroma", "FLUX.1")):
        answer = prolora.check(lora, base=empty_base(layout))
        assert answer and also in answer.base_match.also
        assert answer.base_match.also in answer.headline


def test_text_encoders_need_no_weights_in_the_base_but_must_be_its_own():
    lora = usual_lora("sd15", "unet.")
    for encoder in ("text_encoder", "text_encoder_2"):
        key = f"{encoder}.text_model.encoder.layers.0.self_attn.q_proj"
        lora[f"{key}.lora_A.weight"] = torch.zeros(1, 768)
        lora[f"{key}.lora_B.weight"] = torch.zeros(768, 1)
    answer = prolora.check(lora, base=empty_base("sd15"))
    missing = answer.to_dict()["base_match"]["without_place"]
    assert list(missing) == ["text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"]
    assert "fewer than 2 text encoders" in str(answer)


def test_an_update_that_needs_its_base_is_placed_without_it():
    lora = usual_lora("sdxl", "unet.")
    ups = [k for k in lora if k.endswith("lora_B.weight")]
    lora |= {k.replace("lora_B.weight", "dora_scale"): torch.ones(len(lora[k]), 1) for k in ups}
    assert prolora.check(lora, base=empty_base("sdxl"))
    other = prolora.check(lora, base=empty_base("sd15"))
    assert other.base_match.answer == "other" and "Stable Diffusion XL" in str(other)


def test_an_update_beside_an_unknown_tensor_counts_as_one_without_a_place():
    lora = usual_lora("sdxl", "unet.")
    key = next(k for k in lora if k.endswith("lora_B.weight"))
    lora[key.replace("lora_B.weight", "lora_gate")] = torch.ones(3)
    answer = prolora.check(lora, base=empty_base("sdxl"))
    assert answer.base_match.answer == "in part" and "699 of 700" in str(answer)


def test_what_is_no_lora_or_no_base_is_refused(tmp_path):
    lora = save(tmp_path / "lora.safetensors", usual_lora("sd15", "unet."))
    with pytest.raises(prolora.errors.UnsupportedFormat):
        prolora.check(lora, base=lora)


def test_a_whole_model_is_called_one_in_a_file_and_in_memory(tmp_path):
    weights = empty_base("sd15")
    shapes = {key: tuple(x.shape) for key, x in weights.items()}
    file = sparse_file(tmp_path / "base.safetensors", shapes, "F32")
    stored, loaded = (prolora.check(base) for base in (file, weights))
    for checked in (stored, loaded):
        assert checked and checked.kind == "base" and checked.headline.endswith("Diffusion 1.5")
    facts = ("families", "sizes", "modules", "dtypes", "tensors")
    assert [getattr(stored, fact) for fact in facts] == [getattr(loaded, fact) for fact in facts]
    for base in (file, weights):
        checked = prolora.check(base, base="flux")
        assert checked.mark == "✖" and "compare a LoRA with it" in checked.headline


MINI = Path(__file__).parents[2] / "examples" / "mini_family" / "weights"


def mini_lora():
    shapes = prolora.open_base(MINI / "source").shapes
    name = next(name for name in shapes if name.endswith("attn1.to_q"))
    out, inputs = shapes[name][:2]
    factors = {"lora_A": torch.ones(1, inputs), "lora_B": torch.full((out, 1), 1e-3)}
    return {f"unet.{name}.{role}.weight": x for role, x in factors.items()}


@pytest.mark.parametrize("apart", [False, True])
def test_two_bases_get_the_verdict_of_a_transfer(monkeypatch, apart):
    monkeypatch.undo()
    target = prolora.open_base(MINI / "finetuned")
    if apart:
        torch.manual_seed(0)
        target = {f"{n}.weight": torch.randn(shape) for n, shape in target.shapes.items()}
    bases = {"source": MINI / "source", "target": target}
    found = prolora.check(mini_lora(), **bases)
    assert (found.mark, found.headline) == (found.move.mark, found.move.headline)
    if apart:
        assert found.mark == "✖" and "nothing in common" in found.headline
        with pytest.raises(prolora.errors.UnrelatedBases):
            prolora.transfer(mini_lora(), *bases.values())
    else:
        done = prolora.transfer(mini_lora(), *bases.values()).report.in_words()
        assert (done.mark, done.headline) == (found.mark, found.headline)
        assert done.lines[0] == found.move.lines[0]
    with pytest.raises(prolora.errors.InvalidOption, match="takes two models"):
        prolora.check(mini_lora(), source=MINI / "source")


def test_one_model_as_both_bases_or_another_models_is_an_answer_and_no_error():
    source = MINI / "source"
    for lora, base, start in (
        (mini_lora(), source, "source and source are the same model, where the LoRA works as it"),
        (usual_lora("sd15", "unet."), MINI / "finetuned", "This LoRA is for Stable Diffusion 1.5"),
    ):
        answer = prolora.check(lora, source=source, target=base)
        assert not answer and answer.mark == "✖" and answer.headline.startswith(start)
        with pytest.raises(prolora.errors.WrongBase):
            prolora.transfer(lora, source, base)
    same = prolora.check(mini_lora(), source=source, target=source)
    assert "The options named here are those of `transfer()`." in str(same)


@pytest.mark.parametrize(
    ("own", "other", "told"),
    [
        ("anima", "anima-2.9b", "look like a LoRA for Anima; this base is Anima 2.9B"),
        ("koala-700m", "koala-1b", "look like a LoRA for KOALA 700M; this base is KOALA 1B"),
        ("sd3-medium", "sd3.5-medium", "would have it in Stable Diffusion 3 Medium, too"),
        ("bk-sdm-small", "bk-sdm-base", "look like a LoRA for BK-SDM-Small"),
        ("ltxv-13b", "ltx2", "LTX-2.5 or LTX-Video 13B, too"),
        (
            "anima",
            "anima",
            "for this base, by names and shapes: 272 of 272 modules have their place",
        ),
    ],
)
def test_a_lora_of_another_size_fits_with_a_word_alone(own, other, told):
    prefix = "unet." if own.startswith(("koala", "bk-sdm")) else "transformer."
    lora = attention_lora(own, prefix)
    fit = prolora.check(lora, base=empty_base(other)).base_match
    assert told in fit.sentence
    assert (fit.answer == "unclear") == ("look like" in told)
