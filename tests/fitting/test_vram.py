"""A fit within a bound on a card's memory; the CPU plays the card."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lora_files import same_bits
from test_swapping import Card

import prolora
from prolora import FitOptions
from prolora.errors import InvalidOption, TooLittleMemory
from prolora.files.sizes import parse_size
from prolora.fitting import fit_plan, swapping
from prolora.fitting.pipelines import memory_bounds
from prolora.fitting.pipelines.memory_bounds import plan_card
from prolora.fitting.pipelines.pipeline_opening import open_pipeline
from prolora.fitting.settings import BFLOAT16, FLOAT32, FitSettings
from prolora.fitting.solver import joint
from prolora.fitting.solver.linearisation import ProbeBatch
from prolora.fitting.swapping import count_staying

FEW = FitOptions(("cat",), images=1, steps=2, fit_steps=2, force=True, size=16)


@pytest.fixture
def as_card(monkeypatch: pytest.MonkeyPatch) -> Card:
    """The CPU counts as a card, whose visitors are counted."""
    counted = Card()
    monkeypatch.setattr(memory_bounds, "CONTEXT", 0)
    monkeypatch.setattr(fit_plan, "is_card", lambda _: True)
    monkeypatch.setattr(swapping, "bring_weight", counted.bring)
    return counted


def least_of(ends: tuple[Path, Path], settings: FitSettings, crosses: bool, rank: int = 4) -> int:
    """The least that is needed, by bisection."""
    low, high = 0, 10**12
    while high - low > 1:
        middle = (low + high) // 2
        try:
            plan_card(middle, ends, settings, rank, crosses)
            high = middle
        except TooLittleMemory:
            low = middle
    return high


@pytest.mark.parametrize("crosses", [False, True])
def test_a_smaller_card_takes_16_bits_then_tiles_then_the_fewest_copies(
    pipelines, monkeypatch, crosses
):
    monkeypatch.setattr(memory_bounds, "CONTEXT", 0)
    monkeypatch.setattr(memory_bounds, "_measure", functools.cache(memory_bounds._measure))
    ends = pipelines / "source", pipelines / "other"
    settings = FitSettings(size=1024)
    least = least_of(ends, settings, crosses)
    with pytest.raises(TooLittleMemory) as refused:
        plan_card(least - 1, ends, settings, 4, crosses)
    told = re.search(r"needs ([\d.]+ \w+)", str(refused.value))[1].replace(" ", "")
    assert parse_size(told) == pytest.approx(least, rel=0.01)
    sides = [memory_bounds._measure(end, 1024) for end in ends]
    every = [sum(side.blocks) for side in sides]
    seen, last = [], None
    for limit in sorted({int(least * 1.01**i) for i in range(400)}, reverse=True):
        plan = plan_card(limit, ends, settings, 4, crosses)
        samples = plan.samples or 2
        stay = sum(sides[1].blocks[: count_staying(sides[1].blocks, plan.fitting)])
        copied = (every[1] - stay) / samples
        swapped = plan.samples is not None
        way = plan.precision, plan.tile, swapped
        if way not in seen:
            seen.append(way)
        both = memory_bounds._both_there(sides, plan.precision, plan.tile, samples, 4, crosses)
        alone = memory_bounds._target_alone(sides[1], plan.precision, samples, 4)
        assert max(both + sum(plan.rooms), alone + plan.fitting) <= 0.95 * limit
        assert all(r >= side.visiting for r, side in zip(plan.rooms, sides, strict=True))
        assert plan.rooms[1] <= plan.fitting
        if swapped and last is not None:
            assert copied >= last  # a smaller card copies no less
        last = copied
        for other in range(1, 9) if swapped else ():  # no number of samples copies less
            free = int(0.95 * limit) - memory_bounds._target_alone(
                sides[1], plan.precision, other, 4
            )
            asked = memory_bounds._both_there(sides, plan.precision, plan.tile, other, 4, crosses)
            if free < sides[1].visiting or asked + sum(s.visiting for s in sides) > 0.95 * limit:
                continue
            kept = sum(sides[1].blocks[: count_staying(sides[1].blocks, free)])
            assert copied <= (every[1] - kept) / other
    tile = memory_bounds.TILE if crosses else None
    ladder = [(FLOAT32, None, False), (BFLOAT16, None, False), (BFLOAT16, tile, False)]
    ladder = list(dict.fromkeys([*ladder, (BFLOAT16, tile, True)]))
    assert seen == [way for way in ladder if way in seen]
    assert seen[0] == ladder[0] and seen[-1] == ladder[-1]
    asked = plan_card(10**12, ends, replace(settings, precision="bfloat16"), 4, crosses)
    assert (asked.precision, asked.tile, asked.samples) == ("bfloat16", None, None)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["target", pytest.param("other", marks=pytest.mark.slow)])
def test_a_fit_on_a_card_with_swapped_blocks_is_the_fit_without(
    pipelines, as_card, monkeypatch, target
):
    """Also where images cross; the source's blocks visit while it is sampled and asked."""
    results, rooms = [], [10**9, 0]

    def plan(*_):
        size = rooms.pop(0)
        return memory_bounds.CardPlan("float32", None, 1, (size, size), size)

    monkeypatch.setattr(fit_plan, "plan_card", plan)
    while rooms:
        assert not as_card.visits
        ends = pipelines / "source", pipelines / target
        done = prolora.fit(pipelines / "lora.safetensors", *ends, FEW, max_vram="1GB", device="cpu")
        results.append(done)
    assert as_card.visits and not as_card.held
    largest = max(memory_bounds._measure(end, 16).visiting for end in ends)
    assert as_card.most <= largest
    assert same_bits(*(result.adapter.updates for result in results))
    assert results[0].report.probe.gate == results[1].report.probe.gate


