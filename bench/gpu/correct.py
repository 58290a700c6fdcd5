"""Call 1: does it give on this card what it gives on the CPU?"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import prolora
from prolora.core.ops import native

from .machine import ROOT
from .one_kernel import KERNELS
from .registers import parse_resources
from .steps import Bench, Step, make_weights

SHAPES = [(320, 320), (640, 640), (1280, 1280), (1280, 2048), (10240, 1280), (3072, 3072)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RANK = 128
MODELS = ROOT / "examples" / "mini_family" / "weights"


def list_steps(bench: Bench) -> Iterator[Step]:
    """What the kernels are, then what they give."""
    yield Step("info", 20, count_gpus)
    yield Step("registers", 20, list_registers, tool="" if bench.dry else "cuobjdump")
    for shape in SHAPES:
        for dtype in DTYPES:
            name = f"{shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')}"
            yield Step(name, 20, partial(compare_shape, shape=shape, dtype=dtype))
    for name in SPECTRA:
        yield Step(name, 20, partial(compare_spectrum, name=name))
    yield Step("128 columns", 10, compare_small_svds)
    yield Step("side stream", 10, use_side_stream)
    yield Step("transfer", 40, compare_transfer)
    yield Step("kernel tests", 150, run_tests)
    for op in list(KERNELS)[: 1 if bench.dry else None]:
        for tool in ("memcheck", "racecheck"):
            needed = "" if bench.dry else "compute-sanitizer"
            yield Step(f"{tool} {op}", 40, partial(sanitize, op=op, tool=tool), tool=needed)


def count_gpus(bench: Bench) -> None:
    """What `prolora info` says."""
    code, text = bench.run_command("info.txt", sys.executable, "-m", "prolora", "info")
    bench.record("exit code of prolora info", code, "")
    print(text)
    bench.record("GPUs that run the kernels", native.cuda_status()[0], "")


def list_registers(bench: Bench) -> None:
    """A line for each kernel; shared memory and spills as notes."""
    if bench.dry:
        text = (
            "arch = sm_90\n Function _Z5emptyv:\n  REG:8 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:528"
        )
    else:
        assert native.EXTENSION.kernels is not None
        library = str(native.EXTENSION.kernels.__file__)
        _, text = bench.run_command("registers.txt", "cuobjdump", "--dump-resource-usage", library)
    for found in parse_resources(text):
        note = f"shared {found.shared} bytes, spilled {found.local} bytes"
        case = f"{found.kernel} {found.architecture}"
        bench.record("registers", found.registers, "registers", case, note=note)


def compare_shape(bench: Bench, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """truncated_svd, project, similarity and principal_angles of two related weights."""
    m, n = (bench.size(side) for side in shape)
    source = make_weights(2, m, n, "cpu").to(dtype)
    noise = make_weights(2, m, n, "cpu", seed=1)
    target = (source.float() + 0.1 * noise).to(dtype)
    compare_bases(bench, source, bench.size(RANK))
    update = (make_weights(2, m, n, "cpu", seed=2)).to(dtype)
    rank = bench.size(RANK)
    both = [
        (
            prolora.project(update.to(d), source.to(d), target.to(d), rank=rank),
            prolora.similarity(source.to(d), target.to(d), rank=rank).left,
            prolora.principal_angles(source[..., :rank].to(d), target[..., :rank].to(d)),
        )
        for d in ("cpu", bench.device)
    ]
    for name, on_cpu, on_gpu in zip(("project", "similarity", "angles"), *both, strict=True):
        bench.record(f"{name}, relative difference", relative(on_cpu, on_gpu), "", bench.step)


def relative(wanted: Tensor, found: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖ in float64."""
    x, y = wanted.cpu().double(), found.cpu().double()
    return float((y - x).norm() / x.norm().clamp_min(1e-300))


def compare_bases(bench: Bench, weight: Tensor, rank: int | float) -> None:
    """The largest angle between the subspaces of CPU and GPU, and the sum of their bounds.

    Raises:
        AssertionError: the angle exceeds the sum of the bounds, or the ranks differ.
    """
    here = prolora.truncated_svd(weight, rank)
    there = prolora.truncated_svd(weight.to(bench.device), rank).to("cpu")
    sines, bounds = [0.0], [0.0]
    for i in range(len(weight)):
        k = int(here.rank[i])
        assert k == int(there.rank[i]), (k, int(there.rank[i]))
        for x, y in ((here.U[i], there.U[i]), (here.V[i], there.V[i])):
            x, y = x[:, :k].double(), y[:, :k].double()
            sines.append(float(torch.linalg.matrix_norm(y - x @ (x.mT @ y), 2)) if k else 0.0)
            bounds.append(float(here.bound[i] + there.bound[i]))
    note = f"rungs {here.rung} on the CPU, {there.rung} on the GPU; ok {bool(there.ok.all())}"
    bench.record("sine between CPU and GPU", max(sines), "sine", bench.step, note=note)
    bench.record("sum of the bounds", max(bounds), "sine", bench.step)
    excess = [sine - bound for sine, bound in zip(sines, bounds, strict=True)]
    assert max(excess) <= 1e-6, f"the angle exceeds the bounds by {max(excess)}"


