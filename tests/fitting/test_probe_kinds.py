"""Every kind of pipeline that probing takes is asked what the other one was asked."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

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
from torch import nn
from transformers import (
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)
from typer.testing import CliRunner

from prolora import FitOptions, adapters
from prolora.cli.app import app
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


def permuted(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same function, the channels of every transformer's residual stream in another order."""
    twin = copy.deepcopy(unet)
    for name, module in twin.named_modules():
        if type(module).__name__ != "Transformer2DModel":
            continue
        width = module.proj_in.weight.shape[0]
        order = torch.randperm(width, generator=torch.Generator().manual_seed(len(name)))
        for leaf, part in module.named_modules():
            if isinstance(part, nn.LayerNorm) or leaf.endswith(("proj_in", "to_out.0", "net.2")):
                part.weight.data, part.bias.data = part.weight.data[order], part.bias.data[order]
            elif leaf.endswith(("proj_out", "attn1.to_q", "attn1.to_k", "attn1.to_v")) or (
                leaf.endswith(("attn2.to_q", "net.0.proj"))
            ):
                part.weight.data = part.weight.data[:, order]
    return twin


@pytest.fixture
def run_fit(tmp_path):
    """Runs the command for a target whose features are permuted; its report."""
    tiny.save(tmp_path / "source")
    unet = open_pipeline(tmp_path / "source").denoiser
    tiny.save(tmp_path / "target", unet=permuted(unet), scheduler="euler")
    lora = tiny.write_lora(tmp_path / "lora.safetensors", tiny.updates(unet, ("to_out.0",)))
    line = ["fit", str(lora), "--source", str(tmp_path / "source"), "--target"]
    line += [str(tmp_path / "target"), "--images", "1", "--steps", "2", "--json"]

    def run(name: str, *more: str) -> dict[str, Any]:
        result = CliRunner().invoke(app, [*line, "-o", str(tmp_path / name), *more])
        assert result.exit_code == 0, (result.output, result.exception)
        return json.loads(result.stdout)

    return run


@pytest.mark.slow
def test_a_base_in_other_coordinates_gets_a_lora_that_no_copy_could_be(run_fit, tmp_path):
    report = run_fit("out.safetensors", "--fit-steps", "10")
    gate = report["probe"]["gate"]
    assert gate["decision"] in ("go", "weaken")
    assert gate["share"]["all"] > 0.5
    assert gate["copy_share"]["all"] < 0.5
    assert report["method"] == "fit"
    updates = adapters.read_adapter(tmp_path / "out.safetensors").updates
    assert set(updates) == {row["target"] for row in report["modules"]}


@pytest.mark.slow
def test_twice_the_same_command_writes_the_same_bytes(run_fit, tmp_path):
    names = ("one.safetensors", "two.safetensors")
    for name in names:
        run_fit(name, "--fit-steps", "1", "--force", "--format", "diffusers")
    one, two = ((tmp_path / name).read_bytes() for name in names)
    assert one == two
