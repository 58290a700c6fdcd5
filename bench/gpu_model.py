"""What the counts of bench/dispatches.py take on a GPU, estimated: `python bench/gpu_model.py`.

Nothing here is measured. Each call of torch takes the time of its flops or of its bytes, whichever
is longer, at the rates below; the host takes LAUNCH for each call, beside the GPU; each
synchronisation costs WAIT. Good to about a factor of two, and useful to see which stage is large.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "dispatches.json"
LAUNCH = 5e-6
WAIT = 20e-6
DIGIT_PRODUCTS = 22
SKINNY = 128
"""Products with a dimension up to this reach about half of a card's rate."""


@dataclass(frozen=True)
class Card:
    """A GPU: sustained rates in flop/s and byte/s."""

    name: str  # to print
    float32: float  # of large products without tensor cores
    float32_skinny: float  # of products with a narrow block
    float64: float  # of large products
    int8: float  # of precise_product's, half of what tensor cores do by mma.sync at most
    memory: float  # bandwidth
    stack: int  # bytes that a stack of matrices may take (prolora.core.svd.stacks)
    slow_float64: bool  # whether that asks it for no Gram matrix of wide weights


H100 = Card("H100", 60e12, 35e12, 50e12, 600e12, 3.0e12, 8 << 30, False)
RTX_4090 = Card("RTX 4090", 75e12, 45e12, 1.3e12, 330e12, 0.9e12, 6 << 30, True)
CARDS = (H100, RTX_4090)

SDXL = {
    (1280, 1280): 360,
    (1280, 2048): 120,
    (640, 640): 60,
    (10240, 1280): 60,
    (1280, 5120): 60,
    (640, 2048): 20,
    (5120, 640): 10,
    (640, 2560): 10,
}
"""Attention and feed-forward weights of SDXL: shape -> how many; 700 in all."""
# Both bases of SDXL to SSD-1B: the 272 pairs of attention weights.
PAIRS = {(1280, 1280): 312, (1280, 2048): 104, (640, 640): 96, (640, 2048): 32}
# 19 blocks of two streams and 38 of one.
FLUX = {
    (3072, 3072): 19 * 8 + 38 * 3,
    (12288, 3072): 19 * 2 + 38,
    (3072, 12288): 19 * 2,
    (3072, 15360): 38,
}
GOALS = [
    ("SDXL, 700 weights, k = 128", SDXL, 128, H100, "0.65 s, then 0.45 s"),
    ("FLUX.1, 418 weights, k = 128", FLUX, 128, H100, "1.5 s"),
    ("SDXL → SSD-1B, 544 weights, energy 0.9", PAIRS, 0.9, RTX_4090, "3 s"),
]


def estimate_eigh(b: int, d: int, dtype: str, card: Card) -> float:
    """Seconds of `b` symmetric eigenproblems of size d by torch 2.12 or later.

    Earlier ones loop, at 18 µs a matrix and row. XsyevBatched was seen (jax#31368, float32, a card
    that is not named) to take 0.64, 1.3, 3.3, 6.0 and 11.5 ms for 1, 8, 32, 64 and 128 problems of
    size 128, and 1.7, 3.1, 8.2 and 14.6 ms for 1, 8, 32 and 64 of size 512: a latency, and a time
    for each problem. A power law carries that on to other sizes, and a problem takes at least its
    reads in the reduction to tridiagonal form (d³/3 numbers), and its flops (9 d³).
    """
    wide = dtype == "float64"
    rate = card.float64 if wide else card.float32_skinny
    flops, moved = 9.0 * d**3, d**3 / 3 * (8 if wide else 4)
    latency, each = 0.55e-3 * (d / 128) ** 0.72, 0.086e-3 * (d / 128) ** 0.63
    return latency + b * max(each, moved / card.memory, flops / rate)


def estimate_call(call: list[Any], scale: float, card: Card) -> float:
    """Seconds of one kind of call on the GPU; `scale` times as many matrices as were counted."""
    _, op, kind, dtype, shape, flops, moved, _ = call
    bytes_s = scale * moved / card.memory
    if kind == "pass":
        return max(2e-6, bytes_s)
    if kind == "product":
        if dtype == "float64":
            rate = card.float64 * (0.5 if min(shape[1:]) <= SKINNY and card is H100 else 1)
        else:
            rate = card.float32_skinny if min(shape[1:]) <= SKINNY else card.float32
        torchs = max(3e-6, bytes_s, scale * flops / rate)
        return (
            min(torchs, estimate_digits(call, scale, card)) if op == "precise_product" else torchs
        )
    b, rows, columns = round(scale * shape[0]), shape[1], shape[2]
    d = min(rows, columns)
    if op == "eigh":
        return estimate_eigh(b, d, dtype, card)
    if op in ("cholesky", "triangular"):
        rate = 0.2 * (card.float64 if dtype == "float64" else card.float32)
        return max(40e-6, bytes_s, b * d * d * max(rows, columns) / rate)
    if op == "panel":
        # Two passes of Gram matrix and product, in sums that cost three float32 products.
        return max(30e-6, bytes_s, 24.0 * b * d * d * max(rows, columns) / card.float32_skinny)
    if op == "qr":
        return 0.3e-3 * b
    return b * 30e-6 * d  # svd, looped


def estimate_digits(call: list[Any], scale: float, card: Card) -> float:
    """Seconds of precise_product by its kernels; digits are written and read once."""
    b, rows, depth, columns = call[4]
    digits = 6.0 * b * (rows + columns) * depth
    moved = scale * (call[6] + 2 * digits)
    return 9e-6 + max(scale * call[5] * DIGIT_PRODUCTS / card.int8, moved / card.memory)


