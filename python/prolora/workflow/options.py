"""The choices of a transfer: every one that the paper leaves open is told here, and only here.

Command line, plans, recipes in headers, docs/api.md and `help(prolora.transfer)` are derived from
the fields of `TransferOptions`.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, TypeVar, cast, get_args

import torch

from ..adapters.adapter import Adapter
from ..adapters.lora import Lora, LoraSource
from ..bases.base import Progress
from ..comparison.module_map import AUTO_MATCH, Match
from ..core.arrays import make_fields_plain
from ..core.methods import Method, MethodChoice, find_method
from ..core.option_fields import option, read_shown
from ..core.projection import DEFAULT_RANK
from ..core.rank_rule import Rank, read_rank
from ..core.validation import DeviceLike, resolve_device
from ..core.verdict import AUTO, DEFAULT_THRESHOLD
from ..errors import InvalidOption
from ..files.hub import spell_path
from ..files.sizes import parse_limit
from .block_weights import Blocks, BlockWeights
from .out_rank import OUT_RANK_FORMS, OutRank, is_out_rank

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LoraLike: TypeAlias = "LoraSource | Lora | Adapter"
"""A .safetensors file, a PEFT folder, an id on the hub, a state dict, (state dict,
`peft.LoraConfig`) or an `Adapter`."""

FormatName = Literal["auto", "kohya", "diffusers", "peft", "comfy"]
ProgramName = Literal[
    "comfyui",
    "a1111",
    "diffsynth",
    "diffusers",
    "forge",
    "invokeai",
    "lightx2v",
    "mflux",
    "musubi",
    "sd-scripts",
    "sdcpp",
]
FormatLike = FormatName | ProgramName
"""A format of LoRA files, or the program that reads the file: which format that is depends on the
family. "auto" is the format that the LoRA came in, if a program reads that."""

DtypeName = Literal["float16", "bfloat16", "float32", "float64"]
DtypeLike = torch.dtype | DtypeName
"""The dtype of the factors in a file, or its name."""

TextEncoderMode = Literal["copy", "project", "skip"]
VectorsMode = Literal["copy", "skip"]

TransferMethod = Literal["best"] | MethodChoice
"""What a transfer takes as its method: "best" also runs the models, where that gives more."""

METHOD_NAMES: tuple[str, ...] = (*get_args(MethodChoice), "best")
FORMATS: tuple[str, ...] = tuple(dict.fromkeys(get_args(FormatName) + get_args(ProgramName)))
BEST: TransferMethod = "best"
OF_A_FIT_TOO = (
    *("text_encoder", "match", "again", "target_steps", "min_coverage", "format", "dtype"),
    "overwrite",
    *("cache", "device", "max_memory", "progress"),
)
"""Options that mean the same for a fit: the only ones that method "best" takes."""
FIT = "fit"
"""What reports and headers call the making of a LoRA that was fitted to running models."""
# Its square, times an energy, is in the report: a float must hold that.
LARGEST_STRENGTH = 1e30


METHOD, OUTPUT, MATCHING = "Method", "Output", "Matching"


@dataclass(frozen=True, kw_only=True)
class TransferOptions:
    """How a LoRA is moved; `transfer` takes each of these by its name."""

    method: TransferMethod = option(
        "auto",
        'How to move the LoRA. "auto": a copy, or a refusal where the weights of the two models '
        'have nothing in common; "best": the same, and a fit to the running models (as `fit` makes '
        'it) where weights say too little; "copy": the update as it is, whatever the weights say; '
        '"prolora": the paper.',
        panel=METHOD,
        basic=True,
        words=METHOD_NAMES,
    )
    strength: float = option(
        1.0,
        "Factor on every update.",
        panel=METHOD,
        metavar="FACTOR",
        basic=True,
    )
    rank: Rank = option(
        DEFAULT_RANK,
        "Columns of the subspaces (320), or the share of energy that they hold (0.99).",
        panel=METHOD,
        metavar="RANK",
    )
    blocks: Blocks | None = option(
        None,
        "Factors by block on what is written: a number for each block in depth order, as block "
        'weights have them ("1,0,0,0,1,1,1,1,1,1,1,1"), or names with numbers ("IN04-IN08=0.5, '
        'OUT*=0", "transformer_blocks.0-9=0.5"). A block with 0 is left out.',
        panel=METHOD,
        metavar="WEIGHTS",
    )
    threshold: float = option(
        DEFAULT_THRESHOLD,
        "Overlap Φ, 0 … 1, that both sides of a pair of weights must reach; a pair below it gets "
        'no update. Method "copy" looks at no weights and skips nothing.',
        panel=METHOD,
        metavar="SHARE",
    )
    text_encoder: TextEncoderMode = option(
        "copy",
        'The LoRA\'s text-encoder part: "copy" it unchanged, "project" it like the rest where '
        'both bases hold its weights, or "skip" it.',
        panel=METHOD,
        words=get_args(TextEncoderMode),
    )
    vectors: VectorsMode = option(
        "copy",
        'Trained biases and normalisation layers: "copy" them, or "skip" them.',
        words=get_args(VectorsMode),
    )
    again: bool = option(
        False,
        "Take both bases as given: even where the LoRA was moved to another base before, or "
        "belongs to the target, or the two are one model.",
        panel=METHOD,
        decides=False,
    )
    match: Match = option(
        AUTO_MATCH,
        'How modules are paired. "auto": by name, or by their weights where blocks were cut out, '
        'added or renumbered; "name": by name alone; "similarity": by their weights alone; or a '
        "JSON file or mapping {target module: source module}.",
        panel=MATCHING,
        metavar="auto|name|similarity|FILE",
    )
    target_steps: int | None = option(
        None,
        "Steps in which you draw with the target, where it is a model of few steps and no folder "
        "of a pipeline, whose files would tell.",
        panel=METHOD,
        metavar="STEPS",
        decides=False,
    )
    min_coverage: float = option(
        0.0,
        "Fail if a smaller share of the LoRA's modules, 0 … 1, can move.",
        panel=MATCHING,
        metavar="SHARE",
    )
    out_rank: OutRank = option(
        "exact",
        "Rank of the output: a number, a share of an update's energy (0.99), a share of the LoRA's "
        "own rank (50%), what fits a file of a size (100MB, spent where it keeps the most "
        'energy), or "exact" (at most twice the LoRA\'s).',
        panel=OUTPUT,
        metavar="RANK",
    )
    format: FormatLike | None = option(
        None,
        "Format of the output, or the program that will read it. Default: the LoRA's own format.",
        panel=OUTPUT,
        metavar="FORMAT|PROGRAM",
        basic=True,
        words=FORMATS,
    )
    dtype: DtypeLike | None = option(
        None,
        "Type of the factors in the file. Default: the LoRA's.",
        panel=OUTPUT,
        words=get_args(DtypeName),
    )
    overwrite: bool = option(
        False,
        "Replace what exists. Otherwise the same result is kept, and anything else is refused.",
        panel=OUTPUT,
        decides=False,
    )
    cache: str | PathLike[str] | None = option(
        None,
        "Folder that keeps what is computed of the bases, for the next LoRA.",
        metavar="FOLDER",
        decides=False,
    )
    device: DeviceLike = option(
        None,
        "Where to compute: cpu, cuda, cuda:1, or a torch.device. Default: auto, a GPU where there "
        "is one, and else the CPU.",
        metavar="DEVICE",
        decides=False,
    )
    max_memory: int | str | None = option(
        None,
        "Memory this process may take, as 2GiB; refused if it is too little.",
        metavar="SIZE",
        decides=False,
    )
    progress: Progress | None = option(
        None,
        "Called as progress(done, total, name); what it raises ends the call, and nothing is "
        "written.",
        decides=False,
    )

    def __post_init__(self) -> None:
        """Refuses values that no transfer can use, before anything is read.

        Raises:
            InvalidOption: names the option and what it takes.
            UnsupportedDevice: there is no such device, or it cannot be used.
        """
        make_fields_plain(self)
        try:
            read_rank(self.rank)
        except ValueError as error:
            raise InvalidOption(str(error)) from error
        object.__setattr__(self, "dtype", read_dtype(self.dtype))
        if self.blocks is not None:
            BlockWeights.read(self.blocks)
        for known in fields(self):
            words, value = read_shown(known).words, getattr(self, known.name)
            if words and not (value == known.default or isinstance(value, torch.dtype)):
                check_choice(known.name, value, words)
        if self.target_steps is not None and self.target_steps < 1:
            raise InvalidOption(f"`target_steps` must be 1 or more, not {self.target_steps!r}")
        for name in ("threshold", "min_coverage"):
            _check_share(name, getattr(self, name))
        if not (isinstance(self.strength, float | int) and 0 < self.strength <= LARGEST_STRENGTH):
            raise InvalidOption(
                f"`strength` must be a positive number, {LARGEST_STRENGTH:.0e} at most, not "
                f"{self.strength!r}"
            )
        if not is_out_rank(self.out_rank):
            raise InvalidOption(f"`out_rank` must be {OUT_RANK_FORMS}, not {self.out_rank!r}")
        if self.device is not None:
            object.__setattr__(self, "device", resolve_device(self.device))
        self.memory_limit  # noqa: B018 (raises where it is no size)

    def for_file(self) -> TransferOptions:
        """Returns the options for a file: by default the LoRA's own format."""
        return self if self.format is not None else replace(self, format="auto")

    @property
    def chosen(self) -> Method:
        """The method that moves the updates."""
        return find_method("copy" if self.method in (AUTO, BEST) else self.method)

    @property
    def memory_limit(self) -> int | None:
        """`max_memory` in bytes."""
        return parse_limit(self.max_memory)


