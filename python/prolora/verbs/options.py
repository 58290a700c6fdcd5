"""The choices of a transfer, and those that other verbs share: told here, and only here.

Command line, plans, recipes in headers, docs/api.md and `help(prolora.transfer)` are derived from
the fields.
"""

from __future__ import annotations

import math
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar, get_args

import torch

from ..adapters.adapter import Adapter
from ..adapters.lora import Lora, LoraSource
from ..bases.base import Progress
from ..comparison.module_map import AUTO_MATCH, Match
from ..core.arrays import make_fields_plain
from ..core.lowrank import LowRank
from ..core.methods import Method, MethodChoice, MethodLike, find_method
from ..core.projection import DEFAULT_RANK
from ..core.rank_rule import Rank, read_rank
from ..core.validation import DeviceLike, resolve_device
from ..core.verdict import AUTO, DEFAULT_THRESHOLD
from ..errors import InvalidOption, suggest
from ..files.hub import spell_path
from ..files.sizes import parse_limit
from .block_weights import Blocks, BlockWeights
from .option_fields import option, read_shown

OutRank = int | float | str | None

EXACT = "exact"
OUT_RANK_FORMS = (
    '"exact", an int ≥ 1, a share of the energy between 0 and 1, or one of the rank up to "100%"'
)

_PERCENT = re.compile(r"(\d+(?:\.\d+)?)%")


def parse_percentage(out_rank: OutRank) -> float | None:
    """Returns the number before the % of "50%"; None for any other form."""
    match = _PERCENT.fullmatch(out_rank) if isinstance(out_rank, str) else None
    return float(match[1]) if match else None


def is_out_rank(out_rank: object) -> bool:
    """Returns whether a value is one of `OUT_RANK_FORMS`."""
    if isinstance(out_rank, str):
        return out_rank == EXACT or 0 < (parse_percentage(out_rank) or 0) <= 100
    if isinstance(out_rank, float):
        return 0 < out_rank < 1
    return isinstance(out_rank, int) and not isinstance(out_rank, bool) and out_rank >= 1


def cut_rank(update: LowRank, out_rank: OutRank, rank_in: int) -> LowRank:
    """Cuts the update [m, n] to its output rank; unchanged if nothing is cut.

    `out_rank` "exact" keeps it; an int keeps at most that many singular values; a float the fewest
    that hold this share of Σσ²; "50%" half as many as the LoRA's own rank `rank_in`, rounded up.
    """
    if out_rank is None or out_rank == EXACT:
        return update
    if isinstance(out_rank, float):
        return update.truncate(energy=out_rank)
    share = parse_percentage(out_rank)
    if share is None:
        most = int(out_rank)
    else:
        most = max(1, math.ceil((rank_in or update.rank) * share / 100))
    return update.truncate(rank=most) if most < update.rank else update


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
    "sdnext",
]
FormatLike = FormatName | ProgramName
"""A format of LoRA files, or the program that reads the file: which format that is depends on the
family. "auto" is the format that the LoRA came in, if a program reads that."""

DtypeName = Literal["float16", "bfloat16", "float32", "float64"]
DtypeLike = torch.dtype | DtypeName
"""The dtype of the factors in a file, or its name."""

TextEncoderMode = Literal["copy", "project", "skip"]

TransferMethod = Literal["best"] | MethodLike
"""What a transfer takes as its method: "best" also runs the models, where that gives more."""

METHOD_NAMES: tuple[str, ...] = (*get_args(MethodChoice), "best")
FORMATS: tuple[str, ...] = tuple(dict.fromkeys(get_args(FormatName) + get_args(ProgramName)))
BEST: TransferMethod = "best"
OF_A_FIT_TOO = (
    *("text_encoder", "match", "again", "target_steps", "prompts", "look"),
    *("format", "dtype", "overwrite", "cache", "device", "max_memory", "progress"),
)
"""Options that mean the same for a fit: the only ones that method "best" takes."""
FIT = "fit"
"""What reports and headers call the making of a LoRA that was fitted to running models."""
# Its square, times an energy, is in the report: a float must hold that.
SMALLEST_STRENGTH, LARGEST_STRENGTH = 1e-30, 1e30


METHOD, OUTPUT, MATCHING, RESOURCES = "Method", "Output", "Matching", "Resources"
Chosen = TypeVar("Chosen", bound="FileOutput")