def estimate_stack(case: dict[str, Any], matrices: int, card: Card) -> dict[str, float]:
    """Seconds of each stage for a stack of so many matrices, from the counts of another stack."""
    scale = matrices / case["matrices"]
    on_gpu, on_host = Counter[str](), Counter[str]()
    for call in case["calls"]:
        on_gpu[call[0]] += call[-1] * estimate_call(call, scale, card)
        on_host[call[0]] += call[-1] * LAUNCH
    for stage, counts in case["stages"].items():
        on_host[stage] += WAIT * counts.get("synchronisations", 0)
    return {stage: max(on_gpu[stage], on_host[stage]) for stage in {*on_gpu, *on_host}}


def estimate_model(
    cases: list[dict[str, Any]], shapes: dict[tuple[int, int], int], rank: int | float, card: Card
) -> dict[str, float]:
    """Seconds of each stage for all weights of a model."""
    total = Counter[str]()
    for (m, n), count in shapes.items():
        case = find_case(cases, m, n, rank)
        stacks = count_stacks(m, n, rank, count, card)
        for stage, seconds in estimate_stack(case, count / stacks, card).items():
            total[stage] += stacks * seconds
    return dict(total)


def find_case(cases: list[dict[str, Any]], m: int, n: int, rank: int | float) -> dict[str, Any]:
    """The counts of the largest stack of a shape."""
    counted = [c for c in cases if (c["rows"], c["columns"], c["rank"]) == (m, n, rank)]
    if not counted:
        raise KeyError(f"{m}x{n} at {rank} was not counted")
    return max(counted, key=lambda case: case["matrices"])


def count_stacks(m: int, n: int, rank: int | float, count: int, card: Card) -> int:
    """The stacks that so many matrices [m, n] are worked on in, as in prolora.core.svd.stacks."""
    d = min(m, n)
    few = isinstance(rank, int) and 8 * rank <= d
    each = 16 * m * n + 20 * d**2 if few else 32 * m * n + 80 * d**2
    return -(-count // max(1, card.stack // each))


def render_model(counts: dict[str, Any]) -> str:
    """Tables in Markdown: the counts, the goals, the stages."""
    cases = counts["after"]["cases"]
    by_card = {
        card: cases + counts["models, slow float64" if card.slow_float64 else "models"]["cases"]
        for card in CARDS
    }
    parts = [_render_counts(cases), _render_goals(by_card), _render_stages(cases)]
    return "\n\n".join(parts) + "\n"


def _render_counts(cases: list[dict[str, Any]]) -> str:
    lines = [
        "| stack | solver | dispatches | waits | Tflop float32, float64 | GB |",
        "|---|---|---|---|---|---|",
    ]
    for case in cases:
        b, m, n, rank = _key(case)
        if b == 2:  # as many calls as the larger stack takes
            continue
        # Those for torch's eigensolver, which XsyevBatched has not, stand apart.
        solver = case["stages"]["eigensolver"].get("synchronisations", 0)
        lines.append(
            f"| {b} × {m}×{n}, {_rule(rank)} | `{case['solver']}` | {case['dispatches']} "
            f"| {case['synchronisations'] - solver} + {solver} "
            f"| {case['float32 flops'] / 1e12:.2g}, {case['float64 flops'] / 1e12:.2g} "
            f"| {case['bytes'] / 1e9:.3g} |"
        )
    return "\n".join(lines)


def _key(case: dict[str, Any]) -> list[Any]:
    return [case[name] for name in ("matrices", "rows", "columns", "rank")]


def _rule(rank: int | float) -> str:
    return f"energy {rank}" if isinstance(rank, float) else f"k = {rank}"


def _render_goals(by_card: dict[Card, list[dict[str, Any]]]) -> str:
    lines = ["| | card | goal | estimated | most of it |", "|---|---|---|---|---|"]
    for title, shapes, rank, goal_card, goal in GOALS:
        for card, cases in by_card.items():
            stages = estimate_model(cases, shapes, rank, card)
            whole = sum(stages.values())
            largest = sorted(stages.items(), key=lambda item: -item[1])[:3]
            shares = ", ".join(f"{stage} {seconds / whole:.0%}" for stage, seconds in largest)
            wanted = goal if card is goal_card else ""
            lines.append(f"| {title} | {card.name} | {wanted} | {whole:.2g} s | {shares} |")
    return "\n".join(lines)


def _render_stages(cases: list[dict[str, Any]]) -> str:
    columns = {
        f"{_rule(rank)}, {card.name}": estimate_model(cases, {(1280, 1280): 64}, rank, card)
        for rank in (0.99, 128)
        for card in CARDS
    }
    names = list(dict.fromkeys(stage for stages in columns.values() for stage in stages))
    names.sort(key=lambda stage: -max(stages.get(stage, 0) for stages in columns.values()))
    lines = [
        f"| 64 × 1280², ms, estimated | {' | '.join(columns)} |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for name in names:
        cells = [_milliseconds(stages.get(name)) for stages in columns.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    sums = [_milliseconds(sum(stages.values())) for stages in columns.values()]
    return "\n".join([*lines, f"| sum | {' | '.join(sums)} |"])


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{float(f'{1e3 * seconds:.2g}'):g}"


if __name__ == "__main__":
    print(render_model(json.loads(RESULTS.read_text())))
