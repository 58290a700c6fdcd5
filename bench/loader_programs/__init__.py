"""What each program does with the keys of a LoRA, called in a folder of its source: a file each."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from .common import Keys, Open, Read
from .sdnext import LEFT_TO_DIFFUSERS

__all__ = ["PROGRAMS", "Keys", "Open", "Program", "Read"]


class Program(NamedTuple):
    """A program that is run."""

    title: str  # what people call it
    file: str  # of this folder, which has `open_program`
    reads_text: bool = True  # whether that says what it does with text encoders

    def open(self, checkout: Path) -> Open:
        """What its code makes of a LoRA, for each family and size."""
        open_program = import_module(f"{__name__}.{self.file}").open_program
        return open_program(checkout)  # type: ignore[no-any-return]

    def counts_blocks(self, family: str) -> bool:
        """Whether it has to see all blocks of a family, as diffusers has."""
        return self.file == "diffusers" or (self.file == "sdnext" and family in LEFT_TO_DIFFUSERS)


PROGRAMS = {
    "comfyui": Program("ComfyUI", "comfyui"),
    "diffsynth": Program("DiffSynth-Studio", "diffsynth", reads_text=False),
    "diffusers": Program("diffusers", "diffusers"),
    "forge": Program("Forge", "forge"),
    "invokeai": Program("InvokeAI", "invokeai"),
    "lightx2v": Program("LightX2V", "lightx2v"),
    "mflux": Program("mflux", "mflux"),
    "musubi": Program("musubi-tuner", "musubi"),
    "sd-scripts": Program("sd-scripts", "sd_scripts"),
    "sdcpp": Program("stable-diffusion.cpp", "sdcpp"),
    "sdnext": Program("SD.Next", "sdnext", reads_text=False),
}
"""Id -> program."""
