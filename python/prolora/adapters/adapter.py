"""An adapter in memory: what every reader gives and every writer takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..architectures.family import AuthorsWeight
from ..architectures.identify import Model, identify
from ..core.lowrank import LowRank


@dataclass(frozen=True, eq=False)
class StoredUpdate:
    """A file's tensors behind one update, fused weight or vector."""

    parts: Mapping[str, LowRank | Tensor]  # module or vector -> what was made of them
    keys: Mapping[str, str]  # what stands behind a key's module path -> the key
    read: Callable[[str], Tensor]  # key -> tensor, as it is stored
    kind: str = "vector"  # or the kind of update
    rank: int = 0  # that the file states
    scale: float = 1.0
    configured: bool = False  # a configuration beside the tensors has the scale
    matrix: AuthorsWeight | None = None  # that `parts` are rows of


@dataclass(frozen=True)
class Adapter:
    """A LoRA as {module: update}, the scale α/r already folded into the factors.

    Attributes:
        updates: canonical module name -> update, in file order. Names are diffusers' without
            `.weight`; modules of text encoders start with `text_encoder.`, `text_encoder_2.` or
            `text_encoder_3.`. Factors are float32 on the CPU: up [out, r], down [r, in·kh·kw].
        kernels: (kh, kw), or (k,), of the modules that are convolutions, 1×1 ones included; linear
            modules have no entry.
        vectors: differences of biases and of the weights of normalisation layers, by
            "module.bias" or "module.weight", float32 [n].
        format: the format it came in: "kohya", "diffusers", "peft" or "comfy".
        spelling: how the file spells its modules: "diffusers", or "sgm" for the names of the
            original checkpoints (SGM's UNets, the authors of a transformer).
        origin: what it is for, by its file or base; None where its own names and sizes decide.
        dtype: the storage dtype of the factors in the file.
        metadata: the file's own header metadata, untouched.
        algorithms: module -> kind of update in the file ("lora", "locon", "tucker", "loha", "lokr",
            "full", "glora", "oft"; "+dora" behind it for rescaled ones); "lora" has no entry.
        kept_energy: module -> share of ‖ΔW‖² in `updates`, where the rank was too high to be
            kept exactly (see `truncation`); all others are exact and have no entry.
        shares: module -> share of ‖ΔW‖² of each leading column, where some were cut.
        left_out: tensor or module of the file that is in neither of the two -> the reason. Nothing
            else of a file is ever left out.
        unread: module among `left_out` that has an update -> its (out, in, rank).
        refused: modules among `unread` whose update has a tensor beside it that is not read.
        stored: the tensors behind updates that are to be written as they are stored, unless they
            are changed; empty unless asked for.
        foreign: an array of another library, whose kind `state_dict` returns.
    """

    updates: dict[str, LowRank]
    kernels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    format: str = "kohya"
    spelling: str = "diffusers"
    origin: Model | None = None
    dtype: torch.dtype = torch.float32
    metadata: dict[str, str] = field(default_factory=dict)
    algorithms: dict[str, str] = field(default_factory=dict)
    kept_energy: dict[str, float] = field(default_factory=dict)
    shares: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    left_out: dict[str, str] = field(default_factory=dict)
    unread: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    stored: list[StoredUpdate] = field(default_factory=list, repr=False, compare=False)
    foreign: Any = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        """Returns one line: the number of modules, their ranks and their storage."""
        ranks = sorted({update.rank for update in self.updates.values()})
        of = f" of rank {ranks[0]}" if len(ranks) == 1 else ""
        of = f" of ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else of
        vectors = f", {len(self.vectors)} vectors" if self.vectors else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Adapter({len(self.updates)} modules{of}{vectors}, {self.format}, {dtype})"

    @cached_property
    def model(self) -> Model:
        """What it is for."""
        if self.origin is not None:
            return self.origin
        shapes = {name.rpartition(".")[0]: (0, 0) for name in self.vectors}
        shapes |= {name: (x.shape[0], x.shape[1]) for name, x in self.updates.items()}
        return identify(shapes, self.metadata)

    def with_updates(self, updates: dict[str, LowRank]) -> Adapter:
        """Returns the same adapter with other updates, without facts about absent modules."""
        kernels = {name: kernel for name, kernel in self.kernels.items() if name in updates}
        algorithms = {name: kind for name, kind in self.algorithms.items() if name in updates}
        shares = {name: share for name, share in self.kept_energy.items() if name in updates}
        return replace(
            self, updates=updates, kernels=kernels, algorithms=algorithms, kept_energy=shares
        )
