"""Scores every method on one target: held-out losses, samples and what the weights alone say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from contenders import CHOSEN, METHODS, RUNS, Case, Updates, judge_bases, scale_updates
from images import CONCEPT_LABEL
from judge import CONCEPT, Judge, diversity, mmd
from model import sample
from networks import backbone
from torch import Tensor, nn
from training import JUDGED, TOKENS, task_loss, teacher_pairs

SAMPLED = ("copy", "prolora 0.9", "blocks 0.9", "auto")
IMAGES, SAMPLE_STEPS, FEW_STEPS = 120, 10, 2


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


def held_out_pairs(target: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Noise and samples of the plain target, on which a few-step adapter is judged."""
    return teacher_pairs(target, JUDGED, seed=99)


def cases(arch: str, kind: str, source: nn.Module, target: nn.Module, loras: dict[str, Updates]):
    """Adapter -> its Case; the bases are factorised once for all of them."""
    first: Case | None = None
    cases_by_adapter = {}
    for adapter, lora in loras.items():
        case = Case.of(arch, kind, source, target, lora)
        first = first or case
        cases_by_adapter[adapter] = first.with_lora(case.updates, case.dropped)
    return cases_by_adapter


def loss_rows(
    kind: str, target: nn.Module, cases_by_adapter: dict[str, Case], oracles: dict[str, Updates]
) -> dict[str, Any]:
    """Adapter -> {"none", "oracle", "losses": {"method @ strength": loss}}."""
    pairs = held_out_pairs(target)
    table = {}
    for adapter, case in cases_by_adapter.items():

        def loss(updates: Updates, adapter: str = adapter) -> float:
            with apply_updates(target, updates):
                return task_loss(target, kind, adapter, pairs)

        row: dict[str, Any] = {"none": loss({}), "oracle": loss(oracles[adapter]), "losses": {}}
        for label, method in METHODS.items():
            if not case.updates or (label == "summed" and not case.dropped):
                continue
            updates = method(case)
            for strength in RUNS.get(label, (1.0,)):
                row["losses"][f"{label} @ {strength:g}"] = loss(scale_updates(updates, strength))
        row["modules"] = {n: weight_facts(case, n) for n in case.updates}
        table[adapter] = row
    return table


def chosen_rows(
    kind: str, target: nn.Module, cases_by_adapter: dict[str, Case]
) -> dict[str, dict[str, Any]]:
    """Adapter -> {"losses": {method: loss}, "verdict": …} of what the study led to."""
    pairs = held_out_pairs(target)
    table = {}
    for adapter, case in cases_by_adapter.items():
        losses = {}
        for label, method in CHOSEN.items():
            with apply_updates(target, method(case)):
                losses[label] = task_loss(target, kind, adapter, pairs)
        verdict = judge_bases(case)
        facts = asdict(verdict) | {
            "shift": verdict.shift,
            "go": verdict.go,
            "strength": verdict.strength,
        }
        table[adapter] = {"losses": losses, "verdict": facts | {"kappa": verdict.kappa}}
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


def sample_images(target: nn.Module, adapter: str, seed: int) -> tuple[Tensor, Tensor]:
    """Images the model draws for what the adapter is about, and their labels."""
    y = torch.arange(IMAGES) % 10
    if adapter == "concept":
        y = torch.full((IMAGES,), CONCEPT_LABEL)
    few = adapter == "fewstep"
    steps, guidance = (FEW_STEPS, 1.0) if few else (SAMPLE_STEPS, 2.0)
    return sample(target, TOKENS, y, steps=steps, guidance=guidance, seed=seed), y


def sample_scores(
    judge: Judge, target: nn.Module, adapter: str, updates: dict[str, Updates], oracle: Updates
) -> dict[str, Any]:
    """Label -> {"mmd", "concept", "digit", "diversity"} of samples with those updates.

    The reference of the distance is what the oracle draws from other noise; for the few-step
    adapter, what the plain target draws in many steps.
    """
    if adapter == "fewstep":
        reference = held_out_pairs(target)[1][:IMAGES]
    else:
        with apply_updates(target, oracle):
            reference = sample_images(target, adapter, seed=1)[0]
    wanted = judge(reference)[0]
    scores = {}
    for label, update in ({"none": {}, "oracle": oracle} | updates).items():
        with apply_updates(target, update):
            images, y = sample_images(target, adapter, seed=0)
        features, content, _, _ = judge(images)
        predicted = content.argmax(1)
        scores[label] = {
            "mmd": mmd(features, wanted),
            "concept": float((predicted == CONCEPT).float().mean()),
            "digit": float((predicted == y).float().mean()),
            "diversity": diversity(features, y),
        }
    return scores
