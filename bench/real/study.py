"""The terrain study: ``python bench/real/study.py DATA WORK [options]``; see README.md.

Every LoRA, and the scores of every LoRA in one direction, is a file in WORK that is made once: a
run that was ended goes on where it was, and several processes may help. With --collect FILE what is
there is written as JSON, and nothing is run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1] / "quality"))

# isort: split
from jobs import Job, run_jobs
from loras import ADAPTERS, read_lora, save_lora, train_lora
from network import Network, load_network
from results import git, round_numbers
from rows import score_lora
from safetensors.torch import load_file
from world import IDEAS, Maps

VERSIONS = ("0.4.1", "0.4.2")
DIRECTIONS = {"forward": VERSIONS, "back": VERSIONS[::-1]}


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

    def lora_path(self, version: str, which: Which) -> Path:
        return self.work / "loras" / f"{which.name(version)}.safetensors"

    def lora_job(self, version: str, which: Which) -> Job:
        def run(part: Path) -> None:
            base, maps = open_network(self.data, version), Maps(self.data)
            budget = self.steps, self.batch
            tensors = train_lora(base, maps, which.idea, which.adapter, which.seed, *budget)
            save_lora(part, tensors)

        return Job(self.lora_path(version, which), (), run)

    def score_job(self, direction: str, which: Which) -> Job:
        needed = tuple(self.lora_path(version, which) for version in DIRECTIONS[direction])

        def run(part: Path) -> None:
            bases = tuple(open_network(self.data, version) for version in DIRECTIONS[direction])
            loras = tuple(read_lora(load_file(path)) for path in needed)
            row: dict[str, Any] = {"direction": direction, **asdict(which)}
            row |= {"steps": self.steps, "batch": self.batch}
            row |= score_lora(bases, loras, which.idea, Maps(self.data), self.questions)
            part.write_text(json.dumps(row))

        return Job(self.work / "scores" / f"{which.name(direction)}.json", needed, run)


@cache
def open_network(data: Path, version: str) -> Network:
    return load_network(data / f"{version}.onnx").to(memory_format=torch.channels_last)


def collect(work: Path) -> dict[str, Any]:
    """Every row that was scored, and what the study has beside them."""
    rows = [json.loads(path.read_text()) for path in sorted((work / "scores").glob("*.json"))]
    scored = {tuple(row[key] for key in ("direction", "idea", "adapter", "seed")) for row in rows}
    whole = itertools.product(DIRECTIONS, IDEAS, ADAPTERS, range(3))
    return {
        "made": {
            "script": "bench/real/study.py",
            "commit": git("rev-parse", "--short", "HEAD"),
            "torch": torch.__version__,
        },
        "not run": [" ".join(map(str, key)) for key in whole if key not in scored],
        "rows": [round_numbers(row) for row in rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="what fetch.py made")
    parser.add_argument("work", type=Path)
    parser.add_argument("--ideas", nargs="+", choices=IDEAS, default=IDEAS)
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=tuple(ADAPTERS))
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=tuple(DIRECTIONS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--questions", type=int, default=64, help="held-out ones of each score")
    parser.add_argument("--collect", type=Path, metavar="FILE")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.collect:
        given.collect.write_text(json.dumps(collect(given.work), indent=1) + "\n")
        return
    study = Study(given.data, given.work, given.steps, given.batch, given.questions)
    jobs: list[Job] = []
    for chosen in itertools.product(range(given.seeds), given.ideas, given.adapters):
        which = Which(*chosen[1:], chosen[0])
        jobs += [study.lora_job(version, which) for version in VERSIONS]
        jobs += [study.score_job(direction, which) for direction in given.directions]
    run_jobs(jobs)


if __name__ == "__main__":
    main()
