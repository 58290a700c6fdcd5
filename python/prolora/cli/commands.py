"""All commands, each loaded when it is asked for: torch alone takes more than a second."""

from __future__ import annotations

import ast
from importlib import import_module, resources
from typing import Annotated

import typer

from .exits import MEANINGS, ExitCode, make_app, write_epilog

WHAT = "Write the LoRA that belongs on another image model, without data."
_OF_MOVES = (ExitCode.DONE, ExitCode.FAILED, ExitCode.REFUSED, ExitCode.INCOMPLETE)
"""How a command that moves LoRAs may end, but for signals."""

# Command -> examples; each is the function of that name in the module of that name.
COMMANDS = {
    "transfer": (
        "prolora transfer my-lora.safetensors --source sdxl/ --target ssd-1b/ -o moved.safetensors",
        "prolora transfer loras/*.safetensors --source sdxl/ --target ssd-1b/ -o moved/",
        "prolora transfer my-lora.safetensors --source sdxl/ --target ssd-1b/ --dry-run",
    ),
    "fit": (
        "prolora fit my-lora.safetensors --source sd15/ --target sdxl/ -o fitted.safetensors",
        "prolora fit loras/*.safetensors --source sd15/ --target sdxl/ -o fitted/ --resume kept/",
    ),
    "check": (
        "prolora check my-lora.safetensors",
        "prolora check my-lora.safetensors --base sdxl --for comfyui",
        "prolora check loras/*.safetensors --base sd_xl_base_1.0.safetensors",
        "prolora check my-lora.safetensors --source sdxl/ --target ssd-1b/",
    ),
    "extract": (
        "prolora extract sdxl/ my-finetune.safetensors -o my-finetune-lora.safetensors",
        "prolora extract flux-dev/ flux-turbo/ -o turbo.safetensors --out-rank 0.9 --for comfyui",
    ),
    "convert": (
        "prolora convert my-lora.safetensors -o smaller.safetensors --out-rank 16 --dtype float16",
        "prolora convert my-dora.safetensors sdxl/ -o plain.safetensors --for a1111",
    ),
    "merge": (
        "prolora merge style.safetensors person.safetensors -o both.safetensors --strengths 0.8,1",
        "prolora merge a.safetensors b.safetensors sdxl/ -o both.safetensors --out-rank 32",
    ),
    "migrate": (
        "prolora migrate loras/ --source sdxl/ --target ssd-1b/ --target new/ -o moved/",
        "prolora migrate loras/ --source sdxl/ --target ssd-1b/ -o moved/ --shard 2/8",
    ),
    "demo": ("prolora demo", "prolora demo --lora concept --target far"),
    "doctor": ("prolora doctor",),
}


def build_app(only: str = "", loaded: bool = True) -> typer.Typer:
    """Builds the command line, of one command or of all.

    Unless they are `loaded`, all commands together are names and help texts, for which torch is not
    imported.
    """
    app = make_app()
    app.callback(help=WHAT)(start)
    for name, examples in COMMANDS.items():
        if not (only or loaded):
            app.command(name, help=_read_help(name))(lambda: None)
        elif name == only or not only:
            module = import_module(f".{name}", __package__)
            codes = _OF_MOVES if name in ("transfer", "fit", "migrate") else ()
            meanings = getattr(module, "MEANINGS", {code: MEANINGS[code] for code in codes})
            epilog = write_epilog(*examples, codes=tuple(meanings), meanings=meanings)
            kind = getattr(module, f"{name.title()}Command", None)
            app.command(cls=kind, epilog=epilog)(getattr(module, name))
    return app


def _read_help(name: str) -> str | None:
    """Reads the docstring of a command's function from its source."""
    source = resources.files(__package__).joinpath(f"{name}.py").read_text("utf-8")
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return next(ast.get_docstring(node) for node in functions if node.name == name)


def print_version(asked: bool) -> None:
    """Prints the version and ends the command."""
    if asked:
        from ..version import __version__  # reads the installation's metadata

        print(f"prolora {__version__}")
        raise typer.Exit


def start(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Takes the options of all commands."""
