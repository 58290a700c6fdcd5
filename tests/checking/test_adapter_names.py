"""Keys that hold the name of PEFT's adapter: `to_q.lora_A.default_0.weight`."""

import pytest
import torch
from lora_files import attention_lora

import prolora
from prolora import check
from prolora.errors import UnsupportedFormat


def named(name):
    """A LoRA for FLUX.1 as `model.state_dict()` spells it, with an adapter of this name."""
    plain = attention_lora("flux1-dev")
    return {
        key.replace(".lora_A.", f".lora_A.{name}.").replace(".lora_B.", f".lora_B.{name}."): x
        for key, x in plain.items()
    }


@pytest.mark.parametrize("name", ["default", "default_0", "my_style", "weight"])
def test_any_adapter_name_is_read(name):
    found = check(named(name))
    assert found.modules == check(attention_lora("flux1-dev")).modules
    assert not found.left_out and not found.reason


@pytest.mark.parametrize(
    ("name", "mark"), [("default", "✔"), ("default_0", "⚠"), ("my_style", "⚠")]
)
def test_only_the_name_default_was_tried_with_comfyui(name, mark):
    found = check(named(name), program="comfyui")
    assert str(found).startswith(mark)
    if mark == "⚠":
        assert "was not tried" in str(found)


@pytest.mark.parametrize("format", ["auto", "kohya", "diffusers"])
def test_a_converted_file_has_no_adapter_name(format):
    for name in ("default", "my_style"):
        made = prolora.convert(named(name), format=format).state_dict()
        assert not [key for key in made if f".{name}." in key]
        plain = prolora.convert(attention_lora("flux1-dev"), format=format).state_dict()
        assert made.keys() == plain.keys()
        for key, tensor in plain.items():
            assert torch.equal(made[key], tensor), key


def test_two_adapters_in_one_file_are_refused_by_both_keys():
    both = named("default_0") | named("default_1")
    with pytest.raises(UnsupportedFormat, match=r"default_0.* and .*default_1.*remove one"):
        prolora.convert(both)
