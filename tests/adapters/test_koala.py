"""KOALA has one layer in a block, SDXL two: the original numbers of its blocks mean others."""

import pytest
import torch

from prolora.adapters import Adapter, encode_state_dict
from prolora.architectures.layouts import load_layout
from prolora.core.lowrank import LowRank
from prolora.errors import UnsupportedFormat


@pytest.mark.parametrize("size", ["koala-1b", "koala-700m"])
def test_koala_is_written_in_names_that_comfyui_has_for_it_or_not_at_all(size: str) -> None:
    """Under SDXL's numbers ComfyUI and diffusers would have loaded a part and said nothing."""
    layout = load_layout(size)
    shapes = {name: layout.shapes[name] for name in layout.attention}
    updates = {n: LowRank(torch.ones(m, 1), torch.ones(1, k)) for n, (m, k) in shapes.items()}
    keys = encode_state_dict(Adapter(updates), format="kohya")
    assert all(
        key.startswith(("lora_unet_down_", "lora_unet_up_", "lora_unet_mid")) for key in keys
    )
    with pytest.raises(UnsupportedFormat, match="no name in the comfy format"):
        encode_state_dict(Adapter(updates), format="comfy")
