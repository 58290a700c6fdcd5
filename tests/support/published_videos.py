"""Published sizes of models of video, and of Anima and HunyuanImage, which share their classes."""

from __future__ import annotations

from published_models import DEFAULTS, Published

SCRIPT = "diffusers, scripts/convert_{}_to_diffusers.py"
BLOCKS = "Anima's, with the published number of blocks"
WAN_14B = {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
WAN_1B = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
WAN_5B = {"num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336}
FROM_IMAGES = {"in_channels": 36}
WITH_CLIP = {**FROM_IMAGES, "image_dim": 1280, "added_kv_proj_dim": 5120}
COSMOS_2B = {"num_attention_heads": 16, "num_layers": 28, "extra_pos_embed_type": None}
COSMOS_14B = {"num_attention_heads": 40, "num_layers": 36, "extra_pos_embed_type": None}
FROM_VIDEO = {"in_channels": 17}
COSMOS_25 = {
    **FROM_VIDEO,
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 100352,
    "encoder_hidden_states_channels": 1024,
}
LTX_13B = {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48}
LTX_23 = {
    "gated_attn": True,
    "cross_attn_mod": True,
    "audio_gated_attn": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
    "perturbed_attn": True,
}
LTX_25 = {**LTX_23, "ff_bias": False, "use_keyframes_abs_pos_embedding": True}
LLAMA, QWEN = ("llama3-8b", "clip-l"), ("qwen2.5-vl-7b", "byt5-small")
WITH_BYT5 = {"text_embed_2_dim": 1472}


SKYREELS = SCRIPT.format("skyreelsv2")


def publish_skyreels(title: str, billions: float, **config: object) -> Published:
    cls = "SkyReelsV2Transformer3DModel"
    return Published(title, cls, billions, SKYREELS, {**WAN_1B, **config}, ("umt5-xxl",))


def publish_wan(title: str, billions: float, **config: object) -> Published:
    return Published(
        title, "WanTransformer3DModel", billions, SCRIPT.format("wan"), config, ("umt5-xxl",)
    )


def publish_cosmos(title: str, billions: float, encoder: str, **config: object) -> Published:
    source = SCRIPT.format("cosmos")
    return Published(title, "CosmosTransformer3DModel", billions, source, config, (encoder,))


def publish_anima(title: str, billions: float, source: str, **config: object) -> Published:
    return Published(
        title,
        "CosmosTransformer3DModel",
        billions,
        source,
        {**COSMOS_2B, **config},
        ("qwen3-0.6b",),
        {"llm_adapter": "AnimaTextConditioner"},
    )


def publish_ltx(title: str, billions: float, **config: object) -> Published:
    source = SCRIPT.format("ltx")
    return Published(title, "LTXVideoTransformer3DModel", billions, source, config, ("t5-xxl",))


def publish_ltx2(title: str, billions: float, **config: object) -> Published:
    source = SCRIPT.format("ltx2")
    return Published(
        title, "LTX2VideoTransformer3DModel", billions, source, config, ("gemma3-12b",)
    )


def publish_image(
    title: str, billions: float, *, encoders: tuple[str, ...] = QWEN, **config: object
) -> Published:
    source = SCRIPT.format("hunyuan_image")
    return Published(title, "HunyuanImageTransformer2DModel", billions, source, config, encoders)


VIDEOS = {
    "wan-t2v-14b": publish_wan("Wan 2.1 T2V 14B, Wan 2.2 T2V A14B (each expert)", 14.3, **WAN_14B),
    "wan2.2-i2v-14b": publish_wan("Wan 2.2 I2V A14B (each expert)", 14.3, **WAN_14B, **FROM_IMAGES),
    "wan2.1-i2v-14b": publish_wan("Wan 2.1 I2V 14B", 16.4, **WAN_14B, **WITH_CLIP),
    "wan2.1-flf2v-14b": publish_wan(
        "Wan 2.1 FLF2V 14B", 16.4, **WAN_14B, **WITH_CLIP, pos_embed_seq_len=514
    ),
    "wan-t2v-1.3b": publish_wan("Wan 2.1 T2V 1.3B", 1.4, **WAN_1B),
    "wan2.2-ti2v-5b": publish_wan(
        "Wan 2.2 TI2V 5B", 5.0, **WAN_5B, in_channels=48, out_channels=48
    ),
    "wan2.2-animate-14b": Published(
        "Wan 2.2 Animate 14B",
        "WanAnimateTransformer3DModel",
        17.3,
        SCRIPT.format("wan"),
        {"added_kv_proj_dim": 5120},
        ("umt5-xxl",),
    ),
    "skyreels-v2-df-1.3b": publish_skyreels("SkyReels-V2 DF 1.3B", 1.4, inject_sample_info=True),
    "skyreels-v2-i2v-1.3b": publish_skyreels(
        "SkyReels-V2 I2V 1.3B", 1.6, **FROM_IMAGES, image_dim=1280, added_kv_proj_dim=1536
    ),
    "wan2.1-vace-14b": Published(
        "Wan 2.1 VACE 14B",
        "WanVACETransformer3DModel",
        17.3,
        SCRIPT.format("wan"),
        {**WAN_14B, "vace_layers": list(range(0, 40, 5)), "vace_in_channels": 96},
        ("umt5-xxl",),
    ),
    "wan2.1-vace-1.3b": Published(
        "Wan 2.1 VACE 1.3B",
        "WanVACETransformer3DModel",
        2.2,
        SCRIPT.format("wan"),
        {**WAN_1B, "vace_layers": list(range(0, 30, 2)), "vace_in_channels": 96},
        ("umt5-xxl",),
    ),
    "anima": publish_anima("Anima", 2.1, SCRIPT.format("anima")),
    "anima-2.9b": publish_anima("Anima 2.9B", 2.9, BLOCKS, num_layers=40),
    "anima-3.8b": publish_anima("Anima 3.8B", 3.8, BLOCKS, num_layers=52),
    "cosmos-predict2-2b": publish_cosmos(
        "Cosmos-Predict2 2B Text2Image", 2.0, "t5-11b", **COSMOS_2B
    ),
    "cosmos-predict2-14b": publish_cosmos(
        "Cosmos-Predict2 14B Text2Image", 14.3, "t5-11b", **COSMOS_14B
    ),
    "cosmos-predict2-2b-video": publish_cosmos(
        "Cosmos-Predict2 2B Video2World", 2.0, "t5-11b", **COSMOS_2B, **FROM_VIDEO
    ),
    "cosmos-predict2-14b-video": publish_cosmos(
        "Cosmos-Predict2 14B Video2World", 14.3, "t5-11b", **COSMOS_14B, **FROM_VIDEO
    ),
    "cosmos-predict2.5-2b": publish_cosmos(
        "Cosmos-Predict2.5 2B", 2.1, "qwen2.5-vl-7b", **COSMOS_2B, **COSMOS_25
    ),
    "cosmos-predict2.5-14b": publish_cosmos(
        "Cosmos-Predict2.5 14B", 14.4, "qwen2.5-vl-7b", **COSMOS_14B, **COSMOS_25
    ),
    "ltxv-2b": publish_ltx("LTX-Video 2B", 1.9),
    "ltxv-13b": publish_ltx("LTX-Video 13B", 13.0, **LTX_13B),
    "ltx2": publish_ltx2("LTX-2", 18.9),
    "ltx2.3": publish_ltx2("LTX-2.3", 19.0, **LTX_23),
    "ltx2.5": publish_ltx2("LTX-2.5", 19.0, **LTX_25),
    "hunyuan-video": Published(
        "HunyuanVideo", "HunyuanVideoTransformer3DModel", 12.8, DEFAULTS, {}, LLAMA
    ),
    "hunyuan-video-i2v-33": Published(
        "HunyuanVideo I2V, the first version",
        "HunyuanVideoTransformer3DModel",
        12.8,
        SCRIPT.format("hunyuan_video"),
        {"in_channels": 33, "guidance_embeds": False, "image_condition_type": "latent_concat"},
        LLAMA,
    ),
    "framepack": Published(
        "FramePack",
        "HunyuanVideoFramepackTransformer3DModel",
        12.9,
        "the configuration of FramePackI2V_HY",
        {"has_image_proj": True, "has_clean_x_embedder": True},
        LLAMA,
    ),
    "hunyuan-video-1.5": Published(
        "HunyuanVideo 1.5", "HunyuanVideo15Transformer3DModel", 8.3, DEFAULTS, {}, QWEN
    ),
    "hunyuan-video-1.5-step-distilled": Published(
        "HunyuanVideo 1.5 distilled to a few steps",
        "HunyuanVideo15Transformer3DModel",
        8.3,
        SCRIPT.format("hunyuan_video1_5"),
        {"use_meanflow": True},
        QWEN,
    ),
    "hunyuan-image": publish_image("HunyuanImage 2.1", 17.4, **WITH_BYT5),
    "hunyuan-image-distilled": publish_image(
        "HunyuanImage 2.1 distilled", 17.5, **WITH_BYT5, guidance_embeds=True, use_meanflow=True
    ),
    "hunyuan-image-refiner": publish_image(
        "HunyuanImage 2.1 refiner",
        15.0,
        encoders=QWEN[:1],
        in_channels=128,
        num_attention_heads=26,
        patch_size=(1, 1, 1),
        rope_axes_dim=(16, 56, 56),
        guidance_embeds=True,
    ),
}
