"""Pipelines of a few thousand weights whose latents are different spaces, saved as folders."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import diffusers
import tiny_pipelines as tiny
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from prolora.fitting.pipelines.pipeline_opening import open_pipeline

TEXT = {
    "vocab_size": 64,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def tokenizer(length: int = 16, **more: Any) -> transformers.PreTrainedTokenizerFast:
    """Two words and the marks of a language model."""
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "cat": 3, "dog": 4}
    model = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
        **more,
    )


def t5(
    length: int = 16,
) -> tuple[transformers.T5EncoderModel, transformers.PreTrainedTokenizerFast]:
    """An encoder of width 16, and its tokenizer."""
    config = transformers.T5Config(
        vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    return transformers.T5EncoderModel(config), tokenizer(length)


def sdxl(
    words: Path, vae: diffusers.AutoencoderKL | None = None, size: int = 8
) -> diffusers.StableDiffusionXLPipeline:
    """Two text encoders of unlike widths; by itself with the latents of Stable Diffusion."""
    unet = diffusers.UNet2DConditionModel(
        **{**tiny.UNET, "sample_size": size},
        cross_attention_dim=20,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=60,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=vae or tiny.vae(),
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(**tiny.ALPHAS),
        text_encoder=tiny.text_encoder(8),
        tokenizer=tiny.tokenizer(words),
        text_encoder_2=tiny.text_encoder(12, transformers.CLIPTextModelWithProjection),
        tokenizer_2=tiny.tokenizer(words),
    )


def save_sdxl(folder: Path, seed: int = 1) -> Path:
    """A VAE of its own, with statistics by channel, and images of twice the side."""
    torch.manual_seed(seed)
    own = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.1, 0.9, 1.3, 0.7]}
    vae = diffusers.AutoencoderKL(**tiny.VAE, **own, scaling_factor=0.13025)
    sdxl(folder / "vocabulary", vae, 16).save_pretrained(folder)
    return folder


def flux(
    words: Path, vae: diffusers.AutoencoderKL | None = None, channels: int = 4
) -> diffusers.FluxPipeline:
    """Packed tokens, and the guidance embedded."""
    size = {"in_channels": 4 * channels, "num_layers": 1, "num_single_layers": 1}
    transformer = diffusers.FluxTransformer2DModel(**tiny.FLUX, **size)
    clip = tiny.text_encoder(8), tiny.tokenizer(words)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.FluxPipeline(scheduler, vae or tiny.vae(), *clip, *t5(), transformer)


def save_flux(folder: Path, seed: int = 2) -> Path:
    """A VAE of eight channels and a shift."""
    torch.manual_seed(seed)
    own = {"latent_channels": 8, "scaling_factor": 0.3611, "shift_factor": 0.1159}
    vae = diffusers.AutoencoderKL(**tiny.VAE | own)
    flux(folder / "vocabulary", vae, 8).save_pretrained(folder)
    return folder


def flux2_vae() -> diffusers.AutoencoderKLFlux2:
    """Its patches have a batch norm with statistics."""
    vae = diffusers.AutoencoderKLFlux2(**tiny.VAE, layers_per_block=1)
    vae.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2.0, 16))
    return vae


def save_flux2(folder: Path, seed: int = 3) -> Path:
    """FLUX.2 klein: patches through a batch norm, which the pipeline takes back for "latent"."""
    torch.manual_seed(seed)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    encoder = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**TEXT, num_hidden_layers=28, head_dim=4)
    )
    words = tokenizer(512)
    words.chat_template = "cat {% for m in messages %}{{ m['content'] }}{% endfor %}"
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    diffusers.Flux2KleinPipeline(
        scheduler, flux2_vae(), encoder, words, transformer, is_distilled=True
    ).save_pretrained(folder)
    return folder


def save_qwen_image(folder: Path, seed: int = 4) -> Path:
    """A VAE of videos, with statistics by channel; packed tokens."""
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[-0.7, 0.5, 0.1, -0.2],
        latents_std=[2.8, 1.5, 2.2, 0.8],
    )
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 6, 6),
    )
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2}
    text = {**TEXT, "num_hidden_layers": 1}
    rope = {
        "rope_type": "default",
        "type": "default",
        "mrope_section": [1, 1, 0],
        "rope_theta": 1e4,
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope, "rope_scaling": rope},
        vision_config={**vision, "out_hidden_size": 8, "fullatt_block_indexes": [0]},
    )
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(config)
    diffusers.QwenImagePipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(), vae, encoder, tokenizer(1100), transformer
    ).save_pretrained(folder)
    return folder


def save_pixels(folder: Path, seed: int = 5) -> Path:
    """DeepFloyd IF: no VAE, and a learned variance."""
    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel(
        **{**tiny.UNET, "sample_size": 16, "in_channels": 3, "out_channels": 6},
        cross_attention_dim=16,
    )
    encoder, words = t5(77)
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    pipe = diffusers.IFPipeline(
        words, encoder, unet, scheduler, *[None] * 3, requires_safety_checker=False
    )
    pipe.save_pretrained(folder)
    return folder


MAKERS = {
    "sd": tiny.save,
    "sdxl": save_sdxl,
    "flux": save_flux,
    "flux2": save_flux2,
    "qwen": save_qwen_image,
    "pixels": save_pixels,
}


def save_ends(folder: Path) -> Path:
    """A source and a target with other text encoders, one with another latent, and a LoRA."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny.save(folder / "source")
        tiny.save(folder / "target", seed=5, text=12)
        save_sdxl(folder / "other")
        unet = open_pipeline(folder / "source").denoiser
        tiny.write_lora(folder / "lora.safetensors", tiny.updates(unet, ("attn1.to_v",)))
    return folder
