"""The native ops as torch operators.

Python owns the tensors: shapes, memory, device, stream. The kernels (`csrc/`) see addresses.
Each op is a row in four places, read top to bottom: its schema, its runner, its fake, its gradient.

    split_project   par = U UᵀX and perp = X - par, in one go
    overlap         ‖UsᵀUt‖_F², without the product
    small_svd       thin SVD of a stack of small matrices

All take stacks with any number of leading dimensions, float32 or float64, contiguous or not, on the
CPU or a GPU, and work under FakeTensor and torch.compile.
"""

from __future__ import annotations

import contextlib
from types import ModuleType
from typing import Any

import torch  # before _C, so that both use torch's OpenMP runtime
from torch import Tensor

from .. import _C
from ..errors import ShapeMismatch
from ..parallel import map_on_threads

MAX_SVD_COLUMNS: int = _C.max_svd_columns

_library = torch.library.Library("prolora", "DEF")
_library.define("split_project(Tensor u, Tensor x) -> (Tensor, Tensor)")
_library.define("overlap(Tensor us, Tensor ut) -> Tensor")
_library.define("small_svd(Tensor a) -> (Tensor, Tensor, Tensor)")


def cuda_status() -> tuple[int, str]:
    """The number of usable GPUs; if it is 0, also one clause that says why."""
    count, why = _C.cuda_status()
    if count > 0 and not torch.cuda.is_available():
        return 0, "this torch has no CUDA; install a CUDA build of torch"
    return count, why


def require_cuda() -> None:
    """Raises RuntimeError, with the reason, where no GPU can be used."""
    count, why = cuda_status()
    if count == 0:
        raise RuntimeError(f"prolora: no usable CUDA device ({why})")


def require(device: torch.device | str) -> None:
    """Raises RuntimeError, with the reason, if `device` is a GPU that cannot be used."""
    if torch.device(device).type == "cuda":
        require_cuda()


def built_with_cuda() -> bool:
    """Whether this build has the CUDA kernels, usable or not."""
    return _C.built_with_cuda


def cpu_isa() -> str:
    """The instruction set that the CPU ops use: baseline, avx2 or avx512."""
    return _C.cpu_isa()


# --- Runners: allocate, then call `kernels` (`_C`, or `_emulated` in tests). `cuda` chooses the
# kernel, the tensors' device the memory; they differ only in the emulator.


def _device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _flags(x: Tensor, cuda: bool) -> tuple[bool, bool, int]:
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    return x.dtype == torch.float64, cuda, stream


def run_split_project(
    kernels: ModuleType, u: Tensor, x: Tensor, cuda: bool
) -> tuple[Tensor, Tensor]:
    """u: [b, m, k], x: [b, m, r] -> par, perp: [b, m, r]."""
    u, x = u.contiguous(), x.contiguous()
    (b, m, k), r = u.shape, x.shape[2]
    coefficients = x.new_empty(b, k, r)
    par, perp = torch.empty_like(x), torch.empty_like(x)
    pointers = [t.data_ptr() for t in (u, x, coefficients, par, perp)]
    with _device(x):
        kernels.split_project(*pointers, b, m, k, r, *_flags(x, cuda))
    return par, perp


def run_overlap(kernels: ModuleType, us: Tensor, ut: Tensor, cuda: bool) -> Tensor:
    """us: [b, m, ks], ut: [b, m, kt] -> float64 [b]."""
    us, ut = us.contiguous(), ut.contiguous()
    (b, m, ks), kt = us.shape, ut.shape[2]
    float64, _, stream = _flags(us, cuda)
    tiles = kernels.overlap_tiles(ks, kt, float64, cuda)
    partial = us.new_empty(b, tiles, dtype=torch.float64)
    out = us.new_empty(b, dtype=torch.float64)
    pointers = [t.data_ptr() for t in (us, ut, partial, out)]
    with _device(us):
        kernels.overlap(*pointers, b, m, ks, kt, float64, cuda, stream)
    return out


def run_small_svd(kernels: ModuleType, a: Tensor, cuda: bool) -> tuple[Tensor, Tensor, Tensor]:
    """a: [b, m, n] -> u: [b, m, n], s: [b, n], v: [b, n, n]."""
    a = a.contiguous()
    b, m, n = a.shape
    float64, _, stream = _flags(a, cuda)
    u, s, v = torch.empty_like(a), a.new_empty(b, n), a.new_empty(b, n, n)
    with _device(a):
        size = kernels.small_svd_scratch(b, m, n, float64, cuda)
        scratch = torch.empty(size, dtype=torch.uint8, device=a.device)
        pointers = [t.data_ptr() for t in (a, u, s, v, scratch)]
        kernels.small_svd(*pointers, b, m, n, float64, cuda, stream)
    return u, s, v


