"""A question has one answer, whichever verb asks it and whatever a LoRA or a base comes as."""

import re

import pytest
import torch
from mini import lora_tensors, source_weights, target_weights
from odd_files import make_lora
from safetensors.torch import save_file

import prolora
from prolora import errors

VERBS = {
    "convert": prolora.convert,
    "merge": lambda lora, base: prolora.merge([lora, lora], base),
    "bake": lambda lora, base: prolora.bake([lora], base),
    "transfer": lambda lora, base: prolora.transfer(lora, base, make_base(target_weights())),
}


def make_base(weights):
    """A base in memory."""
    return {f"{name}.weight": tensor for name, tensor in weights.items()}


def make_dora():
    """A DoRA on every module of the source."""
    tensors = lora_tensors()
    scales = {key.replace("alpha", "dora_scale"): torch.ones(24, 1) for key in tensors}
    return tensors | {key: scale for key, scale in scales.items() if "dora" in key}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_lora_of_another_model_is_refused_in_one_sentence(verb, kind, tmp_path):
    tensors, base = make_lora("flux", "comfy"), make_base(source_weights())
    if kind == "dora":
        tensors |= {
            key.replace("lora_B.weight", "dora_scale"): torch.ones(len(tensor), 1)
            for key, tensor in tensors.items()
            if key.endswith("lora_B.weight")
        }
    save_file(tensors, tmp_path / "lora.safetensors")
    role, name = ("source", "the source") if verb == "transfer" else ("base", "state dict")
    sentence = f"This LoRA is for FLUX.1. The {role} you gave, {name}, is a UNet with 3 transf"
    for lora, start in ((tensors, ""), (path := tmp_path / "lora.safetensors", f"{path}: ")):
        with pytest.raises(errors.WrongBase) as refusal:
            VERBS[verb](lora, base)
        assert str(refusal.value).startswith(start + sentence)
        assert "the state dict" not in str(refusal.value)
        assert str(refusal.value).count(str(path)) == bool(start)


@pytest.mark.parametrize("verb", VERBS)
def test_nan_in_a_base_is_named_for_a_lora_that_depends_on_its_weights(verb):
    weights = source_weights()
    module = next(iter(weights))
    weights[module][0, 1] = torch.nan
    place = rf"{module}.weight of .*: 1 of 576 values are NaN or Inf, the first at \[0, 1\]"
    loras = [make_dora(), lora_tensors()] if verb in ("bake", "transfer") else [make_dora()]
    for lora in loras:  # a plain one needs no weights to be converted or merged
        with pytest.raises(errors.NonFiniteWeights, match=place):
            VERBS[verb](lora, make_base(weights))


def test_a_base_that_is_read_on_request_is_baked_as_one_in_memory():
    tensors = make_base(source_weights())
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    outline = prolora.open_base(shapes, read=tensors.__getitem__)
    for lora in (lora_tensors(), make_dora()):
        one, other = (prolora.bake([lora], base) for base in (tensors, outline))
        assert one.tensors.keys() == other.tensors.keys() == tensors.keys()
        assert all(torch.equal(one.tensors[key], other.tensors[key]) for key in tensors)
        assert one.whole.survived == other.whole.survived == pytest.approx(1)
        assert not any(torch.equal(one.tensors[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize(
    "kept, reason",
    [
        (r".*(?<!0_attn1_to_q.lora_down.weight)", "so the file is incomplete; download or save it"),
        ("nothing", "holds no tensors at all; download it again"),
        (None, "is a weight of a base model, not a LoRA; give the LoRA"),
    ],
)
def test_what_is_no_whole_lora_is_called_so_by_every_verb(kept, reason, tmp_path):
    base, path = make_base(source_weights()), tmp_path / "lora.safetensors"
    tensors = {k: x for k, x in lora_tensors().items() if kept and re.fullmatch(kept, k)}
    tensors = base if kept is None else tensors
    save_file(tensors, path)
    for lora, where in ((tensors, "the state dict: "), (path, f"{path}: ")):
        sentences = set()
        for ask in [*VERBS.values(), lambda lora, _: prolora.merge([lora, lora])]:
            with pytest.raises(errors.UnsupportedFormat) as refusal:
                ask(lora, base)
            sentences.add(str(refusal.value))
        assert len(sentences) == 1 and reason in (sentence := sentences.pop())
        assert sentence.startswith(where)


def test_a_base_without_any_module_of_the_lora_is_not_called_baked():
    path = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    text = {
        f"{path}.lora_up.weight": torch.ones(8, 2),
        f"{path}.lora_down.weight": torch.ones(2, 8),
    }
    base, reason = make_base(source_weights()), "no module that the LoRA changes.*self_attn.q_proj:"
    with pytest.raises(errors.UnsupportedFormat, match=reason):
        prolora.bake([text], base)
    done = prolora.bake([text, lora_tensors()], base)
    assert [*done.left_out] == ["text_encoder.text_model.encoder.layers.0.self_attn.q_proj"]
    sentence = done.in_words()
    assert sentence.mark == "⚠" and done.whole.survived == pytest.approx(1)
    assert sentence.headline.endswith("have the LoRA but for 1 of its modules.")