class FileChanges(TypedDict, total=False):
    """Options of every LoRA that is written, as keywords for type checkers."""

    format: FormatLike | None
    dtype: DtypeLike | None
    overwrite: bool


class MadeChanges(FileChanges, total=False):
    """Keywords of a command whose updates are computed from others."""

    out_rank: OutRank
    vectors: VectorsMode


class ResourceChanges(TypedDict, total=False):
    """Options of every job that reads weights."""

    device: DeviceLike
    max_memory: int | str | None
    progress: Progress | None


class BaseChanges(ResourceChanges, total=False):
    """Keywords of a command that keeps what it computes of a base."""

    cache: str | PathLike[str] | None


class OptionChanges(MadeChanges, BaseChanges, total=False):
    """The fields of `TransferOptions` as keywords, for type checkers; a test compares the two."""

    method: TransferMethod
    strength: float
    rank: Rank
    blocks: Blocks | None
    threshold: float
    text_encoder: TextEncoderMode
    again: bool
    match: Match
    target_steps: int | None
    min_coverage: float


Function = TypeVar("Function", bound=Callable[..., Any])
Options = TypeVar("Options", bound="DataclassInstance")


def settle_options(options: Options, changes: Mapping[str, Any], *, here: bool = True) -> Options:
    """Applies changes by keyword, and chooses a device if none is asked.

    Args:
        options: as they were given.
        changes: name -> value.
        here: whether this process computes. It is not asked for its devices otherwise, nor when
            options are made, as the default ones are while the package is imported.

    Raises:
        InvalidOption: an unknown option, or a value that it does not take.
    """
    known = {taken.name for taken in fields(options)}
    for name in changes:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InvalidOption(f"there is no option {name!r}{hint}")
    settled = replace(options, **changes)
    if here and getattr(settled, "device", "") is None:
        choice: Any = {"device": resolve_device(None)}
        settled = replace(settled, **choice)
    return settled


