"""What prolora refuses, as exceptions that name the cause and remedy."""

from __future__ import annotations

import difflib
import errno
import heapq
import itertools
import os
import re
import shlex
from collections.abc import Callable, Iterable
from functools import partial

from .core.exceptions import KernelFailure as KernelFailure
from .core.exceptions import NoDerivative as NoDerivative
from .core.exceptions import NonFiniteWeights as NonFiniteWeights
from .core.exceptions import ProLoRAError as ProLoRAError
from .core.exceptions import ShapeMismatch as ShapeMismatch
from .core.exceptions import SolverFailure as SolverFailure
from .core.exceptions import TooLittleMemory as TooLittleMemory
from .core.exceptions import UnrelatedBases as UnrelatedBases
from .core.exceptions import UnsupportedDevice as UnsupportedDevice
from .core.exceptions import UnsupportedTensor as UnsupportedTensor


class UnsupportedFormat(ProLoRAError):
    """A file, key or adapter type that prolora cannot read exactly."""

    code = "unsupported-format"


class MissingFile(UnsupportedFormat):
    """A missing input."""

    code = "missing-file"


class HubUnavailable(MissingFile):
    """An input that the Hub did not give: no network or access."""

    code = "hub-unavailable"


class WrongBase(ProLoRAError):
    """A source that is not the LoRA's base, or is the target."""

    code = "wrong-base"


class AlreadyMoved(WrongBase):
    """A LoRA that prolora moved to another base than this source."""

    code = "already-moved"


class OutputError(ProLoRAError):
    """An output that cannot be written, or would overwrite an input."""

    code = "output-error"


class OutputExists(OutputError):
    """An existing output, which only the caller may have replaced."""

    code = "output-exists"


class InvalidOption(ProLoRAError):
    """A value that an option does not take."""

    code = "invalid-option"


# Names of a folder among which similar ones are looked for, and that are compared in full.
_LISTED, _COMPARED = 10_000, 50

_WAYS_OUT = {
    errno.EACCES: "change its permissions, or use a folder that you own",
    errno.EPERM: "change its permissions, or use a folder that you own",
    errno.EROFS: "use a folder that can be written",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.ELOOP: "remove the symbolic links that point at each other",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.EIO: "the disk or network drive may be failing: copy the file to another one",
    errno.ESTALE: "the network drive lost the file: run again",
    errno.ENOSPC: "free some space, or use another disk",
    errno.EDQUOT: "free some space, or use another disk",
    errno.EFBIG: "use a file system that takes files of this size",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine: run again",
}

# What Windows reports of a file that is open or mapped elsewhere: refused access, a sharing or lock
# violation, a mapped section.
_IN_USE = (5, 32, 33, 1224)
_NO_NAME = 123  # of a path that Windows has no file for, as one with "*" in it

# An option, perhaps with its value, or a call; a page of HTML writes quotes as entities.
_NAMED = re.compile(
    r"`([a-z_]+)(?:=(?:['\"]|&#x27;|&quot;)?([^`'\"&]*)(?:['\"]|&#x27;|&quot;)?|(\(\)))?`"
)


def name_options(text: str, name: Callable[[str, str | None], str | None]) -> str:
    """Renames the options in a message to the reader's names.

    Messages write options and functions as Python does, in backticks: `max_memory`,
    `match='name'`, `check()`. A command line replaces them by flags, and a node by its widgets.

    Args:
        text: the message.
        name: (option, its value or None) -> its replacement, where the value of a function is
            "()"; None leaves it as it is.
    """

    def rename(match: re.Match[str]) -> str:
        return name(match[1], match[3] or match[2]) or match[0]

    return _NAMED.sub(rename, text)


def join_words(words: Iterable[str]) -> str:
    r"""Joins the words of a command line as this system's shell reads them.

    cmd.exe has double quotes alone; `\` is a letter there, but for those before a quote.
    """
    if os.name != "nt":
        return shlex.join(words)
    quote = partial(re.sub, r'(\\*)("|$)', lambda m: m[1] * 2 + m[2].replace('"', r"\""))
    return " ".join(x if re.fullmatch(r"[\w./:\\+@%=,-]+", x) else f'"{quote(x)}"' for x in words)


