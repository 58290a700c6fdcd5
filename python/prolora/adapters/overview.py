"""What the keys of an adapter file say, whether or not it can be read: for `inspect`.

`parse_contents` refuses a file at the first key that it does not understand. Here every key counts
that says something, so that damaged, foreign and unsupported files are described too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..architectures.family import Family
from ..architectures.modules import TEXT_ENCODERS, find_component
from ..architectures.recognition import NamedMatrix, share_rows
from ..core.grouping import group_by
from ..errors import ProLoRAError
from .algorithms import forms
from .algorithms.forms import Form
from .contents import parse_contents, read_scale
from .keys import module_names, tensor_keys
from .lora import Lora
from .naming import choose_names, list_matrices
from .slots import Contents

NOT_UNDERSTOOD = "not understood"


@dataclass(frozen=True)
class ComponentOverview:
    """One part of a pipeline, as a file updates it.

    Attributes:
        updates: number of updates; a fused weight is one.
        algorithms: number of updates by algorithm.
        ranks: number of updates by rank; those without one (full differences, OFT) are not counted.
        alphas: number of updates by alpha; "none" for those without.
        scales: number of updates by the factor in front of up·down; empty for a file that is
            refused.
    """

    updates: int
    algorithms: dict[str, int] = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)
    alphas: dict[str, int] = field(default_factory=dict)
    scales: dict[str, int] = field(default_factory=dict)


@dataclass
class Overview:
    """An adapter file, key by key.

    Attributes:
        modules: name -> what the path means; a fused weight goes by its own name.
        roles: name -> role -> key.
        forms: name -> what the shapes say, where they go together.
        refused: (module or path, type) of each key of a type that is not read.
        vectors: (module, "bias" or "weight") of each bias and normalisation tensor.
        left_out: the reason for each tensor that is not read and no reason to refuse the rest.
        foreign: path -> rank of LoRA factors on modules that are not known.
        reason: why the file is refused, None if it is not.
        contents: the file's layout, None if it is refused.
        matrices: a transformer's modules under the names of the file.
        reading: the family by whose names the modules of a transformer are read.
        alphas: name -> alpha, of the file or of PEFT's configuration.
        scales: name -> the factor in front of the update.
    """

    modules: dict[str, module_names.ModulePath] = field(default_factory=dict)
    roles: dict[str, dict[str, str]] = field(default_factory=dict)
    forms: dict[str, Form] = field(default_factory=dict)
    refused: list[tuple[str, str]] = field(default_factory=list)
    vectors: list[tuple[module_names.ModulePath, str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    foreign: dict[str, int] = field(default_factory=dict)
    reason: str | None = None
    contents: Contents | None = None
    reading: Family | None = None
    matrices: list[NamedMatrix] = field(default_factory=list)
    alphas: dict[str, float] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)

    @property
    def is_adapter(self) -> bool:
        """Whether any key is one of an adapter."""
        return bool(self.roles or self.foreign or self.refused or self.vectors)

    @property
    def canonical(self) -> list[str]:
        """All modules that are updated, parts of fused weights one by one."""
        return [name for module in self.modules.values() for name in module.modules]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Canonical module -> out × in without the kernel of a convolution, 0 if not known."""
        return self._list_shapes(with_kernel=False)

    @property
    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """Canonical module -> out × (in·kh·kw), 0 if not known."""
        return self._list_shapes(with_kernel=True)

    def _list_shapes(self, with_kernel: bool) -> dict[str, tuple[int, int]]:
        shapes: dict[str, tuple[int, int]] = {}
        for name, module in self.modules.items():
            form = self.forms.get(name)
            kernel = 1 if with_kernel or form is None else math.prod(form.kernel or (1,))
            size = (form.out, form.inputs // kernel) if form else (0, 0)
            if module.matrix:
                shapes |= share_rows(module.matrix, size)
            else:
                shapes[name] = size
        return shapes

    @property
    def needs_base(self) -> bool:
        """Whether any update depends on the weights of the base model."""
        return any(forms.needs_base(roles.keys()) for roles in self.roles.values())

    def kind(self, name: str) -> str:
        """The algorithm of a module, with "+dora" behind it where the result is rescaled."""
        roles = self.roles[name].keys()
        form = self.forms.get(name)
        dora = forms.MAGNITUDES & roles
        family = form.algorithm if form else forms.kind_of_roles(roles)
        return family + ("+dora" if dora else "")

    @property
    def algorithms(self) -> dict[str, int]:
        """Number of updates by algorithm, most frequent first."""
        kinds = [algorithm for _, algorithm in self.refused] + [self.kind(n) for n in self.roles]
        kinds += ["norm"] * (not kinds and bool(self.vectors))
        return count_values(kinds or ["lora"] * len(self.foreign))

    @property
    def ranks(self) -> list[int]:
        """The rank of every update, those of foreign keys last."""
        known = [form.rank for form in self.forms.values() if form.rank]
        return [*known, *self.foreign.values()]

    def components(self) -> dict[str, ComponentOverview]:
        """Part of the pipeline -> its updates; what is on unknown modules goes last."""
        names = sorted(self.modules, key=lambda n: find_component(n) in TEXT_ENCODERS)
        members = group_by(names, find_component)
        refused = dict(self.refused)
        places = {}
        for place, modules in members.items():
            ranks = Counter(self.forms[n].rank for n in modules if n in self.forms)
            ranks.pop(0, None)
            kinds = (self.kind(n) if n in self.roles else refused.get(n, "norm") for n in modules)
            places[place] = ComponentOverview(
                len(modules),
                count_values(kinds),
                dict(sorted(ranks.items())),
                count_values(
                    f"{self.alphas[n]:g}" if n in self.alphas else "none" for n in modules
                ),
                count_values(f"{self.scales[n]:.4g}" for n in modules if n in self.scales),
            )
        if self.foreign:
            ranks = Counter(self.foreign.values())
            places[NOT_UNDERSTOOD] = ComponentOverview(
                len(self.foreign), {}, dict(sorted(ranks.items()))
            )
        return places


def survey_keys(source: Lora) -> Overview:
    """Sorts the keys of a file; reads its alphas and scalars, a number each, and nothing else."""
    overview = Overview()
    overview.matrices = list_matrices(source)
    overview.reading = choose_names(source, overview.matrices, None)
    for key, header in source.headers.items():
        _sort_key(key, header.shape, overview)
    if not overview.is_adapter:
        return overview
    try:
        contents = parse_contents(source)
        overview.scales = {slot.module.name: read_scale(slot, source) for slot in contents.slots}
        overview.contents = contents
    except ProLoRAError as error:
        overview.reason = str(error)
        _guess_forms(source, overview)
    else:
        _use_contents(contents, overview)
    for name, roles in overview.roles.items():
        alpha = roles.get("alpha")
        if alpha is not None and math.prod(source.headers[alpha].shape) == 1:
            overview.alphas[name] = source.read(alpha).double().item()
    return overview


def _use_contents(contents: Contents, overview: Overview) -> None:
    """Takes all from the contents: the keys alone do not tell which encoder a T5 is."""
    overview.modules = {slot.module.name: slot.module for slot in contents.slots}
    overview.roles = {slot.module.name: slot.keys for slot in contents.slots}
    overview.forms = {slot.module.name: slot.form for slot in contents.slots}
    overview.alphas = {
        slot.module.name: slot.peft.alpha(slot.module.local) for slot in contents.slots if slot.peft
    }


def _guess_forms(source: Lora, overview: Overview) -> None:
    """The shapes of a refused file, where they go together."""
    for name, roles in overview.roles.items():
        shapes = {role: source.headers[key].shape for role, key in roles.items()}
        form = forms.derive_form(shapes) if forms.find_missing_role(shapes.keys()) is None else None
        if form:
            overview.forms[name] = form


def _sort_key(key: str, shape: tuple[int, ...], overview: Overview) -> None:
    """Puts a key where it belongs."""
    parsed = tensor_keys.parse_key(key, shape, overview.reading)
    if isinstance(parsed, tensor_keys.VectorKey):
        overview.vectors.append((parsed.module, parsed.tensor))
    elif isinstance(parsed, tensor_keys.LeftOutKey):
        overview.left_out.append(parsed.reason)
    elif isinstance(parsed, tensor_keys.RefusedKey):
        module = module_names.parse_module_path(parsed.path, overview.reading)
        name = module.name if module else parsed.path
        overview.refused.append((name, parsed.algorithm))
        if module:
            overview.modules.setdefault(name, module)
    elif parsed is None:
        factor = tensor_keys.split_factor(key)
        if factor is not None and factor[1] == "down" and shape:
            overview.foreign[factor[0]] = shape[0]
    else:
        overview.modules.setdefault(parsed.module.name, parsed.module)
        overview.roles.setdefault(parsed.module.name, {})[parsed.role] = key


def count_values(values: Iterable[str]) -> dict[str, int]:
    """Value -> number of times, most frequent first."""
    return dict(Counter(values).most_common())
