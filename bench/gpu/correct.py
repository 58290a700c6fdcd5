"""Call 1: does it give on this card what it gives on the CPU?"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import prolora
from prolora.core.ops import krylov_block, native, precise_product, trial
from prolora.core.ops.probe import CASES, make_basis
from prolora.core.svd import block_basis, stacks

from .machine import ROOT
from .one_kernel import by_kernels
from .registers import parse_resources
from .steps import Bench, Step, make_weights

SHAPES = [(640, 640), (1280, 1280), (10240, 1280), (3072, 3072)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RANK = 128
MODELS = ROOT / "examples" / "mini_family" / "weights"

# The largest relative differences between the CPU and the GPU.
LIMITS = {
    "project": 1e-4,
    "similarity": 1e-5,
    "angles": 1e-9,
    "small_svd": 1e-5,
    "krylov_block": 1e-5,
    "side stream": 1e-5,
    "transfer": 1e-3,
}
BLOCKS = [
    ((1280, 2048), (768, 800), torch.float16),
    ((3072, 1280), (800, 768), torch.bfloat16),
]
"""Shapes for krylov_block, and the toys for them, which the Krylov rung takes too."""


def list_steps(bench: Bench) -> Iterator[Step]:
    """The kernels and their trials, then whole calls."""
    yield Step("doctor", 10, count_gpus)
    yield Step("kernel tests", 100, run_tests)
    yield Step("planted rows", 8, compare_planted_rows)
    yield Step("trials", 40, try_kernels)
    yield Step("default calls", 30, compare_default_calls)
    for i, shape in enumerate(SHAPES):  # each dtype on two of them
        dtype = DTYPES[i % len(DTYPES)]
        name = f"{shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')}"
        yield Step(name, 12, partial(compare_shape, shape=shape, dtype=dtype))
    for name in SPECTRA:
        yield Step(name, 6, partial(compare_spectrum, name=name))
    yield Step("128 columns", 4, compare_small_svds)
    yield Step("krylov_block", 12, compare_blocks)
    yield Step("several chunks", 4, compare_chunks)
    yield Step("side stream", 4, use_side_stream)
    yield Step("transfer", 20, compare_transfer)
    yield Step("registers", 6, list_registers, tool="" if bench.dry else "cuobjdump")


def count_gpus(bench: Bench) -> None:
    """What `prolora doctor` says."""
    code, text = bench.run_command("doctor.txt", sys.executable, "-m", "prolora", "doctor")
    print(text)
    bench.require("exit code of prolora doctor", code, 0)
    count, why = native.cuda_status()
    bench.record("GPUs that run the kernels", count, "")
    assert count or bench.dry, f"the kernels run on no GPU: {why}"


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
        bench.require("spilled", found.local, 0, "bytes", case)


def compare_shape(bench: Bench, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """truncated_svd, project, similarity and principal_angles of two related weights."""
    m, n = (bench.size(side) for side in shape)
    source = make_weights(2, m, n, bench.device).to(dtype).cpu()
    noise = make_weights(2, m, n, bench.device, seed=1).cpu()
    target = (source.float() + 0.1 * noise).to(dtype)
    rank = bench.size(RANK)
    compare_bases(bench, source, rank)
    update = make_weights(2, m, n, bench.device, seed=2).cpu()  # float32, and so is its result
    both = [
        (
            prolora.project(update.to(d), source.to(d), target.to(d), rank=rank),
            prolora.similarity(source.to(d), target.to(d), rank=rank).left,
            prolora.principal_angles(source[..., :rank].to(d), target[..., :rank].to(d)),
        )
        for d in ("cpu", bench.device)
    ]
    for name, on_cpu, on_gpu in zip(("project", "similarity", "angles"), *both, strict=True):
        require_equal(bench, name, on_cpu, on_gpu, bench.step)


def require_equal(bench: Bench, what: str, wanted: Tensor, found: Tensor, case: str) -> None:
    """Records the relative difference; raises AssertionError where it exceeds its limit."""
    difference = relative(wanted, found)
    bench.require(f"{what}, relative difference", difference, LIMITS[what], "", case)


def relative(wanted: Tensor, found: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖ in float64."""
    x, y = wanted.cpu().double(), found.cpu().double()
    return float((y - x).norm() / x.norm().clamp_min(1e-300))


def compare_bases(bench: Bench, weight: Tensor, rank: int | float) -> None:
    """The largest angle between the subspaces of CPU and GPU, and the sum of their bounds."""
    here = prolora.truncated_svd(weight, rank)
    there = prolora.truncated_svd(weight.to(bench.device), rank).to("cpu")
    compare_subspaces(bench, here, there)