def suggest(word: str, words: Iterable[str]) -> str:
    """Asks whether the word most alike is meant."""
    near = difflib.get_close_matches(word, list(words), 1)
    return f"; did you mean {near[0]}?" if near else ""


def explain_os_error(error: OSError | ValueError) -> str:
    """Explains a file error of the operating system, with a known remedy.

    A ValueError comes from a path with a null byte.
    """
    if not isinstance(error, OSError):
        return str(error)
    way_out = _WAYS_OUT.get(error.errno or 0)
    if error.errno == errno.ENOENT:
        way_out = _explain_length(error.filename2 or error.filename) or way_out
    if getattr(error, "winerror", 0) in _IN_USE:
        way_out = f"close the program that has it open, such as ComfyUI, or {way_out}"
    reason = error.strerror or str(error) or type(error).__name__
    return f"{reason}; {way_out}" if way_out else reason


def input_error(
    path: str | os.PathLike[str], error: OSError | ValueError, what: str = "cannot be read"
) -> UnsupportedFormat:
    """Makes the error of an unreadable input, with path and remedy."""
    if isinstance(error, FileNotFoundError) or getattr(error, "winerror", 0) == _NO_NAME:
        return MissingFile(describe_missing(path))
    return UnsupportedFormat(f"{os.fspath(path)}: {what}: {explain_os_error(error)}")


_LONGEST_NAME = 255
"""Bytes of a file's name, in nearly all file systems."""


def describe_missing(path: str | os.PathLike[str], wanted: str = "file") -> str:
    """Describes a missing input: what it may be, and similar names there.

    `wanted` is what it should have been.
    """
    # A `Path` made of an address has lost a slash.
    text = re.sub(r"^(\w{2,}):[/\\](?=[^/\\])", r"\1://", os.fspath(path))
    if "://" in text:
        text = text.replace("\\", "/")
        return f"{text}: an address on the web; download it, and give the file"
    if "*" in text:
        return f"{text}: no such {wanted}; no name matches this pattern, or it is in quotes"
    folder, name = os.path.split(text.rstrip("/\\"))
    if len(os.fsencode(name)) > _LONGEST_NAME:
        return f"{text}: no such {wanted}; this name is too long for one"
    if shorter := _explain_length(text):
        return f"{text}: no such {wanted}; {shorter}"
    try:
        with os.scandir(folder or ".") as entries:
            there = [entry.name for entry in itertools.islice(entries, _LISTED)]
    except (OSError, ValueError):
        return f"{text}: no such {wanted}; there is no folder {folder} to read"
    # Without endings, which most names of a folder have in common.
    stem, kind = os.path.splitext(name)
    kinds = {kind, "", ".safetensors", ".gguf"}  # what can be read
    stems = {os.path.splitext(n)[0]: n for n in there if os.path.splitext(n)[1] in kinds}
    # What most letters side by side are in is compared in full, which takes longer a name.
    pairs = {stem[i : i + 2] for i in range(len(stem) - 1)}
    likely = heapq.nlargest(_COMPARED, stems, lambda other: sum(pair in other for pair in pairs))
    alike = [stems[other] for other in difflib.get_close_matches(stem, likely)]
    return f"{text}: no such {wanted}" + (f". Similar here: {', '.join(alike)}" if alike else "")


def _explain_length(path: object) -> str:
    """Explains that a path is too long for Windows, if it is."""
    if os.name == "nt" and isinstance(path, str) and len(os.path.abspath(path)) > 259:
        return "this path is too long: Windows opens 259 letters unless it allows more"
    return ""


def is_disk_full(error: OutputError) -> bool:
    """Returns whether an output was not written for lack of room."""
    return getattr(error.__cause__, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


def output_error(
    path: str | os.PathLike[str], error: OSError | ValueError, what: str = "cannot be written"
) -> OutputError:
    """Makes the error of an unwritable output, with path and remedy."""
    return OutputError(f"{os.fspath(path)}: {what}: {explain_os_error(error)}")
