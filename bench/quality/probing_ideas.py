"""What a probing may ask, compared: ``python bench/quality/probing_ideas.py --work DIR``.

DIR is the folder of study.py. All ways fit as many samples by the library's fit; they differ in
what the target is taught. docs/fit_measured.md says which of
them the library takes for which target.
"""

from __future__ import annotations

import argparse
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from evidence import ROOT, fill_page
from flow import sample
from guiding import guide_source
from jobs import Job, run_jobs
from models import Folder
from probing import IMAGES, STEPS, Case
from results import Row, git, round_numbers
from scoring import apply_updates
from tables import format_table
from torch import Tensor
from worlds import load_world

from prolora import LowRank
from prolora.adapters.adapter import Adapter
from prolora.probe.checkpoint import Checkpoints
from prolora.probe.recording.recorder import Recorder
from prolora.probe.recording.trajectories import Call
from prolora.probe.recording.translation import PAIR, Question, Translation
from prolora.probe.run import fit_from_recorder
from prolora.probe.settings import FitSettings

RESULTS = ROOT / "bench/results/probing_ideas.json"
WAYS = {
    "answers": (False, None),
    "guided answers": (True, None),
    "guided answers and pairs": (True, "fresh"),
    "guided answers and pairs at their noise": (True, "shared"),
    "answers and pairs": (False, "fresh"),
}
"""Way -> whether the source is asked with its guidance, and the noise of pairs of images."""
FREE_SHARE = 0.2


class FlowTranslation(Translation):
    """Knows which velocity means an x₀."""

    def of_clean(self, call: Call) -> Tensor:
        """See `Translation.of_clean`."""
        x, time, _ = call.args
        return (x - call.clean) / (time[:, None, None, None] / 1000)


@dataclass(frozen=True)
class PairedRecorder(Recorder):
    """Adds pairs of images, with and without the LoRA, to the recorded calls.

    Attributes:
        case: one LoRA and one target.
        noise: of the pairs' states: "fresh", "shared" (what both were drawn from), or None for no
            pairs.
    """

    case: Case | None = None
    noise: str | None = None

    def record_questions(self, seed: int, held_out: bool = False) -> list[Question]:
        """See `Recorder.record_questions`."""
        questions = super().record_questions(seed, held_out)
        return questions if held_out or not self.noise else questions + self._draw_pairs(seed)

    def _draw_pairs(self, seed: int) -> list[Question]:
        case, world = self.case, self.case.world
        few = case.adapter == "fewstep"
        generator = torch.Generator().manual_seed(seed + 7777)
        y = world.draw_prompts(IMAGES, generator, case.adapter == "concept")
        ours, theirs = (
            [world.tokens(model, prompts) for prompts in (y, world.null_like(y))]
            for model in (self.source, self.target)
        )
        draw = functools.partial(sample, self.source, *ours, world.shape, seed=seed + 7777)
        images = [draw(STEPS, world.guidance)]
        with apply_updates(self.source, case.lora):
            images.append(draw(4, 1.0) if few else draw(STEPS, world.guidance))
        own = torch.randn(images[0].shape, generator=torch.Generator().manual_seed(seed + 7777))
        free_share = 0.0 if world.guidance_of(case.kind) == 1 else FREE_SHARE
        questions = []
        for i in range(STEPS):
            t = (1 - (i + torch.rand(IMAGES, generator=generator)) / STEPS).clamp(0.02, 1)
            fresh = torch.randn(own.shape, generator=generator)
            noise, s = own if self.noise == "shared" else fresh, t[:, None, None, None]
            free = torch.rand(IMAGES, generator=generator) < free_share
            tokens = torch.where(free[:, None, None], theirs[1], theirs[0])
            numbers = tuple(range(IMAGES))
            calls = [
                Call(((1 - s) * x + s * noise, 1000 * t, tokens), {}, PAIR, numbers, x)
                for x in images
            ]
            questions.append(Question(*calls))
        return questions


