"""Fits to a target of another look: ``python bench/quality/another_look.py --adapters neon``.

Models and LoRAs are those of examples/icon_family, the target is its *far*. Fits start from the
copy and are shrunk by their trust. WAYS differ in where both models are asked: on the trajectories
of all three samplers, or only at noised images of the target, which alone knows its look; at all
times or at late ones. What is wanted there is always the change that the LoRA makes to the source.
Scores are shares of the held-out loss in the target's look between no LoRA and one trained there;
*own* is what is recovered on the LoRA's own images, where 1 is the copy.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from typing import Any

import torch
from contenders import CHOSEN, STRENGTHS, Case, Updates, scale_updates
from evidence import ROOT, fill_page
from fitted_icons import FIT, IMAGES, SAMPLER_STEPS, choose_world
from flow import predict
from icons.shipped import load_lora, load_model
from lessons import Lesson, make_lesson
from probing import Sampler
from results import Row, git, round_numbers
from scoring import apply_updates
from tables import format_table
from torch import nn
from training import train_lora
from worlds import World

from prolora import LowRank, probe

RESULTS, PAGE = ROOT / "bench/results/another_look.json", ROOT / "docs/fit_measured.md"
KIND = "far"
WAYS = {
    "three trajectories": None,
    "the target's images": 1.0,
    "the target's images, late": 0.5,
}
"""Way -> the earliest time at which images of the target are asked about; None: as the library."""
FROM_COPY = {"start": "copy", "rank": 32, "probes": 384, "fit_steps": 8}
AGAIN = 5
"""How often each image of the target is noised."""


class TargetImages:
    """Draws images of the target, and calls a model with them at noises of late times."""

    def __init__(
        self, world: World, model: nn.Module, target: nn.Module, adapter: str, earliest: float
    ) -> None:
        """The model that is recorded; the target is run as a copy, which is not."""
        self.world, self.model, self.adapter = world, model, adapter
        self.target, self.earliest = copy.deepcopy(target), earliest

    @torch.no_grad()
    def __call__(self, seed: int) -> None:
        """One run from noise."""
        generator = torch.Generator().manual_seed(seed)
        y = self.world.draw_prompts(IMAGES, generator, self.adapter == "concept")
        drawn = self.world.sample(self.target, y, SAMPLER_STEPS, self.world.guidance, seed)
        for _ in range(AGAIN):
            noise = torch.randn(drawn.shape, generator=generator)
            t = self.earliest * torch.rand(IMAGES, generator=generator)
            s = t[:, None, None, None]
            x = (1 - s) * drawn + s * noise
            predict(self.model, x, t, self.world.tokens(self.model, y))


def fit(
    world: World, models: tuple[nn.Module, nn.Module], adapter: str, earliest: float | None
) -> tuple[Updates, dict[str, Any]]:
    """What is fitted from the copy, at strength 1, and how the fit judges itself."""
    source, target = models
    prefix, lora = world.prefix["flux"], load_lora(adapter)
    if earliest is None:
        ends = [Sampler(world, model, adapter, IMAGES, SAMPLER_STEPS) for model in models]
    else:
        ends = [TargetImages(world, model, target, adapter, earliest) for model in models]
    settings = probe.FitSettings(**FIT | FROM_COPY)
    updates = {f"{prefix}{name}": update for name, update in lora.items()}
    result = probe.fit_to_models(source, target, updates, probe.Samplers(*ends), settings)
    verdict = result.report.gate
    assert verdict is not None
    facts = {"decision": verdict.decision, "share": verdict.share, "trust": result.report.trust}
    facts |= {"disagreement": verdict.disagreement, "seconds": result.report.seconds}
    fitted = {
        name.removeprefix(prefix): LowRank(u.up / verdict.strength, u.down)
        for name, u in result.adapter.updates.items()
    }
    return fitted, facts


def loss_with(target: nn.Module, lesson: Lesson, updates: Updates) -> float:
    """The held-out loss."""
    with apply_updates(target, updates):
        return lesson.held_out(target)


def move(adapter: str, ways: list[str]) -> Row:
    """One LoRA, by copies, `auto` and every way of fitting."""
    world, source, target = choose_world(), load_model("source"), load_model(KIND)
    look, own = (make_lesson(world, k, adapter, target, "held_out") for k in (KIND, "source"))
    taught = make_lesson(world, KIND, adapter, target, "train")
    case = Case.of(world, "flux", KIND, source, target, load_lora(adapter))
    rows: dict[str, Updates] = {"none": {}}
    rows["oracle"] = train_lora(world, "flux", adapter, 0, target, taught)
    rows |= {f"copy @ {s:g}": scale_updates(case.updates, s) for s in STRENGTHS}
    rows["auto"], facts = CHOSEN["auto"](case), {}
    for way in ways:
        rows[way], facts[way] = fit(world, (source, target), adapter, WAYS[way])
    losses = {row: loss_with(target, look, updates) for row, updates in rows.items()}
    theirs = {row: loss_with(target, own, updates) for row, updates in rows.items()}
    return round_numbers({"adapter": adapter, "losses": losses, "own": theirs, "fits": facts})


def share(losses: dict[str, float], row: str, best: str) -> float:
    """0 without a LoRA, 1 at the best."""
    return (losses["none"] - losses[row]) / (losses["none"] - losses[best])


def looks_table(rows: list[Row]) -> str:
    """A line for each LoRA and way: by the target's look, by its own images, what the fit says."""
    lines = []
    for row in rows:
        copies = [name for name in row["losses"] if name.startswith("copy @ ")]
        best = min(copies, key=lambda name: row["losses"][name])
        shown = dict.fromkeys(["copy @ 1", best, "auto", *(w for w in WAYS if w in row["fits"])])
        for name in shown:
            fit = row["fits"].get(name, {})
            facts = [fit.get("trust"), (fit.get("disagreement") or {}).get("all")]
            scores = [share(row["losses"], name, "oracle"), share(row["own"], name, "copy @ 1")]
            cells = ["–" if x is None else f"{x:.2f}" for x in (*scores, *facts)]
            lines.append([row["adapter"], name, *cells, fit.get("decision", "–")])
    return format_table(["LoRA", "", "look", "own", "trust", "disagreement", "gate"], lines)


def main() -> None:
    """Moves what is asked for, and keeps the rest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", nargs="+", default=[], help="that are moved anew")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for adapter in asked.adapters:
        row = move(adapter, asked.ways)
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"made": {}, "rows": []}
        made = {"script": "bench/quality/another_look.py", "torch": torch.__version__}
        made |= {"commit": git("rev-parse", "--short", "HEAD")}
        made |= {"commands": [*kept["made"].get("commands", []), " ".join(sys.argv[1:])]}
        rows = [*(old for old in kept["rows"] if old["adapter"] != adapter), row]
        RESULTS.write_text(json.dumps({"made": made, "rows": rows}, indent=0) + "\n")
    table = looks_table(json.loads(RESULTS.read_text())["rows"])
    PAGE.write_text(fill_page(PAGE.read_text(), {"another look": table}))


if __name__ == "__main__":
    main()
