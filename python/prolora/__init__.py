"""Move a LoRA to another base model, without training and without data."""

import torch  # noqa: F401  (before the extension, so that both use torch's OpenMP runtime)

from .adapters.adapter import Adapter
from .bases import Base, open_base
from .batch import Outcome, transfer_many
from .comparison import Comparison, compare
from .damping import damped
from .errors import (
    LowCoverage,
    NonFiniteWeights,
    OutputError,
    ProLoRAError,
    ShapeMismatch,
    UnrelatedBases,
    UnsupportedFormat,
)
from .inspection import Description, inspect
from .linalg.basis import Basis, truncated_svd
from .linalg.lowrank import LowRank
from .linalg.subspaces import Similarity, principal_angles, similarity
from .ops import cuda_status, require_cuda
from .options import Probing
from .projection import DEFAULT_RANK, METHODS, ProjectionInfo, project
from .report import Report
from .transfer import Transfer, transfer, transfer_file
from .verdict import Verdict
from .version import __version__

__all__ = [
    "DEFAULT_RANK",
    "METHODS",
    "Adapter",
    "Base",
    "Basis",
    "Comparison",
    "Description",
    "LowCoverage",
    "LowRank",
    "NonFiniteWeights",
    "Outcome",
    "OutputError",
    "ProLoRAError",
    "Probing",
    "ProjectionInfo",
    "Report",
    "ShapeMismatch",
    "Similarity",
    "Transfer",
    "UnrelatedBases",
    "UnsupportedFormat",
    "Verdict",
    "__version__",
    "compare",
    "cuda_status",
    "damped",
    "inspect",
    "open_base",
    "principal_angles",
    "project",
    "require_cuda",
    "similarity",
    "transfer",
    "transfer_file",
    "transfer_many",
    "truncated_svd",
]
