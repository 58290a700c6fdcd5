"""Stages of a fit give their memory back: text encoders, the source, and what only samples."""

from __future__ import annotations

import itertools

import pytest
import torch
from lora_files import same_bits
from torch import nn

import prolora
from prolora import FitOptions
from prolora.errors import ProLoRAError, TooLittleMemory
from prolora.fitting.pipelines import memory_bounds, pipeline_opening, prompt_memory
from prolora.fitting.pipelines.memory_bounds import check_memory, estimate_bytes
from prolora.fitting.pipelines.pipeline import Pipeline
from prolora.fitting.pipelines.pipeline_opening import open_pipeline
from prolora.fitting.solver import joint

FEW = FitOptions(("cat", "dog"), images=1, steps=2, fit_steps=2, force=True)


def count_numbers(*models: nn.Module) -> int:
    return sum(p.numel() for model in models for p in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("name", ["source", pytest.param("other", marks=pytest.mark.slow)])
def test_text_encoders_run_once_a_prompt_and_give_their_memory_back(pipelines, name):
    plain, kept = (open_pipeline(pipelines / name) for _ in range(2))
    encoders = kept.memory.encoders
    runs = []
    for encoder in encoders.values():
        encoder.register_forward_hook(lambda *_: runs.append(1))
    kept.encode_prompts(FEW)
    kept.memory.release()
    assert count_numbers(*encoders.values()) == 0
    once = len(runs)
    for prompt in FEW.prompts:
        one, other = (p.sample_final(prompt, FEW, 0) for p in (plain, kept))
        assert torch.equal(one.latents[-1], other.latents[-1])
    assert len(runs) == once
    with pytest.raises(ProLoRAError, match="asks its text encoders about a prompt again"):
        kept.sample_latents("a bird", FEW, 3)


def test_text_encoders_stay_where_an_answer_cannot_be_remembered(pipelines):
    memory = open_pipeline(pipelines / "source").memory
    memory(None, torch.device("cpu"), 1, False, prompt_embeds=torch.ones(1, 8, 8))
    memory.release()
    assert not memory.is_freed and count_numbers(*memory.encoders.values())


@pytest.mark.slow
@pytest.mark.parametrize("target", ["target", "other"])
def test_the_target_alone_has_weights_while_it_is_fitted(pipelines, target, monkeypatch):
    opened, seen = [], []
    load, work = open_pipeline, joint.fit_in_factors

    def remember(*args):
        opened.append(load(*args))
        return opened[-1]

    def fit_in_factors(*args):
        ours, theirs = ([*p.memory.pipe.components.values()] for p in opened[-2:])
        modules = [part for part in (*ours, *theirs) if isinstance(part, nn.Module)]
        rest = [part for part in modules if part is not opened[-1].denoiser]
        seen.append((count_numbers(*rest), count_numbers(opened[-1].denoiser)))
        return work(*args)

    monkeypatch.setattr(pipeline_opening, "open_pipeline", remember)
    monkeypatch.setattr(joint, "fit_in_factors", fit_in_factors)
    done = prolora.fit(
        pipelines / "lora.safetensors", pipelines / "source", pipelines / target, FEW
    )
    assert seen[0][0] == 0 and seen[0][1] > 1000
    # As without.
    monkeypatch.setattr(Pipeline, "free", lambda *_, **__: None)
    monkeypatch.setattr(prompt_memory.PromptMemory, "release", lambda *_: None)
    same = prolora.fit(
        pipelines / "lora.safetensors", pipelines / "source", pipelines / target, FEW
    )
    assert seen[1][0] > 1000
    assert done.report.probe.gate == same.report.probe.gate
    assert same_bits(done.adapter.updates, same.adapter.updates)


def test_a_vae_takes_large_images_tile_by_tile_and_its_own_size_as_before(pipelines):
    pipeline = open_pipeline(pipelines / "source")
    vae = pipeline.pipe.vae
    assert vae.use_tiling and vae.use_slicing
    side = vae.config.sample_size // pipeline.pipe.vae_scale_factor
    latent = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))
    tiled = vae.decode(latent).sample
    vae.disable_tiling()
    assert torch.equal(tiled, vae.decode(latent).sample)


def test_a_bound_below_what_the_models_need_is_refused_before_they_are_loaded(ends, unopened):
    with pytest.raises(TooLittleMemory, match=r"two pipelines alone need \d+"):
        prolora.fit(*ends, FEW, max_memory="1MB")


@pytest.mark.slow
def test_a_bound_that_answers_pass_is_refused_with_what_all_of_them_need(ends, monkeypatch):
    taken = itertools.chain([0], itertools.count(10**9, 2 * 10**8))
    monkeypatch.setattr(memory_bounds, "resident_bytes", lambda: next(taken))
    words = r"with 50% of a stage done this run takes 1\.5 GiB, and will need about 2\.0 GiB"
    with pytest.raises(TooLittleMemory, match=words):
        prolora.fit(*ends, FEW, max_memory=15 * 10**8)


def test_a_cache_folder_that_cannot_be_made_is_named_before_a_model_is_loaded(
    ends, tmp_path, unopened
):
    """Without it the LoRA moved by weights would be missing: another fit, and nobody told."""
    (tmp_path / "file").write_text("")
    with pytest.raises(prolora.errors.OutputError, match="the cache folder cannot be made"):
        prolora.fit(*ends, FEW, cache=tmp_path / "file" / "cache")


def test_what_the_models_need_is_counted_from_their_files(pipelines):
    pipeline = open_pipeline(pipelines / "other")
    models = {n: p for n, p in pipeline.pipe.components.items() if isinstance(p, nn.Module)}
    encoders = [model for name, model in models.items() if name.startswith("text_encoder")]
    others = [model for name, model in models.items() if not name.startswith("text_encoder")]
    sizes = [
        4 * sum(p.numel() for m in part for p in m.parameters()) for part in (encoders, others)
    ]
    counted = estimate_bytes(pipelines / "other")
    for size, estimate in zip(sizes, counted, strict=True):
        assert size <= estimate <= 1.01 * size + 4096  # stored buffers


def test_the_source_in_full_and_the_targets_encoders_are_never_there_together(
    pipelines, monkeypatch
):
    """The least that is needed counts the text encoders of one pipeline at a time."""
    (ours, others), (theirs, rest) = (
        estimate_bytes(pipelines / name) for name in ("source", "other")
    )
    monkeypatch.setattr(memory_bounds, "resident_bytes", lambda: 0)
    least = max(ours + others, others + theirs + rest)
    ends = pipelines / "source", pipelines / "other"
    check_memory(least, ends, None)
    with pytest.raises(TooLittleMemory):
        check_memory(least - 1, ends, None)
    assert least < ours + others + theirs + rest
    # Weights go on to a card, one pipeline after the other.
    check_memory(max(ours + others, theirs + rest), ends, "cuda:0")