def compare_subspaces(bench: Bench, here: prolora.Basis, there: prolora.Basis) -> None:
    """As `compare_bases`, of what the CPU and the GPU have given."""
    sines, bounds = [0.0], [0.0]
    for i in range(len(here.rank)):
        k = int(here.rank[i])
        assert k == int(there.rank[i]), (k, int(there.rank[i]))
        for x, y in ((here.U[i], there.U[i]), (here.V[i], there.V[i])):
            x, y = x[:, :k].double(), y[:, :k].double()
            assert bool(y.isfinite().all()), "the GPU's subspace is not finite"
            # Both ways: vectors that are zero or too short leave nothing outside of the other span.
            left = (y - x @ (x.mT @ y), x - y @ (y.mT @ x))
            norms = [float(torch.linalg.matrix_norm(one, 2)) if k else 0.0 for one in left]
            sines.append(max(norms))
            bounds.append(float(here.bound[i] + there.bound[i]))
    note = f"rungs {here.rung} on the CPU, {there.rung} on the GPU; ok {bool(there.ok.all())}"
    bench.record("sine between CPU and GPU", max(sines), "sine", bench.step, note=note)
    bench.record("sum of the bounds", max(bounds), "sine", bench.step)
    for sine, bound in zip(sines, bounds, strict=True):
        assert sine <= bound + 1e-6, f"the sine {sine:.3g} exceeds the bounds, {bound:.3g}"


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
        require_equal(bench, "small_svd", wanted, found, case)


def compare_planted_rows(bench: Bench) -> None:
    """Products of digits where one number of a row is large and many are small: error and bound."""
    generator = torch.Generator().manual_seed(0)
    x = 2e-4 * torch.randn(2, bench.size(1280), bench.size(1280), generator=generator)
    x[..., 0] = 1
    with by_kernels():
        for dtype in (torch.float32, torch.float64):
            given = x.to(bench.device, dtype)
            product, error = precise_product.measured_product(given)
            exact = x.double() @ x.double().mT
            away = float((product.cpu() - exact).norm())
            rounding = 1e-15 * x.shape[-1] * float(exact.norm())
            share = away / (float(error.max()) + rounding)
            bench.require("error over its bound", share, 1, "", str(dtype).removeprefix("torch."))


def compare_blocks(bench: Bench) -> None:
    """krylov_block against float64, and a truncated SVD that takes its blocks from it."""
    with by_kernels():
        choice = native.choose("krylov_block", torch.device(bench.device))
        assert choice.kernels or bench.dry, f"krylov_block runs in torch here: {choice.why}"
        for shape, toy, dtype in BLOCKS:
            m, n = toy if bench.dry else shape
            weight = make_weights(2, m, n, "cpu").to(dtype)
            case = f"{shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')}"
            compare_block(bench, weight if m < n else weight.mT, case)
            compare_svd_by_blocks(bench, weight, case)


def compare_block(bench: Bench, w: Tensor, case: str) -> None:
    """A block for W [b, d, n]: its projection, its length, whether it is orthonormal and spans."""
    width, size = bench.size(256) // 4, bench.size(256)
    rows, projected = make_basis(2, w.shape[1], size, size + width, bench.device)
    known = rows[:, :size].cpu().double()
    length = krylov_block.krylov_block(w.to(bench.device), rows, projected, size, width)
    image = known[:, -width:] @ w.double() @ w.double().mT
    column = image @ known.mT
    image -= column @ known
    require_equal(bench, "krylov_block", column, projected[:, size - width : size, :size], case)
    require_equal(bench, "krylov_block", image.norm(dim=(1, 2)), length, f"{case}, length")
    whole = rows.cpu().double()
    skew = float((whole @ whole.mT - torch.eye(size + width)).norm())
    bench.require("krylov_block, orthonormality", skew, 1e-4, "", case)
    block = whole[:, size:]
    missed = relative(image, image @ block.mT @ block)
    bench.require("krylov_block, image outside of the block", missed, 1e-4, "", case)


def compare_svd_by_blocks(bench: Bench, weight: Tensor, case: str) -> None:
    """A truncated SVD with the op against one on the CPU without it."""
    rank, find = bench.size(RANK), block_basis.krylov_block
    here = prolora.truncated_svd(weight, rank)
    as_gpu = mock.patch.object(stacks, "FORCE_BATCHED", bench.dry)
    with as_gpu, mock.patch.object(block_basis, "krylov_block", wraps=find) as op:
        there = prolora.truncated_svd(weight.to(bench.device), rank).to("cpu")
    bench.record("krylov_block, calls", op.call_count, "times", case)
    assert op.call_count, "krylov_block finds no block of a truncated SVD"
    # What it spoils, another rung mends.
    assert there.rung == "krylov", f"with krylov_block the rung is {there.rung}, not krylov"
    compare_subspaces(bench, here, there)


