"""Every kind of pipeline that probing takes is asked what the other one was asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_pipelines as tiny
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from fitting import ask, draw_probes, watch_calls
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from prolora import FitOptions
from prolora.fitting.pipelines.pipeline_opening import open_pipeline
from prolora.fitting.sides import NO_PROMPT


def sdxl(folder: Path, width: int) -> None:
    unet = UNet2DConditionModel(
        **tiny.UNET,
        cross_attention_dim=8 + width,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=48 + width,
    )
    StableDiffusionXLPipeline(
        vae=tiny.vae(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**tiny.ALPHAS),
        text_encoder=tiny.text_encoder(8),
        tokenizer=tiny.tokenizer(folder / "vocabulary"),
        text_encoder_2=tiny.text_encoder(width, CLIPTextModelWithProjection),
        tokenizer_2=tiny.tokenizer(folder / "vocabulary"),
    ).save_pretrained(folder)


def t5() -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "cat": 3, "dog": 4}
    tokenizer_model = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer_model.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_model,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=16,
    )
    config = T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config), tokenizer


def pixart(folder: Path) -> None:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=16,
        caption_channels=16,
        use_additional_conditions=False,
    )
    encoder, tokenizer = t5()
    PixArtAlphaPipeline(
        tokenizer, encoder, tiny.vae(), transformer, DPMSolverMultistepScheduler(**tiny.ALPHAS)
    ).save_pretrained(folder)


def flux(folder: Path, layers: int) -> None:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=layers == 1,
        axes_dims_rope=(4, 4, 8),
    )
    encoder, tokenizer = t5()
    FluxPipeline(
        FlowMatchEulerDiscreteScheduler(),
        tiny.vae(),
        tiny.text_encoder(8),
        tiny.tokenizer(folder / "vocabulary"),
        encoder,
        tokenizer,
        transformer,
    ).save_pretrained(folder)


MAKE = {
    "SDXL, second encoder of another width": (lambda f: sdxl(f, 8), lambda f: sdxl(f, 12)),
    "PixArt, which learns its variance, and Stable Diffusion": (pixart, tiny.save),
    "FLUX with guidance embedded and without": (lambda f: flux(f, 1), lambda f: flux(f, 2)),
}


@pytest.mark.parametrize("kind", MAKE)
def test_a_side_asks_its_model_what_its_pipeline_asks(kind, tmp_path):
    """Both branches of the guidance, at each step of a sampling; and both sides compare."""
    torch.manual_seed(0)
    for make, name in zip(MAKE[kind], ("source", "target"), strict=True):
        make(tmp_path / name)
    models = (open_pipeline(tmp_path / name) for name in ("source", "target"))
    asking = ask(*models, FitOptions(("cat", "dog"), images=2, steps=2, size=16))
    for side in (asking.source, asking.target):
        calls = watch_calls(side, prompt=1)
        assert len(calls) == 2
        for parts, predicted, _ in calls:
            for i, state in enumerate(parts.latent):
                prompt = 1 if side.table.has_prompt(parts, i) else NO_PROMPT
                level = side.schedule.level_at(parts.time[i : i + 1])
                answer = side.predict(state[None], level, [prompt])
                torch.testing.assert_close(answer[0], predicted[i], rtol=1e-3, atol=1e-4)
    for asked in draw_probes(asking, images=1, count=6):
        assert asked.plain.shape == asked.change.shape and float(asked.change.norm()) == 0
