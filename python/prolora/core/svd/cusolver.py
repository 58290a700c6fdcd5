"""cuSOLVER's batched symmetric eigensolver, from the library that torch has loaded already.

`cusolverDnXsyevBatched` came with cuSOLVER 11.7.1 (CUDA 12.6 update 2). torch.linalg.eigh calls it
for n ≤ 32 only, loops over the matrices for larger n and synchronises to read `info`; here a whole
stack is one call, and `info` stays on the device. Nothing is linked: the functions are looked up by
name, and a torch without them is no error.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import threading
from collections import defaultdict
from ctypes import POINTER, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Arguments as in cusolverDn.h of cuSOLVER 11.7.3 (a C compiler agrees), documented under
# cusolverDnXsyevBatched(): enumerations are ints. Each function returns a status, an int.
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cusolverDnCreate": (POINTER(c_void_p),),
    "cusolverDnSetStream": (c_void_p, c_void_p),
    "cusolverDnCreateParams": (POINTER(c_void_p),),
    # handle, params, jobz, uplo, n, type of A, A, lda, type of W, W, compute type,
    # bytes on the device, bytes on the host, batch
    "cusolverDnXsyevBatched_bufferSize": (
        *(c_void_p, c_void_p, c_int, c_int, c_int64, c_int, c_void_p, c_int64, c_int, c_void_p),
        *(c_int, POINTER(c_size_t), POINTER(c_size_t), c_int64),
    ),
    # the same up to the compute type; then workspace and its bytes on the device, the same on the
    # host, info, batch
    "cusolverDnXsyevBatched": (
        *(c_void_p, c_void_p, c_int, c_int, c_int64, c_int, c_void_p, c_int64, c_int, c_void_p),
        *(c_int, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p, c_int64),
    ),
}
VALUES_ONLY, VALUES_AND_VECTORS = 0, 1  # cusolverEigMode_t
UPPER = 1  # cublasFillMode_t, by columns: the lower triangle of rows
DATA_TYPES = {torch.float32: 0, torch.float64: 1}  # cudaDataType: CUDA_R_32F, CUDA_R_64F
# More matrices than about 32,000, or more than 2 GiB of them, are refused or overflow an int
# inside of the library. No documentation says so: github.com/mujocolab/mjlab/pull/732 and
# github.com/jax-ml/jax/pull/33063 do.
MOST_MATRICES = 16384
MOST_BYTES = 2**31 - 1


class SolverUnavailable(Exception):
    """A batched eigensolver is missing, or refuses this problem."""


@dataclass(frozen=True)
class Session:
    """Handle and parameters, for one thread and stream at a time."""

    handle: c_void_p
    params: c_void_p


class Cusolver:
    """`cusolverDnXsyevBatched` of a library.

    A handle stays with one device and stream, where the library may still be at work when the next
    call comes. Of threads that share a stream each takes a handle of its own.
    """

    def __init__(self, library: Any) -> None:
        """Looks the functions up.

        library: has the functions as attributes.

        Raises:
            SolverUnavailable: one of them is missing.
        """
        self._library = library  # an address does not keep it loaded
        self._functions: dict[str, Any] = {}
        for name, arguments in SIGNATURES.items():
            if not hasattr(library, name):
                raise SolverUnavailable(f"this cuSOLVER has no {name}")
            address = ctypes.cast(getattr(library, name), c_void_p).value
            self._functions[name] = ctypes.CFUNCTYPE(c_int, *arguments)(address or 0)
        self._idle: defaultdict[tuple[int, int], list[Session]] = defaultdict(list)
        self._lock = threading.Lock()

    def solve(self, rows: Tensor, with_vectors: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues, ascending, and eigenvectors of a stack [b, d, d] in float32 or float64.

        Nothing here waits for the device.

        rows: contiguous; the lower triangles are read, and everything is overwritten; with_vectors:
        whether to compute the vectors. Returns values [b, d], vectors [b, d, d] as columns
        (meaningless without `with_vectors`), and int32 [b], 0 where the algorithm converged.

        Raises:
            SolverUnavailable: the library refuses the problem.
        """
        b, d, _ = rows.shape
        values = rows.new_empty(b, d)
        info = rows.new_zeros(b, dtype=torch.int32)
        matrix_bytes = max(1, d * d * rows.element_size())
        step = max(1, min(MOST_MATRICES, MOST_BYTES // matrix_bytes))
        start = 0
        with self._session(rows) as session:
            while start < b:
                part = slice(start, start + step)
                job = VALUES_AND_VECTORS if with_vectors else VALUES_ONLY
                try:
                    self._solve_in_place(session, rows[part], values[part], info[part], job)
                except RuntimeError as error:
                    if "memory" not in str(error).lower() or len(rows[part]) == 1:
                        raise
                    step = (len(rows[part]) + 1) // 2  # the workspace grows with the batch
                else:
                    start += step
        # A matrix in rows is its transpose in columns: each vector comes back as a row.
        return values, rows.mT, info

    def _solve_in_place(
        self, session: Session, rows: Tensor, values: Tensor, info: Tensor, job: int
    ) -> None:
        """Turns `rows` [b, d, d] into the eigenvectors, one a row, in one call."""
        b, d, _ = rows.shape
        kind = DATA_TYPES[rows.dtype]
        matrix = (session.handle, session.params, job, UPPER, d, kind, rows.data_ptr(), d)
        problem = (*matrix, kind, values.data_ptr(), kind)
        device_bytes, host_bytes = c_size_t(), c_size_t()
        sizes = (ctypes.byref(device_bytes), ctypes.byref(host_bytes))
        self._call("cusolverDnXsyevBatched_bufferSize", *problem, *sizes, b)
        # Zeros, because cuSOLVER 11.7.1 of CUDA 12.6 returns wrong vectors where the workspace
        # holds anything else (github.com/pytorch/pytorch/issues/192483).
        on_device = rows.new_zeros(max(1, device_bytes.value), dtype=torch.uint8)
        on_host = ctypes.create_string_buffer(max(1, host_bytes.value))
        work = (on_device.data_ptr(), device_bytes.value, ctypes.addressof(on_host))
        self._call("cusolverDnXsyevBatched", *problem, *work, host_bytes.value, info.data_ptr(), b)

    @contextlib.contextmanager
    def _session(self, like: Tensor) -> Any:
        """Returns a handle for the device of a tensor and its current stream."""
        stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
        with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
            key = (like.device.index or 0, stream)
            with self._lock:
                session = self._idle[key].pop() if self._idle[key] else None
            session = session or self._open(stream)
            try:
                yield session
            finally:
                with self._lock:
                    self._idle[key].append(session)

    def _open(self, stream: int) -> Session:
        handle, params = c_void_p(), c_void_p()
        self._call("cusolverDnCreate", ctypes.byref(handle))
        self._call("cusolverDnSetStream", handle, stream)
        self._call("cusolverDnCreateParams", ctypes.byref(params))
        return Session(handle, params)

    def _call(self, name: str, *arguments: Any) -> None:
        status = self._functions[name](*arguments)
        if status != 0:
            raise SolverUnavailable(f"{name} returned status {status}")


def open_library() -> Any:
    """Opens the cuSOLVER that this process has loaded; torch loads it at its first use.

    Raises:
        SolverUnavailable: there is none.
    """
    if sys.platform == "win32":
        for name in ("cusolver64_12.dll", "cusolver64_11.dll"):
            handle = ctypes.windll.kernel32.GetModuleHandleW(name)
            if handle:
                return ctypes.CDLL(name, handle=handle)
    else:
        for path in [*_mapped_libraries(), "libcusolver.so.12", "libcusolver.so.11"]:
            with contextlib.suppress(OSError):
                return ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    raise SolverUnavailable("torch has loaded no libcusolver")


def _mapped_libraries() -> list[str]:
    """Lists the paths of libcusolver in the memory map of this process (Linux)."""
    try:
        maps = Path("/proc/self/maps").read_text(errors="replace")
    except OSError:
        return []
    return sorted(set(re.findall(r"/\S.*?/libcusolver\.so\S*$", maps, re.MULTILINE)))