@dataclass(frozen=True, kw_only=True)
class VerbOptions:
    """Options of any verb; words are checked before anything is read."""

    progress: Progress | None = option(
        None,
        "Called as progress(done, total, name); what it raises ends the call, and nothing is "
        "written.",
        decides=False,
    )

    def __post_init__(self) -> None:
        """Refuses values that no verb can use.

        Raises:
            InvalidOption: names the option and what it takes.
            UnsupportedDevice: there is no such device, or it cannot be used.
        """
        make_fields_plain(self)
        for field in fields(self):
            words, value = read_shown(field).words, getattr(self, field.name)
            is_own = field.name == "dtype" and isinstance(value, torch.dtype)
            if BEST in words:  # a merge has methods, too, and takes no function
                is_own = isinstance(value, Method) or callable(value)
            if words and not (value == field.default or is_own):
                check_choice(field.name, value, words)
        for name in ("cache", "resume", "pictures"):
            if not isinstance(value := getattr(self, name, None), str | PathLike | None):
                raise InvalidOption(f"`{name}` must be the path of a folder, not {value!r}")
        if not (self.progress is None or callable(self.progress)):
            raise InvalidOption(f"`progress` must be a function, not {self.progress!r}")

    def report_progress(self, done: int, total: int, name: str) -> None:
        """Calls `progress`, if given, with how far the work is."""
        if self.progress:
            self.progress(done, total, name)


@dataclass(frozen=True, kw_only=True)
class FileOutput(VerbOptions):
    """How a file is written."""

    format: FormatLike | None = option(
        None,
        "Format of the output, or the program that will read it. Default: that of the LoRA.",
        panel=OUTPUT,
        metavar="FORMAT|PROGRAM",
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
        "Replace what exists, which is refused otherwise.",
        panel=OUTPUT,
        decides=False,
    )

    def __post_init__(self) -> None:
        """Reads the dtype, too."""
        super().__post_init__()
        object.__setattr__(self, "dtype", read_dtype(self.dtype))

    def for_file(self: Chosen) -> Chosen:
        """Returns the options for a file: by default the LoRA's own format."""
        return self if self.format is not None else replace(self, format="auto")


@dataclass(frozen=True, kw_only=True)
class Output(FileOutput):
    """How a LoRA is written whose updates were computed from others."""

    out_rank: OutRank = option(
        "exact",
        "Rank of the output: a number, a share of an update's energy (0.99), a share of the LoRA's "
        'own rank (50%), or "exact".',
        panel=OUTPUT,
        metavar="RANK",
    )

    def __post_init__(self) -> None:
        """Refuses an invalid rank; None stands for the default, as for other options."""
        super().__post_init__()
        if self.out_rank is None:
            default = type(self).__dataclass_fields__["out_rank"].default
            object.__setattr__(self, "out_rank", default)
        if not is_out_rank(self.out_rank):
            raise InvalidOption(f"`out_rank` must be {OUT_RANK_FORMS}, not {self.out_rank!r}")


@dataclass(frozen=True, kw_only=True)
class Resources(VerbOptions):
    """With what to compute."""

    device: DeviceLike = option(
        None,
        "Where to compute: cpu, cuda, cuda:1, or a torch.device. Default: auto, a GPU where there "
        "is one, and else the CPU.",
        panel=RESOURCES,
        metavar="DEVICE",
        decides=False,
    )
    max_memory: int | str | None = option(
        None,
        "Memory this process may take, as 2GiB; refused if it is too little.",
        panel=RESOURCES,
        metavar="SIZE",
        decides=False,
    )

    def __post_init__(self) -> None:
        """Looks for the device, and reads the bound on memory."""
        super().__post_init__()
        if self.device is not None:
            object.__setattr__(self, "device", resolve_device(self.device))
        self.memory_limit  # noqa: B018 (raises where it is no size)

    @property
    def memory_limit(self) -> int | None:
        """`max_memory` in bytes."""
        return parse_limit(self.max_memory)


@dataclass(frozen=True, kw_only=True)
class BaseResources(Resources):
    """With what to compare bases."""

    cache: str | PathLike[str] | None = option(
        None,
        "Folder that keeps what is computed of the bases, for the next LoRA.",
        panel=RESOURCES,
        metavar="FOLDER",
        decides=False,
    )


