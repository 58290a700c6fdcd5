"""truncated_svd against what torch offers for the same stack, with error and bound beside the time.

    pytest bench/test_svd.py -k cpu
    pytest bench/test_svd.py --benchmark-disable    # once each on small stacks, as a test

`extra_info["speedup"]` is a baseline's time over ours, medians of runs of the same session;
`extra_info["sine"]` that of the largest angle to the subspace that LAPACK finds in float64.
torch.svd_lowrank is there to show what its speed is worth: its sine is about 1.
"""

import statistics

import pytest
import torch
from timing import seconds

import prolora

CASES = [
    (64, 320, 320, 160),
    (32, 640, 640, 320),
    (4, 1280, 1280, 128),
    (4, 1280, 1280, 320),
    (4, 1280, 1280, 0.9),
    (4, 1280, 2048, 320),
    (2, 1280, 5120, 128),
    (2, 1280, 5120, 320),
    (2, 10240, 1280, 128),
    (2, 10240, 1280, 320),
    (1, 3072, 3072, 128),
    (1, 3072, 3072, 320),
]
GPU_CASES = [
    (64, 320, 320, 128),
    (64, 640, 640, 128),
    (64, 1280, 1280, 128),
    (64, 1280, 1280, 320),
    (16, 10240, 1280, 128),
    (8, 3072, 3072, 128),
]


def weights(b, m, n, device):
    """W [b, m, n], float32, with random singular vectors and σ_i = i^-0.5."""
    d = min(m, n)
    generator = torch.Generator().manual_seed(0)
    u, v = (
        torch.linalg.qr(torch.randn(b, size, d, generator=generator).to(device))[0]
        for size in (m, n)
    )
    return (u * torch.arange(1, d + 1, device=device) ** -0.5) @ v.mT


def lapack(w, k):
    """torch.linalg.svd over the stack, float32."""
    return torch.linalg.svd(w, full_matrices=False)[0]


def gram(w, k):
    """torch.linalg.eigh of the Gram matrices, float32."""
    if w.shape[-2] > w.shape[-1]:
        return None  # gives the right vectors, which are not compared here
    return torch.linalg.eigh(w @ w.mT)[1].flip(-1)


def lowrank(w, k):
    """torch.svd_lowrank(q=k+8, niter=4)."""
    if isinstance(k, float):
        return None
    return torch.svd_lowrank(w, q=k + 8, niter=4)[0]


def sine(u, found, k):
    """Of the largest angle between the subspaces of the first matrix: u [m, d], found [b, m, d]."""
    x, y = u[:, :k], found[0, :, :k].double()
    return float(torch.linalg.matrix_norm(y - x @ (x.mT @ y), 2))


@pytest.mark.parametrize("case", range(max(len(CASES), len(GPU_CASES))))
def test_truncated_svd(benchmark, device, case):
    cases = GPU_CASES if device == "cuda" else CASES
    if case >= len(cases):
        pytest.skip("the other device has more cases")
    b, m, n, k = cases[case]
    if not benchmark.enabled:
        b, m, n, k = 2, m // 8, n // 8, (k if isinstance(k, float) else k // 8)
    w = weights(b, m, n, device)
    u = torch.linalg.svd(w[0].double(), full_matrices=False)[0]
    basis = prolora.truncated_svd(w, k)
    used = int(basis.rank[0])
    error = sine(u, basis.U, used)
    assert basis.ok.all() and error <= float(basis.bound[0])
    benchmark.extra_info |= {
        "case": f"{b} x {m}x{n}, k={k}",
        "rung": basis.rung,
        "sine": error,
        "bound": float(basis.bound.max()),
    }
    if benchmark.enabled:
        ours = statistics.median(seconds(prolora.truncated_svd, (w, k)) for _ in range(3))
        for baseline in (lapack, gram, lowrank):
            found = baseline(w, k)
            if found is None:
                continue
            theirs = statistics.median(seconds(baseline, (w, k)) for _ in range(3))
            benchmark.extra_info[baseline.__doc__] = {
                "speedup": round(theirs / ours, 3),
                "ms": round(1e3 * theirs, 1),
                "sine": sine(u, found, used),
            }
    benchmark.pedantic(prolora.truncated_svd, args=(w, k), rounds=3 if benchmark.enabled else 1)
