"""Moves LoRAs to other base models, without training and without data.

For tensors (`prolora.core` has these alone):

    project            moves the update of one weight to another weight
    project_many       moves many updates, by name
    truncated_svd      leading singular subspaces, with a bound on their error
    similarity         overlap of the leading subspaces of two weights
    principal_angles   angles between two column spaces

For files, folders, state dicts and pipelines:

    transfer           moves a LoRA to another base model, by weights alone
    fit                moves a LoRA between two models that can run
    check              reports what a file is, for which model, and what is wrong with it
    convert            writes a LoRA in another format, precision or rank
    extract            makes a LoRA from two models
    merge, bake        join LoRAs, or write them into a model
    migrate            moves a collection
    load_moved_lora    moves a LoRA into a diffusers pipeline

`help(prolora.transfer)` describes one of them; docs/api.md describes all.

Names are loaded when they are asked for: importing the package imports no torch. Type checkers read
__init__.pyi, which docs/make_stub.py writes.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "DEFAULT_RANK": "core.projection",
    "METHODS": "core.methods",
    "Adapter": "adapters.adapter",
    "Base": "bases",
    "Basis": "core.basis",
    "Check": "checking.check_result",
    "FitOptions": "fitting.settings",
    "Lora": "adapters.lora",
    "LowRank": "core.lowrank",
    "MergeOptions": "making.merge_options",
    "Method": "core.methods",
    "Outcome": "reports.outcome",
    "ProLoRAError": "errors",
    "ProjectionInfo": "core.projection_info",
    "Report": "reports.report",
    "Similarity": "core.subspaces",
    "Transfer": "verbs.result",
    "TransferOptions": "verbs.options",
    "__version__": "version",
    "bake": "making.bake",
    "check": "checking.check",
    "convert": "making.convert",
    "extract": "making.extract",
    "fit": "fitting.fit",
    "fit_many": "fitting.fit",
    "load_moved_lora": "moving.pipeline_loading",
    "merge": "making.merge",
    "migrate": "fleet.migration",
    "open_base": "bases",
    "open_experts": "bases.experts",
    "principal_angles": "core.subspaces",
    "project": "core.projection",
    "project_many": "core.grouped",
    "similarity": "core.subspaces",
    "transfer": "best",
    "transfer_many": "best",
    "truncated_svd": "core.basis",
}
_ROOMS = ("adapters", "architectures", "bases", "comparison", "core", "errors", "files", "fitting")

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Loads a public name or a room of the package."""
    if name in _HOMES:
        try:
            value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith(__name__):
                raise
            raise ImportError(f"this copy of prolora lacks {error.name}: no {name}") from error
        globals()[name] = value
        return value
    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Lists the public names."""
    return [*__all__, *_ROOMS]
