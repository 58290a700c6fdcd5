"""What commands that write LoRAs take beside their own options: files, and what is shown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from .flags import JsonOption, path_option


@dataclass
class OutputFlags:
    """Options of what is written and shown."""

    panel: ClassVar[str] = "Output"
    output: Annotated[
        Path | None,
        path_option(
            "Output file (.safetensors), or a folder where several LoRAs are moved.",
            "--output",
            "-o",
            metavar="PATH",
        ),
    ] = None
    report: Annotated[
        Path | None,
        path_option(
            "Also write the whole report: a page for people if the name ends in .html, "
            "otherwise JSON; - prints the JSON."
        ),
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done; write nothing.")
    ] = False
    card: Annotated[
        bool,
        typer.Option(
            "--card",
            help="Also write a model card for the Hugging Face Hub: README.md beside the output, "
            "or in the folder of several.",
        ),
    ] = False
    as_json: JsonOption = False

    @property
    def show_tables(self) -> bool:
        """Whether people read along."""
        return not (self.as_json or self.report == Path("-"))
