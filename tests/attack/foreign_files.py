"""Files of others where prolora writes: none may be replaced, changed or deleted.

Each command runs once in an empty place, which shows every file that it writes. Then, for each of
those names in turn, a file is there that prolora did not write, and the command runs again. So
nothing here has to know where results go.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import inputs
from inputs import RANK, bases, write_foreign_lora, write_loras
from sandbox import Box, Row, Run, Words, digest, look_at

FOREIGN: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("mine\n"),
    "LoRA": write_foreign_lora,
}
"""What may be where a result goes; every kind under every name."""
_DIGEST = re.compile(r"[0-9a-f]{12,}[^/]*$")


def transfer(box: Box, *more: object, lora: str = "lora.safetensors") -> Words:
    loras = sorted((box.inputs / lora).iterdir()) if lora == "loras" else [box.inputs / lora]
    return ["transfer", *loras, *bases(box), *more]


def fit(box: Box) -> Words:
    words = [*inputs.fit(box), "-o", box.out / "m.safetensors", "--resume", box.out / "kept"]
    return [*words, "--report", box.out / "report.json"]


COMMANDS: dict[str, Callable[[Box], Words]] = {
    "transfer": lambda box: transfer(
        box,
        *("-o", box.out / "moved.safetensors", "--report", box.out / "report.json"),
        *("--card", "--cache=none"),
    ),
    "transfer, PEFT": lambda box: transfer(
        box, "-o", box.out / "moved", "--format", "peft", "--card", "--cache=none"
    ),
    "transfer, several": lambda box: transfer(
        box,
        *("-o", box.out / "moved", "--report", box.out / "report.json", "--card", "--cache=none"),
        lora="loras",
    ),
    "transfer, cache": lambda box: transfer(
        box, *RANK, "-o", box.out / "m.safetensors", "--cache", box.out / "c"
    ),
    "migrate": inputs.migrate,
    "fit with resume": fit,
    "demo": lambda box: ["demo", "-o", box.out / "demo", "--target", "pruned"],
}


def list_written(box: Box, command: str) -> tuple[Path, Iterator[str]]:
    """The filled box, and the files that a command writes, but for names that are digests.

    No file of another has such a name by chance, and one that is damaged has to be made again.
    """
    template = box.fill(inputs.write_pipelines if "fit" in command else write_loras)
    box.must(*COMMANDS[command](box))
    out = box.keep() / "out"
    names = [name for name in look_at(out) if (out / name).is_file()]
    if not names:
        raise RuntimeError("a command that should write something wrote nothing")
    return template, [name for name in names if not _DIGEST.search(name)]


def plant_others(folder: Path) -> None:
    """Files that have nothing to do with any result."""
    (folder / "mine").mkdir(parents=True, exist_ok=True)
    (folder / "notes.txt").write_text("mine\n")
    write_foreign_lora(folder / "trained.safetensors")
    (folder / "mine" / "data.json").write_text("{}\n")


def attack(box: Box, row: Row, words: Words, how: str) -> None:
    """Runs a command; all that was there before must be there as it was."""
    mine = {path: digest(path.read_bytes()) for path in box.out.rglob("*") if path.is_file()}

    def judge(run: Run) -> list[str]:
        files = mine.items()
        is_whole = all(p.is_file() and digest(p.read_bytes()) == was for p, was in files)
        return ["replaced" if not is_whole else "refused" if run.code else "done"]

    box.attack(row, words, how, judge)


def run_command(command: str, box: Box, row: Row) -> None:
    """A command over foreign files, one after the other, in every place that it writes to."""
    template, names = list_written(box, command)
    row.facts["files that it writes"] = len(names)
    share = 0.15 if command in ("fit with resume", "demo") else 1.0
    for target in names:
        for kind, write in FOREIGN.items():
            if row.random(target, kind).random() >= row.scale * share:
                continue
            box.begin(template)
            path = box.out / target
            path.parent.mkdir(parents=True, exist_ok=True)
            plant_others(box.out)
            plant_others(path.parent)
            write(path)
            attack(box, row, COMMANDS[command](box), f"{kind} as {target}")


CASES = {name: partial(run_command, name) for name in COMMANDS}
