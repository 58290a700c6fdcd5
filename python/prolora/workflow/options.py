"""The choices of a transfer: every one that the paper leaves open has a name here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..bases.base import Progress
from ..comparison.contested_blocks import INSERTED, InsertedMode
from ..comparison.module_map import Match
from ..comparison.verdict import AUTO, DEFAULT_THRESHOLD, LookMode, Verdict
from ..core.arrays import make_fields_plain
from ..core.methods import Method, MethodName, Needs, find_method
from ..core.projection import DEFAULT_RANK
from ..core.rank_rule import Rank, read_rank
from ..core.validation import resolve_device
from ..errors import InvalidOption
from ..files.sizes import parse_limit
from ..probe.settings import Probing
from .out_rank import OUT_RANK_FORMS, OutRank, is_out_rank, parse_percentage, parse_size_limit

LoraLike = str | PathLike[str] | Mapping[str, Tensor] | Adapter
"""A .safetensors file, a PEFT folder, a state dict or an `Adapter`."""

MethodChoice = Literal["auto", MethodName]
"""What `transfer` takes as its method; "auto" chooses one of `METHODS`."""

FormatName = Literal["auto", "kohya", "diffusers", "peft", "comfy"]
ProgramName = Literal["comfyui", "a1111", "forge", "invokeai", "diffusers", "musubi", "sd-scripts"]
FormatLike = FormatName | ProgramName
"""A format, or the program that reads the file: each family says which format that is."""
"""The formats of a LoRA file; "auto" is the one that it came in."""

DtypeName = Literal["float16", "bfloat16", "float32", "float64"]
DtypeLike = torch.dtype | DtypeName
"""The dtype of the factors in a file, or its name."""

DroppedMode = Literal["skip", "sum"]
TextEncoderMode = Literal["copy", "project", "skip"]
VectorsMode = Literal["copy", "skip"]
Strength = float | Literal["auto"]

METHOD_NAMES: tuple[str, ...] = get_args(MethodChoice)
FORMATS: tuple[str, ...] = get_args(FormatName) + get_args(ProgramName)
DROPPED: tuple[str, ...] = get_args(DroppedMode)
TEXT_ENCODER: tuple[str, ...] = get_args(TextEncoderMode)
VECTORS: tuple[str, ...] = get_args(VectorsMode)
LOOKS: tuple[str, ...] = get_args(LookMode)
PROBE = "probe"
DEFAULT_PROBING = Probing()
# Its square, times an energy, is in the report: a float must hold that.
LARGEST_STRENGTH = 1e30


@dataclass(frozen=True)
class TransferOptions:
    """How a LoRA is moved; `transfer` takes each of these by its name.

    Attributes:
        method: "prolora" (the paper), "subspace" (its ablation), "lora-x", "blocks", "copy" (the
            update as it is), "damped" (see `damping`), "probe" (see `probe`; runs the models and
            needs pipeline folders), or "auto": the one that docs/evidence.md found best for bases
            as far apart as these.
        rank: columns of the subspaces, or the share of energy that they hold, between 0 and 1.
        match: how modules are paired: "name"; "similarity" (blocks are recognised by their
            weights); a JSON file or a mapping {target module: source module}.
        threshold: the overlap Φ that both sides of a pair must reach, 0 … 1; a pair below it gets
            no update. "copy" looks at no weights and skips nothing.
        damping: κ of "damped", 0 or more; None chooses it by the drift between the bases.
        strength: factor on every update; "auto" chooses it by the drift between the bases. None
            means "auto" for method "auto" and 1 for any other method.
        look: what the automatic method and strength aim at. "target": what the LoRA means in the
            target's own look, as a LoRA that was trained on the target draws it. "lora": the images
            that the LoRA was made for, as nearly as the target draws them; a copy does that best.
        out_rank: "exact" keeps every singular value of the result; an int keeps at most that many;
            a share between 0 and 1 the fewest that hold this much of an update's energy; "50%" half
            as many as the LoRA's own rank; "100MB" those that fit a file of that size, spent where
            they hold most energy. Method "probe" fits updates of that rank or share.
        dropped: "skip" leaves out the updates of blocks that the target has dropped; "sum" adds
            them to those of the nearest block that is still there.
        inserted: what feeds blocks that the target has more, where blocks are matched by
            similarity: "skip" nothing, "similar" the block of the source that they resemble,
            "previous" the block that feeds the one before them.
        text_encoder: "copy" carries the text encoders' updates over unchanged, "project" moves
            them as all others where both bases hold their weights, "skip" leaves them out.
        vectors: "copy" carries trained biases and normalisation layers over to the modules that
            they belong to, "skip" leaves them out.
        min_coverage: the least share of the LoRA's modules that must find a place, 0 … 1.
        again: takes `source` and `target` as they are given. Else a LoRA that prolora moved before
            must start from the base that it was moved to, the target must not be the base whose
            hash the LoRA's header gives, and the two must not be one model.
        cache: folder that keeps subspaces for later LoRAs; None keeps nothing.
        device: where to compute, as torch names it; "auto" means a GPU where there is one, None the
            CPU.
        max_memory: bytes of memory that this process may take, or a text such as "2GiB"; None sets
            no bound.
        probe: what method "probe" samples.
        progress: called as progress(done, total, name); what it raises ends the call, and nothing
            is written.
    """

    method: MethodChoice = "auto"
    rank: Rank = DEFAULT_RANK
    match: Match = "name"
    dropped: DroppedMode = "skip"
    inserted: InsertedMode = "skip"
    threshold: float = DEFAULT_THRESHOLD
    damping: float | None = None
    strength: Strength | None = None
    look: LookMode = "target"
    out_rank: OutRank = "exact"
    text_encoder: TextEncoderMode = "copy"
    vectors: VectorsMode = "copy"
    min_coverage: float = 0.0
    again: bool = False
    cache: str | PathLike[str] | None = None
    device: str | None = None
    max_memory: int | str | None = None
    probe: Probing = DEFAULT_PROBING
    progress: Progress | None = None

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
        for name, words in (
            ("method", METHOD_NAMES),
            ("text_encoder", TEXT_ENCODER),
            ("dropped", DROPPED),
            ("inserted", INSERTED),
            ("vectors", VECTORS),
            ("look", LOOKS),
        ):
            check_choice(name, getattr(self, name), words)
        for name in ("threshold", "min_coverage"):
            _check_share(name, getattr(self, name))
        if self.damping is not None and not (
            isinstance(self.damping, float | int) and 0 <= self.damping < math.inf
        ):
            raise InvalidOption(f"damping must be 0 or more, not {self.damping!r}")
        if isinstance(self.strength, str):
            if self.strength != AUTO:
                raise InvalidOption(f'strength must be a number or "auto", not {self.strength!r}')
        elif self.strength is not None and not (
            isinstance(self.strength, float | int) and 0 < self.strength <= LARGEST_STRENGTH
        ):
            raise InvalidOption(
                f"strength must be a positive number, {LARGEST_STRENGTH:.0e} at most, not "
                f"{self.strength!r}"
            )
        self._check_out_rank()
        object.__setattr__(self, "device", resolve_device(self.device))
        self.memory_limit  # noqa: B018 (raises where it is no size)

    def _check_out_rank(self) -> None:
        if not is_out_rank(self.out_rank):
            raise InvalidOption(f"out_rank must be {OUT_RANK_FORMS}, not {self.out_rank!r}")
        measured = parse_percentage(self.out_rank) or parse_size_limit(self.out_rank)
        if self.runs_models and measured is not None:
            raise InvalidOption(
                f"out_rank {self.out_rank!r} is for LoRAs that are moved; method {self.method} "
                "fits new ones: give a rank or a share of the energy"
            )

    def decide(self, verdict: Verdict | None) -> TransferOptions:
        """The options with method, strength and damping settled.

        Args:
            verdict: on the pair of bases; None where no weight is moved, so that there is nothing
                to choose a method by.
        """
        if verdict is not None:
            settled: Any = verdict.decide(self.method, self.strength, self.damping, self.look)
            return replace(
                self,
                method=settled.method,
                strength=settled.strength,
                damping=settled.damping,
            )
        # Without weights there is no drift to weaken an update along.
        copies = self.chosen is None or self.chosen.needs is Needs.WEIGHTS
        return replace(self, method="copy" if copies else self.method, strength=self.factor)

    @property
    def chosen(self) -> Method | None:
        """The method's row of `METHODS`; None as long as "auto" has chosen none."""
        return None if self.method == AUTO else find_method(self.method)

    @property
    def runs_models(self) -> bool:
        """Whether the method runs the models, and is another pipeline than all others."""
        return self.chosen is not None and self.chosen.needs is Needs.MODELS

    @property
    def kappa(self) -> float:
        """The damping as a number, once it is known; 0 before."""
        return self.damping or 0.0

    @property
    def factor(self) -> float:
        """The strength as a number, once it is known (see `decide`); 1 before."""
        return float(self.strength) if isinstance(self.strength, float | int) else 1.0

    @property
    def memory_limit(self) -> int | None:
        """`max_memory` in bytes."""
        return parse_limit(self.max_memory)


def check_choice(name: str, value: object, words: tuple[str, ...]) -> None:
    """Refuses a value that is none of the words.

    Raises:
        InvalidOption: names the option and its words.
    """
    if value not in words:
        raise InvalidOption(f"{name} must be one of {', '.join(words)}, not {value!r}")


def _check_share(name: str, value: float) -> None:
    """Refuses what is no number between 0 and 1; NaN would switch a check off."""
    if not (isinstance(value, float | int) and 0 <= value <= 1):
        raise InvalidOption(f"{name} must be a number between 0 and 1, not {value!r}")


def read_dtype(dtype: DtypeLike | None) -> torch.dtype | None:
    """The dtype that a name stands for.

    Raises:
        InvalidOption: it is no dtype and no name of one.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    check_choice("dtype", dtype, get_args(DtypeName))
    named: torch.dtype = getattr(torch, dtype)
    return named
