"""A slice of the study: ``python bench/quality/slice.py [--world icons]``, minutes on one thread.

Fails (exit code 1) if the order of the methods differs from that of the study.
"""

from __future__ import annotations

import argparse
import importlib
import sys

import torch
from worlds import NAMES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", choices=NAMES, default=NAMES[0])
    world = parser.parse_args().world
    run = importlib.import_module(f"slice_{world}").run
    torch.manual_seed(0)
    wrong = 0
    for outcome in run():
        ranking = sorted(outcome.shares.items(), key=lambda item: -item[1])
        print(f"{outcome.title}:")
        print("  " + ", ".join(f"{label} {share:.2f}" for label, share in ranking), flush=True)
        for fault in outcome.faults:
            wrong += 1
            print(f"  NOT AS IN THE STUDY: {fault}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
