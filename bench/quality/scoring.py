"""Scores every method on one target: held-out losses, samples and what the weights alone say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from contenders import Case, Updates, judge_bases, run_all
from judge import Judge, mmd
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
            weight = inner.get_submodule(name).weight.data
            weight += update.dense().reshape(weight.shape)
        yield model
    finally:
        for name, weight in kept.items():
            inner.get_submodule(name).weight.data.copy_(weight)


@dataclass(frozen=True)
class Yardstick:
    """How the adapters of one target are judged."""

    lessons: dict[str, Lesson]  # adapter -> what it is asked for
    oracles: dict[str, Updates]  # adapter -> the one that was trained on the target for that


def loss_rows(
    target: nn.Module, cases_by_adapter: dict[str, Case], stick: Yardstick
) -> dict[str, Any]:
    """Adapter -> {"none", "oracle", "losses": {method: loss}, "verdict"}.

    Between bases without modules of equal shape nothing is moved, and there is no verdict.
    """
    table = {}
    for adapter, case in cases_by_adapter.items():
        ends = {"none": {}, "oracle": stick.oracles[adapter]}
        moved = run_all(case) if case.updates else ()
        judged = stick.lessons[adapter]
        row: dict[str, Any] = {n: held_out_loss(target, judged, u) for n, u in ends.items()}
        row["losses"] = {label: held_out_loss(target, judged, u) for label, u in moved}
        verdict = judge_bases(case) if case.updates else None
        row["verdict"] = verdict and asdict(verdict) | {"related": verdict.related}
        table[adapter] = row
    return table


def held_out_loss(target: nn.Module, lesson: Lesson, updates: Updates) -> float:
    """The loss of the target with updates on what a lesson holds out."""
    with apply_updates(target, updates):
        return lesson.held_out(target)


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
    """Label -> {"mmd", "concept", "digit"} of samples with those updates.

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
        }
    return scores
