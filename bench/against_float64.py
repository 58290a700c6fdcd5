"""Computations on random matrices, each against its definition in numpy's float64.

    python bench/against_float64.py [COUNT] [SEED] [SPOIL]

Sizes to 128, five kinds of spectra, four dtypes. An error is a share of what the dtype, or the
returned bound, allows. Exit code 1 if one is above 1. Results are changed by a share SPOIL, which
has to be found.
"""

import sys
from collections import defaultdict
from itertools import product

import numpy as np
import torch
from numpy.linalg import cond, norm, qr, solve, svd

import prolora

STEPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
NAMES = [f"transformer_blocks.{i}.attn.to_{leaf}" for i in range(4) for leaf in "qkv"]
GIVEN = list(map(float, sys.argv[1:]))
COUNT, SEED, SPOIL = GIVEN + [20000, 0, 0][len(GIVEN) :]
draw = np.random.default_rng(int(SEED))


def wide(tensor):
    return tensor.double().numpy()


def spoil(tensor):
    return wide(tensor) * (1 + SPOIL * draw.choice([-1, 1], tuple(tensor.shape)))


def sizes():
    return tuple(max(2, int(128 ** draw.random())) for _ in range(2))


def spectrum(m, n, dtype="float32", scale=1.0):
    i = np.arange(1, (d := min(m, n)) + 1)
    kinds = (i ** -draw.uniform(0.1, 2), 0.5 ** (i / draw.uniform(1, 20)), np.ceil((d - i + 1) / 8))
    s = (*kinds, 1.0 * (i <= 1 + d // 3), np.sort(1 + 0.1 * draw.random(d))[::-1])[draw.integers(5)]
    u, v = (qr(draw.standard_normal((size, d)))[0] for size in (m, n))
    return torch.from_numpy(scale * u * s @ v.T).to(getattr(torch, dtype))


def factors(m, n, size=1.0):
    r = draw.integers(1, 9)
    up, down = draw.standard_normal((m, r)), draw.standard_normal((r, n))
    return torch.from_numpy(up * size / norm(up @ down)).float(), torch.from_numpy(down).float()


def loras(count, size):
    shapes = {name: sizes() for name in NAMES}
    pairs = [{n: factors(*shape, size) for n, shape in shapes.items()} for _ in range(count)]
    keys = [(f"transformer.{n}.lora_{'BA'[i]}.weight", n, i) for n in NAMES for i in (0, 1)]
    return [{key: one[n][i] for key, n, i in keys} for one in pairs], pairs


def sine(true, found):
    return norm(found - true @ (true.T @ found), 2) if true.size else 0.0


def compare_bases():
    dtype = str(draw.choice(list(STEPS)))
    scale = 1.0 if dtype == "float16" else 2.0 ** draw.integers(-20, 21)
    w = spectrum(*sizes(), dtype, scale)
    rank = int(draw.integers(1, min(w.shape) + 1)) if draw.random() < 0.7 else draw.uniform(0.3, 1)
    basis, (u, s, vt) = prolora.truncated_svd(w, rank), svd(wide(w), full_matrices=False)
    k, shares = int(basis.rank), np.cumsum(s * s) / np.sum(s * s)
    yield "singular values", np.abs(spoil(basis.S)[:k] - s[:k]).max() / (1e-6 * s[0])
    yield "energies", np.abs(spoil(basis.energy) - shares[k - 1]) / 1e-6
    if isinstance(rank, float):
        least = 1 + int((shares < rank).sum())
        near = np.abs(shares - rank).min() < 1e-9
        yield "ranks of an energy", 0.0 if k + SPOIL == least or near else 2.0
    if float(basis.bound) < 1:
        gap = (s[k - 1] - (s[k] if k < len(s) else 0)) / s[0]  # which limits numpy's own span
        allowed = float(basis.bound) + 3e-7 * np.sqrt(k) + 1e-14 / max(gap, 1e-14)
        spans = ((u[:, :k], basis.U[:, :k]), (vt[:k].T, basis.V[:, :k]))
        yield "spans", max(sine(true, spoil(found)) for true, found in spans) / allowed


def compare_angles():
    m, dtype = draw.integers(6, 128), getattr(torch, str(draw.choice(list(STEPS))))
    q, p = sorted(draw.integers(1, m // 2 + 1, 2))
    x = draw.standard_normal((m, p))
    y = x[:, :q] + 10.0 ** draw.uniform(-9, 2) * draw.standard_normal((m, q))
    x, y = (torch.from_numpy(z).to(dtype) for z in (x, y))
    a, b = (qr(wide(z))[0] for z in (x, y))
    cosines, sines = (svd(z, compute_uv=False).clip(0, 1) for z in (a.T @ b, b - a @ (a.T @ b)))
    true = np.where(sines[::-1] ** 2 < 0.5, np.arcsin(sines[::-1]), np.arccos(cosines))
    allowed = 1e-15 * max(cond(wide(x)), cond(wide(y))) + 1e-12 * true
    yield "principal angles", (np.abs(spoil(prolora.principal_angles(x, y)) - true) / allowed).max()


def compare_projections():
    w = spectrum(*sizes(), str(draw.choice(["float32", "float64"])))
    noise = torch.from_numpy(draw.standard_normal(w.shape)).to(w.dtype)
    pair, rank = (w, w + 0.3 * noise * w.norm() / noise.norm()), int(draw.integers(1, min(w.shape)))
    (up, down), spans, allowed = factors(*w.shape), [], 3e-6
    for weight in pair:
        basis, (u, _, vt) = prolora.truncated_svd(weight, rank), svd(wide(weight), False)
        k, allowed = int(basis.rank), allowed + 4 * float(basis.bound)
        spans.append([x @ x.T for x in (u[:, :k], vt[:k].T)])
    if allowed < 0.05:  # else there is no gap at this rank
        delta = wide(up) @ wide(down)
        (ps, qs), (pt, qt), (i, j) = (*spans, map(np.eye, w.shape))
        rest = (i - pt) @ (i - ps) @ delta @ (j - qs) @ (j - qt)
        true = pt @ ps @ delta @ qs @ qt + rest
        for kind, update in (("factors", (up, down)), ("dense", up @ down)):
            moved = prolora.project(update, *pair, rank=rank)
            moved = moved if kind == "dense" else moved.dense()
            yield f"projections, {kind}", norm(spoil(moved) - true) / allowed


def balance(parts):
    """Every a ≥ 0 with Ga ≥ 1 and a·(Ga − 1) = 0, by trying which are 0."""
    gram = np.array([[max(0.0, (a * b).sum()) / (a * a).sum() for b in parts] for a in parts])
    for chosen in map(np.flatnonzero, product([0, 1], repeat=len(parts))):
        a = np.zeros(len(parts))
        a[chosen] = solve(gram[np.ix_(chosen, chosen)], np.ones(len(chosen)))
        if a.min() > -1e-9 and (gram @ a).min() > 1 - 1e-9:
            yield sum(x * part for x, part in zip(a, parts, strict=True))


def compare_merges():
    files, pairs = loras(int(draw.integers(2, 5)), 1.0)
    strengths, method = draw.choice([1, 0.5, -0.7, 2], len(files)), draw.choice(["sum", "balanced"])
    done = prolora.merge(files, strengths=strengths.tolist(), method=str(method)).adapter.updates
    for n in NAMES:
        parts = [
            s * wide(one[n][0]) @ wide(one[n][1]) for s, one in zip(strengths, pairs, strict=True)
        ]
        wanted = [sum(parts)] if method == "sum" else balance(parts)
        yield f"merges, {method}", min(norm(spoil(done[n].dense()) - x) for x in wanted) / 1e-6


def compare_extractions():
    base, rank = {n: spectrum(*sizes()) for n in NAMES}, int(draw.integers(1, 12))
    tuned = {n: w + 0.1 * spectrum(*w.shape) for n, w in base.items()}
    models = ({f"{n}.weight": w for n, w in one.items()} for one in (base, tuned))
    done = prolora.extract(*models, out_rank=rank, dtype="float32").adapter.updates
    for n in NAMES:
        s = svd(delta := wide(tuned[n]) - wide(base[n]), compute_uv=False)
        left, least = norm(spoil(done[n].dense()) - delta), norm(s[rank:])
        yield "extractions", (left - least) / (1e-3 * least + 1e-5 * norm(s))


def compare_baking():
    dtype, strength = (
        str(draw.choice([*STEPS, "float8_e4m3fn"])),
        float(draw.choice([1, 0.5, -0.7])),
    )
    (lora,), (pairs,) = loras(1, 0.1)
    kind, ups = getattr(torch, dtype), {n: pair[0] for n, pair in pairs.items()}
    base = {n: spectrum(len(up), pairs[n][1].shape[1]).to(kind) for n, up in ups.items()}
    model = {f"{n}.weight": w for n, w in base.items()}
    baked = prolora.bake([lora], model, strengths=[strength]).tensors
    for n, (up, down) in pairs.items():
        true = wide(base[n]) + strength * wide(up) @ wide(down)
        step = 2.0 ** np.floor(np.log2(np.abs(true) + 1e-300)).clip(np.log2(torch.finfo(kind).tiny))
        sums = np.abs(wide(base[n])) + np.abs(wide(up)) @ np.abs(wide(down))  # in float32
        allowed = STEPS.get(dtype, 2.0**-3) * step / 2 + 2.0**-22 * sums
        yield f"baking, {dtype}", (np.abs(spoil(baked[f"{n}.weight"]) - true) / allowed).max()


CASES = 8 * [compare_bases, compare_angles, compare_projections]
CASES += [compare_merges, compare_extractions, compare_baking]

if __name__ == "__main__":
    torch.set_num_threads(1)
    errors = defaultdict(list)
    while sum(map(len, errors.values())) < COUNT:
        for case in CASES:
            for kind, error in case():
                errors[kind].append(float(error))
    for kind, found in sorted(errors.items()):
        wrong = sum(not error <= 1 for error in found)
        print(f"{kind}: {len(found)}, largest error {max(found):.3f} of the allowed, {wrong} wrong")
    wrong = sum(not error <= 1 for found in errors.values() for error in found)
    print(f"{sum(map(len, errors.values()))} computations, {wrong} wrong")
    sys.exit(bool(wrong))
