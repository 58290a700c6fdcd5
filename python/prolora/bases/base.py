"""A base model, opened: names and shapes at once, weights one at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..architectures.identify import Model, identify_base
from ..core.precision import is_finite, working_dtype
from ..errors import NonFiniteWeights
from .keys.canonical_names import name_others
from .leaves import Leaves
from .quantised.weight import find_kind
from .weights import Weight

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class Base:
    """A base model as {canonical module name: weight}, read lazily.

    Only weights of two or more axes are listed; names are diffusers' without `.weight`.

    Attributes:
        name: its name in messages and reports: the file's or folder's own.
        weights: module -> weight, in the order of the files.
        stored: every key of the checkpoint -> what it holds; quantised weights are joined.
        path: the file or folder it was opened from, None for a base from memory.
        files: the files it is read from.
        leaves: the same files with digests of their tensors.
        by_name: whether it was given by its name alone ("anima"), without weights.
    """

    name: str
    weights: Mapping[str, Weight]
    stored: Mapping[str, Weight] = field(default_factory=dict)
    path: Path | None = None
    files: list[Path] = field(default_factory=list)
    leaves: tuple[Leaves, ...] = ()
    by_name: bool = False

    def __repr__(self) -> str:
        """Returns one line: the name, the number of weights and the layout."""
        layout = f", {self.layout}" if self.layout else ""
        return f"Base({self.name!r}, {len(self.weights)} weights{layout})"

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Module -> shape of its weight, known without reading it."""
        return {module: weight.shape for module, weight in self.weights.items()}

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Module -> storage dtype."""
        return {module: weight.dtype for module, weight in self.weights.items()}

    @cached_property
    def quantised_as(self) -> str:
        """How its weights are quantised, and how many are: "nvfp4 (840 of 846 weights)"; or ""."""
        kinds = Counter(kind for weight in self.weights.values() if (kind := find_kind(weight)))
        every = len(self.weights)
        return " and ".join(f"{kind} ({n} of {every} weights)" for kind, n in kinds.most_common())

    @cached_property
    def others(self) -> tuple[dict[str, Weight], dict[str, Weight]]:
        """All tensors beside `weights`: of this model, and of others in its files (a VAE).

        Biases and norms of known modules are "module.bias" and "module.weight"; all others go by
        their own keys.
        """
        return name_others(self.stored)

    @cached_property
    def model(self) -> Model:
        """What it is: a published size, or by all of its names a family."""
        return identify_base(self.shapes)

    @property
    def layout(self) -> str | None:
        """The id of the architecture, None if it is not a known one."""
        return next(iter(self.model.sizes), None)

    @property
    def family(self) -> str | None:
        """The id of the family (`architectures.families`), None if none or several are possible."""
        return self.model.family

    def read(self, module: str) -> Tensor:
        """Returns the weight of `module` in its storage dtype; do not write into it.

        Raises:
            KeyError: no such module.
            UnsupportedFormat: the file was changed or cannot be read any more.
        """
        return self.weights[module].read()

    def read_finite(self, module: str) -> Tensor:
        """Returns the weight of `module`, as `read` does; refuses one with NaN or Inf.

        Raises:
            NonFiniteWeights: names the tensor and the file, and says where the value is.
        """
        weight = self.read(module)
        if not is_finite(weight):
            _refuse_non_finite(self, module, weight)
        return weight

    def tensor_name(self, module: str) -> str:
        """Returns where a module's weight lies, "file.safetensors:key", for messages."""
        return self.weights[module].name


def stack_weights(weights: Sequence[Tensor]) -> Tensor:
    """Stacks weights of one shape [b, ...]; mixed dtypes become float32 or better.

    Checkpoints with some layers in float8 are common, and torch promotes no float8.
    """
    dtypes = {weight.dtype for weight in weights}
    if len(dtypes) > 1:
        weights = [weight.to(working_dtype(*dtypes)) for weight in weights]
    return torch.stack(list(weights))


def list_quantised(*bases: Base) -> dict[str, str]:
    """Returns name -> how its weights are quantised, for quantised bases."""
    return {base.name: base.quantised_as for base in bases if base.quantised_as}


def check_finite(base: Base, modules: Iterable[str]) -> None:
    """Reads every weight once and refuses the first that holds NaN or Inf."""
    for module in modules:
        base.read_finite(module)


def _refuse_non_finite(base: Base, module: str, weight: Tensor) -> None:
    """Refuses values that are not finite: how many, and where the first is."""
    bad = torch.nonzero(~torch.isfinite(weight.float() if weight.dtype.itemsize == 1 else weight))
    if not len(bad):
        return
    where = base.path or base.name
    raise NonFiniteWeights(
        f"{base.tensor_name(module)} of {where}: {len(bad)} of {weight.numel()} values are NaN or "
        f"Inf, the first at {bad[0].tolist()}; the checkpoint is damaged"
    )
