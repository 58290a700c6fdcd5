"""Call 1: does it give on this card what it gives on the CPU?"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import prolora
from prolora.core.ops import native, trial
from prolora.core.ops.krylov_block import STORED
from prolora.core.ops.probe import CASES

from .machine import ROOT
from .one_kernel import by_kernels
from .registers import parse_resources
from .steps import Bench, Step, make_weights

SHAPES = [(640, 640), (1280, 1280), (10240, 1280), (3072, 3072)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RANK = 128
MODELS = ROOT / "examples" / "mini_family" / "weights"

# The largest relative differences between the CPU and the GPU.
LIMITS = {"project": 1e-4, "similarity": 1e-5, "angles": 1e-9, "transfer": 1e-3}


def list_steps(bench: Bench) -> Iterator[Step]:
    """The kernels and their trials, then whole calls."""
    yield Step("doctor", 10, count_gpus)
    yield Step("kernel tests", 100, run_tests)
    yield Step("trials", 40, try_kernels)
    yield Step("default calls", 30, compare_default_calls)
    for i, shape in enumerate(SHAPES):  # each dtype on two of them
        dtype = DTYPES[i % len(DTYPES)]
        name = f"{shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')}"
        yield Step(name, 12, partial(compare_shape, shape=shape, dtype=dtype))
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
    """truncated_svd, project, similarity and principal_angles of two related weights.

    Weights in 16 bits by the kernels, whatever the trials say; small and odd ones are the tests'.
    """
    m, n = (bench.size(side) for side in shape)
    source = make_weights(2, m, n, bench.device).to(dtype).cpu()
    noise = make_weights(2, m, n, bench.device, seed=1).cpu()
    target = (source.float() + 0.1 * noise).to(dtype)
    rank = bench.size(RANK)
    with by_kernels() if dtype in STORED else nullcontext():
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
    note = f"solvers {here.solver} on the CPU, {there.solver} on the GPU; ok {bool(there.ok.all())}"
    bench.record("sine between CPU and GPU", max(sines), "sine", bench.step, note=note)
    bench.record("sum of the bounds", max(bounds), "sine", bench.step)
    for sine, bound in zip(sines, bounds, strict=True):
        assert sine <= bound + 1e-6, f"the sine {sine:.3g} exceeds the bounds, {bound:.3g}"


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
