"""Published sizes of models of video, and of Anima and HunyuanImage, which share their classes."""

from __future__ import annotations

from dataclasses import replace

from published_models import DEFAULTS, SCRIPT, Published, publish

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
LLAMA, QWEN = "llama3-8b clip-l", "qwen2.5-vl-7b byt5-small"
WITH_BYT5, MEAN_FLOW = {"text_embed_2_dim": 1472}, {"use_meanflow": True}
I2V_33 = {"in_channels": 33, "guidance_embeds": False, "image_condition_type": "latent_concat"}
REFINER = {"in_channels": 128, "num_attention_heads": 26, "guidance_embeds": True}
REFINER |= {"patch_size": (1, 1, 1), "rope_axes_dim": (16, 56, 56)}


def publish_skyreels(title: str, billions: float, **config: object) -> Published:
    cls, source = "SkyReelsV2Transformer3DModel", SCRIPT.format("skyreelsv2")
    return publish(f"SkyReels-V2 {title}", cls, billions, source, "umt5-xxl", **WAN_1B, **config)


def publish_wan(
    title: str, billions: float, cls: str = "WanTransformer3DModel", **config: object
) -> Published:
    return publish(f"Wan {title}", cls, billions, SCRIPT.format("wan"), "umt5-xxl", **config)


def publish_cosmos(title: str, billions: float, encoder: str, **config: object) -> Published:
    cls, source = "CosmosTransformer3DModel", SCRIPT.format("cosmos")
    return publish(f"Cosmos-Predict{title}", cls, billions, source, encoder, **config)


def publish_anima(title: str, billions: float, source: str, **config: object) -> Published:
    cls, config = "CosmosTransformer3DModel", {**COSMOS_2B, **config}
    made = publish(title, cls, billions, source, "qwen3-0.6b", **config)
    return replace(made, attached={"llm_adapter": "AnimaTextConditioner"})


def publish_ltx(title: str, billions: float, **config: object) -> Published:
    cls, source = "LTXVideoTransformer3DModel", SCRIPT.format("ltx")
    return publish(title, cls, billions, source, "t5-xxl", **config)


def publish_ltx2(title: str, billions: float, **config: object) -> Published:
    cls, source = "LTX2VideoTransformer3DModel", SCRIPT.format("ltx2")
    return publish(title, cls, billions, source, "gemma3-12b", **config)


def publish_hunyuan(
    title: str, kind: str, billions: float, source: str, encoders: str, **config: object
) -> Published:
    cls = f"Hunyuan{kind}Transformer3DModel"
    return publish(f"Hunyuan{title}", cls, billions, source, encoders, **config)


def publish_image(title: str, billions: float, encoders: str = QWEN, **config: object) -> Published:
    cls, source = "HunyuanImageTransformer2DModel", SCRIPT.format("hunyuan_image")
    return publish(f"HunyuanImage {title}", cls, billions, source, encoders, **config)


