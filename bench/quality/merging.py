"""How much of each LoRA a merge keeps: ``python bench/quality/merging.py --work DIR --again DIR2``.

DIR holds the models and adapters that study.py trained on the icons. DIR2 gets one more adapter of
each base, neon trained again from another start. Three bases that were trained apart have their own
adapters; all are merged on their own base. There are two kinds of task:

- *together*: different LoRAs, judged on images that call for all of them (a neon butterfly; the
  few-step lines of the base with neon). Loading all is 1, the base alone 0.
- *alike*: neon twice, alone or with another LoRA, judged on images that call for neon once. One
  neon is 1.

For each LoRA of a task "share" is what it adds beside the others, in units of what it adds where
all are loaded, and "own" what the merge does on that LoRA's own images, where it alone is 1. "adds"
is that unit as a part of what all add; where it is below MATTERS the table leaves the share out.
Results go into bench/results/merged_icons.json, and with --table the means into docs/merge.md.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from contenders import Updates
from evidence import ROOT, fill_page
from icons.drawing import STYLES, flatten, pictures
from lessons import Images, Lesson, Lines, teacher_pairs
from merging_ways import cut, dare, knots, ssr, ties, tsv
from models import BASE_SEED, Folder, load_lora
from probing import Sampler
from results import git, round_numbers
from safetensors.torch import save_file
from scoring import apply_updates
from tables import format_table
from torch import Tensor
from training import train_lora
from worlds import backbone, load_world

from prolora import LowRank
from prolora.core.merging import merge_updates

BASES = (("source", BASE_SEED), ("independent", 1), ("resized", 1))
SEED, AGAIN = 1, "neon again"
TOGETHER = (
    ("neon", "concept"),
    ("duotone", "concept"),
    ("neon", "duotone"),
    ("neon", "fewstep"),
    ("neon", "duotone", "concept"),
)
ALIKE = (("neon", AGAIN), ("neon", AGAIN, "concept"))
RANKS, MATTERS = (8, 16, 32), 0.04
LOOKED_AT = ("sum", "balanced", "KnOTS")
"""Methods that are also cut to a rank."""

Merge = Callable[[list[LowRank]], Tensor]


def dense(way: Callable[..., Tensor], *rest: Any) -> Merge:
    """A way of `merging_ways` for factors."""
    return lambda parts: way([part.to(torch.float64).dense() for part in parts], *rest)


def ours(method: str, factor: float = 1.0) -> Merge:
    """A method of the library."""
    return lambda parts: factor * merge_updates(parts, method).to(torch.float64).dense()


WAYS: dict[str, Merge] = {
    "sum": ours("sum"),
    "balanced": ours("balanced"),
    "sum × 0.7": ours("sum", 0.7),
    "mean": lambda parts: ours("sum")(parts) / len(parts),
    "TIES, 20 %": dense(ties, 0.2),
    "TIES, 100 %": dense(ties, 1.0),
    "KnOTS": dense(knots, 1.0),
    "DARE, half": dense(dare, 0.5),
    "TSV": dense(tsv),
}


@dataclass
class Dense:
    """A merged update of one module."""

    matrix: Tensor

    def dense(self) -> Tensor:
        """As `LowRank` gives it."""
        return self.matrix


@dataclass
class Stage:
    """A base with its adapters.

    Attributes:
        folder: of the study.
        kind: of the base.
        seed: of the base.
        loras: adapter -> its updates.
        lessons: adapter -> what it is about.
    """

    folder: Folder
    kind: str
    seed: int
    loras: dict[str, Updates] = field(default_factory=dict)
    lessons: dict[str, Lesson] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Loads all but the adapter that is trained again."""
        self.model = self.folder.load_model(self.kind, self.seed)
        for adapter in ("neon", "duotone", "concept", "fewstep"):
            self.loras[adapter] = load_lora(self.folder.lora_path(self.kind, SEED, adapter))
        for adapter in ("neon", "duotone", "concept"):
            lesson = self.folder.lesson(self.kind, SEED, adapter, "look", "held_out")
            self.lessons[adapter] = self.lessons[f"{adapter} again"] = lesson

    def add_again(self, work: Path) -> None:
        """Trains neon from another start, or loads it."""
        path = work / f"{self.kind}-{SEED}-again-neon.safetensors"
        if not path.exists():
            lesson = self.folder.lesson(self.kind, SEED, "neon", "look", "train")
            model = self.folder.load_model(self.kind, self.seed)
            trained = train_lora(self.folder.world, self.folder.arch, "neon", 12, model, lesson)
            parts = {f"{name}.up": update.up.contiguous() for name, update in trained.items()}
            parts |= {f"{name}.down": u.down.contiguous() for name, u in trained.items()}
            save_file(parts, path)
        self.loras[AGAIN] = load_lora(path)

    def loss(self, lesson: Lesson, updates: Any) -> float:
        """Held-out loss of the base with updates."""
        with apply_updates(self.model, updates):
            return lesson.held_out(self.model)

    def load(self, adapters: Iterable[str]) -> dict[str, Dense]:
        """All of them loaded."""
        found = [self.loras[adapter] for adapter in adapters]
        names = found[0] if found else ()
        return {n: Dense(torch.stack([u[n].dense() for u in found]).sum(0)) for n in names}

    def judge_together(self, adapters: tuple[str, ...]) -> Lesson:
        """Images that call for all of them; duotone is the last style, as the LoRA has it."""
        world, rest = self.folder.world, [a for a in adapters if a != "fewstep"]
        if "fewstep" in adapters:
            with apply_updates(self.model, self.load(rest)):
                teacher = copy.deepcopy(self.model)
            guidance = world.guidance_of(self.kind)
            return Lines(world, teacher_pairs(world, teacher, world.judged_rows, 99, guidance))
        layers, y = pictures("held_out", "concept" in adapters)
        for adapter in rest:
            layers = STYLES[adapter](layers) if adapter in STYLES else layers
        return Images(world, (flatten(layers), y))

    def inputs(self, adapter: str) -> dict[str, Tensor]:
        """Module -> Σ xxᵀ of what it reads in a short run with the adapter."""
        found: dict[str, Tensor] = {}
        inner, hooks = backbone(self.model), []

        def watch(name: str) -> Callable[..., None]:
            def add(_: Any, given: tuple[Tensor, ...], __: Any) -> None:
                x = given[0].reshape(-1, given[0].shape[-1]).double()
                found[name] = found.get(name, 0) + x.mT @ x

            return add

        for name in self.loras[adapter]:
            hooks.append(inner.get_submodule(name).register_forward_hook(watch(name)))
        with apply_updates(self.model, self.load([adapter])):
            Sampler(self.folder.world, self.model, adapter.split(" ")[0], 8, 8)(5)
        for hook in hooks:
            hook.remove()
        return found


