"""Scores every way of moving one terrain LoRA: the held-out loss, and samples of some."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import contenders
import torch
from contenders import STRENGTHS, Case, Updates, arbitrate, judge_bases, scale_updates
from fitted import fit_lora
from network import Network
from scoring import apply_updates
from torch import Tensor
from world import (
    Batch,
    Maps,
    ask_base,
    change_answer,
    distance,
    measure_terrains,
    sample_changed,
    sample_terrains,
)
from world_side import choose_written

NAMES = ("auto", "prolora 0.9", "lora-x 0.9", "blocks 0.9", "casa", "extracted")
METHODS = {name: contenders.METHODS[name] for name in NAMES}
METHODS["casa, arbitration alone"] = functools.partial(arbitrate, gives_drift_back=False)
SAMPLED = ("none", "copy @ 1", "auto", "prolora 0.9", "delta sampling")
SAMPLES, ASKED_AT_ONCE = 16, 8

Answer = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Exam:
    """What methods are judged by on one target."""

    target: Network  # the base
    idea: str  # what is wanted of it
    asked: Batch  # the held-out questions
    plain: Tensor  # the target's own answers
    wanted: Tensor  # those with the idea

    @classmethod
    def of(cls, target: Network, idea: str, maps: Maps, questions: int) -> Exam:
        """The same questions for every LoRA of an idea."""
        asked = maps.draw(True, questions, torch.Generator().manual_seed(1))

        def ask(*batch: Tensor) -> tuple[Tensor, Tensor]:
            plain = ask_base(target, one := Batch(*batch))
            return plain, change_answer(target, idea, one, plain)

        return cls(target, idea, asked, *split_run(ask, asked))

    def score(self, answers: Mapping[str, Answer], sampled: Iterable[str]) -> dict[str, Any]:
        """The loss of every answer, and distances of samples of some."""
        return {
            "losses": {label: self.loss(answer) for label, answer in answers.items()},
            "samples": {label: self.distances(answers[label]) for label in sampled},
        }

    def loss(self, answer: Answer) -> float:
        """The squared error of answers, over that of the target's own."""
        (found,) = split_run(lambda *batch: (answer(*batch),), self.asked)
        full = (self.plain - self.wanted).square().mean()
        return float((found - self.wanted).square().mean() / full)

    def distances(self, answer: Answer) -> dict[str, float]:
        """How far samples are from the target's own with the idea done to them, by statistic."""
        difficulty = torch.linspace(0, 1, SAMPLES)
        wanted = sample_changed(self.target, self.idea, difficulty, 0)
        drawn = measure_terrains(sample_terrains(answer, difficulty, 0))
        return {name: distance(drawn[name], one) for name, one in measure_terrains(wanted).items()}


def score_methods(source: Network, exam: Exam, lora: Updates) -> dict[str, Any]:
    """{"losses", "samples", "verdict"} of every way of moving the source's LoRA."""
    case = make_case((source, exam.target), lora)
    updates = {f"copy @ {s:g}": scale_updates(case.updates, s) for s in STRENGTHS}
    updates |= {label: method(case) for label, method in METHODS.items()}
    answers: dict[str, Answer] = {
        label: functools.partial(answer_with, exam.target, moved)
        for label, moved in updates.items()
    }
    answers["delta sampling"] = functools.partial(answer_by_delta, source, exam.target, lora)
    answers["none"] = exam.target
    return exam.score(answers, SAMPLED) | {"verdict": vars(judge_bases(case))}


def score_fit(source: Network, exam: Exam, lora: Updates) -> tuple[dict[str, Any], Updates]:
    """The same of a fit to both models, and what it writes.

    "fit" is what it writes, which is the copy where the gate says so; "fit, fitted" is what it
    fitted, at strength 1.
    """
    moved = fit_lora(source, exam.target, lora, force=True)
    chosen, strength = choose_written(moved, lora)
    written, report = scale_updates(chosen, strength), moved.report
    answers = {
        label: functools.partial(answer_with, exam.target, updates)
        for label, updates in (("fit", written), ("fit, fitted", moved.updates))
    }
    facts = {"decision": report.gate.decision, "strength": strength, "start": report.start}
    facts |= {"trust": report.trust, "steps": report.steps, "seconds": report.seconds}
    return exam.score(answers, answers) | {"fit": facts}, written


def score_oracle(exam: Exam, lora: Updates) -> dict[str, Any]:
    """The same of the LoRA that was trained on the target."""
    answers = {"oracle": functools.partial(answer_with, exam.target, lora)}
    return exam.score(answers, answers)


def make_case(bases: tuple[Network, Network], lora: Updates) -> Case:
    """The modules of the LoRA in both networks, convolutions as out × in·kh·kw."""
    sides = (
        {name: base.get_submodule(name).weight.data.flatten(1).contiguous() for name in lora}
        for base in bases
    )
    return Case(*sides, lora)


def split_run(run: Callable[..., tuple[Tensor, ...]], asked: Batch) -> tuple[Tensor, ...]:
    """What a function of a batch gives for many questions, a few at a time."""
    with torch.no_grad():
        parts = [run(*part) for part in zip(*(t.split(ASKED_AT_ONCE) for t in asked), strict=True)]
    return tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True))


def answer_with(network: Network, updates: Updates, *asked: Tensor) -> Tensor:
    with apply_updates(network, updates):
        return network(*asked)


def answer_by_delta(source: Network, target: Network, lora: Updates, *asked: Tensor) -> Tensor:
    """Delta Sampling (arXiv 2512.03056): the target's answer and the change of the source's."""
    return target(*asked) + answer_with(source, lora, *asked) - source(*asked)
