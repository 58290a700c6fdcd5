"""Scores every method on one target: held-out losses, samples and what the weights alone say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from contenders import CHOSEN, METHODS, RUNS, Case, Updates, judge_bases, scale_updates
from judge import Judge, diversity, mmd
from lessons import Lesson, teacher_pairs
from torch import Tensor, nn
from worlds import World, backbone

SAMPLED = ("copy", "prolora 0.9", "blocks 0.9", "auto")
IMAGES, SAMPLE_STEPS, FEW_STEPS, STUDENT_STEPS = 120, 10, 2, 4


@contextlib.contextmanager
def apply_updates(model: nn.Module, updates: Updates) -> Iterator[nn.Module]:
    """The model with the updates in its weights, for a while."""
    inner = backbone(model)
    kept = {name: inner.get_submodule(name).weight.data.clone() for name in updates}
    try:
        for name, update in updates.items():
            inner.get_submodule(name).weight.data += update.dense()
        yield model
    finally:
        for name, weight in kept.items():
            inner.get_submodule(name).weight.data.copy_(weight)


def cases(
    world: World,
    arch: str,
    kind: str,
    source: nn.Module,
    target: nn.Module,
    loras: dict[str, Updates],
) -> dict[str, Case]:
    """Adapter -> its Case; the bases are factorised once for all of them."""
    first: Case | None = None
    cases_by_adapter = {}
    for adapter, lora in loras.items():
        case = Case.of(world, arch, kind, source, target, lora)
        first = first or case
        cases_by_adapter[adapter] = first.with_lora(case.updates)
    return cases_by_adapter


@dataclass(frozen=True)
class Yardstick:
    """How the adapters of one target are judged."""

    lessons: dict[str, Lesson]  # adapter -> what it is asked for
    oracles: dict[str, Updates]  # adapter -> the one that was trained on the target for that


def loss_rows(
    target: nn.Module,
    cases_by_adapter: dict[str, Case],
    look: Yardstick,
) -> dict[str, Any]:
    """Adapter -> {"none", "oracle", "losses": {"method @ strength": loss}}."""
    table = {}
    for adapter, case in cases_by_adapter.items():
        known = {"none": {}, "oracle": look.oracles[adapter]}
        row: dict[str, Any] = {n: held_out(target, look, adapter, u) for n, u in known.items()}
        losses = row["losses"] = {}
        for label, method in METHODS.items():
            if not case.updates:
                continue
            updates = method(case)
            for strength in RUNS.get(label, (1.0,)):
                scaled = scale_updates(updates, strength)
                losses[f"{label} @ {strength:g}"] = held_out(target, look, adapter, scaled)
        table[adapter] = row
    return table


def held_out(target: nn.Module, stick: Yardstick, adapter: str, updates: Updates) -> float:
    """The held-out loss of the target with updates."""
    return held_out_loss(target, stick.lessons[adapter], updates)


def held_out_loss(target: nn.Module, lesson: Lesson, updates: Updates) -> float:
    """The loss of the target with updates on what a lesson holds out."""
    with apply_updates(target, updates):
        return lesson.held_out(target)


def chosen_rows(
    target: nn.Module, cases_by_adapter: dict[str, Case], look: Yardstick
) -> dict[str, dict[str, Any]]:
    """Adapter -> {"losses": {method: loss}, "verdict": …} of what the study led to."""
    table = {}
    for adapter, case in cases_by_adapter.items():
        losses = {
            label: held_out(target, look, adapter, method(case)) for label, method in CHOSEN.items()
        }
        verdict = judge_bases(case)
        facts = asdict(verdict) | {"related": verdict.related}
        table[adapter] = {"losses": losses, "verdict": facts}
    return table


def sample_images(
    world: World, kind: str, target: nn.Module, adapter: str, seed: int, y: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Images the model draws, and their prompts; what the adapter is about unless given."""
    y = world.sample_prompts(adapter, IMAGES) if y is None else y
    few = adapter == "fewstep"
    steps, guidance = (FEW_STEPS, 1.0) if few else (SAMPLE_STEPS, world.guidance_of(kind))
    if world.distilled.get(kind) == "lines":
        steps = STUDENT_STEPS
    return world.sample(target, y, steps=steps, guidance=guidance, seed=seed), y


def sample_scores(
    world: World,
    judge: Judge,
    kind: str,
    target: nn.Module,
    adapter: str,
    updates: dict[str, Updates],
    oracle: Updates,
) -> dict[str, Any]:
    """Label -> {"mmd", "concept", "digit", "diversity"} of samples with those updates.

    The reference of the distance is what the oracle draws from other noise; for the few-step
    adapter, what the plain target draws in many steps. "digit" is the share of samples in which
    the judge recognises what was asked for.
    """
    if adapter == "fewstep":
        guidance = world.guidance_of(kind)
        reference = teacher_pairs(world, target, world.judged_rows, 99, guidance)[1][:IMAGES]
    else:
        with apply_updates(target, oracle):
            reference = sample_images(world, kind, target, adapter, seed=1)[0]
    wanted = judge(reference)[0]
    scores = {}
    for label, update in ({"none": {}, "oracle": oracle} | updates).items():
        with apply_updates(target, update):
            images, y = sample_images(world, kind, target, adapter, seed=0)
        features, content, _, _ = judge(images)
        predicted, asked = content.argmax(1), world.content(y)
        scores[label] = {
            "mmd": mmd(features, wanted),
            "concept": float((predicted == world.concept_class).float().mean()),
            "digit": float((predicted == asked).float().mean()),
            "diversity": diversity(features, asked),
        }
    return scores