def low_rank(d: int) -> Tensor:
    """Rank d/16 in float32."""
    generator = torch.Generator().manual_seed(0)
    k = max(2, d // 16)
    return torch.randn(2, d, k, generator=generator) @ torch.randn(2, k, d, generator=generator)


def clustered(d: int) -> Tensor:
    """Groups of 64 values (or of two at toy size) that lie within 1e-4 of each other."""
    made = make_weights(2, d, d, "cpu", decay=0.0)
    u, _, vt = torch.linalg.svd(made)
    index = torch.arange(d)
    values = 0.8 ** (index // max(2, d // 20)) * (1 + 1e-4 * index / d)
    return (u * values) @ vt


# Name -> (weights of a size, rank).
SPECTRA = {
    "energy 0.99": (lambda d: make_weights(2, d, d, "cpu"), 0.99),
    "low rank": (low_rank, RANK),
    "zero": (lambda d: torch.zeros(2, d, d), RANK),
    "clustered": (clustered, RANK),
}


def compare_spectrum(bench: Bench, name: str) -> None:
    """A spectrum that leaves the usual rung."""
    make, rank = SPECTRA[name]
    weight = make(bench.size(1280))
    compare_bases(bench, weight, rank if isinstance(rank, float) else bench.size(rank))


def compare_small_svds(bench: Bench) -> None:
    """small_svd at its largest size: the variants in shared and in global memory."""
    from prolora.core.ops.small_svd import small_svd

    for m in (128, 512):
        generator = torch.Generator().manual_seed(0)
        a = torch.randn(4, bench.size(m), bench.size(128), generator=generator)
        found = small_svd(a.to(bench.device))[1].cpu()
        wanted = torch.linalg.svdvals(a.double())
        case = f"{a.shape[1]}x{a.shape[2]}"
        bench.record("small_svd, relative difference", relative(wanted, found), "", case)


def use_side_stream(bench: Bench) -> None:
    """A call in a stream of its own sees what that stream has queued before."""
    weight = make_weights(2, bench.size(1280), bench.size(1280), "cpu")
    wanted = prolora.truncated_svd(weight, bench.size(RANK))
    if bench.device == "cuda":
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            late = torch.zeros_like(weight, device="cuda")
            torch.cuda._sleep(200_000_000)
            late.copy_(weight.cuda(non_blocking=True))
            found = prolora.truncated_svd(late, bench.size(RANK)).to("cpu")
        side.synchronize()
    else:
        found = prolora.truncated_svd(weight.clone(), bench.size(RANK))
    bench.record("values, relative difference", relative(wanted.S, found.S), "", "side stream")


def compare_transfer(bench: Bench) -> None:
    """A whole transfer between the small models that come with the package."""
    lora = MODELS / "loras" / "thick.safetensors"
    moved = [
        prolora.transfer(lora, MODELS / "source", MODELS / "pruned", method="prolora", device=d)
        for d in ("cpu", bench.device)
    ]
    updates = [one.adapter.updates for one in moved]
    assert updates[0].keys() == updates[1].keys()
    worst = max(relative(updates[0][key].dense(), updates[1][key].dense()) for key in updates[0])
    bench.record("transfer, largest relative difference", worst, "", "mini family")


def run_tests(bench: Bench) -> None:
    """The tests that a card selects; at toy size only that pytest finds tests.

    Raises:
        AssertionError: some failed.
    """
    core = ROOT / "tests" / "core"
    folders = [core / "ops", core / "test_devices.py", core / "svd" / "test_batched_eigh.py"]
    chosen = [path for path in folders if Path(path).exists()]
    chosen_tests = ("-k", "torch", "--co") if bench.dry else ("-k", "cuda")
    words = ("-q", "-p", "no:cacheprovider", *chosen_tests)
    if bench.dry:
        chosen = [ROOT / "tests" / "core" / "ops" / "test_small_svd.py"]
    code, text = bench.run_command(
        "tests.txt", sys.executable, "-m", "pytest", *words, *chosen, seconds=145
    )
    print("\n".join(text.splitlines()[-5:]))
    for what in ("passed", "failed", "skipped"):
        numbers = re.findall(rf"(\d+) {what}", text)
        bench.record(f"tests {what}", int(numbers[-1]) if numbers else 0, "tests")
    assert code == 0, f"pytest ended with {code}"


def sanitize(bench: Bench, op: str, tool: str) -> None:
    """compute-sanitizer over one kernel; at toy size the script that it would watch.

    Raises:
        AssertionError: it found something.
    """
    script = (sys.executable, "-m", "gpu.one_kernel", op, bench.device)
    watch = () if bench.dry else ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
    if bench.dry and tool == "racecheck":
        return
    code, text = bench.run_command(
        f"{tool}-{op}.txt", *watch, *script, seconds=100, cwd=ROOT / "bench"
    )
    bench.record(f"exit code of {tool}", code, "", op)
    assert code == 0, text[-300:]