ANIMATE, VACE = (f"Wan{x}Transformer3DModel" for x in ("Animate", "VACE"))
VACE_14B = {"vace_layers": list(range(0, 40, 5)), "vace_in_channels": 96}
VACE_1B = {"vace_layers": list(range(0, 30, 2)), "vace_in_channels": 96}
VIDEO, VIDEO_15 = (SCRIPT.format(f"hunyuan_{x}") for x in ("video", "video1_5"))
FRAMEPACK = {"has_image_proj": True, "has_clean_x_embedder": True}
VIDEOS = {
    "wan-t2v-14b": publish_wan("2.1 T2V 14B, Wan 2.2 T2V A14B (each expert)", 14.3, **WAN_14B),
    "wan2.2-i2v-14b": publish_wan("2.2 I2V A14B (each expert)", 14.3, **WAN_14B, **FROM_IMAGES),
    "wan2.1-i2v-14b": publish_wan("2.1 I2V 14B", 16.4, **WAN_14B, **WITH_CLIP),
    "wan2.1-flf2v-14b": publish_wan(
        "2.1 FLF2V 14B", 16.4, **WAN_14B, **WITH_CLIP, pos_embed_seq_len=514
    ),
    "wan-t2v-1.3b": publish_wan("2.1 T2V 1.3B", 1.4, **WAN_1B),
    "wan2.2-ti2v-5b": publish_wan("2.2 TI2V 5B", 5.0, **WAN_5B, in_channels=48, out_channels=48),
    "wan2.2-animate-14b": publish_wan("2.2 Animate 14B", 17.3, ANIMATE, added_kv_proj_dim=5120),
    "skyreels-v2-df-1.3b": publish_skyreels("DF 1.3B", 1.4, inject_sample_info=True),
    "skyreels-v2-i2v-1.3b": publish_skyreels(
        "I2V 1.3B", 1.6, **FROM_IMAGES, image_dim=1280, added_kv_proj_dim=1536
    ),
    "wan2.1-vace-14b": publish_wan("2.1 VACE 14B", 17.3, VACE, **WAN_14B, **VACE_14B),
    "wan2.1-vace-1.3b": publish_wan("2.1 VACE 1.3B", 2.2, VACE, **WAN_1B, **VACE_1B),
    "anima": publish_anima("Anima", 2.1, SCRIPT.format("anima")),
    "anima-2.9b": publish_anima("Anima 2.9B", 2.9, BLOCKS, num_layers=40),
    "anima-3.8b": publish_anima("Anima 3.8B", 3.8, BLOCKS, num_layers=52),
    "cosmos-predict2-2b": publish_cosmos("2 2B Text2Image", 2.0, "t5-11b", **COSMOS_2B),
    "cosmos-predict2-14b": publish_cosmos("2 14B Text2Image", 14.3, "t5-11b", **COSMOS_14B),
    "cosmos-predict2-2b-video": publish_cosmos(
        "2 2B Video2World", 2.0, "t5-11b", **COSMOS_2B, **FROM_VIDEO
    ),
    "cosmos-predict2-14b-video": publish_cosmos(
        "2 14B Video2World", 14.3, "t5-11b", **COSMOS_14B, **FROM_VIDEO
    ),
    "cosmos-predict2.5-2b": publish_cosmos(
        "2.5 2B", 2.1, "qwen2.5-vl-7b", **COSMOS_2B, **COSMOS_25
    ),
    "cosmos-predict2.5-14b": publish_cosmos(
        "2.5 14B", 14.4, "qwen2.5-vl-7b", **COSMOS_14B, **COSMOS_25
    ),
    "ltxv-2b": publish_ltx("LTX-Video 2B", 1.9),
    "ltxv-13b": publish_ltx("LTX-Video 13B", 13.0, **LTX_13B),
    "ltx2": publish_ltx2("LTX-2", 18.9),
    "ltx2.3": publish_ltx2("LTX-2.3", 19.0, **LTX_23),
    "ltx2.5": publish_ltx2("LTX-2.5", 19.0, **LTX_25),
    "hunyuan-video": publish_hunyuan("Video", "Video", 12.8, DEFAULTS, LLAMA),
    "hunyuan-video-i2v-33": publish_hunyuan(
        "Video I2V, the first version", "Video", 12.8, VIDEO, LLAMA, **I2V_33
    ),
    "framepack": publish(
        "FramePack",
        "HunyuanVideoFramepackTransformer3DModel",
        12.9,
        "the configuration of FramePackI2V_HY",
        LLAMA,
        **FRAMEPACK,
    ),
    "hunyuan-video-1.5": publish_hunyuan("Video 1.5", "Video15", 8.3, DEFAULTS, QWEN),
    "hunyuan-video-1.5-step-distilled": publish_hunyuan(
        "Video 1.5 distilled to a few steps", "Video15", 8.3, VIDEO_15, QWEN, **MEAN_FLOW
    ),
    "hunyuan-image": publish_image("2.1", 17.4, **WITH_BYT5),
    "hunyuan-image-distilled": publish_image(
        "2.1 distilled", 17.5, **WITH_BYT5, guidance_embeds=True, **MEAN_FLOW
    ),
    "hunyuan-image-refiner": publish_image("2.1 refiner", 15.0, QWEN.split()[0], **REFINER),
}
