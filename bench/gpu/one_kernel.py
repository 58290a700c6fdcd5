"""The kernels of an op: what compute-sanitizer and ncu watch. `python -m gpu.one_kernel OP`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from prolora.core.ops import probe, trial
from prolora.core.ops.krylov_block import STORED
from prolora.core.svd import krylov

OPS = [op for op in probe.CASES if op != "small_singular_values"]  # small_svd's kernel


@contextmanager
def by_kernels() -> Iterator[None]:
    """What has kernels runs them, without a trial; in a dry run, too, the blocks of a basis."""

    def takes_stored(*operands: Any) -> bool:
        return operands[-1] is not None and operands[-1].dtype in STORED

    with (
        mock.patch.object(trial, "prefers_kernel", lambda *_: True),
        mock.patch.object(krylov, "_takes_stored", takes_stored),
    ):
        yield


if __name__ == "__main__":
    # `one_kernel OP DEVICE [large]`
    probe.run_op(sys.argv[1], sys.argv[2], sys.argv[3:] == ["large"])
