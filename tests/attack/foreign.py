"""Files of others where prolora writes: none may be replaced, changed or deleted.

Each command runs once in an empty place, which shows every file that it writes. Then, for each of
those names in turn, a file lies there that prolora did not write, and the command runs again. So
nothing here has to know where results go.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import damage
import fleet_files
import mini
from hostile import bases
from safetensors.torch import save_file
from sandbox import Box, Row, choose, digest, judge_ending, look_at

Words = list[object]


def write_lora(path: Path) -> None:
    """A trained LoRA that is not prolora's."""
    save_file(mini.lora_tensors(3), path, {"ss_output_name": "mine", "ss_training_comment": "week"})


FOREIGN: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("mine\n"),
    "LoRA": write_lora,
}
"""What may lie where a result goes; every kind under every name."""
_DIGEST = re.compile(r"[0-9a-f]{12,}[^/]*$")


def write_inputs(box: Box) -> None:
    """A LoRA, bases, three LoRAs in a folder."""
    damage.write_case(box)
    loras = box.inputs / "loras"
    loras.mkdir()
    for name in "abc":
        save_file(fleet_files.some_tensors(2, 12), loras / f"{name}.safetensors")


def transfer(box: Box, *more: object) -> Words:
    return ["transfer", box.inputs / "lora.safetensors", *bases(box), "--cache=none", *more]


COMMANDS: dict[str, tuple[Callable[[Box], None], Callable[[Box], Words]]] = {
    "transfer": (
        write_inputs,
        lambda box: transfer(
            box,
            *("-o", box.out / "moved.safetensors", "--card"),
            *("--report", box.out / "report.json"),
        ),
    ),
    "transfer, PEFT": (
        write_inputs,
        lambda box: transfer(box, "-o", box.out / "moved", "--format", "peft", "--card"),
    ),
    "transfer, several": (
        write_inputs,
        lambda box: [
            *("transfer", *sorted((box.inputs / "loras").iterdir()), *bases(box)),
            *("-o", box.out / "moved", "--report", box.out / "report.json", "--card"),
            "--cache=none",
        ],
    ),
    "transfer, cache": (
        write_inputs,
        lambda box: [
            *("transfer", box.inputs / "lora.safetensors", *bases(box), "--method"),
            *("prolora", "--rank", "4", "-o", box.out / "m.safetensors", "--cache", box.out / "c"),
        ],
    ),
    "migrate": (
        write_inputs,
        lambda box: ["migrate", box.inputs / "loras", *bases(box), "-o", box.out, "--cache=none"],
    ),
    "fit with resume": (
        damage.write_pipelines,
        lambda box: [
            *("fit", box.inputs / "lora.safetensors", *bases(box), "--cache=none"),
            *(*damage.FIT, "-o", box.out / "m.safetensors", "--resume", box.out / "kept"),
        ],
    ),
    "demo": (write_inputs, lambda box: ["demo", "-o", box.out / "demo", "--target", "pruned"]),
}


def run_command(name: str, box: Box, scale: float, seed: int) -> Row:
    """A command over foreign files, one after the other, in every place that it writes to."""
    row = Row("foreign", name)
    prepare, make = COMMANDS[name]
    box.begin()
    prepare(box)
    template = box.keep()
    box.must(*make(box))
    written = box.keep() / "out"
    names = list_written(written)
    row.facts["files that it writes"] = len(names)
    slow = 0.15 if "fit" in name or name == "demo" else 1.0
    for target in names:
        for kind in FOREIGN:
            if choose(seed, target, kind).random() >= scale * slow:
                continue
            box.begin(template)
            path = box.out / target
            path.parent.mkdir(parents=True, exist_ok=True)
            FOREIGN[kind](path)
            plant_others(box, [path])
            judge_foreign(box, row, make(box), f"{kind} as {target}")
    return row


def list_written(out: Path) -> list[str]:
    """The files that a command wrote, but for those whose names are digests.

    No file of another has such a name by chance, and one that is damaged has to be made again.
    """
    names = [n for n in look_at(out) if (out / n).is_file()]
    if not names:
        raise RuntimeError("a command that should write something wrote nothing")
    return [name for name in names if not _DIGEST.search(name)]


def plant_others(box: Box, there: Sequence[Path]) -> None:
    """Files that have nothing to do with any result, in each folder of the results."""
    folders = {box.out, *(path.parent for path in there)}
    for folder in folders:
        (folder / "notes.txt").write_text("mine\n")
        write_lora(folder / "trained.safetensors")
        (folder / "mine").mkdir(exist_ok=True)
        (folder / "mine" / "data.json").write_text("{}\n")


def judge_foreign(box: Box, row: Row, words: Words, how: str) -> None:
    """Runs a command; all that was there before must be there as it was."""
    mine = {path: digest(path.read_bytes()) for path in box.out.rglob("*") if path.is_file()}
    before = box.look()
    run = box.run(*words)
    verdicts = judge_ending(box, run, before)
    for path, was in mine.items():
        if not path.is_file() or digest(path.read_bytes()) != was:
            verdicts.append("replaced")
            how = f"{how}: {path.relative_to(box.out)}"
            break
    row.add(verdicts or ["done" if run.code == 0 else "refused"], how, run)


def run_folders(box: Box, scale: float, seed: int) -> Row:
    """Folders of projects that happen to have names that prolora uses."""
    row = Row("foreign", "folders with our names")
    box.begin()
    write_inputs(box)
    template = box.keep()
    for name in ("target", "moved", "c", "c/v3", "cache"):
        cached = transfer(box, "-o", box.out / "moved.safetensors", "--cache", box.out / "c")
        for words in (
            ["migrate", box.inputs / "loras", *bases(box), "-o", box.out, "--cache=none"],
            [word for word in cached if word != "--cache=none"],
        ):
            box.begin(template)
            folder = box.out / name
            folder.mkdir(parents=True)
            plant_others(box, [folder / "x"])
            judge_foreign(box, row, words, f"{words[0]} over {name}/")
    return row


def run_links(box: Box, scale: float, seed: int) -> Row:
    """Links in the places of results, to files of others beside the results."""
    row = Row("foreign", "links to files of others")
    for name in COMMANDS:
        if "fit" in name or name == "demo":
            continue
        prepare, make = COMMANDS[name]
        box.begin()
        prepare(box)
        template = box.keep()
        box.must(*make(box))
        written = box.keep() / "out"
        for target in list_written(written):
            if choose(seed, name, target).random() >= scale:
                continue
            box.begin(template)
            victim, path = box.inputs / "victim", box.out / target
            write_lora(victim) if target.endswith(".safetensors") else victim.write_text("mine\n")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(victim)
            judge_foreign(box, row, make(box), f"{name}: a link as {target}")
    return row


def list_cases() -> dict[str, Callable[[Box, float, int], Row]]:
    """Name -> what runs it."""
    commands = {name: partial(run_command, name) for name in COMMANDS}
    return commands | {"folders with our names": run_folders, "links": run_links}
