"""The way in: all commands, what they have in common, and how they end."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..version import __version__
from . import check as checking
from . import doctor as doctor_facts
from .console import answer, out, progress_bar
from .convert import convert
from .demo import APART, Demo
from .exits import ExitCode, make_app, write_epilog
from .extract import extract
from .fit import FitCommand, fit
from .flags import JsonOption, OverwriteOption, path_option
from .merge import merge
from .migrate import migrate
from .tables import draw_facts
from .transfer import TransferCommand, show_report, transfer

_OF_MOVES = (ExitCode.DONE, ExitCode.FAILED, ExitCode.REFUSED, ExitCode.INCOMPLETE)
"""How a command that moves LoRAs may end, but for signals."""

app = make_app()
app.command(
    cls=TransferCommand,
    epilog=write_epilog(
        "prolora transfer my-lora.safetensors --source sdxl/ --target ssd-1b/ -o moved.safetensors",
        "prolora transfer loras/*.safetensors --source sdxl/ --target ssd-1b/ -o moved/",
        "prolora transfer my-lora.safetensors --source sdxl/ --target ssd-1b/ --dry-run",
        codes=_OF_MOVES,
    ),
)(transfer)
app.command(
    cls=FitCommand,
    epilog=write_epilog(
        "prolora fit my-lora.safetensors --source sd15/ --target sdxl/ -o fitted.safetensors",
        "prolora fit loras/*.safetensors --source sd15/ --target sdxl/ -o fitted/ --resume kept/",
        codes=_OF_MOVES,
    ),
)(fit)
checking.add_to(app)
app.command(
    epilog=write_epilog(
        "prolora extract sdxl/ my-finetune.safetensors -o my-finetune-lora.safetensors",
        "prolora extract flux-dev/ flux-turbo/ -o turbo.safetensors --out-rank 0.9 --for comfyui",
    ),
)(extract)
app.command(
    epilog=write_epilog(
        "prolora convert my-lora.safetensors -o smaller.safetensors --out-rank 16 --dtype float16",
        "prolora convert my-dora.safetensors sdxl/ -o plain.safetensors --for a1111",
    ),
)(convert)
app.command(
    epilog=write_epilog(
        "prolora merge style.safetensors person.safetensors -o both.safetensors --strengths 0.8,1",
        "prolora merge a.safetensors b.safetensors --target new/ --source old/ --source new/ "
        "-o both.safetensors --out-rank 32",
    ),
)(merge)
app.command(
    epilog=write_epilog(
        "prolora migrate loras/ --source sdxl/ --target ssd-1b/ --target new/ -o moved/",
        "prolora migrate loras/ --source sdxl/ --target ssd-1b/ -o moved/ --shard 2/8",
        codes=_OF_MOVES,
    ),
)(migrate)


def print_version(asked: bool) -> None:
    """Prints the version and ends the command."""
    if asked:
        print(f"prolora {__version__}")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Move a LoRA to another base model, without training and without data."""


@app.command(epilog=write_epilog("prolora demo", "prolora demo --lora concept --target far"))
def demo(
    output: Annotated[
        Path, path_option("Folder for the results.", "--output", "-o", metavar="FOLDER")
    ] = Path("prolora-demo"),
    lora: Annotated[
        str, typer.Option(help="A shipped LoRA: neon, duotone or concept (a butterfly).")
    ] = "neon",
    target: Annotated[
        str,
        typer.Option(
            help="A shipped base to move to: pruned, far (another art style), few-step, or apart "
            "(trained apart from the source, so that both models run, for a minute or two). "
            "Default: pruned, and then apart."
        ),
    ] = "",
    overwrite: OverwriteOption = False,
) -> None:
    """Move a shipped LoRA between small shipped models, and draw what it does."""
    demos = [Demo.find(lora, name, output) for name in ([target] if target else ["pruned", APART])]
    output.mkdir(parents=True, exist_ok=True)
    for one in demos:
        out.print_line(one.command)
        with progress_bar("demo") as progress:
            report = one.run(overwrite, progress)
        show_report(report)
        for path in (one.moved, one.page):
            out.print_line(f"wrote {path}")
        out.print_line(f"To see it, open {one.page} in a browser.", style="bold")


@app.command(epilog=write_epilog("prolora doctor"))
def doctor(as_json: JsonOption = False) -> None:
    """Say what is installed, what is missing and how to get it: kernels, extras, memory, cache."""
    facts = doctor_facts.describe_kernels() | doctor_facts.describe_surroundings()
    if as_json:
        answer.give(facts)
    else:
        out.print(doctor_facts.tell_verdict(), style="bold")
        out.print(facts_table(facts))


def facts_table(facts: Mapping[str, object]) -> Table:
    """Writes a line for each fact; a reason that several have is given once."""
    lines, given = [], set[str]()
    for name, value in facts.items():
        text = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
        for reason in set(re.findall(r" \(.+?\)", text)) & given:
            text = text.replace(reason, "")
        given |= set(re.findall(r" \(.+?\)", text))
        lines.append((name, text))
    return draw_facts(lines)
