"""Call 3: truncated_svd as a whole and by stage, and each kernel against torch."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import prolora
from prolora.core.ops import native
from prolora.core.ops.panel_qr import panel_qr
from prolora.core.ops.precise_product import multiply_wide, precise_product
from prolora.core.ops.probe import random
from prolora.core.ops.project_pair import project_pair, project_twice
from prolora.core.ops.small_svd import small_singular_values, small_svd
from prolora.core.ops.subspace_overlap import subspace_overlap, sum_overlaps
from prolora.core.svd.block_basis import BlockBasis
from prolora.core.svd.products import ImpliedGram

from .clock import peak_memory, time_call
from .counters import Counting, counting
from .one_kernel import by_kernels
from .stages import stage_of
from .steps import Bench, Step, make_weights

STACKS = [
    (64, 1280, 1280, 0.99),
    (64, 1280, 1280, 128),
    (8, 3072, 3072, 128),
    (16, 10240, 1280, 128),
]


def list_steps(bench: Bench) -> Iterator[Step]:
    """The default call first, then k = 128."""
    for stack in STACKS:
        yield Step(describe(stack), 34, partial(time_stack, stack=stack))
    for name, run in KERNELS.items():
        yield Step(name, 18, run)
    yield Step("principal angles", 30, time_angles)


def describe(stack: tuple[int, int, int, int | float]) -> str:
    """As 64 x 1280x1280, k=128."""
    b, m, n, k = stack
    return f"{b} x {m}x{n}, k={k}"


def time_stack(bench: Bench, stack: tuple[int, int, int, int | float]) -> None:
    """The whole call, its memory, where the host waits, and the share of each stage."""
    b, m, n, k = stack
    rank = k if isinstance(k, float) else bench.size(k)
    w = make_weights(bench.batch(b), bench.size(m), bench.size(n), bench.device)
    case = describe(stack)

    def whole() -> Any:
        return prolora.truncated_svd(w, rank)

    before = torch.get_float32_matmul_precision()
    for precision in ("highest", "high"):
        # It pins full precision itself, so that the second time must be the first.
        torch.set_float32_matmul_precision(precision)
        try:
            ms, repeats = time_call(whole, bench.device, limit=8)
        finally:
            torch.set_float32_matmul_precision(before)
        note = f"float32 matmul precision {precision}"
        name = "truncated_svd" if precision == "highest" else "truncated_svd, precision high"
        bench.record(name, ms, "ms", case, repeats=repeats, note=note)
    basis = whole()
    bench.record("largest bound", float(basis.bound.max()), "sine", case, note=basis.solver)
    bench.record("peak memory", peak_memory(whole, bench.device) / 2**20, "MiB", case)
    bench.record("synchronisations", count_waits(whole, bench.device), "times", case)
    with counting(stage_of) as tally:
        whole()
    bench.record("dispatches", tally.dispatches, "times", case)
    for stage, ms in time_stages(whole, bench.device).items():
        note = "between events, with the counting's own time: for the shares"
        bench.record(f"stage {stage}", ms, "ms", case, note=note)


def count_waits(job: Callable[[], Any], device: str) -> int:
    """How often the host waits for the GPU, as torch's own debug mode says."""
    if device != "cuda":
        with counting(stage_of) as tally:
            job()
        return sum(tally.waits.values())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            job()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in seen)


class Timing(Counting):
    """Notes an event wherever the stage changes."""

    def __init__(self) -> None:
        self.marks: list[tuple[str, Any]] = []
        super().__init__(self._notice)

    def _notice(self, frame: Any) -> str:
        stage = stage_of(frame)
        # The frame of the dispatch comes after the call, so this call belongs to what follows.
        if not self.marks or self.marks[-1][0] != stage:
            self.marks.append((stage, _event()))
        return stage


def _event() -> Any:
    if not torch.cuda.is_available():
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def time_stages(job: Callable[[], Any], device: str) -> dict[str, float]:
    """Milliseconds of each stage, between events at the first call of every run of a stage."""
    job()
    timing = Timing()
    with timing:
        job()
    last = _event()
    if device != "cuda":
        return {stage: 0.0 for stage, _ in timing.marks}
    torch.cuda.synchronize()
    spent = Counter[str]()
    ends = [event for _, event in timing.marks[1:]] + [last]
    for (stage, start), end in zip(timing.marks, ends, strict=True):
        spent[stage] += start.elapsed_time(end)
    return dict(spent)


def compare_kernel(
    bench: Bench, case: str, ours: Callable[[], Any], torchs: Callable[[], Any], few: float = 1.0
) -> float:
    """Records both times; `few` scales torch's where it ran on fewer matrices."""
    name = bench.step
    choice = native.choose(name, torch.device(bench.device))
    assert choice.kernels or bench.dry, f"{name} runs in torch here: {choice.why}"
    with by_kernels():
        mine, repeats = time_call(ours, bench.device, limit=3)
    bench.record(name, 1e3 * mine, "µs", case, repeats=repeats)
    theirs, repeats = time_call(torchs, bench.device, limit=3)
    further = {} if few == 1 else {"scaled": few}
    bench.record(f"torch for {name}", 1e3 * theirs * few, "µs", case, repeats=repeats, **further)
    return mine / (theirs * few)


