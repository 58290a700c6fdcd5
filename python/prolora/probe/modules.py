"""Which modules of the target get an update."""

from __future__ import annotations

from torch import nn

from ..errors import ProLoRAError
from .fitting.blocks import find_blocks
from .probe_run import FittedModules, ProbeRun
from .recording.translation import Question


def choose_modules(run: ProbeRun, question: Question) -> FittedModules:
    """The linear modules of the target's blocks whose role the LoRA adapts in a source block.

    A role is a name inside a block. Where the two models have no class of blocks in common, roles
    do not correspond: then every linear module of a block is chosen, except for those that
    modulate norms. The report lists the modules of the LoRA that are outside all blocks.

    Args:
        run: the probing.
        question: any one; both models are run on it to find their blocks.

    Raises:
        ProLoRAError: the LoRA adapts none of the target's modules.
    """
    source_blocks = find_blocks(run.source, question.source)
    target_blocks = find_blocks(run.target, question.target)
    roles = set()
    for name in run.adapter.updates:
        block = next((b for b in source_blocks if name.startswith(f"{b}.")), None)
        if block is None:
            run.report.left_out[name] = (
                "it is in no transformer block; the fit compensates for it in the blocks"
            )
        else:
            roles.add(name.removeprefix(f"{block}."))
    classes = {type(run.source.get_submodule(block)).__name__ for block in source_blocks}
    alike = any(type(run.target.get_submodule(b)).__name__ in classes for b in target_blocks)
    by_block: dict[str, list[str]] = {}
    for block in target_blocks:
        inside = run.target.get_submodule(block).named_modules()
        linear = [name for name, module in inside if isinstance(module, nn.Linear)]
        chosen = [n for n in linear if (n in roles if alike else "norm" not in n)]
        if chosen:
            by_block[block] = chosen
    if not by_block:
        raise ProLoRAError("no block of the target has a module that the LoRA adapts")
    return FittedModules(source_blocks, by_block)