def takes_options(function: Function) -> Function:
    """Gives a function with `options` and `**changes` the help of every option.

    `help()` and editors then show each keyword with its default and what it does. The options of
    another function are refused before anything else.
    """
    signature = inspect.signature(function)
    default = signature.parameters["options"].default
    place = list(signature.parameters).index("options")
    _TAKERS.setdefault(type(default).__name__, []).append(f"{function.__name__}()")

    @functools.wraps(function)
    def check_and_call(*args: Any, **keywords: Any) -> Any:
        given = args[place] if len(args) > place else keywords.get("options", default)
        _check_kind(given, type(default), function.__name__)
        return function(*args, **keywords)

    told = fields(default)
    lines = [
        textwrap.fill(
            f"{known.name}: {read_shown(known).help}",
            width=100,
            initial_indent=" " * 8,
            subsequent_indent=" " * 12,
        )
        for known in told
    ]
    text = function.__doc__ or ""
    check_and_call.__doc__ = text.rstrip() + "\n\n    Options:\n" + "\n".join(lines) + "\n    "
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    taken = {parameter.name for parameter in parameters}
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters += [
        inspect.Parameter(known.name, keyword, default=known.default, annotation=known.type)
        for known in told
        if known.name not in taken
    ]
    shown: Any = check_and_call
    shown.__signature__ = signature.replace(parameters=parameters)
    return cast(Function, shown)


_TAKERS: dict[str, list[str]] = {}
"""Name of the options -> the functions that take them."""


def _check_kind(given: object, kind: type, function: str) -> None:
    """Refuses options of another function.

    Raises:
        InvalidOption: names the options it takes, and the functions that take the others.
    """
    if isinstance(given, kind):
        return
    name = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
    takers = f", which is of {', '.join(_TAKERS[name])}" if name in _TAKERS else ""
    raise InvalidOption(
        f"{function}() takes {kind.__name__}, not {name}{takers}; each option may also be given by "
        "its name"
    )


def check_choice(name: str, value: object, words: tuple[str, ...]) -> None:
    """Refuses a value that is none of the words.

    Raises:
        InvalidOption: names the option and its words.
    """
    if value not in words:
        raise InvalidOption(f"`{name}` must be one of {', '.join(words)}, not {value!r}")


def _check_share(name: str, value: float) -> None:
    """Refuses what is no number between 0 and 1; NaN would switch a check off."""
    if not (isinstance(value, float | int) and 0 <= value <= 1):
        raise InvalidOption(f"`{name}` must be a number between 0 and 1, not {value!r}")


def read_dtype(dtype: DtypeLike | None) -> torch.dtype | None:
    """Returns the dtype of a name.

    Raises:
        InvalidOption: it is no dtype and no name of one.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    check_choice("dtype", dtype, get_args(DtypeName))
    named: torch.dtype = getattr(torch, dtype)
    return named


def name_lora(lora: LoraLike | None) -> str:
    """Returns the name of a LoRA's file or folder, "the LoRA" in memory."""
    if isinstance(lora, Lora) and lora.path:
        return Path(lora.where).name
    return Path(lora).name if isinstance(lora, str | PathLike) else "the LoRA"


def begin_message(lora: LoraLike) -> str:
    """Begins a message about a LoRA with its path, if it has one."""
    if isinstance(lora, Lora) and lora.path:
        return f"{lora.where}: "
    return f"{spell_path(lora)}: " if isinstance(lora, str | PathLike) else ""


DEFAULT_OPTIONS = TransferOptions()
