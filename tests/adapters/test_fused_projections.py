"""Updates of q, k and v in one, as diffusers fuses projections: split by rows, of any kind."""

from __future__ import annotations

import pytest
import torch
from lora_files import random

import prolora

# Krea 2's, of SimpleTuner: "lora key not loaded: …text_fusion_layerwise_blocks_0_attn_to_qkv…"
STEM = "text_fusion.layerwise_blocks.0.attn.to_"
OUT, INPUTS, RANK = 12, 8, 2
HEADER = {"ss_base_model_version": "krea2"}
UP, DOWN = random(3 * OUT, RANK), random(RANK, INPUTS, seed=1)
PEFT = {"lora_B.weight": UP, "lora_A.weight": DOWN}
ONE, TWO, WHOLE = random(6, 2, seed=2), random(6, 4, seed=3), random(3 * OUT, INPUTS, seed=4)
KINDS = {
    "lora": (PEFT, UP @ DOWN),
    "lokr": ({"lokr_w1": ONE, "lokr_w2": TWO}, torch.kron(ONE, TWO)),
    "full": ({"diff": WHOLE}, WHOLE),
}


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", "lycoris_", "lora_unet_"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_update_is_split_into_those_of_its_parts(prefix, kind):
    tensors, update = KINDS[kind]
    path = f"{prefix}{STEM}qkv" if prefix[-1] == "." else (prefix + f"{STEM}qkv").replace(".", "_")
    lora = prolora.Lora.open({f"{path}.{name}": x for name, x in tensors.items()}, HEADER)
    converted = prolora.convert(lora)
    updates = converted.adapter.updates
    assert list(updates) == [f"{STEM}{part}" for part in "qkv"] and not converted.report.left_out
    for part, rows in zip("qkv", update.split(OUT), strict=True):
        assert torch.allclose(updates[f"{STEM}{part}"].dense(), rows, atol=1e-4)


def test_a_fused_dora_is_scaled_row_by_row_of_its_parts_weights():
    weights = {f"{STEM}{part}": random(OUT, INPUTS, seed=i) for i, part in enumerate("qkv", 5)}
    scale = random(3 * OUT, 1, seed=9).abs()
    tensors = {f"transformer.{STEM}qkv.{role}": x for role, x in PEFT.items()}
    tensors |= {f"transformer.{STEM}qkv.dora_scale": scale}
    updates = prolora.convert(prolora.Lora.open(tensors, HEADER), weights).adapter.updates
    whole = torch.cat(list(weights.values())).double()
    merged = whole + UP.double() @ DOWN.double()
    wanted = scale * merged / merged.norm(dim=1, keepdim=True) - whole
    for part, rows in zip("qkv", wanted.split(OUT), strict=True):
        assert torch.allclose(updates[f"{STEM}{part}"].dense().double(), rows, atol=1e-4)
