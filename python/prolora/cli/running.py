"""The way into a command, and how it ends."""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import sys
from glob import glob
from typing import Any

import typer

from .commands import COMMANDS, build_app
from .console import answer, err, prepare_streams
from .exits import HANDLED, ExitCode, describe_error, find_exit_code

log = logging.getLogger(__name__)

# What all of typer's complaints about a command line are; recent versions export no name for it.
CommandLineError: Any = typer.BadParameter.__base__


_interrupted = False  # by Ctrl-C


def interrupt(*_: object) -> None:
    """Raises the exception of Ctrl-C, in a command that has begun."""
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


def refuse_results(event: str, _: object) -> None:
    """Raises Ctrl-C's exception again, which a destructor or C's callback may have lost."""
    if _interrupted and event == "os.rename":
        raise KeyboardInterrupt


def find_verb() -> str:
    """Finds the command of the command line, or of the one that a shell completes."""
    words = sys.argv[1:]
    if any(name.endswith("_COMPLETE") for name in os.environ):
        typed = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
        words = typed.split()[1:]
        # A shell completes names of files by itself; options need the command, and so torch.
        if not any(word.startswith("-") for word in words[-2:]):
            return ""
    return next((word for word in words[:1] if word in COMMANDS), "")


def expand_patterns(words: list[str]) -> list[str]:
    """Expands `*`, `?` and a first `~` as shells other than Windows' do.

    Brackets, `$` and `%` belong to names there, and are no pattern.
    """
    expanded: list[str] = []
    for word in words:
        path = os.path.expanduser(word) if re.match(r"~($|[\\/])", word) else word
        is_pattern = re.search(r"[*?]", path) is not None
        there = glob(path.replace("[", "[[]"), recursive=True) if is_pattern else []
        expanded += sorted(there) or [path]
    return expanded


def run() -> None:
    """Runs the command line; an expected error becomes one message and an exit code."""
    app = build_app(find_verb(), loaded=False)
    gc.freeze()  # a search for garbage among all of torch takes 0.2 s, and finds none
    gc.enable()
    # An ordinary exit when told to stop, so that temporary files are removed.
    for name in ("SIGTERM", "SIGBREAK"):  # the second is Windows' Ctrl-Break
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: sys.exit(ExitCode.TERMINATED))
    prepare_streams()
    answer.begin()
    command = typer.main.get_command(app)
    signal.signal(signal.SIGINT, interrupt)
    sys.addaudithook(refuse_results)
    try:
        if os.name == "nt":  # whose shells leave patterns to programs
            sys.argv[1:] = expand_patterns(sys.argv[1:])
        code = command(sys.argv[1:], standalone_mode=False)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command is done
    except CommandLineError as error:
        # Not typer's own message, which would obey the escape sequences of file names.
        if type(error).__name__ != "NoArgsIsHelpError":
            # Typer passes on how the library below it calls a wrong choice.
            message = error.format_message().replace("Value error, ", "")
            print_error(message)
            path = error.ctx.command_path if error.ctx else "prolora"
            err.print_line(f"Try '{path} -h' for help.")
        sys.exit(ExitCode.REFUSED)
    except HANDLED as error:
        log.debug("the error in full", exc_info=error)
        answer.write_error(error)
        print_error(*describe_error(error))
        sys.exit(find_exit_code(error))
    if code == ExitCode.INTERRUPTED:
        err.print_line("Stopped; nothing was written, but for what was finished before.")
    sys.exit(code)


def print_error(message: str, command: str = "") -> None:
    """Prints what went wrong, and on a line of its own the command that helps."""
    err.print("Error:", style="bold red", end=" ")
    err.print_line(message)
    if command:
        err.print_line(command)
