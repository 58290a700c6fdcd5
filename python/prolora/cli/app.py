"""The way in: all commands, what they have in common, and how they end."""

from __future__ import annotations

import logging
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..version import __version__
from . import check as checking
from . import doctor as doctor_facts
from .console import answer, err, out, prepare_streams, progress_bar
from .convert import convert
from .demo import APART, Demo
from .exits import HANDLED, ExitCode, describe_error, find_exit_code, write_epilog
from .extract import extract
from .fit import FitCommand, fit
from .merge import merge
from .migrate import migrate
from .options import JsonOption, OverwriteOption, path_option
from .tables import draw_facts
from .transfer import TransferCommand, show_report, transfer

log = logging.getLogger(__name__)

# What all of typer's complaints about a command line are; recent versions export no name for it.
CommandLineError: Any = typer.BadParameter.__base__

_OF_MOVES = tuple(code for code in ExitCode if code <= ExitCode.INCOMPLETE)
"""How a command that moves LoRAs may end, but for signals."""

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    epilog=write_epilog(
        "prolora transfer my-lora.safetensors --source sdxl/ --target ssd-1b/ -o moved.safetensors",
        codes=tuple(ExitCode),
    ),
)
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
app.command(
    epilog=write_epilog(
        "prolora check my-lora.safetensors",
        "prolora check my-lora.safetensors --base sdxl --for comfyui",
        "prolora check loras/*.safetensors --base sd_xl_base_1.0.safetensors",
        "prolora check my-lora.safetensors --source sdxl/ --target ssd-1b/",
        codes=tuple(checking.MEANINGS),
        meanings=checking.MEANINGS,
    )
)(checking.check)
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
        codes=(ExitCode.DONE, ExitCode.FAILED, ExitCode.REFUSED, ExitCode.INCOMPLETE),
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


def main() -> None:
    """Runs the command line; an expected error becomes one message and an exit code."""
    # An ordinary exit when told to stop, so that temporary files are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ExitCode.TERMINATED))
    prepare_streams()
    answer.begin()
    try:
        code = app(standalone_mode=False)
    except CommandLineError as error:
        # Not typer's own message, which would obey the escape sequences of file names.
        if type(error).__name__ != "NoArgsIsHelpError":
            # Typer passes on how the library below it calls a wrong choice.
            message = error.format_message().replace("Value error, ", "")
            print_error(message)
            command = error.ctx.command_path if error.ctx else "prolora"
            err.print_line(f"Try '{command} -h' for help.")
        sys.exit(ExitCode.REFUSED)
    except HANDLED as error:
        log.debug("the error in full", exc_info=error)
        answer.give_error(error)
        print_error(*describe_error(error))
        sys.exit(find_exit_code(error))
    if code == ExitCode.INTERRUPTED:
        err.print_line("Stopped; nothing was written, but for LoRAs that were finished before.")
    sys.exit(code)


def print_error(message: str, command: str = "") -> None:
    """Prints what went wrong, and on a line of its own the command that helps."""
    err.print("Error:", style="bold red", end=" ")
    err.print_line(message)
    if command:
        err.print_line(command)
