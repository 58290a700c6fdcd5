"""Which modules a probing fits, carries over or skips, from names and shapes; what it refuses."""

from __future__ import annotations

import torch

from ...adapters.adapter import Adapter
from ...architectures.modules import find_block
from ...bases import Base, vae
from ...comparison.verdict import AUTO, DEFAULT_THRESHOLD
from ...core.lowrank import LowRank
from ...core.projection import DEFAULT_RANK
from ...errors import InvalidOption, UnsupportedFormat
from ..options import TransferOptions
from ..plan import Plan, check_fits_source, place_text_encoders

RULE = "running models"
"""How modules are paired, for the report."""

_NO_PLACE = "it is in no transformer block; the fit compensates for it in the blocks"


def check_probing(source: Base, target: Base, options: TransferOptions) -> None:
    """Refuses before any model is loaded.

    Raises:
        InvalidOption: an option that probing has no use for.
        UnsupportedFormat: a base that is no pipeline folder.
        UnrelatedBases: pipelines with different latents.
    """
    unused = {
        "match": options.match == "name",
        "dropped": options.dropped == "skip",
        "inserted": options.inserted == "skip",
        "rank": options.rank == DEFAULT_RANK,
        "damping": options.damping is None,
        "threshold": options.threshold == DEFAULT_THRESHOLD,
        "text_encoder project": options.text_encoder != "project",
        "strength auto": options.strength != AUTO,
    }
    given = [name for name, is_default in unused.items() if not is_default]
    if given:
        raise InvalidOption(
            f"method 'probe' has no use for {', '.join(given)}: it looks at the running models, "
            "not at pairs of weights; its rank is out_rank"
        )
    for side, base in (("source", source), ("target", target)):
        if not vae.is_pipeline(base.path):
            raise UnsupportedFormat(
                f"the {side} {base.path or base.name} is no pipeline folder: --method probe runs "
                "the models, so both bases must be folders of whole diffusers pipelines "
                f"({vae.PIPELINE_INDEX}, scheduler, text encoders, and unet or "
                "transformer). A single "
                "file becomes one by StableDiffusionPipeline.from_single_file(FILE)"
                ".save_pretrained(FOLDER) and the like; a model on the hub by downloading all of it"
            )
    assert source.path is not None and target.path is not None
    vae.check_latents(source.path, target.path)


def plan_probing(adapter: Adapter, source: Base, target: Base, options: TransferOptions) -> Plan:
    """Which modules are carried over or skipped, and why; all others are fitted.

    Raises:
        UnsupportedFormat: a module that the source does not have.
        ShapeMismatch: an update that does not fit the source.
    """
    plan = Plan(rule=RULE)
    names = place_text_encoders(adapter, source, target, options.text_encoder, plan)
    check_fits_source(adapter, names, source)
    for name in [n for n in plan.passed if _has_other_width(n, source, target)]:
        plan.passed.remove(name)
        plan.skipped[name] = "the target has another text encoder, where it means nothing"
    inside = fitted_modules(names, source)
    plan.skipped |= {name: _NO_PLACE for name in names if name not in inside}
    return plan


def _has_other_width(name: str, source: Base, target: Base) -> bool:
    """Whether the target's text encoder cannot hold this update."""
    return name in source.shapes and source.shapes[name] != target.shapes.get(name)


def fitted_modules(names: list[str], source: Base) -> set[str]:
    """Those of the LoRA's modules whose change is fitted: linear ones in transformer blocks."""
    return {n for n in names if find_block(n) and len(source.shapes.get(n, ())) == 2}


def target_modules(adapter: Adapter, source: Base, target: Base) -> dict[str, tuple[int, ...]]:
    """Target module -> shape, of all that may get an update: the roles that the LoRA adapts."""
    roles = {
        block.local
        for name in fitted_modules(list(adapter.updates), source)
        if (block := find_block(name))
    }
    return {
        name: shape
        for name, shape in target.shapes.items()
        if (block := find_block(name)) and block.local in roles and len(shape) == 2
    }


def outline_fit(adapter: Adapter, plan: Plan, source: Base, target: Base) -> dict[str, LowRank]:
    """Updates of the names and shapes that will be written, without values."""
    outline = {
        name: LowRank(torch.zeros(shape[0], 1), torch.zeros(1, shape[1]))
        for name, shape in target_modules(adapter, source, target).items()
    }
    return outline | {name: adapter.updates[name] for name in plan.passed}
