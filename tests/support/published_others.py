"""Published sizes of families that few LoRAs move within, or that only diffusers runs."""

from __future__ import annotations

from published_models import DEFAULTS, Published

SCRIPT = "diffusers, scripts/convert_{}_to_diffusers.py"
QWEN_AND_CLIP = ("qwen2.5-vl-7b", "clip-l")
KANDINSKY = {"in_visual_dim": 16, "out_visual_dim": 16}
FROM_FRAMES = {**KANDINSKY, "visual_cond": True}
COG_5B = {"num_layers": 42, "num_attention_heads": 48}
COG_15 = {
    **COG_5B,
    "patch_size_t": 2,
    "patch_bias": False,
    "use_rotary_positional_embeddings": True,
}
SANA_600M = {
    "num_attention_heads": 36,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
    "num_layers": 28,
}
SPRINT = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}


def publish_kandinsky(title: str, billions: float, **config: object) -> Published:
    return Published(
        title,
        "Kandinsky5Transformer3DModel",
        billions,
        "musubi-tuner, kandinsky5/configs.py",
        config,
        QWEN_AND_CLIP,
    )


def publish_sana(title: str, billions: float, **config: object) -> Published:
    source = SCRIPT.format("sana")
    return Published(title, "SanaTransformer2DModel", billions, source, config, ("gemma2-2b",))


def publish_cogvideox(title: str, billions: float, **config: object) -> Published:
    source = "the models' configurations, transformer/config.json"
    return Published(title, "CogVideoXTransformer3DModel", billions, source, config, ("t5-xxl",))


OTHERS = {
    "ace-step-1.5": Published(
        "ACE-Step 1.5", "AceStepTransformer1DModel", 1.6, DEFAULTS, {}, ("qwen3-embedding-0.6b",)
    ),
    "ace-step-1.5-xl": Published(
        "ACE-Step 1.5 XL",
        "AceStepTransformer1DModel",
        4.2,
        "ACE-Step/acestep-v15-xl-base, config.json, as its ports have it",
        {
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "encoder_hidden_size": 2048,
        },
        ("qwen3-embedding-0.6b",),
    ),
    "mageflow": Published(
        "Mage-Flow",
        "QwenImageTransformer2DModel",
        4.1,
        "microsoft/Mage, mage_flow/models/mage_flow.py, whose class has the same names and shapes",
        {
            "patch_size": 1,
            "in_channels": 128,
            "out_channels": 128,
            "num_layers": 12,
            "joint_attention_dim": 2560,
        },
        ("qwen3-vl-4b",),
    ),
    "longcat-image": Published(
        "LongCat-Image",
        "LongCatImageTransformer2DModel",
        6.3,
        "meituan-longcat/LongCat-Image, transformer/config.json, as its ports have it",
        {"num_layers": 10, "num_single_layers": 20},
        ("qwen2.5-vl-7b",),
    ),
    "ideogram4": Published(
        "Ideogram 4", "Ideogram4Transformer2DModel", 9.3, DEFAULTS, {}, ("qwen3-vl-8b",)
    ),
    "ernie-image": Published(
        "ERNIE-Image",
        "ErnieImageTransformer2DModel",
        8.0,
        "baidu/ERNIE-Image, transformer/config.json",
        {
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_layers": 36,
            "ffn_hidden_size": 12288,
            "text_in_dim": 3072,
        },
        ("ministral-3b",),
    ),
    "flux3-klein": Published("FLUX.3 [klein]", "Flux3Transformer2DModel", 5.5, DEFAULTS),
    "flux3-klein-distilled": Published(
        "FLUX.3 [klein] distilled to a few steps",
        "Flux3Transformer2DModel",
        5.5,
        "the class's flow_map, which is that of step-distilled models",
        {"flow_map": True},
    ),
    "minimax-h3": Published(
        "MiniMax-H3", "MiniMaxH3Transformer3DModel", 33.1, DEFAULTS, {}, ("qwen3-vl-32b",)
    ),
    "kandinsky5-lite": publish_kandinsky(
        "Kandinsky 5 Lite", 2.0, **FROM_FRAMES, model_dim=1792, ff_dim=7168
    ),
    "kandinsky5-pro": publish_kandinsky(
        "Kandinsky 5 Pro",
        19.3,
        **FROM_FRAMES,
        model_dim=4096,
        ff_dim=16384,
        time_dim=1024,
        num_text_blocks=4,
        num_visual_blocks=60,
    ),
    "kandinsky5-image-lite": publish_kandinsky(
        "Kandinsky 5 Image Lite",
        6.0,
        **KANDINSKY,
        model_dim=2560,
        ff_dim=10240,
        num_visual_blocks=50,
    ),
    "kandinsky5-image-lite-edit": publish_kandinsky(
        "Kandinsky 5 Image Lite, editing",
        6.0,
        **FROM_FRAMES,
        model_dim=2560,
        ff_dim=10240,
        num_visual_blocks=50,
    ),
    "bria-fibo": Published(
        "Bria FIBO",
        "BriaFiboTransformer2DModel",
        8.3,
        "briaai/FIBO, transformer/config.json",
        {"in_channels": 48, "num_layers": 8},
        ("smollm3-3b",),
    ),
    "cogview4": Published(
        "CogView4",
        "CogView4Transformer2DModel",
        6.4,
        SCRIPT.format("cogview4"),
        {
            "num_layers": 28,
            "num_attention_heads": 32,
            "attention_head_dim": 128,
            "condition_dim": 256,
        },
        ("glm-4-9b",),
    ),
    "sana-0.6b": publish_sana("Sana 0.6B", 0.6, **SANA_600M),
    "sana-1.6b": publish_sana("Sana 1.6B", 1.6),
    "sana-4.8b": publish_sana("Sana 1.5 4.8B", 4.7, num_layers=60),
    "sana-sprint-0.6b": publish_sana("Sana Sprint 0.6B", 0.6, **SANA_600M, **SPRINT),
    "sana-sprint-1.6b": publish_sana("Sana Sprint 1.6B", 1.6, **SPRINT),
    "mochi": Published("Mochi 1", "MochiTransformer3DModel", 10.0, DEFAULTS, {}, ("t5-xxl",)),
    "cogvideox-2b": publish_cogvideox("CogVideoX 2B", 1.7),
    "cogvideox-5b": publish_cogvideox("CogVideoX 5B", 5.6, **COG_5B),
    "cogvideox-5b-i2v": publish_cogvideox("CogVideoX 5B I2V", 5.6, **COG_5B, in_channels=32),
    "cogvideox1.5-5b": publish_cogvideox("CogVideoX 1.5 5B", 5.6, **COG_15),
    "cogvideox1.5-5b-i2v": publish_cogvideox(
        "CogVideoX 1.5 5B I2V", 5.6, **COG_15, in_channels=32, ofs_embed_dim=512
    ),
}