@pytest.mark.slow
def test_a_batch_of_the_fit_holds_the_samples_of_the_plan(ends, as_card, monkeypatch):
    sizes = []

    def look(call, plain, wanted):
        sizes.append(len(plain))
        return ProbeBatch(call, plain, wanted)

    monkeypatch.setattr(joint, "ProbeBatch", look)
    for samples, largest in ((None, 4), (1, 1), (3, 2)):  # of four, in batches of equal size
        plan = memory_bounds.CardPlan("float32", None, samples, (10**9, 10**9), 10**9)
        monkeypatch.setattr(fit_plan, "plan_card", lambda *_, plan=plan: plan)
        prolora.fit(*ends, FEW, max_vram="1GB", device="cpu")
        assert max(sizes) == largest
        sizes.clear()


@pytest.mark.slow
def test_a_fit_runs_at_the_least_that_is_needed(ends, as_card):
    least = least_of(ends[1:], FEW, crosses=False, rank=2)
    done = prolora.fit(*ends, FEW, max_vram=least, device="cpu")
    assert as_card.visits and done.adapter.updates


def test_a_bound_on_the_card_is_refused_before_a_model_is_loaded(ends, as_card, unopened):
    for dry_run in (False, True):
        with pytest.raises(TooLittleMemory, match=r"one block of each model .* needs \d"):
            prolora.fit(*ends, FEW, max_vram=1000, device="cpu", dry_run=dry_run)


def test_a_bound_on_the_card_means_nothing_on_the_cpu(ends, unopened):
    with pytest.raises(InvalidOption, match="runs on the CPU"):
        prolora.fit(*ends, FEW, max_vram="12GB")


def test_prompts_encoded_in_the_machines_memory_are_there_on_the_card(pipelines):
    pipeline = open_pipeline(pipelines / "source")
    pipeline.encode_prompts(FEW)
    memory, runs = pipeline.memory, []
    for encoder in memory.encoders.values():
        encoder.register_forward_hook(lambda *_: runs.append(1))
    asked = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    first = memory("cat", device=torch.device("cpu"), **asked)
    count = len(runs)
    moved = memory("cat", device=torch.device("meta"), **asked)
    assert len(runs) == count
    for here, there in zip(first, moved, strict=True):
        assert here is there is None or (there.device.type == "meta" and here.shape == there.shape)


def test_small_tiles_are_those_of_the_size_that_is_asked(pipelines):
    from diffusers import AutoencoderKLQwenImage

    pipeline = open_pipeline(pipelines / "source")
    vae = pipeline.pipe.vae
    factor = vae.tile_sample_min_size // vae.tile_latent_min_size
    half = vae.tile_sample_min_size // 2
    pipeline.move_to_card("cpu", 0, half)
    assert (vae.tile_sample_min_size, vae.tile_latent_min_size) == (half, half // factor)
    pipeline.move_to_card("cpu", 0, 10 * half)  # never larger ones
    assert vae.tile_sample_min_size == half
    other = AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1)
    memory_bounds.shrink_tiles(other, 128)
    assert other.tile_sample_min_height == other.tile_sample_min_width == 128
    assert other.tile_sample_stride_width == 96
