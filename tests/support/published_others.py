"""Published sizes of families that few LoRAs move within, or that only diffusers runs."""

from __future__ import annotations

from published_models import DEFAULTS, SCRIPT, Published, publish

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


def publish_kandinsky(
    title: str, billions: float, width: int, depth: int, **config: object
) -> Published:
    cls, source = "Kandinsky5Transformer3DModel", "musubi-tuner, kandinsky5/configs.py"
    sizes = {"model_dim": width, "ff_dim": 4 * width, "num_visual_blocks": depth}
    title, encoders = f"Kandinsky 5 {title}", "qwen2.5-vl-7b clip-l"
    return publish(title, cls, billions, source, encoders, **sizes, **config)


def publish_sana(title: str, billions: float, **config: object) -> Published:
    cls, source = "SanaTransformer2DModel", SCRIPT.format("sana")
    return publish(f"Sana {title}", cls, billions, source, "gemma2-2b", **config)


def publish_cogvideox(title: str, billions: float, **config: object) -> Published:
    source = "the models' configurations, transformer/config.json"
    cls = "CogVideoXTransformer3DModel"
    return publish(f"CogVideoX {title}", cls, billions, source, "t5-xxl", **config)


def publish_ace(title: str, billions: float, source: str, **config: object) -> Published:
    cls, encoder = "AceStepTransformer1DModel", "qwen3-embedding-0.6b"
    return publish(title, cls, billions, source, encoder, **config)


ACE_XL = {"hidden_size": 2560, "intermediate_size": 9728, "encoder_hidden_size": 2048}
ACE_XL |= {"num_hidden_layers": 32, "num_attention_heads": 32}
MAGE = {"patch_size": 1, "in_channels": 128, "out_channels": 128, "num_layers": 12}
MAGE |= {"joint_attention_dim": 2560}
ERNIE = {"hidden_size": 4096, "num_attention_heads": 32, "num_layers": 36}
ERNIE |= {"ffn_hidden_size": 12288, "text_in_dim": 3072}
COGVIEW = {"num_layers": 28, "num_attention_heads": 32}
COGVIEW |= {"attention_head_dim": 128, "condition_dim": 256}
LONGCAT, FIBO = {"num_layers": 10, "num_single_layers": 20}, {"in_channels": 48, "num_layers": 8}
FLUX3 = "Flux3Transformer2DModel"
FLOW_MAP = "the class's flow_map, which is that of step-distilled models"
XL = "ACE-Step/acestep-v15-xl-base, config.json, as its ports have it"
AS_QWEN = "microsoft/Mage, mage_flow/models/mage_flow.py, whose class has the same names and shapes"
PORTS = "meituan-longcat/LongCat-Image, transformer/config.json, as its ports have it"
PRO = {**FROM_FRAMES, "time_dim": 1024, "num_text_blocks": 4}
OTHERS = {
    "ace-step-1.5": publish_ace("ACE-Step 1.5", 1.6, DEFAULTS),
    "ace-step-1.5-xl": publish_ace("ACE-Step 1.5 XL", 4.2, XL, **ACE_XL),
    "mageflow": publish(
        "Mage-Flow", "QwenImageTransformer2DModel", 4.1, AS_QWEN, "qwen3-vl-4b", **MAGE
    ),
    "longcat-image": publish(
        "LongCat-Image", "LongCatImageTransformer2DModel", 6.3, PORTS, "qwen2.5-vl-7b", **LONGCAT
    ),
    "ideogram4": publish("Ideogram 4", "Ideogram4Transformer2DModel", 9.3, DEFAULTS, "qwen3-vl-8b"),
    "ernie-image": publish(
        "ERNIE-Image",
        "ErnieImageTransformer2DModel",
        8.0,
        "baidu/ERNIE-Image, transformer/config.json",
        "ministral-3b",
        **ERNIE,
    ),
    "flux3-klein": publish("FLUX.3 [klein]", FLUX3, 5.5, DEFAULTS),
    "flux3-klein-distilled": publish(
        "FLUX.3 [klein] distilled to a few steps", FLUX3, 5.5, FLOW_MAP, flow_map=True
    ),
    "minimax-h3": publish(
        "MiniMax-H3", "MiniMaxH3Transformer3DModel", 33.1, DEFAULTS, "qwen3-vl-32b"
    ),
    "kandinsky5-lite": publish_kandinsky("Lite", 2.0, 1792, 32, **FROM_FRAMES),
    "kandinsky5-pro": publish_kandinsky("Pro", 19.3, 4096, 60, **PRO),
    "kandinsky5-image-lite": publish_kandinsky("Image Lite", 6.0, 2560, 50, **KANDINSKY),
    "kandinsky5-image-lite-edit": publish_kandinsky(
        "Image Lite, editing", 6.0, 2560, 50, **FROM_FRAMES
    ),
    "bria-fibo": publish(
        "Bria FIBO",
        "BriaFiboTransformer2DModel",
        8.3,
        "briaai/FIBO, transformer/config.json",
        "smollm3-3b",
        **FIBO,
    ),
    "cogview4": publish(
        "CogView4",
        "CogView4Transformer2DModel",
        6.4,
        SCRIPT.format("cogview4"),
        "glm-4-9b",
        **COGVIEW,
    ),
    "sana-0.6b": publish_sana("0.6B", 0.6, **SANA_600M),
    "sana-1.6b": publish_sana("1.6B", 1.6),
    "sana-4.8b": publish_sana("1.5 4.8B", 4.7, num_layers=60),
    "sana-sprint-0.6b": publish_sana("Sprint 0.6B", 0.6, **SANA_600M, **SPRINT),
    "sana-sprint-1.6b": publish_sana("Sprint 1.6B", 1.6, **SPRINT),
    "mochi": publish("Mochi 1", "MochiTransformer3DModel", 10.0, DEFAULTS, "t5-xxl"),
    "cogvideox-2b": publish_cogvideox("2B", 1.7),
    "cogvideox-5b": publish_cogvideox("5B", 5.6, **COG_5B),
    "cogvideox-5b-i2v": publish_cogvideox("5B I2V", 5.6, **COG_5B, in_channels=32),
    "cogvideox1.5-5b": publish_cogvideox("1.5 5B", 5.6, **COG_15),
    "cogvideox1.5-5b-i2v": publish_cogvideox(
        "1.5 5B I2V", 5.6, **COG_15, in_channels=32, ofs_embed_dim=512
    ),
}