def merge_all(stage: Stage, adapters: tuple[str, ...]) -> dict[str, dict[str, Dense]]:
    """Label -> merged updates, with the ways of the papers, and cut to ranks."""
    parts = {n: [stage.loras[a][n] for a in adapters] for n in stage.loras[adapters[0]]}
    merged = {way: {n: merge(p) for n, p in parts.items()} for way, merge in WAYS.items()}
    seen = [stage.inputs(adapter) for adapter in adapters]
    merged["SSR, models run"] = {
        n: ssr([x.to(torch.float64).dense() for x in p], [s[n] for s in seen])
        for n, p in parts.items()
    }
    for way in LOOKED_AT:
        for rank in RANKS:
            merged[f"{way}, rank {rank}"] = {n: cut(x, rank) for n, x in merged[way].items()}
    return {way: {n: Dense(x.float()) for n, x in some.items()} for way, some in merged.items()}


def score_task(stage: Stage, adapters: tuple[str, ...], task: str) -> Iterable[dict[str, Any]]:
    """A row for each way to merge some adapters."""
    once = tuple(adapter for adapter in adapters if adapter != AGAIN)
    lesson = stage.judge_together(once) if len(once) > 1 else stage.lessons[once[0]]
    base, best = stage.loss(lesson, {}), stage.loss(lesson, stage.load(once))
    without = {a: stage.loss(lesson, stage.load([b for b in once if b != a])) for a in once}
    own = {a: stage.lessons[a] for a in once if a in stage.lessons and "fewstep" not in once}
    ends = {a: (stage.loss(x, {}), stage.loss(x, stage.load([a]))) for a, x in own.items()}
    for way, updates in merge_all(stage, adapters).items():
        loss = stage.loss(lesson, updates)
        alone = {a: (ends[a][0] - stage.loss(x, updates)) for a, x in own.items()}
        yield {
            "base": stage.kind,
            "task": task,
            "loras": list(adapters),
            "method": way,
            "whole": (base - loss) / (base - best),
            "adds": {a: (x - best) / (base - best) for a, x in without.items()},
            "share": {a: (x - loss) / (x - best) for a, x in without.items()},
            "own": {a: x / (ends[a][0] - ends[a][1]) for a, x in alone.items()},
        }


def make_table(rows: list[dict[str, Any]]) -> str:
    """Means over bases and tasks, and the lowest share of any LoRA."""
    lines = []
    for way in dict.fromkeys(row["method"] for row in rows):
        cells = [way]
        for task in ("together", "alike"):
            some = [row for row in rows if row["method"] == way and row["task"] == task]
            wholes = [row["whole"] for row in some]
            shares = [
                share
                for row in some
                for adapter, share in row["share"].items()
                if row["adds"][adapter] >= MATTERS
            ]
            mean = sum(wholes) / len(wholes)
            cells += [f"{mean:.2f} [{min(wholes):.2f}, {max(wholes):.2f}]"]
            cells += [f"{sum(shares) / len(shares):.2f}", f"{min(shares):.2f}"]
        lines.append(cells)
    head = ["", "different LoRAs", "each LoRA", "the least", "one twice", "each LoRA", "the least"]
    return format_table(head, lines)


def main() -> None:
    """Scores what is not scored yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of study.py")
    parser.add_argument("--again", type=Path, required=True, help="folder for what is trained here")
    parser.add_argument("--table", action="store_true", help="write the table alone")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    file = ROOT / "bench/results/merged_icons.json"
    known = json.loads(file.read_text()) if file.exists() else {"rows": []}
    folder = Folder(load_world("icons"), asked.work, "flux")
    for kind, seed in () if asked.table else BASES:
        if any(row["base"] == kind for row in known["rows"]):
            continue
        stage = Stage(folder, kind, seed)
        stage.add_again(asked.again)
        for task, combinations in (("together", TOGETHER), ("alike", ALIKE)):
            for adapters in combinations:
                known["rows"] += map(round_numbers, score_task(stage, adapters, task))
                print(kind, task, adapters, flush=True)
        known["made"] = {
            "script": "bench/quality/merging.py",
            "commit": git("rev-parse", "--short", "HEAD"),
            "date": git("log", "-1", "--format=%cs"),
            "torch": torch.__version__,
        }
        file.write_text(json.dumps(known, indent=0, ensure_ascii=False) + "\n")
    page = ROOT / "docs/merge.md"
    table = make_table(known["rows"])
    print(table)
    if page.exists():
        page.write_text(fill_page(page.read_text(), {"merged icons": table}))


if __name__ == "__main__":
    main()
