"""Move a LoRA to another base model, without training and without data."""

import torch  # noqa: F401  (before the extension, so that both use torch's OpenMP runtime)

from .adapters.adapter import Adapter
from .bases import Base, BaseLike, open_base
from .bases.experts import ExpertsLike, open_experts
from .core.basis import Basis, truncated_svd
from .core.lowrank import LowRank
from .core.methods import METHODS, Method, MethodChoice, MethodName
from .core.ops.native import cuda_status, require_cuda
from .core.projection import DEFAULT_RANK, project
from .core.projection_info import ProjectionInfo
from .core.similarity import Similarity, principal_angles, similarity
from .core.verdict import Verdict
from .errors import (
    AlreadyMoved,
    HubUnavailable,
    InvalidOption,
    KernelFailure,
    LowCoverage,
    MissingFile,
    NonFiniteWeights,
    OutputError,
    OutputExists,
    ProLoRAError,
    ShapeMismatch,
    SolverFailure,
    TooLittleMemory,
    UnrelatedBases,
    UnsupportedDevice,
    UnsupportedFormat,
    UnsupportedTensor,
    WrongBase,
)
from .probe.settings import FitSettings
from .version import __version__
from .workflow.batch import transfer_many
from .workflow.check import Check, check
from .workflow.convert import convert
from .workflow.convert_options import ConvertOptions
from .workflow.extract import extract
from .workflow.extract_options import ExtractOptions
from .workflow.fit import fit, fit_many
from .workflow.fit_options import FitOptions
from .workflow.fleet.migration import migrate
from .workflow.merge import merge
from .workflow.merge_options import MergeOptions
from .workflow.options import TransferMethod, TransferOptions
from .workflow.outcome import Outcome
from .workflow.pipeline_loading import load_moved_lora
from .workflow.report import Report
from .workflow.result import Transfer
from .workflow.transfer import transfer

__all__ = [
    "DEFAULT_RANK",
    "METHODS",
    "Adapter",
    "AlreadyMoved",
    "Base",
    "BaseLike",
    "Basis",
    "Check",
    "ConvertOptions",
    "ExpertsLike",
    "ExtractOptions",
    "FitOptions",
    "FitSettings",
    "HubUnavailable",
    "InvalidOption",
    "KernelFailure",
    "LowCoverage",
    "LowRank",
    "MergeOptions",
    "Method",
    "MethodChoice",
    "MethodName",
    "MissingFile",
    "NonFiniteWeights",
    "Outcome",
    "OutputError",
    "OutputExists",
    "ProLoRAError",
    "ProjectionInfo",
    "Report",
    "ShapeMismatch",
    "Similarity",
    "SolverFailure",
    "TooLittleMemory",
    "Transfer",
    "TransferMethod",
    "TransferOptions",
    "UnrelatedBases",
    "UnsupportedDevice",
    "UnsupportedFormat",
    "UnsupportedTensor",
    "Verdict",
    "WrongBase",
    "__version__",
    "check",
    "convert",
    "cuda_status",
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
    "require_cuda",
    "similarity",
    "transfer",
    "transfer_many",
    "truncated_svd",
]
