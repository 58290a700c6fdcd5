"""Move a LoRA to another base model, without training and without data.

Names are loaded when they are asked for: importing the package imports no torch. Type checkers read
__init__.pyi, which docs/make_stub.py writes.
"""

from importlib import import_module
from typing import Any

from .version import __version__

_HOMES = {
    "DEFAULT_RANK": "core.projection",
    "METHODS": "core.methods",
    "Adapter": "adapters.adapter",
    "Base": "bases",
    "Basis": "core.basis",
    "Check": "workflow.check_result",
    "FitOptions": "workflow.fit_options",
    "Lora": "adapters.lora",
    "LowRank": "core.lowrank",
    "MergeOptions": "workflow.merge_options",
    "Method": "core.methods",
    "Outcome": "workflow.outcome",
    "ProLoRAError": "errors",
    "Report": "workflow.report",
    "Similarity": "core.similarity",
    "Transfer": "workflow.result",
    "TransferOptions": "workflow.options",
    "bake": "workflow.bake",
    "check": "workflow.check",
    "convert": "workflow.convert",
    "extract": "workflow.extract",
    "fit": "workflow.fit",
    "fit_many": "workflow.fit",
    "load_moved_lora": "workflow.pipeline_loading",
    "merge": "workflow.merge",
    "migrate": "workflow.fleet.migration",
    "open_base": "bases",
    "open_experts": "bases.experts",
    "principal_angles": "core.similarity",
    "project": "core.projection",
    "similarity": "core.similarity",
    "transfer": "workflow.best",
    "transfer_many": "workflow.best",
    "truncated_svd": "core.basis",
}
_ROOMS = ("adapters", "architectures", "bases", "comparison", "core", "errors", "files", "probe")

__all__ = [
    "DEFAULT_RANK",
    "METHODS",
    "Adapter",
    "Base",
    "Basis",
    "Check",
    "FitOptions",
    "Lora",
    "LowRank",
    "MergeOptions",
    "Method",
    "Outcome",
    "ProLoRAError",
    "Report",
    "Similarity",
    "Transfer",
    "TransferOptions",
    "__version__",
    "bake",
    "check",
    "convert",
    "extract",
    "fit",
    "fit_many",
    "load_moved_lora",
    "merge",
    "migrate",
    "open_base",
    "open_experts",
    "principal_angles",
    "project",
    "similarity",
    "transfer",
    "transfer_many",
    "truncated_svd",
]


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
