"""The terrain study: ``python bench/real/study.py DATA WORK [options]``; see README.md.

Every LoRA, and the scores of every LoRA in one direction, is a file in WORK that is made once: a
run that was ended goes on where it was, and several processes may help. With --collect FILE what is
there is written as JSON, and nothing is run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1] / "quality"))

# isort: split
from changed import FAR, MERGED, train_far
from contenders import Updates
from jobs import Job, run_jobs
from loras import ADAPTERS, train_lora
from models import load_lora, merge_loras, save_lora
from network import Network, load_network
from results import git, round_numbers
from rows import Exam, score_fit, score_methods, score_oracle
from safetensors.torch import load_file, save_file
from world import IDEAS, Maps

from prolora import LowRank

VERSIONS = ("0.4.1", "0.4.2")
DIRECTIONS = {"forward": VERSIONS, "back": VERSIONS[::-1]}
CHANGED = {name: (VERSIONS[0], name) for name in (*MERGED, FAR)}
"""Moves to targets that are made here, which try the rule's constants."""


@dataclass(frozen=True)
class Which:
    """One LoRA of the study."""

    idea: str
    adapter: str
    seed: int

    def name(self, where: str) -> str:
        return f"{where}-{self.idea}-{self.adapter}-{self.seed}"


@dataclass(frozen=True)
class Study:
    """Where it reads and writes, and how long LoRAs are trained."""

    data: Path
    work: Path
    steps: int
    batch: int
    questions: int
    fits: int  # seeds

    def base_path(self, name: str) -> Path:
        folder, suffix = (self.data, "onnx") if name in VERSIONS else (self.work, "base")
        return folder / f"{name}.{suffix}"

    def base_job(self, name: str) -> Job:
        """Makes a changed target."""
        whiches = [Which(idea, "lora-16", 0) for idea in MERGED.get(name, ())]
        needs = tuple(self.lora_path(VERSIONS[0], one) for one in whiches)

        def run(part: Path) -> None:
            network = load_network(self.base_path(VERSIONS[0]))
            if name == FAR:
                train_far(network, open_maps(self.data), self.steps, self.batch)
            else:
                merge_loras(network, needs, 1.0)
            save_file(network.state_dict(), part)

        return Job(self.base_path(name), needs, run)

    def lora_path(self, version: str, which: Which) -> Path:
        return self.work / "loras" / f"{which.name(version)}.safetensors"

    def moved_path(self, direction: str, which: Which) -> Path:
        return self.work / "moved" / f"{which.name(direction)}-fit.safetensors"

    def lora_job(self, version: str, which: Which) -> Job:
        def run(part: Path) -> None:
            base, maps = open_network(self.base_path(version)), open_maps(self.data)
            lora = train_lora(base, maps, **asdict(which), steps=self.steps, batch=self.batch)
            save_lora(lora, part)

        return Job(self.lora_path(version, which), (self.base_path(version),), run)

    def score_jobs(self, direction: str, which: Which) -> list[Job]:
        """For what is moved by weights, the LoRA trained on the target, and the fit."""
        source, target = (DIRECTIONS | CHANGED)[direction]
        bases = self.base_path(source), self.base_path(target)
        own, oracle = self.lora_path(source, which), self.lora_path(target, which)

        def exam() -> Exam:
            network = open_network(bases[1])
            return Exam.of(network, which.idea, open_maps(self.data), self.questions)

        def moved(part: Path) -> None:
            scores = score_methods(open_network(bases[0]), exam(), read_lora(own))
            part.write_text(json.dumps(scores | {"commit": git("rev-parse", "--short", "HEAD")}))

        def trained(part: Path) -> None:
            part.write_text(json.dumps(score_oracle(exam(), read_lora(oracle))))

        def fitted(part: Path) -> None:
            scores, moved = score_fit(open_network(bases[0]), exam(), read_lora(own))
            save_lora(moved, self.moved_path(direction, which))
            part.write_text(json.dumps(scores))

        name = self.work / "scores" / which.name(direction)
        jobs = [
            Job(Path(f"{name}-moved.json"), (own, bases[1]), moved),
            Job(Path(f"{name}-oracle.json"), (oracle,), trained),
        ]
        if which.seed < self.fits and direction in DIRECTIONS:
            jobs.append(Job(Path(f"{name}-fit.json"), (own,), fitted))
        return jobs