def compare_default_calls(bench: Bench) -> None:
    """`project` without a rank, thin and dense, wide angles, and a basis of more than 512 rows."""
    d = bench.size(1280)
    source = make_weights(2, d, d, "cpu")
    target = source + 0.1 * make_weights(2, d, d, "cpu", seed=1)
    dense = make_weights(2, d, d, "cpu", seed=2)
    thin = prolora.LowRank(dense[..., :8].contiguous(), dense[:, :8].contiguous())
    columns = bench.size(320)
    calls: dict[str, Callable[[str], Tensor]] = {
        "project": lambda at: prolora.project(dense.to(at), source.to(at), target.to(at)),
        "project, thin": lambda at: prolora.project(
            prolora.LowRank(thin.up.to(at), thin.down.to(at)), source.to(at), target.to(at)
        ).dense(),
        "angles": lambda at: prolora.principal_angles(
            source[..., :columns].to(at), target[..., :columns].to(at)
        ),
    }
    for name, call in calls.items():
        what = name.partition(",")[0]
        require_equal(bench, what, call("cpu"), call(bench.device), f"default {name}")
    # The basis of so many columns has four times as many rows.
    compare_bases(bench, source.half(), bench.size(144))


def compare_chunks(bench: Bench) -> None:
    """A stack that the card takes in several parts, against the whole."""
    weight = make_weights(7, bench.size(640), bench.size(640), bench.device)
    rank = bench.size(RANK)
    whole = prolora.truncated_svd(weight, rank).to("cpu")
    with mock.patch.object(stacks, "stack_budget", lambda device: 3 * 50 * weight[0].numel()):
        parts = prolora.truncated_svd(weight, rank).to("cpu")
    compare_subspaces(bench, whole, parts)


def try_kernels(bench: Bench) -> None:
    """The trial of every op on stacks of three shapes: what is chosen, and the times."""
    for b, m, n in ((64, 1280, 1280), (8, 3072, 3072), (32, 640, 2560)):
        b, m, n = bench.batch(b), bench.size(m), bench.size(n)
        source = make_weights(b, m, n, bench.device)
        target = source + 0.1 * make_weights(b, m, n, bench.device, seed=1)
        rank, r = bench.size(RANK), bench.size(256)
        prolora.truncated_svd(source.bfloat16(), rank)
        prolora.similarity(source, target, rank=rank)
        prolora.principal_angles(source[..., :rank], target[..., :rank])
        thin = prolora.LowRank(source[..., :r].contiguous(), source[:, :r].contiguous())
        prolora.project(thin, source, target, rank=rank)
    for key, (wins, why) in trial.list_choices().items():
        bench.record("trial", float(wins), "kernel", key, note=why)
    ops = {key.partition(" ")[0] for key in trial.list_choices()}
    bench.record("ops on trial", len(ops), "ops", note=", ".join(sorted(ops)))
    assert bench.dry or ops >= CASES.keys() - {"small_svd"}, f"{sorted(ops)} alone"


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
    require_equal(bench, "side stream", wanted.S, found.S, "values")


def compare_transfer(bench: Bench) -> None:
    """A whole transfer between the small models that come with the package."""
    lora = MODELS / "loras" / "thick.safetensors"
    moved = [
        prolora.transfer(lora, MODELS / "source", MODELS / "pruned", method="prolora", device=d)
        for d in ("cpu", bench.device)
    ]
    updates = [one.adapter.updates for one in moved]
    assert updates[0].keys() == updates[1].keys()
    pairs = [[update[key].dense().flatten() for update in updates] for key in updates[0]]
    for key, (on_cpu, on_gpu) in zip(updates[0], pairs, strict=True):
        require_equal(bench, "transfer", on_cpu, on_gpu, key)


def run_tests(bench: Bench) -> None:
    """The tests that a card selects; at toy size only that pytest finds tests."""
    core = ROOT / "tests" / "core"
    folders = [core / "ops", core / "test_devices.py"]
    chosen = [path for path in folders if Path(path).exists()]
    chosen_tests = ("-k", "torch", "--co") if bench.dry else ("-k", "cuda")
    words = ("-q", "-p", "no:cacheprovider", *chosen_tests)
    if bench.dry:
        chosen = [ROOT / "tests" / "core" / "ops" / "test_small_svd.py"]
    code, text = bench.run_command(
        "tests.txt",
        *(sys.executable, "-m", "pytest", *words, *chosen),
        seconds=300,
        # A test that finds no GPU fails.
        PROLORA_REQUIRE="" if bench.dry else "cuda",
    )
    print("\n".join(text.splitlines()[-5:]))
    counts = {}
    for what in ("passed", "failed", "skipped"):
        numbers = re.findall(rf"(\d+) {what}", text)
        counts[what] = int(numbers[-1]) if numbers else 0
        bench.record(f"tests {what}", counts[what], "tests")
    assert code == 0, f"pytest ended with {code}"
    assert counts["passed"] or bench.dry, "no test ran"
