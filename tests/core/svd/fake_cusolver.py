"""A libcusolver on host memory, behind the documented ABI of cusolverDnXsyevBatched()."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_int, c_int64, c_size_t, c_uint8, c_void_p

import numpy as np

INVALID_VALUE, EXECUTION_FAILED = 3, 6
HANDLE, PARAMS = 0x1000, 0x2000
HOST_BYTES = 24
# From NVIDIA's documentation, and not from the table that the package calls with.
PROBLEM = (c_void_p, c_void_p, c_int, c_int, c_int64, c_int, c_void_p, c_int64, c_int, c_void_p)
QUERY = (*PROBLEM, c_int, POINTER(c_size_t), POINTER(c_size_t), c_int64)
SOLVE = (*PROBLEM, c_int, c_void_p, c_size_t, c_void_p, c_size_t, POINTER(c_int), c_int64)


def array_at(address, shape, dtype):
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = (c_uint8 * size).from_address(address)
    return np.frombuffer(buffer, dtype=dtype).reshape(shape)


class FakeCusolver:
    """Has the functions as attributes, as a ctypes library does."""

    def __init__(self, fault=None, statuses=None, missing=(), largest=16384):
        self.calls, self.jobs, self.sessions, self.busy = [], [], 0, set()
        self.fault, self.statuses, self.largest = fault, statuses or {}, largest
        functions = {
            "cusolverDnCreate": (self._create, (POINTER(c_void_p),)),
            "cusolverDnSetStream": (self._set_stream, (c_void_p, c_void_p)),
            "cusolverDnCreateParams": (self._create_params, (POINTER(c_void_p),)),
            "cusolverDnXsyevBatched_bufferSize": (self._query, QUERY),
            "cusolverDnXsyevBatched": (self._solve, SOLVE),
        }
        for name, (function, arguments) in functions.items():
            if name not in missing:
                answer = self._guard(name, function)
                setattr(self, name, ctypes.CFUNCTYPE(c_int, *arguments)(answer))

    def _guard(self, name, function):
        def answer(*arguments):
            try:
                return self.statuses.get(name) or function(*arguments) or 0
            except Exception:  # a callback that raises would return 0
                return INVALID_VALUE

        return answer

    def _create(self, handle):
        self.sessions += 1
        handle[0] = HANDLE + self.sessions

    def _set_stream(self, handle, stream):
        assert HANDLE < handle <= HANDLE + self.sessions and not stream

    def _create_params(self, params):
        params[0] = PARAMS

    def _check_problem(self, handle, params, job, uplo, n, type_a, a, lda, type_w, w, compute):
        assert HANDLE < handle <= HANDLE + self.sessions and params == PARAMS
        assert job in (0, 1) and uplo in (0, 1) and handle not in self.busy
        assert n >= 0 and lda >= max(1, n) and a and w
        assert type_a == type_w == compute and type_a in (0, 1)

    def _device_bytes(self, n, batch):
        return 8 * n * batch + 40

    def _query(self, *arguments):
        *problem, on_device, on_host, batch = arguments
        self._check_problem(*problem)
        assert 1 <= batch <= self.largest
        on_device[0], on_host[0] = self._device_bytes(problem[4], batch), HOST_BYTES

    def _solve(self, *arguments):
        *problem, work, work_bytes, host, host_bytes, info, batch = arguments
        self._check_problem(*problem)
        job, uplo, n, type_a, a, lda, _, w = problem[2:10]
        assert 1 <= batch <= self.largest
        assert work_bytes == self._device_bytes(n, batch) and host_bytes == HOST_BYTES
        dtype = (np.float32, np.float64)[type_a]
        # As cuSOLVER 11.7.1: a workspace that is not zero spoils the result.
        dirty = array_at(work, (work_bytes,), np.uint8).any()
        array_at(work, (work_bytes,), np.uint8)[:] = 255
        array_at(host, (host_bytes,), np.uint8)[:] = 255
        columns = array_at(a, (batch, n, lda), dtype)  # matrix k holds A(i, j) at [k, j, i]
        values, status = array_at(w, (batch, n), dtype), array_at_ints(info, batch)
        for k in range(batch):
            matrix = columns[k, :, :n].T
            found, vectors = np.linalg.eigh(matrix, UPLO="LU"[uplo])
            values[k], status[k] = found, 0
            columns[k, :, :n] = vectors.T if job and not dirty else 7.0
        self.busy.add(problem[0])
        if self.fault:
            self.fault(values, columns[:, :, :n], status)
        self.busy.remove(problem[0])
        self.calls.append(batch)
        self.jobs.append(job)


def array_at_ints(pointer, count):
    return np.ctypeslib.as_array(pointer, (count,))
