"""How a command ends: the exit code, and the one line that says why."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from enum import IntEnum

import typer

from ..errors import ProLoRAError, explain_os_error


class ExitCode(IntEnum):
    """What an exit code means."""

    DONE = 0
    FAILED = 1
    REFUSED = 2
    NOT_FOR_IT = 3
    INCOMPLETE = 4
    INTERRUPTED = 130
    TERMINATED = 143


MEANINGS = {
    ExitCode.DONE: "done as asked",
    ExitCode.FAILED: "the system failed while reading or writing, or memory is short",
    ExitCode.REFUSED: "refused, as a damaged file or a wrong command line; or some LoRAs failed",
    ExitCode.NOT_FOR_IT: "`check`: a file is not for the base or program, or in part",
    ExitCode.INCOMPLETE: "done, without updates of a LoRA that could not be read",
    ExitCode.INTERRUPTED: "interrupted by Ctrl-C",
    ExitCode.TERMINATED: "stopped by SIGTERM",
}


class IncompleteResult(ProLoRAError):
    """A complete output with unreadable updates of a LoRA left behind."""

    code = "incomplete-result"


HANDLED = (ValueError, RuntimeError, OSError, MemoryError, ArithmeticError)
"""Errors that become one line; ProLoRAError is a ValueError. All others are bugs: a traceback."""


def write_epilog(
    *examples: str,
    codes: tuple[ExitCode, ...] = (),
    meanings: Mapping[ExitCode, str] = MEANINGS,
) -> str:
    """Writes the end of a command's help: examples and exit codes.

    In rich's markup.
    """
    title = "Example" if len(examples) == 1 else "Examples"
    paragraphs = [f"[bold]{title}[/bold]", *examples]
    if codes:
        explained = "; ".join(f"{code:d} {meanings[code]}" for code in codes)
        paragraphs.append(f"[bold]Exit codes[/bold]: {explained}.")
    return "\n\n".join(paragraphs)


def make_app() -> typer.Typer:
    """Makes an app without commands."""
    return typer.Typer(
        no_args_is_help=True,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
        epilog=write_epilog(
            "prolora transfer lora.safetensors --source sdxl/ --target ssd-1b/ -o new.safetensors",
            codes=tuple(ExitCode),
        ),
    )


def find_exit_code(error: BaseException) -> ExitCode:
    """Returns the exit code of a command that ended in one of `HANDLED`."""
    if isinstance(error, IncompleteResult):
        return ExitCode.INCOMPLETE
    number = getattr(error.__cause__, "errno", None)  # of an output
    full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
    if full or isinstance(error, OSError | MemoryError | UnicodeError) or _is_out_of_memory(error):
        return ExitCode.FAILED
    return ExitCode.REFUSED


def describe_error(error: BaseException) -> tuple[str, str]:
    """Describes an error to people, with a helpful command line or ""."""
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        advice = "the system gave no more memory; --max-memory 2GiB keeps prolora within a bound"
        if "CUDA" in str(error):
            advice = "the card has too little memory; --device cpu takes the machine's instead"
        return f"{advice} ({error})" if str(error) else advice, ""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {explain_os_error(error)}", ""
    command = error.command if isinstance(error, ProLoRAError) else ""
    # `str(error)` alone has a line break, which would be spelled out.
    return str(error).removesuffix(command).rstrip() or type(error).__name__, command


def _is_out_of_memory(error: BaseException) -> bool:
    """Recognises torch's RuntimeError of missing memory."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
    )
