"""Updates of q, k and v in one, as diffusers fuses projections: split by rows, of any kind."""

from __future__ import annotations

import pytest
import torch

from prolora.adapters import read_adapter
from prolora.adapters.file_model import BaseNames
from prolora.architectures.identify import Model

# Krea 2's, of SimpleTuner: "lora key not loaded: …text_fusion_layerwise_blocks_0_attn_to_qkv…"
STEM = "text_fusion.layerwise_blocks.0.attn.to_"
OUT, INPUTS, RANK = 12, 8, 2
KREA = BaseNames(Model.of("krea2"))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kinds():
    """Kind -> (tensors of the fused module, its update)."""
    up, down = random(3 * OUT, RANK), random(RANK, INPUTS, seed=1)
    yield "lora", {"lora_B.weight": up, "lora_A.weight": down}, up @ down
    one, two = random(6, 2, seed=2), random(6, 4, seed=3)
    yield "lokr", {"lokr_w1": one, "lokr_w2": two}, torch.kron(one, two)
    whole = random(3 * OUT, INPUTS, seed=4)
    yield "full", {"diff": whole}, whole


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", "lycoris_", "lora_unet_"])
@pytest.mark.parametrize(("kind", "tensors", "update"), kinds(), ids=["lora", "lokr", "full"])
def test_a_fused_update_is_split_into_those_of_its_parts(prefix, kind, tensors, update):
    path = f"{prefix}{STEM}qkv" if prefix[-1] == "." else (prefix + f"{STEM}qkv").replace(".", "_")
    adapter = read_adapter({f"{path}.{name}": x for name, x in tensors.items()}, base=KREA)
    assert list(adapter.updates) == [f"{STEM}{part}" for part in "qkv"] and not adapter.left_out
    for part, rows in zip("qkv", update.split(OUT), strict=True):
        made = adapter.updates[f"{STEM}{part}"]
        assert torch.allclose(made.up @ made.down, rows, atol=1e-4)


def test_a_fused_dora_is_scaled_row_by_row_of_its_parts_weights():
    up, down = random(3 * OUT, RANK), random(RANK, INPUTS, seed=1)
    weights = {f"{STEM}{part}": random(OUT, INPUTS, seed=i) for i, part in enumerate("qkv", 5)}
    scale = random(3 * OUT, 1, seed=9).abs()
    path = f"transformer.{STEM}qkv"
    tensors = {f"{path}.lora_B.weight": up, f"{path}.lora_A.weight": down}
    tensors |= {f"{path}.dora_scale": scale}
    adapter = read_adapter(tensors, base=KREA, read_weight=weights.__getitem__)
    whole = torch.cat(list(weights.values())).double()
    merged = whole + up.double() @ down.double()
    wanted = scale * merged / merged.norm(dim=1, keepdim=True) - whole
    for part, rows in zip("qkv", wanted.split(OUT), strict=True):
        made = adapter.updates[f"{STEM}{part}"]
        assert torch.allclose((made.up @ made.down).double(), rows, atol=1e-4)
