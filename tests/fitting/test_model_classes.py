"""Fits of pipelines of diffusers' many classes, a few thousand weights each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from crossing_pipelines import TEXT, flux, sdxl, t5, tokenizer
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from fitting import ask, draw_probes, watch_calls
from torch import nn
from transformers import CLIPTextModelWithProjection, Qwen3Config, Qwen3Model

from prolora import FitOptions, LowRank, ProLoRAError
from prolora import fitting as probe
from prolora.architectures.modules import find_block, is_adaptable
from prolora.fitting.fitted_modules import group_by_block
from prolora.fitting.pipelines.conditioning import split_call
from prolora.fitting.pipelines.pipeline import Pipeline
from prolora.fitting.pipelines.pipeline_side import PipelineSide
from prolora.fitting.sides import NO_PROMPT

SETTINGS = FitOptions(("cat", "dog cat"), images=2, steps=2, size=16)


def stable_diffusion(folder) -> Any:
    unet = UNet2DConditionModel(**tiny.UNET, cross_attention_dim=8)
    parts = tiny.vae(), tiny.text_encoder(8), tiny.tokenizer(folder), unet
    scheduler = DDIMScheduler(**tiny.ALPHAS)
    return StableDiffusionPipeline(*parts, scheduler, None, None, requires_safety_checker=False)


def pixart(folder) -> Any:
    """It learns its variance."""
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
    encoder, words = t5()
    scheduler = DPMSolverMultistepScheduler(**tiny.ALPHAS)
    return PixArtAlphaPipeline(words, encoder, tiny.vae(), transformer, scheduler)


def sd3(folder) -> Any:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=16,
    )
    clip = [
        part
        for _ in range(2)
        for part in (tiny.text_encoder(8, CLIPTextModelWithProjection), tiny.tokenizer(folder))
    ]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(transformer, scheduler, tiny.vae(), *clip, *t5())


def z_image(folder) -> Any:
    size = {"in_channels": 4, "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2}
    size |= {"n_kv_heads": 2, "cap_feat_dim": 16, "axes_dims": [4, 6, 6], "axes_lens": [64, 16, 16]}
    transformer = ZImageTransformer2DModel(**size)
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        nn.init.normal_(token)
    words = tokenizer(512)
    words.chat_template = "cat {% for m in messages %}{{ m['content'] }}{% endfor %}"
    width = {"hidden_size": 16, "intermediate_size": 16}
    encoder = Qwen3Model(Qwen3Config(**TEXT | width, num_hidden_layers=2, head_dim=8))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return ZImagePipeline(scheduler, tiny.vae(), encoder, words, transformer)


def opened(make: Callable[..., Any], folder, seed: int = 0) -> Pipeline:
    torch.manual_seed(seed)
    pipe = make(folder / "vocabulary")
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    return Pipeline(pipe, make.__name__)


def updates(model: nn.Module) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(1)
    made = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_adaptable(name) and name.endswith(("v", "w2", "2")):
            m, n = module.weight.shape
            up = 0.3 * torch.randn(m, 2, generator=generator)
            made[name] = LowRank(up, torch.randn(2, n, generator=generator) / n**0.5)
    return made


def adaptable_modules(model: nn.Module) -> list[str]:
    """The linear modules in blocks that no norm is made of."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and find_block(name) and is_adaptable(name)
    ]


@pytest.mark.parametrize("make", [stable_diffusion, sdxl, sd3, flux, z_image, pixart])
def test_a_side_asks_its_model_what_its_pipeline_asks(make, tmp_path):
    """Both branches of the guidance, at each step of a sampling."""
    side = PipelineSide(opened(make, tmp_path), SETTINGS, shared=True)
    calls = watch_calls(side, prompt=1)
    assert len(calls) == SETTINGS.steps
    for parts, predicted, _ in calls:
        for i, state in enumerate(parts.latent):
            prompt = 1 if side.table.has_prompt(parts, i) else NO_PROMPT
            level = side.schedule.level_at(parts.time[i : i + 1])
            answer = side.predict(state[None], level, [prompt])
            torch.testing.assert_close(answer[0], predicted[i], rtol=1e-3, atol=1e-4)


def run_fit(source: Pipeline, target: Pipeline, fit_steps: int) -> probe.Fitted:
    asking = ask(source, target, SETTINGS, updates(source.denoiser))
    counts = {"probes": 16, "held_out": 8, "batch": 8, "fit_steps": fit_steps, "rank": 2}
    return probe.fit_sides(asking, replace(SETTINGS, force=True, **counts))


@pytest.mark.parametrize(
    ("make", "blocks"),
    [
        pytest.param(sd3, ["transformer_blocks.0", "transformer_blocks.1"], marks=pytest.mark.slow),
        (z_image, ["noise_refiner.0", "context_refiner.0", "layers.0"]),
    ],
)
def test_a_class_that_nobody_named_takes_the_change(make, blocks, tmp_path):
    source, target = opened(make, tmp_path), opened(make, tmp_path)
    for weight in target.denoiser.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    result = run_fit(source, target, fit_steps=8)
    assert list(group_by_block(adaptable_modules(source.denoiser))) == blocks
    assert result.report.gate.share["all"] > 0.1  # after eight steps
    assert result.updates.keys() == updates(source.denoiser).keys()


def test_a_unet_for_noise_asks_a_transformer_for_flow_at_equal_log_snr(tmp_path):
    source, target = opened(stable_diffusion, tmp_path), opened(sd3, tmp_path)
    report = run_fit(source, target, fit_steps=1).report
    assert report.log_snr == pytest.approx((-5.364, 7.069), abs=1e-3)
    assert "equal log-SNR from -5.4 to 7.1" in report.sentences()[1]
    assert report.modules == len(adaptable_modules(target.denoiser))


def test_packed_latents_are_asked_of_a_model_that_takes_a_list_and_counts_backwards(tmp_path):
    source, target = opened(flux, tmp_path), opened(z_image, tmp_path)
    asking = ask(source, target, SETTINGS)
    for asked in draw_probes(asking, 2, 12, held_out=True):
        call = asking.target.build_call(asked.target, asked.level, asked.prompts)
        listed = split_call(target.denoiser, call)
        assert listed.listed
        torch.testing.assert_close(listed.time, 1 - asked.level, check_dtype=False)
        unpack = source.pipe._unpack_latents, 16, 16, source.pipe.vae_scale_factor
        image = unpack[0](asked.source, *unpack[1:])
        torch.testing.assert_close(listed.latent[:, :, 0], image)
        answer = asked.plain - asked.difference  # the source's, in the target's terms
        given = asking.source.predict(asked.source, asked.level, asked.prompts)
        # Z-Image predicts x₀ − ε
        torch.testing.assert_close(answer[:, :, 0], -unpack[0](given, *unpack[1:]))
    assert run_fit(source, target, 1).report.modules == len(adaptable_modules(target.denoiser))


def test_latents_of_other_shapes_are_refused(tmp_path):
    source, target = opened(sd3, tmp_path), opened(stable_diffusion, tmp_path)
    other = {**tiny.UNET, "in_channels": 3, "out_channels": 3}
    target.pipe.unet = UNet2DConditionModel(**other, cross_attention_dim=8).eval()
    target = Pipeline(target.pipe, "target")
    with pytest.raises(ProLoRAError, match=r"sd3 denoises \[4, 8, 8\] numbers and target \[3"):
        ask(source, target, SETTINGS)