@dataclass(frozen=True, kw_only=True)
class TransferOptions(Output, BaseResources):
    """How a LoRA is moved; `transfer` takes each of these by its name."""

    method: TransferMethod = option(
        "auto",
        'How to move the LoRA. "auto": a copy, or a refusal where the weights of the two models '
        'have nothing in common; "best": the same, and a fit to the running models (as `fit` makes '
        'it) where weights say too little; "copy": the update as it is, whatever the weights say; '
        '"prolora": the paper.',
        panel=METHOD,
        words=METHOD_NAMES,
    )
    strength: float = option(
        1.0,
        "Factor on every update.",
        panel=METHOD,
        metavar="FACTOR",
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
        'weights have them ("1,0,0,0,1,1,0.5,0"), or names with numbers ("IN04-IN08=0.5, '
        'OUT*=0", "double_blocks.0-9=0"). A block with 0 is left out.',
        panel=METHOD,
        metavar="WEIGHTS",
    )
    threshold: float = option(
        DEFAULT_THRESHOLD,
        "Overlap Φ, 0 … 1, that both sides of a pair of weights must reach; a pair below it gets "
        'no update. Method "copy" looks at no weights and skips nothing.',
    )
    text_encoder: TextEncoderMode = option(
        "copy",
        'The LoRA\'s text-encoder part: "copy" it unchanged, "project" it like the rest where '
        'both bases hold its weights, or "skip" it.',
        panel=METHOD,
        words=get_args(TextEncoderMode),
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
    prompts: tuple[str, ...] = option(
        (),
        "Prompts that are sampled, in turn. Default: some that are made from the LoRA's header.",
    )
    look: float | str = option(
        "target",
        'Whose look images of the target with the LoRA have: its own ("target"), the one that the '
        'LoRA was made with ("source"), or a share of the way between them. Only a fit can do so.',
        panel=METHOD,
        metavar="target|source|0...1",
    )

    def __post_init__(self) -> None:
        """Refuses values that no transfer can use, before anything is read."""
        super().__post_init__()
        if self.method != BEST and (self.prompts or self.look != "target"):
            given = "prompts" if self.prompts else "look"
            raise InvalidOption(f"`{given}` is for a fit: take `method='best'`, or `fit()`")
        try:
            read_rank(self.rank)
            self.chosen  # noqa: B018 (raises where its name is taken)
        except ValueError as error:
            raise InvalidOption(str(error)) from error
        if self.blocks is not None:
            BlockWeights.read(self.blocks)
        steps = self.target_steps
        if steps is not None and not (isinstance(steps, int) and steps >= 1):
            raise InvalidOption(f"`target_steps` must be 1 or more, not {self.target_steps!r}")
        value = self.threshold  # NaN would switch the check off
        if not (isinstance(value, float | int) and 0 <= value <= 1):
            raise InvalidOption(f"`threshold` must be a number between 0 and 1, not {value!r}")
        number = isinstance(self.strength, float | int)
        if not (number and SMALLEST_STRENGTH <= self.strength <= LARGEST_STRENGTH):
            raise InvalidOption(
                f"`strength` must be a positive number, {SMALLEST_STRENGTH:.0e} to "
                f"{LARGEST_STRENGTH:.0e}, not {self.strength!r}"
            )

    @property
    def chosen(self) -> Method:
        """The method that moves the updates."""
        return find_method("copy" if self.method in (AUTO, BEST) else self.method)

    @property
    def method_name(self) -> str:
        """The name of the method, also of one's own."""
        return self.method if isinstance(self.method, str) else self.chosen.name


def check_choice(name: str, value: object, words: tuple[str, ...]) -> None:
    """Refuses a value that is none of the words.

    Raises:
        InvalidOption: names the option and its words.
    """
    if value not in words:
        meant = suggest(str(value), words)
        raise InvalidOption(f"`{name}` must be one of {', '.join(words)}, not {value!r}{meant}")


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


def use_lora(lora: LoraLike) -> AbstractContextManager[Lora | Adapter]:
    """Opens a LoRA for the whole of a verb; what the caller opened stays open."""
    return nullcontext(lora) if isinstance(lora, Lora | Adapter) else Lora.open(lora)


def name_lora(lora: LoraLike | None) -> str:
    """Returns the name of a LoRA's file or folder, "the LoRA" in memory."""
    if isinstance(lora, Lora) and lora.given:
        return lora.given.name
    return Path(lora).name if isinstance(lora, str | PathLike) else "the LoRA"


def begin_message(lora: LoraLike) -> str:
    """Begins a message about a LoRA with its path, if it has one."""
    if isinstance(lora, Lora) and lora.path:
        return f"{lora.where}: "
    return f"{spell_path(lora)}: " if isinstance(lora, str | PathLike) else ""


DEFAULT_OPTIONS = TransferOptions()
