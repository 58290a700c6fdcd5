"""LoRAs for Wan as people have them: norms, biases, and tensors that are no matrices."""

import torch

from prolora.adapters import encode_state_dict, read_adapter

WIDTH = 80


def pair(name, out, inputs):
    return {
        f"diffusion_model.{name}.lora_up.weight": torch.randn(out, 2),
        f"diffusion_model.{name}.lora_down.weight": torch.randn(2, inputs),
        f"diffusion_model.{name}.alpha": torch.tensor(2.0),
    }


def wan_file():
    block = "blocks.0"
    tensors = {}
    for attention in ("self_attn", "cross_attn"):
        for part in "qkvo":
            name = f"{block}.{attention}.{part}"
            tensors |= pair(name, WIDTH, WIDTH)
            tensors[f"diffusion_model.{name}.diff_b"] = torch.randn(WIDTH)
        tensors[f"diffusion_model.{block}.{attention}.norm_q.diff"] = torch.randn(WIDTH)
    tensors |= pair(f"{block}.ffn.0", 216, WIDTH) | pair(f"{block}.ffn.2", WIDTH, 216)
    tensors[f"diffusion_model.{block}.norm3.diff"] = torch.randn(WIDTH)
    tensors[f"diffusion_model.{block}.norm3.diff_b"] = torch.randn(WIDTH)
    return tensors


NO_MATRICES = {
    "diffusion_model.blocks.0.diff_m": torch.randn(1, 6, WIDTH),
    "diffusion_model.blocks.0.modulation.diff": torch.randn(1, 6, WIDTH),
    "diffusion_model.patch_embedding.diff": torch.randn(WIDTH, 16, 1, 2, 2),
}


def test_norms_and_biases_keep_their_names_and_what_is_no_matrix_is_left_out_by_name():
    tensors = wan_file()
    adapter = read_adapter(tensors | NO_MATRICES)
    assert adapter.family == "wan"
    assert adapter.left_out.keys() == NO_MATRICES.keys()
    assert "blocks.0.attn1.to_q" in adapter.updates and len(adapter.vectors) == 12
    written = encode_state_dict(adapter, dtype=torch.float32)
    for key, tensor in tensors.items():
        if key.endswith(("diff", "diff_b")):
            suffixes = (".diff_b", ".b_norm") if key.endswith("_b") else (".w_norm",)
            stem = key.rpartition(".")[0]
            assert any(torch.equal(written.get(stem + s, torch.zeros(1)), tensor) for s in suffixes)


def test_an_update_of_a_convolution_over_time_is_left_out_and_counts_as_skipped():
    volume = {
        "diffusion_model.patch_embedding.lora_up.weight": torch.randn(WIDTH, 2, 1, 1, 1),
        "diffusion_model.patch_embedding.lora_down.weight": torch.randn(2, 16, 1, 2, 2),
    }
    adapter = read_adapter(wan_file() | volume)
    assert adapter.unread == {"patch_embedding": (WIDTH, 64, 2)}
    assert "over time" in adapter.left_out["patch_embedding"]
