"""Whether the evaluator orders methods on the icons as the study does: by images, not by losses.

``python bench/quality/evaluated_icons.py --work icons --judge DIR`` with the trained models of the
study; it resumes. The images are drawn by the world, since its networks are not pipelines; metrics,
intervals and verdict are those of `prolora evaluate`. The reference is what a LoRA trained on the
target draws from the same noise. *features* is the cosine of the study's judge, *features-MMD* its
distance of all images, *pixels* the root mean square of the difference.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from contenders import METHODS, Case
from judge import Judge
from models import Folder, load_lora
from PIL import Image
from results import git
from scoring import apply_updates, sample_images
from study import load_judge, make_judge
from torch import Tensor
from worlds import World, load_world

from prolora.workflow.evaluating.entrants import Entrant, Subject
from prolora.workflow.evaluating.evaluation import Evaluation
from prolora.workflow.evaluating.metrics import ask_metric, split_mmd
from prolora.workflow.evaluating.statistics import Estimate

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench/results/evaluated_icons.json"
STUDY = ROOT / "bench/results/quality_icons.json"
SEED, ARCH = 1, "flux"
KINDS, ADAPTERS = ("pruned", "few-step", "guided"), ("neon", "duotone", "concept")
MOVED = {"copy": "copy", "blocks": "blocks 0.9", "prolora": "prolora 0.9", "lora-x": "lora-x 0.9"}


class IconMetric:
    """The study's judge and plain pixels as a metric of the evaluator."""

    lower = ("features-MMD", "pixels")

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    def __call__(self, images: Any, prompts: Any, reference: Any) -> dict[str, list[float]]:
        ours, theirs = (self._read(rows) for rows in (images, [r[0] for r in reference]))
        with torch.no_grad():
            seen, wanted = (self.judge(rows)[0].double() for rows in (ours, theirs))
        return {
            "features": torch.cosine_similarity(seen, wanted).tolist(),
            "features-MMD": split_mmd(seen, wanted).tolist(),
            "pixels": (ours - theirs).square().mean((1, 2, 3)).sqrt().tolist(),
        }

    @staticmethod
    def _read(images: Any) -> Tensor:
        rows = [torch.frombuffer(bytearray(x.tobytes()), dtype=torch.uint8) for x in images]
        return torch.stack(rows).reshape(-1, 24, 24, 3).movedim(3, 1) / 127.5 - 1


def to_pictures(images: Tensor) -> list[Image.Image]:
    """[n, 3, 24, 24] from −1 to 1 as Pillow's images."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(1, 3)
    return [Image.fromarray(one.contiguous().numpy()) for one in pixels]


def evaluate_kind(world: World, root: Path, kind: str, metric: IconMetric) -> Evaluation:
    """The methods on one kind of target, over the adapters."""
    folder = Folder(world, root, ARCH)
    source, target = folder.load_source(kind, SEED), folder.load_model(kind, SEED)
    subjects, scores, first = [], {}, None
    rows = ("source", "source + LoRA", "target", *MOVED)
    for adapter in ADAPTERS:
        lora = load_lora(folder.source_lora_path(kind, SEED, adapter))
        case = Case.of(world, ARCH, kind, source, target, lora)
        first = first or case
        case = first.with_lora(case.updates, case.dropped)
        updates = {"target": {}} | {row: METHODS[label](case) for row, label in MOVED.items()}
        entrants = {row: Entrant(1, known) for row, known in updates.items()}
        entrants |= {"source": Entrant(0), "source + LoRA": Entrant(0, lora)}
        oracle = load_lora(folder.lora_path(kind, SEED, adapter))
        with apply_updates(target, oracle):
            drawn, asked = sample_images(world, kind, target, adapter, seed=0)
        reference = [[image] for image in to_pictures(drawn)]
        prompts = tuple(f"{i}: {y}" for i, y in enumerate(asked.tolist()))
        subjects.append(Subject(adapter, prompts, entrants, {}))
        for row, known in updates.items():
            with apply_updates(target, known):
                images = to_pictures(sample_images(world, kind, target, adapter, seed=0)[0])
            for score, values in ask_metric("icons", metric, images, prompts, reference).items():
                scores.setdefault(score, {}).setdefault(row, []).append([[v] for v in values])
    stacked = {s: {r: torch.tensor(v) for r, v in rows.items()} for s, rows in scores.items()}
    lower = frozenset(metric.lower)
    return Evaluation(
        "source", kind, tuple(subjects), (0,), rows, stacked, lower,
        "the LoRA trained on the target, image by image", {}, {}, {},
    )  # fmt: skip


def order_by_losses(kind: str) -> dict[str, float]:
    """Method -> the mean share of the study over the same adapters and seed."""
    rows = json.loads(STUDY.read_text("utf-8"))["rows"]
    rows = [r for r in rows if (r["arch"], r["kind"], r["seed"]) == (ARCH, kind, SEED)]
    rows = [r for r in rows if r["adapter"] in ADAPTERS]
    return {
        name: sum((r["none"] - r["losses"][f"{label} @ 1"]) / (r["none"] - r["oracle"])
                  for r in rows) / len(rows)
        for name, label in MOVED.items()
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the study's models")
    parser.add_argument("--judge", type=Path, required=True, help="folder of the judge; made there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    world = load_world("icons")
    options.judge.mkdir(parents=True, exist_ok=True)
    if not (options.judge / "judge.safetensors").is_file():
        make_judge(world, options.judge / "judge.safetensors")
    metric = IconMetric(load_judge(world, options.judge))
    found: dict[str, Any] = {"made": git("rev-parse", "--short", "HEAD"), "kinds": {}}
    if RESULTS.is_file():
        found["kinds"] = json.loads(RESULTS.read_text("utf-8"))["kinds"]
    for kind in [kind for kind in KINDS if kind not in found["kinds"]]:
        done = evaluate_kind(world, options.work, kind, metric)
        print(f"\n{kind}\n{done.in_words()}", flush=True)
        means = {
            score: {row: Estimate.of(values).mean for row, values in by_row.items()}
            for score, by_row in done.scores.items()
        }
        found["kinds"][kind] = {"study": order_by_losses(kind), "scores": means}
        found["kinds"][kind]["verdict"] = str(done.in_words()).splitlines()
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
