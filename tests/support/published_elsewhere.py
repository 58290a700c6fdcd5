"""Models that diffusers has no class for, built on the meta device from what others have of them.

Each is a class of diffusers or transformers, with the layers added that its authors added to it.
What ComfyUI builds for the same checkpoints was compared, outside of this repository: all names and
shapes are equal, but for layers of HiDream-O1 that nothing runs (see `build_hidream_o1`).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from published_models import Published
from published_videos import WAN_14B

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


def build_boogu() -> nn.Module:
    """OmniGen2 wider, its first blocks with a stream for the instruction beside the image's."""
    import diffusers
    from torch import nn

    width, narrow, heads, config = 3360, 840, 28, {"multiple_of": 256}
    config |= {"hidden_size": width, "num_layers": 32, "num_attention_heads": heads}
    config |= {"num_kv_heads": 7, "cap_feat_dim": 4096, "axes_dim_rope": (40, 40, 40)}
    model = diffusers.Lumina2Transformer2DModel.from_config(config)
    model.ref_image_patch_embedder = nn.Linear(64, width)
    model.ref_image_refiner = copy.deepcopy(model.noise_refiner)
    model.image_index_embedding = nn.Parameter(model.x_embedder.weight.new_empty(5, width))
    model.single_stream_layers = model.layers
    del model.layers
    block = model.single_stream_layers[0]
    streams = {
        f"{stream}_{name}": nn.Linear(width, size, bias=False)
        for stream in ("img", "instruct")
        for name, size in (("to_q", width), ("to_k", narrow), ("to_v", narrow), ("out", width))
    }
    parts = {
        "img_instruct_attn": nn.ModuleDict(
            {"to_out": block.attn.to_out, "processor": nn.ModuleDict(streams)}
        ),
        "img_self_attn": block.attn,
        "img_feed_forward": block.feed_forward,
        "instruct_feed_forward": block.feed_forward,
        **{f"img_norm{number}": block.norm1 for number in (1, 2, 3)},
        **{f"instruct_norm{number}": block.norm1 for number in (1, 2)},
    }
    double = nn.ModuleDict({name: copy.deepcopy(part) for name, part in parts.items()})
    model.double_stream_layers = nn.ModuleList(copy.deepcopy(double) for _ in range(8))
    return model


def build_llada() -> nn.Module:
    """Z-Image on other latents, with two more embedders and a refiner of semantic features."""
    import diffusers
    from torch import nn

    model = diffusers.ZImageTransformer2DModel.from_config(
        {"all_patch_size": (1,), "in_channels": 128}
    )
    width, text, features = 3840, 2560, 4096
    for name, size in (("cap", text), ("semantic", features), ("sigvq", features)):
        embedder = nn.Sequential(nn.Identity(), nn.Linear(size, width))
        setattr(model, f"{name}_embedder", embedder)
    model.sigvq_refiner = copy.deepcopy(model.context_refiner)
    model.sigvq_pad_token = copy.deepcopy(model.cap_pad_token)
    for module in model.modules():
        for name in [n for n, part in module.named_children() if "norm" in n.lower()]:
            delattr(module, name)  # its norms have no weights
    return model


def build_wan_s2v() -> nn.Module:
    """Wan with an encoder of sounds, and attention to them in twelve blocks."""
    import diffusers
    from torch import nn

    width, sound = 5120, 1024
    model = diffusers.WanTransformer3DModel.from_config(WAN_14B)
    made = model.patch_embedding.weight
    model.cond_encoder = nn.Conv3d(16, width, (1, 2, 2))
    encoder = {
        "conv1_local": nn.ModuleDict({"conv": nn.Conv1d(sound, width, 3)}),
        "conv1_global": nn.ModuleDict({"conv": nn.Conv1d(sound, width // 4, 3)}),
        "conv2": nn.ModuleDict({"conv": nn.Conv1d(width // 4, width // 2, 3)}),
        "conv3": nn.ModuleDict({"conv": nn.Conv1d(width // 2, width, 3)}),
        "final_linear": nn.Linear(width, width),
    }
    model.casual_audio_encoder = nn.ModuleDict({"encoder": nn.ModuleDict(encoder)})
    model.casual_audio_encoder.weights = nn.Parameter(made.new_empty(1, 25, 1, 1))
    tokens = nn.Parameter(made.new_empty(1, 1, 1, width))
    model.casual_audio_encoder["encoder"].padding_tokens = tokens
    attention = nn.ModuleDict({name: nn.Linear(width, width) for name in "qkvo"})
    norms = {f"norm_{name}": nn.RMSNorm(width) for name in "qk"}
    attention.update(norms)
    modulation = nn.ModuleDict({"linear": nn.Linear(width, 2 * width)})
    model.audio_injector = nn.ModuleDict(
        {
            "injector": nn.ModuleList(copy.deepcopy(attention) for _ in range(12)),
            "injector_adain_layers": nn.ModuleList(copy.deepcopy(modulation) for _ in range(12)),
        }
    )
    model.trainable_cond_mask = nn.Embedding(3, width)
    model.frame_packer = nn.ModuleDict(
        {
            "proj": nn.Conv3d(16, width, (1, 2, 2)),
            "proj_2x": nn.Conv3d(16, width, (2, 4, 4)),
            "proj_4x": nn.Conv3d(16, width, (4, 8, 8)),
        }
    )
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


def publish_built(title: str, billions: float, build, source: str, *encoders: str) -> Published:
    return Published(title, "", billions, source, text_encoders=encoders, build=build)


BOOGU = "boogu-project/Boogu-Image, boogu/models/transformers; sizes as ai-toolkit has them"
LLADA = "diffusers, pull request 14815, and ComfyUI, comfy/ldm/llada_image/model.py"
RADIANCE = "lodestone-rock/flow and ai-toolkit, diffusion_models/chroma/src/radiance.py"
O1 = "HiDream-ai/HiDream-O1-Image, and musubi-tuner, hidream_o1/qwen3_vl_transformers.py"
OMNIGEN2 = "VectorSpaceLab/OmniGen2, omnigen2/models/transformers, and its transformer/config.json"
S2V = "Wan-Video/Wan2.2, wan/configs/wan_s2v_14B.py"
ELSEWHERE = {
    "boogu-image": publish_built("Boogu-Image", 10.3, build_boogu, BOOGU, "qwen3-vl-8b"),
    "llada-image": publish_built("LLaDA-Image", 6.5, build_llada, LLADA, "llada2-mini"),
    "wan2.2-s2v-14b": publish_built("Wan 2.2 S2V 14B", 16.3, build_wan_s2v, S2V, "umt5-xxl"),
    "chroma-radiance": publish_built(
        "Chroma Radiance", 9.5, build_chroma_radiance, RADIANCE, "t5-xxl"
    ),
    "hidream-o1": publish_built("HiDream-O1", 8.2, build_hidream_o1, O1),
    "omnigen2": publish_built("OmniGen2", 4.0, build_omnigen2, OMNIGEN2, "qwen2.5-vl-3b"),
}