def try_way(case_of: tuple[Any, ...], way: str, out: Path) -> None:
    """One transfer in one way, and what it is worth."""
    case, (guided, noise) = Case(*case_of), WAYS[way]
    world, prefix = case.world, case.world.prefix[case.arch]
    lora = {prefix + name: update for name, update in case.lora.items()}
    source, target, adapted = case.samplers(IMAGES, STEPS)
    guidance = guide_source(world, case.source, case.kind, case.adapter) if guided else None
    recorder = PairedRecorder(
        case.source,
        case.target,
        Adapter(lora, format="diffusers"),
        (source, adapted, target),
        FlowTranslation(guidance=guidance),
        Checkpoints(None),
        case=case,
        noise=noise,
    )
    rank = max(32, *(update.rank for update in lora.values()))
    settings = FitSettings(rank=rank, seed=100 * case.seed, force=True)
    rival = {prefix + name: update for name, update in case.copied().items()}
    result = fit_from_recorder(recorder, rival, settings)
    verdict = result.report.gate
    updates = {
        name.removeprefix(prefix): LowRank(u.up / verdict.strength, u.down)
        for name, u in result.adapter.updates.items()
    }
    names = {"kind": case.kind, "seed": case.seed, "adapter": case.adapter, "way": way}
    scores = {"score": case.score(updates), "copy": case.score(case.copied())}
    row = names | scores | {"decision": verdict.decision, "share": verdict.share["all"]}
    out.write_text(json.dumps(round_numbers(row)))


def ideas_table(rows: list[Row]) -> str:
    """What every way gives, target by target."""
    lines = []
    for kind, adapter in dict.fromkeys((row["kind"], row["adapter"]) for row in rows):
        part = [row for row in rows if (row["kind"], row["adapter"]) == (kind, adapter)]
        scores = {row["way"]: row["score"] for row in part}
        cells = [f"{scores[way]:.2f}" if way in scores else "–" for way in WAYS]
        lines.append([kind, adapter, f"{part[0]['copy']:.2f}", *cells])
    return format_table(["target", "LoRA", "copy", *WAYS], lines)


def main() -> None:
    """Tries what is asked for, and collects it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="folder of study.py, icons; none tries nothing")
    parser.add_argument("--kinds", nargs="+", default=["few-step", "guided", "independent"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--adapters", nargs="+", default=["neon", "concept"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    asked = parser.parse_args()
    if asked.work:
        RESULTS.write_text(json.dumps(try_ways(asked), indent=0) + "\n")
    table = ideas_table(json.loads(RESULTS.read_text())["rows"])
    page = ROOT / "docs/fit_measured.md"
    page.write_text(fill_page(page.read_text(), {"probing ideas": table}))


def try_ways(asked: argparse.Namespace) -> dict[str, Any]:
    """Every row, those of earlier runs too, and how it was made."""
    torch.set_num_threads(1)
    world, folder = load_world("icons"), asked.work / "ideas"
    files = Folder(world, asked.work, "flux")
    jobs = []
    for kind in asked.kinds:
        ways = [way for way in asked.ways if kind in world.distilled or not WAYS[way][0]]
        for seed in asked.seeds:
            for adapter in asked.adapters:
                needs = (files.lora_path(kind, seed, adapter), files.model_path(kind, seed))
                case = (world, asked.work, "flux", "flux", kind, seed, adapter)
                for way in ways if all(path.exists() for path in needs) else ():
                    out = folder / f"{kind},{seed},{adapter},{way}.json"
                    jobs.append(Job(out, needs, functools.partial(try_way, case, way)))
    run_jobs(jobs)
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    made = {
        "script": "bench/quality/probing_ideas.py",
        "commit": git("rev-parse", "--short", "HEAD"),
    }
    made |= {"date": git("log", "-1", "--format=%cs"), "torch": torch.__version__}
    return {"made": made, "rows": rows}


if __name__ == "__main__":
    main()
