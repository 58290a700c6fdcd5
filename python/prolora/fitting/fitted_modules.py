"""Modules that a fit changes: called ones of the LoRA's roles and kinds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from ..architectures.modules import find_block, is_conditioning
from ..errors import ProLoRAError
from .probes import Asking, Probe
from .sides import FitSide
from .updates import can_be_fitted, temporary_hooks, weight_of

Shapes = Mapping[str, tuple[int, ...]]
"""Module -> shape of its weight."""

NO_KIND = "a fit cannot change modules of its kind; it compensates in others"
_NO_PLACE = "the target calls no module of that name that a fit can change; the others compensate"
_NEVER_CALLED = "the source never calls it, so that it changes nothing there"


def find_called(side: FitSide, state: Tensor, probe: Probe) -> dict[str, tuple[int, ...]]:
    """Returns the modules with shapes that a fit can change and a pass calls.

    Blocks come in the order in which they first run.
    """
    model = side.denoiser
    called: dict[object, int] = {}  # block, or module outside of all -> when it first ran
    ran = set[str]()

    def note(name: str) -> None:
        ran.add(name)
        called.setdefault(_find_place(name), len(called))

    modules = {name: module for name, module in model.named_modules() if can_be_fitted(module)}
    hooks = (
        module.register_forward_pre_hook(lambda *_, name=name: note(name))
        for name, module in modules.items()
    )
    with temporary_hooks(hooks):
        side.predict(state, probe.level, probe.prompts)
    names = sorted((n for n in modules if n in ran), key=lambda n: called[_find_place(n)])
    return {name: tuple(weight_of(model, name).shape) for name in names}


def _find_place(name: str) -> object:
    """Returns the block of a module; a module outside of all is a place of its own."""
    position = find_block(name)
    return (position.stack, position.number) if position else name


def choose_modules(asking: Asking, probe: Probe) -> tuple[list[str], dict[str, str]]:
    """Chooses the target's modules that get an update.

    Also returns why modules of the LoRA have none; `probe` is one about states.
    """
    ours, theirs = asking.source.denoiser, asking.target.denoiser
    source = find_called(asking.source, probe.source, probe)
    target = find_called(asking.target, probe.target, probe)
    chosen = choose_fitted(asking.updates, source, target)
    if not chosen:
        raise ProLoRAError(
            f"{type(theirs).__name__} calls no linear layer or convolution of the kinds "
            "that the LoRA adapts, which is what a fit changes; it calls "
            f"{', '.join(target) or 'none'}"
        )
    roles, taken = find_roles(source), {find_roles(target)[name] for name in chosen}
    alike = have_like_blocks(source, target)
    left_out = {}
    for name in asking.updates:
        if name not in source:
            left_out[name] = _NEVER_CALLED if can_be_fitted(ours.get_submodule(name)) else NO_KIND
        elif alike and roles[name] not in taken:
            left_out[name] = _NO_PLACE
    return chosen, left_out


def choose_fitted(lora: Iterable[str], source: Shapes, target: Shapes) -> list[str]:
    """Returns the target's modules that a fit of a LoRA changes.

    Between models with like blocks these are the modules of the LoRA's roles: of its names inside
    blocks, and of its names outside. Elsewhere roles do not correspond: then they are all modules
    in blocks that are of the LoRA's kinds and neither normalise nor modulate.
    """
    adapted = [name for name in lora if name in source]
    if have_like_blocks(source, target):
        roles = find_roles(source)
        wanted = {roles[name] for name in adapted}
        return [name for name, role in find_roles(target).items() if role in wanted]
    kinds = {_is_pointwise(source[name]) for name in adapted}
    inside = {name for block in group_by_block(target).values() for name in block.values()}
    return [n for n, shape in target.items() if n in inside and _is_pointwise(shape) in kinds]


def have_like_blocks(source: Shapes, target: Shapes) -> bool:
    """Returns True if some block's names all lie in a block of the other."""
    ours, theirs = (
        {frozenset(block) for block in group_by_block(side).values()} for side in (source, target)
    )
    return any(a <= b or b <= a for a in ours for b in theirs)


def group_by_block(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Returns block -> {role: module}, without what normalises or modulates.

    A model without blocks is one.
    """
    roles = find_roles(names)
    has_blocks = any(role.inside for role in roles.values())
    blocks: dict[str, dict[str, str]] = {}
    for name, role in roles.items():
        if role.inside == has_blocks and not is_conditioning(role.local):
            blocks.setdefault(name.removesuffix(role.local).rstrip("."), {})[role.local] = name
    return blocks


class Role(NamedTuple):
    """A module's name inside its block, or its whole name outside."""

    local: str
    inside: bool


def find_roles(names: Iterable[str]) -> dict[str, Role]:
    """Returns module -> role; a block is what `find_block` calls one by any name in it."""
    names = list(names)
    found = (find_block(name) for name in names)
    blocks = {f"{position.stack}.{position.number}" for position in found if position}
    roles = {}
    for name in names:
        words = name.split(".")
        starts = (".".join(words[:i]) for i in range(1, len(words)))
        block = next((start for start in starts if start in blocks), "")
        roles[name] = Role(name.removeprefix(f"{block}."), bool(block))
    return roles


def _is_pointwise(shape: tuple[int, ...]) -> bool:
    return set(shape[2:]) <= {1}
