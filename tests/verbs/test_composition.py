"""Results of one verb as the input of another, in memory, and options that are left unset."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from spectra import related, weights

import prolora
from prolora.errors import OutputError, UnsupportedFormat

NAMES = [f"transformer_blocks.{i}.attn.{n}" for i in range(3) for n in ("to_q", "to_k", "to_v")]


def base(seed, drift=0.05):
    """Two seeds give two related models."""
    first = {name: weights(32, 32, i) for i, name in enumerate(NAMES)}
    return {f"{n}.weight": related(w, drift, seed) if seed else w for n, w in first.items()}


def lora(seed):
    torch.manual_seed(seed)
    sides = {"A": (4, 32), "B": (32, 4)}
    return {f"transformer.{n}.lora_{s}.weight": torch.randn(sides[s]) for n in NAMES for s in sides}


def changes(tensors):
    """Name -> the dense update of a state dict in diffusers' names."""
    return {
        n: tensors[f"transformer.{n}.lora_B.weight"] @ tensors[f"transformer.{n}.lora_A.weight"]
        for n in NAMES
    }


@pytest.fixture(scope="module")
def moved():
    return prolora.transfer(lora(0), base(0), base(1))


def test_a_result_is_the_input_of_every_other_verb(moved):
    wanted = changes(moved.state_dict("diffusers"))
    model = {key: weight.double() for key, weight in base(1).items()}
    for again in (
        prolora.convert(moved, dtype="float32"),
        prolora.transfer(moved, base(1), base(2), method="copy"),
        prolora.transfer(prolora.convert(moved), base(1), base(2), method="copy"),
    ):
        found = changes(again.state_dict("diffusers"))
        for name, update in wanted.items():
            torch.testing.assert_close(found[name], update, rtol=1e-5, atol=1e-5)
    other = changes(lora(1))
    merged = changes(prolora.merge([moved, lora(1)]).state_dict("diffusers"))
    for given in (moved, [moved], (moved,)):
        baked = prolora.bake(given, model).tensors
        for name, update in wanted.items():
            torch.testing.assert_close(merged[name], update + other[name], rtol=1e-4, atol=1e-4)
            change = baked[f"{name}.weight"] - model[f"{name}.weight"]
            torch.testing.assert_close(change.float(), update, rtol=1e-4, atol=1e-4)


def test_check_describes_a_result_as_its_file(moved, tmp_path):
    path = tmp_path / "moved.safetensors"
    moved.save(path)
    of_file = prolora.check(path, base=base(1))
    for given in (moved, moved.adapter):
        of_memory = prolora.check(given, base=base(1))
        assert (of_memory.kind, of_memory.base_match) == (of_file.kind, of_file.base_match)


def test_a_result_does_not_overwrite_the_file_that_it_was_made_of(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(lora(0), path)
    moved = prolora.transfer(path, base(0), base(1))
    for verb in (prolora.convert, lambda x, **k: prolora.merge([x, lora(1)], **k)):
        with pytest.raises(OutputError, match="would overwrite the input"):
            verb(moved, out=path, overwrite=True)
    assert load_file(path).keys() == lora(0).keys()
    out = tmp_path / "converted.safetensors"
    prolora.convert(moved, out=out)
    assert out.exists()


def test_a_rank_of_none_is_the_default_of_each_verb(moved):
    found = prolora.transfer(lora(0), base(0), base(1), out_rank=None).state_dict()
    for key, tensor in moved.state_dict().items():
        assert torch.equal(found[key], tensor)
    tuned, usual = base(1), prolora.extract(base(0), base(1)).state_dict()
    for key, tensor in prolora.extract(base(0), tuned, out_rank=None).state_dict().items():
        assert torch.equal(usual[key], tensor)


def test_a_target_with_other_names_is_refused_with_a_name_of_each():
    target = {"other.weight": torch.randn(32, 32)}
    words = r"has no transformer_blocks\.0\.attn\.to_q; it has other\."
    with pytest.raises(UnsupportedFormat, match=words):
        prolora.transfer(lora(0), base(0), target)


def test_a_copy_is_reported_as_a_copy(moved):
    words = str(moved.report)
    assert "9 of 9 modules copied from" in words and "The copied modules hold 100%" in words
    assert "cosine" not in words and "away from" not in words
    half = str(prolora.transfer(lora(0), base(0), base(1), method="copy", strength=0.5).report)
    assert "100% of the LoRA's energy, times 0.5." in half
    projected = str(prolora.transfer(lora(0), base(0), base(1), method="prolora").report)
    assert "9 of 9 modules moved from" in projected and "differs from a copy by" in projected
