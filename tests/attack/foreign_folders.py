"""Folders with names that prolora uses, and links to files of others in the places of results."""

from __future__ import annotations

import inputs
from foreign_files import COMMANDS, attack, list_written, plant_others
from sandbox import Box, Row


def run_folders(box: Box, row: Row) -> None:
    template = box.fill(inputs.write_loras)
    for name in ("target", "moved", "c", "c/v3", "cache"):
        for command in ("migrate", "transfer, cache"):
            box.begin(template)
            plant_others(box.out)
            plant_others(box.out / name)
            attack(box, row, COMMANDS[command](box), f"{command} over {name}/")


def run_links(box: Box, row: Row) -> None:
    for command in COMMANDS.keys() - {"fit with resume", "demo"}:
        template, names = list_written(box, command)
        for target in names:
            if not row.wants(command, target):
                continue
            box.begin(template)
            victim, path = box.inputs / "victim", box.out / target
            if target.endswith(".safetensors"):
                inputs.write_foreign_lora(victim)
            else:
                victim.write_text("mine\n")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(victim)
            attack(box, row, COMMANDS[command](box), f"{command}: a link as {target}")


CASES = {"folders with our names": run_folders, "links": run_links}
