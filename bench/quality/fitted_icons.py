"""The fit on the shipped icons: ``python bench/quality/fitted_icons.py --label NAME --out FILE``.

Models and LoRAs are those of examples/icon_family. The score is the share of the held-out loss
between no LoRA and one trained on the target for 90 steps that is recovered, at strength 1. Rows of
FILE with the same label are not made again, so that fits of several states of the library lie side
by side; --options gives fields of `FitSettings`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from results import RowsFile
from yards import Yard, choose_world, open_yard

ROWS = (*(("apart", x) for x in ("neon", "duotone", "concept")),)
ROWS += (("pruned", "neon"), ("pruned", "concept"))


def fit(yard: Yard, options: dict[str, Any]) -> dict[str, Any]:
    """One row of the table."""
    before = time.process_time()
    fitted = yard.fit(yard.lora, **({"seed": 0} | options))
    seconds, report = time.process_time() - before, fitted.report
    return {
        "start": report.start,
        "rank": max(update.rank for update in fitted.updates.values()),
        "steps": len(report.steps),
        "score": yard.share(fitted.updates),
        "share": round(report.gate.share["all"], 4),
        "history": [round(share, 3) for share in report.steps],
        "fit_seconds": round(report.seconds["fit"], 1),
        "processor_seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--label", default="")
    parser.add_argument("--work", type=Path, default=Path("work"), help="of what sets the scale")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--options", type=json.loads, default={}, help="of FitSettings, as JSON")
    given = parser.parse_args()
    table = RowsFile(given.out, given.label)
    for kind, adapter in ROWS:
        key = f"{given.label}, {kind}, {adapter}"
        if key not in table.rows:
            yard = open_yard(choose_world("shipped"), given.work / "shipped", kind, adapter)
            table.add(key, fit(yard, given.options))


if __name__ == "__main__":
    main()
