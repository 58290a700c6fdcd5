"""Scores every method on one target: held-out losses, samples and what the weights alone say."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
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
        cases_by_adapter[adapter] = first.with_lora(case.updates, case.dropped)
    return cases_by_adapter


@dataclass(frozen=True)
class Yardstick:
    """How the adapters of one target are judged.

    Attributes:
        lessons: adapter -> what it is asked for.
        oracles: adapter -> the one that was trained on the target for that.
    """

    lessons: dict[str, Lesson]
    oracles: dict[str, Updates]


def loss_rows(
    target: nn.Module,
    cases_by_adapter: dict[str, Case],
    look: Yardstick,
    own: Yardstick | None,
    skipped: Collection[str] = (),
) -> dict[str, Any]:
    """Adapter -> {"none", "oracle", "losses": {"method @ strength": loss}}.

    They are of the target's look; "own" has the same for the adapter's own images if these differ.
    Methods that are skipped are not run.
    """
    table = {}
    for adapter, case in cases_by_adapter.items():
        rows: list[dict[str, Any]] = []
        sticks = [stick for stick in (look, own) if stick is not None]
        for stick in sticks:
            known = {"none": {}, "oracle": stick.oracles[adapter]}
            row = {name: held_out(target, stick, adapter, u) for name, u in known.items()}
            rows.append(row | {"losses": {}})
        for label, method in METHODS.items():
            if not case.updates or (label == "summed" and not case.dropped) or label in skipped:
                continue
            updates = method(case)
            for strength in RUNS.get(label, (1.0,)):
                scaled = scale_updates(updates, strength)
                for stick, row in zip(sticks, rows, strict=True):
                    loss = held_out(target, stick, adapter, scaled)
                    row["losses"][f"{label} @ {strength:g}"] = loss
        table[adapter] = rows[0] | {"modules": {n: weight_facts(case, n) for n in case.updates}}
        table[adapter] |= {"own": rows[1]} if own else {}
    return table


def held_out(target: nn.Module, stick: Yardstick, adapter: str, updates: Updates) -> float:
    """The held-out loss of the target with updates."""
    with apply_updates(target, updates):
        return stick.lessons[adapter].held_out(target)


def chosen_rows(
    target: nn.Module, cases_by_adapter: dict[str, Case], look: Yardstick, own: Yardstick | None
) -> dict[str, dict[str, Any]]:
    """Adapter -> {"losses": {method: loss}, "verdict": …, "own": …} of what the study led to."""
    table = {}
    for adapter, case in cases_by_adapter.items():
        losses, theirs = {}, {}
        for label, method in CHOSEN.items():
            updates = method(case)
            losses[label] = held_out(target, look, adapter, updates)
            if own is not None:
                theirs[label] = held_out(target, own, adapter, updates)
        verdict = judge_bases(case)
        facts = asdict(verdict) | {"related": verdict.related}
        table[adapter] = {"losses": losses, "verdict": facts}
        table[adapter] |= {"own": {"losses": theirs}} if own else {}
    return table


def weight_facts(case: Case, name: str) -> dict[str, float]:
    """What weights and update say about one module: candidates to predict the outcome."""
    ws, wt, update = case.source[name].double(), case.target[name].double(), case.updates[name]
    up, down = update.up.double(), update.down.double()
    delta, drift = up @ down, wt - ws
    left, right = torch.linalg.qr(up)[0], torch.linalg.qr(down.mT)[0]

    def cosine(a: Tensor, b: Tensor) -> float:
        return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-30))

    return {
        "source": float(ws.norm()),
        "target": float(wt.norm()),
        "drift": float(drift.norm()),
        "update": float(delta.norm()),
        "cosine": cosine(ws, wt),
        "cosine_read": cosine(ws @ right, wt @ right),
        "cosine_written": cosine(ws.mT @ left, wt.mT @ left),
        "cosine_both": cosine(left.mT @ ws @ right, left.mT @ wt @ right),
        "update_on_drift": cosine(delta, drift),
        "drift_read": float((drift @ right).norm()),
        "drift_written": float((left.mT @ drift).norm()),
        "source_read": float((ws @ right).norm()),
        "source_written": float((left.mT @ ws).norm()),
        "top_update": float(torch.linalg.matrix_norm(delta, 2)),
        "top_source": float(torch.linalg.matrix_norm(ws, 2)),
        "top_drift": float(torch.linalg.matrix_norm(drift, 2)),
    }


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