# On the CPU a vendor library is the better choice for some sizes. Speed of ours over torch's (MKL),
# measured on one core of a Xeon with AVX-512, best of ten, with other load on the machine:
#   split_project  float32, r = 32 to 64: 0.8 to 1.05, with less memory; r = 256: 0.7.
#                  float64, r = 32: 0.85; k = 640, r = 64: 0.6; r = 256: 0.5.
#   overlap        0.6 to 0.9 from 64 columns on.
#   small_svd      n = 8: 1.9; 16: 1.3; 32: 1.7 in stacks, where starting threads for LAPACK takes
#                  longer than the work; 64: 0.5; 128: 0.3. Both are spread
#                  over the threads, so the crossing does not depend on their number.
_MANY_COLUMNS = 64
_OVERLAP_COLUMNS = 64
_MANY_FLOPS = 5e7
_LAPACK_COLUMNS = 32


def _split_project(u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    (b, m, k), r = u.shape, x.shape[2]
    favours_bmm = x.dtype == torch.float64 or r > _MANY_COLUMNS
    if x.is_cpu and favours_bmm and 4.0 * b * m * k * r > _MANY_FLOPS:
        par = u @ (u.mT @ x)
        return par, x - par
    return run_split_project(_C, u, x, x.is_cuda)


def _overlap(us: Tensor, ut: Tensor) -> Tensor:
    if us.is_cpu and len(us) and min(us.shape[2], ut.shape[2]) >= _OVERLAP_COLUMNS:
        pairs = zip(us, ut, strict=True)
        norms = [torch.linalg.vector_norm(x.mT @ y, dtype=torch.float64) for x, y in pairs]
        return torch.stack(norms).square()
    return run_overlap(_C, us, ut, us.is_cuda)


def _small_svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if a.is_cpu and len(a) and a.shape[2] > _LAPACK_COLUMNS:
        return _lapack_svd(a)
    return run_small_svd(_C, a, a.is_cuda)


def _lapack_svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """torch.linalg.svd, the stack shared out over the threads.

    torch takes one matrix after the other, and at these sizes LAPACK has no use for a second
    thread.
    """
    parts = map_on_threads(
        _lapack_svd_of, list(a.tensor_split(min(len(a), torch.get_num_threads())))
    )
    u, s, v = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return u, s, v


def _lapack_svd_of(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """torch.linalg.svd, with the promises of small_svd: noise is 0, non-finite gives NaN."""
    n = a.shape[2]
    finite = a.isfinite().all(dim=(1, 2), keepdim=True)  # [b, 1, 1]
    u, s, vt = torch.linalg.svd(torch.where(finite, a, 0), full_matrices=False)
    noise = s <= n * torch.finfo(a.dtype).eps * s.amax(1, keepdim=True)
    u = u.masked_fill(noise[:, None], 0).masked_fill(~finite, torch.nan)
    s = s.masked_fill(noise, 0).masked_fill(~finite[:, 0], torch.nan)
    return u, s, vt.mT.masked_fill(~finite, torch.nan).contiguous()


for _key in ("CPU", "CUDA"):
    _library.impl("split_project", _split_project, _key)
    _library.impl("overlap", _overlap, _key)
    _library.impl("small_svd", _small_svd, _key)


# --- Fakes: shapes and dtypes without data.


def _split_project_fake(u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _overlap_fake(us: Tensor, ut: Tensor) -> Tensor:
    return us.new_empty(us.shape[0], dtype=torch.float64)


def _small_svd_fake(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, m, n = a.shape
    return a.new_empty(b, m, n), a.new_empty(b, n), a.new_empty(b, n, n)


torch.library.register_fake("prolora::split_project", _split_project_fake)
torch.library.register_fake("prolora::overlap", _overlap_fake)
torch.library.register_fake("prolora::small_svd", _small_svd_fake)


# --- Gradients. small_svd has none: a recompression is not differentiated through, and the SVD's
# gradient is undefined where singular values meet.


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _split_project_backward(ctx: Any, d_par: Tensor, d_perp: Tensor) -> tuple[Tensor, Tensor]:
    # With G = d_par - d_perp: the loss changes by <G, d(U UᵀX)> + <d_perp, dX>.
    u, x = ctx.saved_tensors
    g = d_par - d_perp
    d_u = g @ (x.mT @ u) + x @ (g.mT @ u)
    par_of_g, _ = torch.ops.prolora.split_project(u, g)
    return d_u, d_perp + par_of_g


def _overlap_backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
    # d‖UsᵀUt‖² / dUs = 2 Ut UtᵀUs, which is split_project's par once more.
    us, ut = ctx.saved_tensors
    scale = (2 * d_out)[:, None, None].to(us.dtype)
    d_us, _ = torch.ops.prolora.split_project(ut, us)
    d_ut, _ = torch.ops.prolora.split_project(us, ut)
    return scale * d_us, scale * d_ut


torch.library.register_autograd(
    "prolora::split_project", _split_project_backward, setup_context=_save_inputs
)
torch.library.register_autograd("prolora::overlap", _overlap_backward, setup_context=_save_inputs)


# --- Public functions: check, flatten the leading dimensions, call, restore them.


def _check(op: str, **tensors: Tensor) -> None:
    """Same dtype (float32 or float64), device and leading dimensions; at least two dimensions."""
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, not {type(x).__name__}")
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{op}: {name} must be float32 or float64, not {x.dtype}")
        if x.dtype != first.dtype or x.device != first.device:
            raise TypeError(
                f"{op}: {first_name} is {first.dtype} on {first.device}, "
                f"but {name} is {x.dtype} on {x.device}"
            )
        if x.ndim < 2 or x.shape[:-1] != first.shape[:-1]:
            raise ShapeMismatch(
                f"{op}: shapes must agree but for the last dimension, with two or more dimensions; "
                f"{first_name} is {tuple(first.shape)}, {name} is {tuple(x.shape)}"
            )


def _stack(x: Tensor) -> Tensor:
    """[..., m, n] -> [b, m, n]."""
    return x.reshape(x.shape[:-2].numel(), *x.shape[-2:])


def split_project(u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Splits x into its part inside the span of u and the rest (METHOD.md §1, step 3).

    Args:
        u: [..., m, k], orthonormal columns; zero columns are padding and change nothing.
        x: [..., m, r].

    Returns:
        par = u uᵀ x and perp = x - par, each [..., m, r]. Differentiable in both inputs.

    Raises:
        TypeError: a dtype other than float32 and float64, or two dtypes or devices.
        ShapeMismatch: shapes that do not agree but for the last dimension.
    """
    _check("split_project", u=u, x=x)
    par, perp = torch.ops.prolora.split_project(_stack(u), _stack(x))
    return par.reshape(x.shape), perp.reshape(x.shape)


def overlap(us: Tensor, ut: Tensor) -> Tensor:
    """How much two subspaces share: ‖usᵀut‖_F², the sum of the squared cosines between them.

    Args:
        us: [..., m, ks], orthonormal columns.
        ut: [..., m, kt], orthonormal columns.

    Returns:
        [...], float64 whatever the inputs are, between 0 and min(ks, kt). Differentiable.

    Raises:
        TypeError: a dtype other than float32 and float64, or two dtypes or devices.
        ShapeMismatch: shapes that do not agree but for the last dimension.
    """
    _check("overlap", us=us, ut=ut)
    shared: Tensor = torch.ops.prolora.overlap(_stack(us), _stack(ut))
    return shared.reshape(us.shape[:-2])


def small_svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of a stack of small matrices, a = u diag(s) vᵀ, by one-sided Jacobi.

    Singular values of at most n·eps·s_1 are rounding noise: they come back as exactly 0, with a
    zero column in u; v is orthonormal always. A matrix with NaN or Inf gives NaN everywhere. Not
    differentiable. For m much larger than n, take a QR first and give its R.

    Args:
        a: [..., m, n], n <= m, n <= 128.

    Returns:
        u [..., m, n], s [..., n] in descending order, v [..., n, n].

    Raises:
        TypeError: a dtype other than float32 and float64.
        ShapeMismatch: n larger than m or 128.
    """
    _check("small_svd", a=a)
    m, n = a.shape[-2:]
    if n > m or n > MAX_SVD_COLUMNS:
        raise ShapeMismatch(
            f"small_svd: takes [..., m, n] with n <= m and n <= {MAX_SVD_COLUMNS}, not {m} x {n}; "
            "use torch.linalg.svd"
        )
    u, s, v = torch.ops.prolora.small_svd(_stack(a))
    lead = a.shape[:-2]
    return u.reshape(a.shape), s.reshape(*lead, n), v.reshape(*lead, n, n)
