"""Maps between two models that move any LoRA: ``python bench/quality/pair_maps.py --work DIR``.

DIR is the folder of study.py, --crossed that of crossed.py; nothing is written into them.
pair_maps_fitting.py says what the maps are; they are fitted once for a pair. docs/fit_measured.md
says what they are worth.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from contenders import scale_updates
from evidence import ROOT, fill_page
from jobs import Job, run_jobs
from pair_maps_fitting import BEST, CROSSING, IMAGES, TIMES, WAYS, Pair, Study
from pair_maps_scoring import Judged, copy_of, fit_some, score_all, score_way
from pair_maps_tables import WORD, adapters_of, tables_of
from results import Row, git, round_numbers

RESULTS = ROOT / "bench/results/pair_maps.json"
SMALL = ((8, 10, 4), (8, 10, 12))
"""Images, steps of the samplers and of the fit, where a fit starts from what was moved."""


def try_maps(
    kind: str, seed: int, roots: Mapping[str, Path], asked: Mapping[str, Any], out: Path
) -> None:
    """All LoRAs of a pair, moved in every way that is asked for, and what it took."""
    pairs = {name: Pair(kind, seed, name, roots) for name in asked["adapters"] or adapters_of(kind)}
    first = next(iter(pairs.values()))
    first.asks_for_concept = asked["concept"]
    study = Study.collect(first, asked["images"], asked["times"])
    judged = Judged.of(first)
    maps = {way: study.fit(*WAYS[way]) for way in asked["ways"] if way in WAYS}
    about = {
        "kind": kind,
        "seed": seed,
        "seconds": study.seconds | {way: made.seconds for way, made in maps.items()},
        "predictions": study.predictions,
        "concept": asked["concept"],
        "explained": maps[BEST].explained if BEST in maps else {},
    }
    rows: list[Row] = []
    for name, pair in pairs.items():
        lora = pair.case.lora
        for way, made in maps.items():
            rows += score_way(pair, judged, lora, way, made)
        if asked["concept"]:
            rows = [row | {"way": row["way"].removesuffix(WORD) + WORD} for row in rows]
        row = {"kind": kind, "seed": seed, "adapter": name}
        if copied := copy_of(pair):
            rows.append(row | {"way": "copy", "scores": score_all(pair, copied, (1.0,))})
        if name in asked["fitted"] and kind != CROSSING:
            moved = maps[asked["ways"][-1]].move(lora)
            strength, _ = judged.best_strength(lora, moved)
            for numbers in SMALL:
                for start in ({}, scale_updates(moved, strength)):
                    rows.append(row | {"way": "fit"} | fit_some(pair, start, *numbers))
    out.write_text(json.dumps({"about": about, "rows": rows}))


def main() -> None:
    """Tries what is asked for, and fills the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="folder of study.py, icons; none tries nothing")
    parser.add_argument("--crossed", type=Path, help="folder of crossed.py")
    parser.add_argument("--out", type=Path, help="folder for the rows")
    parser.add_argument("--pairs", nargs="+", default=["independent 1"], help="kind and seed")
    parser.add_argument("--adapters", nargs="+", help="all of a pair unless given")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--fitted", nargs="*", default=[], help="LoRAs that are fitted afterwards")
    parser.add_argument("--concept", action="store_true", help="ask with the concept's word, too")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--times", type=int, default=TIMES)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.work:
        roots = {"icons": asked.work, "crossed": asked.crossed}
        jobs = []
        for pair in asked.pairs:
            kind, seed = pair.rsplit(" ", 1)
            run = functools.partial(try_maps, kind, int(seed), roots, vars(asked))
            name = f"{pair}{WORD if asked.concept else ''}.json"
            jobs.append(Job(asked.out / name, (), run))
        run_jobs(jobs)
        RESULTS.write_text(json.dumps(collect(asked.out), indent=0) + "\n")
    results = json.loads(RESULTS.read_text())
    page = ROOT / "docs/fit_measured.md"
    page.write_text(fill_page(page.read_text(), tables_of(results)))


def collect(folder: Path) -> dict[str, Any]:
    """What was measured, and how it was made."""
    parts = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    made = {
        "script": "bench/quality/pair_maps.py",
        "command": "python pair_maps.py --work icons --crossed crossing --out maps --pairs PAIR",
        "commit": git("rev-parse", "--short", "HEAD"),
        "date": git("log", "-1", "--format=%cs"),
        "torch": torch.__version__,
        "threads": 1,
    }
    pairs = [round_numbers(part["about"]) for part in parts]
    return {
        "made": made,
        "pairs": pairs,
        "rows": [round_numbers(r) for p in parts for r in p["rows"]],
    }


if __name__ == "__main__":
    main()
