"""Stores the keys of LoRAs as a trainer writes them: see trainer_files/__init__.py."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from loader_matrix import describe_checkout

from trainer_files import write_cells


def main() -> None:
    """Reads the arguments, runs the trainer's code, writes the cells."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trainer", help="for example musubi_tuner, the name of a module here")
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--version", default="", help="what the trainer calls this version")
    words = parser.parse_args()
    list_cells = importlib.import_module(f"trainer_files.{words.trainer}").list_cells
    version = ", ".join(filter(None, [words.version, describe_checkout(words.checkout)]))
    sys.argv = sys.argv[:1]
    cells = list(list_cells(words.checkout.resolve()))
    write_cells(words.trainer, version, cells)
    for cell in cells:
        print(f"{cell.model}: {cell.how}, {len(cell.modules)} modules; {cell.note}")


if __name__ == "__main__":
    main()