def time_small(
    bench: Bench, cases: list[tuple[int, int]], op: Callable[..., Any], torchs: Callable[..., Any]
) -> None:
    """Against torch's, which loops: two matrices, scaled."""
    for b, n in cases:
        a = random((b if not bench.dry else 2, bench.size(n), bench.size(n)), bench.device)
        both = partial(op, a), partial(torchs, a[:2].contiguous())
        compare_kernel(bench, f"{b} x {n}x{n}", *both, few=b / 2)


def time_panel_qr(bench: Bench) -> None:
    """Against torch's formulas."""
    for b, rows, m in ((64, 32, 1280), (16, 32, 10240), (8, 32, 3072)):
        panel = random((bench.batch(b), bench.size(rows), bench.size(m)), bench.device)
        compare_kernel(
            bench,
            f"{b} x {rows}x{m}",
            partial(panel_qr, panel),
            lambda panel=panel: torch.linalg.qr(panel.mT),
        )


def time_krylov_block(bench: Bench) -> None:
    """A block from weights in their 16 bits, against torch on a float32 copy of them."""
    for b, d, dtype in ((64, 1280, torch.float16), (8, 3072, torch.bfloat16)):
        w = make_weights(bench.batch(b), bench.size(d), bench.size(d), bench.device).to(dtype)
        case = f"{b} x {d}², {str(dtype).removeprefix('torch.')}, 256 + 32 rows"
        ratio = compare_kernel(bench, case, grow_basis(bench, w, w), grow_basis(bench, w, None))
        if bench.dry:
            bench.record("krylov_block over torch", ratio, "", case)
        else:
            bench.require("krylov_block over torch", ratio, 1.0, "", case)


def grow_basis(bench: Bench, w: Tensor, stored: Tensor | None) -> Callable[[], Any]:
    """What adds a block to a basis of 256 rows, the same one in each call."""
    width, single = bench.size(32 if not bench.dry else 256), w.float()
    start = random((len(w), width, w.shape[1]), bench.device)
    norm = torch.linalg.matrix_norm(single.double())
    basis = BlockBasis.begin(ImpliedGram(single), single, norm, start, 3 * 256 // width, stored)
    while basis.size < bench.size(256):
        basis.expand()
        basis.append()

    def grow() -> None:
        basis.expand()
        basis.append()
        basis.size -= basis.width

    return grow


def time_subspace_overlap(bench: Bench) -> None:
    """Both sides of a shape's pairs in one launch."""
    for b, m, k in ((64, 1280, 128), (64, 1280, 640)):
        us = random((bench.batch(b), bench.size(m), bench.size(k)), bench.device)
        ut = us.flip(0).contiguous()
        compare_kernel(
            bench,
            f"{b} x {m}, k={k}",
            partial(subspace_overlap, [us], [ut]),
            partial(sum_overlaps, [us], [ut]),
        )


def time_project_pair(bench: Bench) -> None:
    """A square and a tall shape."""
    for b, m, k, r in ((64, 1280, 588, 32), (2, 10240, 588, 32)):
        us, ut = (
            random((bench.batch(b), bench.size(m), bench.size(k)), bench.device) / m**0.5
            for _ in range(2)
        )
        x: Tensor = random((bench.batch(b), r, bench.size(m)), bench.device)
        compare_kernel(
            bench,
            f"{b} x ({m}, {k}, {r})",
            partial(project_pair, us, ut, x),
            partial(project_twice, us, ut, x),
        )


def time_precise_product(bench: Bench) -> None:
    """Gram matrices, and what a refinement multiplies by one."""
    for b, d, n, dtype in ((64, 1280, 1280, torch.bfloat16), (8, 3072, 3072, torch.float32)):
        w = make_weights(bench.batch(b), bench.size(d), bench.size(n), bench.device).to(dtype)
        gram = multiply_wide(w)[0]
        for what, given in (("with itself", (w,)), ("by its Gram matrix", (gram, gram))):
            both = partial(precise_product, *given), partial(multiply_wide, *given)
            compare_kernel(bench, f"{b} x {d}x{n}, {dtype}, {what}", *both)


KERNELS = {
    "small_svd": partial(
        time_small,
        cases=[(512, 64), (256, 128), (128, 16)],
        op=small_svd,
        torchs=partial(torch.linalg.svd, full_matrices=False),
    ),
    "small_singular_values": partial(
        time_small,
        cases=[(64, 128), (512, 64)],
        op=small_singular_values,
        torchs=torch.linalg.svdvals,
    ),
    "panel_qr": time_panel_qr,
    "krylov_block": time_krylov_block,
    "subspace_overlap": time_subspace_overlap,
    "project_pair": time_project_pair,
    "precise_product": time_precise_product,
}


def time_angles(bench: Bench) -> None:
    """principal_angles of 64 pairs, against torch's QR and SVD on two of them."""
    x, y = (
        random((bench.batch(64), bench.size(1280), bench.size(128)), bench.device) + i
        for i in range(2)
    )
    ms, repeats = time_call(lambda: prolora.principal_angles(x, y), bench.device, limit=5)
    bench.record("principal_angles", ms, "ms", "64 x (1280, 128)", repeats=repeats)

    def torchs() -> Any:
        q, r = (torch.linalg.qr(side[:2].double())[0] for side in (x, y))
        return torch.linalg.svdvals(q.mT @ r)

    ms, repeats = time_call(torchs, bench.device, limit=5)
    bench.record(
        "torch for principal_angles",
        32 * ms,
        "ms",
        "64 x (1280, 128)",
        repeats=repeats,
        scaled=32.0,
        note="cosines alone",
    )
