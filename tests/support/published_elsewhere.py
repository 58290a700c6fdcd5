"""Models that diffusers has no class for, built on the meta device from what others have of them.

Each is a class of diffusers or transformers, with the layers added that its authors added to it.
What ComfyUI builds for the same checkpoints was compared, outside of this repository: all names and
shapes are equal, but for layers of HiDream-O1 that nothing runs (see `build_hidream_o1`).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from published_models import Published

if TYPE_CHECKING:
    from torch import nn


def build_chroma_radiance() -> nn.Module:
    """Chroma whose first and last layers meet pixels: patches in, a small network a pixel out."""
    import diffusers
    from torch import nn

    width, patch, channels, hidden, frequencies = 3072, 16, 3, 64, 8
    model = diffusers.ChromaTransformer2DModel.from_config({})
    del model.x_embedder, model.norm_out, model.proj_out
    model.img_in_patch = nn.Conv2d(channels, width, patch, patch)
    model.nerf_image_embedder = nn.ModuleDict(
        {"embedder": nn.Sequential(nn.Linear(channels + frequencies**2, hidden))}
    )
    # Gate, value and output of a feed-forward layer four times as wide, made for every patch.
    made = nn.Linear(width, 3 * 4 * hidden**2)
    model.nerf_blocks = nn.ModuleList(
        nn.ModuleDict({"param_generator": copy.deepcopy(made), "norm": nn.RMSNorm(hidden)})
        for _ in range(4)
    )
    model.nerf_final_layer_conv = nn.ModuleDict(
        {"norm": nn.RMSNorm(hidden), "conv": nn.Conv2d(hidden, channels, 3, padding=1)}
    )
    return model


def build_omnigen2() -> nn.Module:
    """Lumina 2 with a second way in, for the images to work from."""
    import diffusers
    import torch
    from torch import nn

    width = 2520
    model = diffusers.Lumina2Transformer2DModel.from_config(
        {
            "hidden_size": width,
            "num_layers": 32,
            "num_attention_heads": 21,
            "num_kv_heads": 7,
            "cap_feat_dim": 2048,
            "axes_dim_rope": (40, 40, 40),
        }
    )
    model.ref_image_patch_embedder = nn.Linear(64, width)
    model.ref_image_refiner = copy.deepcopy(model.noise_refiner)
    model.image_index_embedding = nn.Parameter(torch.empty(5, width))
    return model


def build_hidream_o1() -> nn.Module:
    """Qwen3-VL 8B with layers for the time step and for patches of pixels.

    Its authors' files also have a head for words and three `deepstack_merger_list`s of the vision
    tower. Nothing runs the head, which is left out; ComfyUI's files have neither.
    """
    from torch import nn
    from transformers import Qwen3VLConfig, Qwen3VLModel

    width, patch = 4096, 32 * 32 * 3
    text = {
        "hidden_size": width,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    }
    vision = {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": width,
        "deepstack_visual_indexes": [8, 16, 24],
    }
    model = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision))
    model.t_embedder1 = nn.ModuleDict(
        {"mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))}
    )
    model.x_embedder = nn.ModuleDict(
        {"proj1": nn.Linear(patch, 1024, bias=False), "proj2": nn.Linear(1024, width)}
    )
    model.final_layer2 = nn.ModuleDict({"linear": nn.Linear(width, patch)})
    return model


ELSEWHERE = {
    "chroma-radiance": Published(
        "Chroma Radiance",
        "",
        9.5,
        "lodestone-rock/flow and ai-toolkit, diffusion_models/chroma/src/radiance.py",
        text_encoders=("t5-xxl",),
        build=build_chroma_radiance,
    ),
    "hidream-o1": Published(
        "HiDream-O1",
        "",
        8.2,
        "HiDream-ai/HiDream-O1-Image, and musubi-tuner, hidream_o1/qwen3_vl_transformers.py",
        build=build_hidream_o1,
    ),
    "omnigen2": Published(
        "OmniGen2",
        "",
        4.0,
        "VectorSpaceLab/OmniGen2, omnigen2/models/transformers, and its transformer/config.json",
        text_encoders=("qwen2.5-vl-3b",),
        build=build_omnigen2,
    ),
}