def read_lora(path: Path) -> Updates:
    """A LoRA in memory of its own: the last bits of products depend on where a file has it."""
    return {n: LowRank(u.up.clone(), u.down.clone()) for n, u in load_lora(path).items()}


@cache
def open_network(path: Path) -> Network:
    """A base from the file of its wheel, or as it was changed here."""
    if path.suffix == ".onnx":
        network = load_network(path)
    else:
        network = Network().eval().requires_grad_(False)
        network.load_state_dict(load_file(path))
    return network.to(memory_format=torch.channels_last)


open_maps = cache(Maps)


def measure_size(study: Study, version: str, which: Which) -> float:
    """‖ΔW‖/‖W‖ of a LoRA over its modules."""
    updates = read_lora(study.lora_path(version, which))
    network = open_network(study.base_path(version))
    weights = (network.get_submodule(name).weight for name in updates)
    own = math.fsum(float(update.norm()) ** 2 for update in updates.values())
    return math.sqrt(own / math.fsum(float(weight.double().norm()) ** 2 for weight in weights))


def collect(study: Study) -> dict[str, Any]:
    """Every row that was scored, and what the study has beside them.

    A share is what a method takes away of the loss, over what the oracle takes away.
    """
    rows, missing = [], []
    every = DIRECTIONS | CHANGED
    for direction, seed, idea, adapter in itertools.product(every, range(3), IDEAS, ADAPTERS):
        which = Which(idea, adapter, seed)
        moved, trained, *fits = (
            json.loads(job.path.read_text()) if job.path.exists() else None
            for job in study.score_jobs(direction, which)
        )
        if moved is None:
            if direction in DIRECTIONS or (adapter, seed) == ("lora-16", 0):
                missing.append(which.name(direction))
            continue
        row = {"direction": direction, **asdict(which), **moved}
        row["verdict"]["size"] = measure_size(study, every[direction][0], which)
        copies = {label: loss for label, loss in moved["losses"].items() if "copy" in label}
        row["best fixed copy"] = min(copies, key=lambda label: copies[label])
        for name, scores in (*zip(["fit"], fits, strict=False), ("oracle", trained)):
            if scores is None:
                missing.append(f"{which.name(direction)}-{name}")
                continue
            for part in ("losses", "samples"):
                row[part] |= scores.pop(part)
            row |= scores
        if trained is not None:
            gap = 1 - row["losses"]["oracle"]
            row["shares"] = {label: (1 - loss) / gap for label, loss in row["losses"].items()}
        rows.append(round_numbers(row))
    made = {
        "script": "bench/real/study.py",
        "commit": git("rev-parse", "--short", "HEAD"),
        "torch": torch.__version__,
        "steps": study.steps,
        "batch": study.batch,
        "questions": study.questions,
        "seeds of fits": study.fits,
    }
    return {"made": made, "not run": missing, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="what fetch.py made")
    parser.add_argument("work", type=Path)
    parser.add_argument("--ideas", nargs="+", choices=IDEAS, default=IDEAS)
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=tuple(ADAPTERS))
    parser.add_argument(
        "--directions", nargs="+", choices=DIRECTIONS | CHANGED, default=tuple(DIRECTIONS)
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--questions", type=int, default=64, help="held-out ones of each score")
    parser.add_argument("--fits", type=int, default=1, metavar="N", help="seeds that are fitted")
    parser.add_argument("--collect", type=Path, metavar="FILE")
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes = given.steps, given.batch, given.questions, given.fits
    study = Study(given.data, given.work, *sizes)
    if given.collect:
        given.collect.write_text(json.dumps(collect(study), indent=1) + "\n")
        return
    jobs: list[Job] = [study.base_job(name) for name in given.directions if name in CHANGED]
    for chosen in itertools.product(range(given.seeds), given.ideas, given.adapters):
        which = Which(*chosen[1:], chosen[0])
        bases = dict.fromkeys(
            itertools.chain(*((DIRECTIONS | CHANGED)[d] for d in given.directions))
        )
        jobs += [study.lora_job(base, which) for base in bases]
        for direction in given.directions:
            jobs += study.score_jobs(direction, which)
    run_jobs(jobs)


if __name__ == "__main__":
    main()
