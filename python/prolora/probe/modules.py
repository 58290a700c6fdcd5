"""Which modules of the target get an update."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from ..architectures.modules import is_adaptable
from ..errors import ProLoRAError
from .hooks import keep_hooks
from .probe_run import ProbeRun
from .recording.trajectories import Call
from .recording.translation import Question
from .swapping import name_blocks
from .updates import can_be_fitted

_COMPENSATED = "the fit compensates for it in the blocks"
_NO_PLACE = (
    f"no block of the target has a module of that name that a fit can change; {_COMPENSATED}"
)


def find_blocks(model: nn.Module, call: Call) -> list[str]:
    """The names of a model's transformer blocks (`name_blocks`), in the order they first run in.

    Raises:
        ProLoRAError: the model runs no block that holds linear modules.
    """
    order: dict[str, None] = {}
    blocks = {name: model.get_submodule(name) for name in name_blocks(model)}
    hooks = (
        module.register_forward_pre_hook(lambda *_, name=name: order.setdefault(name))
        for name, block in blocks.items()
        for module in (block, *block.children())  # a list of layers is not run itself
    )
    with keep_hooks(hooks), torch.no_grad():
        model(*call.args, **call.kwargs)
    if not order:
        raise ProLoRAError(
            f"{type(model).__name__} has no block with linear layers, which is what a fit changes"
        )
    return list(order)


def name_class(block: nn.Module) -> str:
    """The class of a block; of a list of layers the classes in it."""
    if isinstance(block, nn.ModuleList):
        return ", ".join(sorted({type(layer).__name__ for layer in block}))
    return type(block).__name__


def choose_modules(run: ProbeRun, question: Question) -> list[str]:
    """The modules of the target's blocks whose role the LoRA adapts in a source block.

    A role is a name inside a block. Where the two models have no class of blocks in common, roles
    do not correspond: then every linear module of a block is chosen, except for those that
    normalise or modulate (`is_adaptable`). The report lists the modules of the LoRA that are
    outside all blocks, and those whose role no block of the target can take.

    Args:
        run: the probing.
        question: any one; both models are run on it to find their blocks.

    Raises:
        ProLoRAError: the LoRA adapts none of the target's modules.
    """
    source_blocks = find_blocks(run.source, question.source)
    target_blocks = find_blocks(run.target, question.target)
    roles: dict[str, list[str]] = {}
    for name in run.adapter.updates:
        block = next((b for b in source_blocks if name.startswith(f"{b}.")), None)
        if block is None:
            run.report.left_out[name] = f"it is in no transformer block; {_COMPENSATED}"
        else:
            roles.setdefault(name.removeprefix(f"{block}."), []).append(name)
    classes = {name_class(run.source.get_submodule(block)) for block in source_blocks}
    alike = any(name_class(run.target.get_submodule(b)) in classes for b in target_blocks)
    chosen, reached = list[str](), set[str]()
    for block in target_blocks:
        inside = dict(run.target.get_submodule(block).named_modules())
        if alike:
            names = [name for name in inside if name in roles and can_be_fitted(inside[name])]
        else:
            linear = [name for name, module in inside.items() if isinstance(module, nn.Linear)]
            names = [n for n in linear if "norm" not in n and is_adaptable(f"{block}.{n}")]
        chosen += [f"{block}.{name}" for name in names]
        reached.update(names)
    if alike:
        unmoved = itertools.chain(*(roles[role] for role in roles.keys() - reached))
        run.report.left_out |= dict.fromkeys(sorted(unmoved), _NO_PLACE)
    if not chosen:
        raise ProLoRAError("no block of the target has a module that the LoRA adapts")
    return chosen
