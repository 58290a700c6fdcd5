"""krylov_block against its definition in float64, on every backend, and inside of truncated_svd."""

import random as choices

import pytest
import torch
from backends import load
from diagonal import pair_up
from dispatched import Calls
from spectra import lapack, planted, power_law, randn, true_error

from prolora import truncated_svd
from prolora.core.ops.krylov_block import run_krylov_block
from prolora.core.svd import krylov, stacks
from prolora.core.svd.panels import extend_basis

EPS = 2.0**-23
HALF, BFLOAT = torch.float16, torch.bfloat16

# batch, d, n, size, width, room: sides that no 8 divides, tiles that are cut, a full basis,
# products in parts (of 512 and more for few matrices), widths of more than a tile has columns.
SHAPES = [
    (2, 40, 64, 8, 8, 32),
    (1, 67, 131, 24, 8, 40),
    (2, 96, 96, 32, 16, 32),
    (1, 512, 520, 20, 20, 60),
    (2, 520, 72, 16, 16, 48),  # a stack in parts
    (1, 528, 24, 512, 8, 528),  # a basis in parts
    (1, 80, 72, 80, 40, 80),
    (1, 130, 70, 64, 64, 128),
    (3, 33, 35, 2, 1, 5),
]


def weights(b, d, n, dtype, transposed, seed=0):
    """σ_i = i^-0.5 and random vectors, rounded to 16 bits."""
    fall = torch.arange(1, min(d, n) + 1, dtype=torch.float64) ** -0.5
    u, v = (torch.linalg.qr(randn(b, x, min(d, n), seed=seed + x))[0] for x in (d, n))
    w = ((u * fall) @ v.mT).to(dtype)
    return w.mT.contiguous().mT if transposed else w


def basis(b, d, size, room, seed=1):
    """Orthonormal rows, and NaN where none are yet."""
    rows = torch.full((b, room, d), torch.nan)
    rows[:, :size] = torch.linalg.qr(randn(b, d, size, seed=seed))[0].mT
    return rows, torch.full((b, room, room), torch.nan)


def exact_block(w, rows, size, width):
    """The projection's rows, the image beyond the basis, and its length; in float64."""
    known = rows[:, :size].double()
    image = known[:, size - width :] @ w.double() @ w.double().mT
    column = image @ known.mT
    image = image - column @ known
    return column, image, image.norm(dim=(1, 2))


def assert_block(w, before, size, width, found):
    """What is found, against float64: to rounding of ‖W‖², by the sums' lengths."""
    length, rows, projected = found
    d, n = w.shape[1:]
    column, image, exact = exact_block(w, before, size, width)
    unit = EPS * (4 + (d + n + size) ** 0.5) * w.double().norm(dim=(1, 2)).square().clamp_min(1e-30)
    assert torch.equal(rows[:, :size], before[:, :size])
    part = projected[:, size - width : size, :size].double()
    assert ((part - column).norm(dim=(1, 2)) <= unit).all()
    assert ((length - exact).abs() <= unit).all()
    rest = projected.clone()
    rest[:, size - width : size, :size] = torch.nan
    assert rest.isnan().all()
    if size + width > rows.shape[1]:
        assert rows[:, size:].isnan().all()
        return
    assert rows[:, size + width :].isnan().all()
    block = rows[:, size : size + width].double()
    kept = block.norm(dim=2) > 0.5
    assert (block[~kept] == 0).all()
    identity = torch.diag_embed(kept.double())
    assert ((block @ block.mT - identity).norm(dim=(1, 2)) <= 8 * (width + 1) * EPS).all()
    # What the basis lacks lies in the block, but for rounding and for rows that were dropped as it.
    missed = (image - image @ block.mT @ block).norm(dim=2)
    scale = column.norm(dim=(1, 2))
    assert (missed <= unit[:, None] + 4e-6 * scale[:, None]).all()
    # A row that is much shorter than rounding was dropped; the others are orthogonal to the basis
    # to rounding over the share of the image that is left.
    shortest = torch.linalg.svdvals(image)[:, -1].clamp_min(1e-6 * scale).clamp_min(1e-300)
    inside = (block @ before[:, :size].double().mT).norm(dim=(1, 2))
    allowed = 8 * EPS + 4 * EPS * (width * exact + scale) / shortest
    assert (inside <= allowed).all()


@pytest.mark.parametrize(("shape", "kind"), pair_up(SHAPES, [(HALF, False), (BFLOAT, True)]))
def test_a_block_is_what_float64_gives_to_rounding(kernels, shape, kind):
    dtype, transposed = kind
    b, d, n, size, width, room = shape
    w = weights(b, d, n, dtype, transposed)
    w[1:, d // 2 :] = 0  # of so low a rank that directions add nothing
    rows, projected = basis(b, d, size, room)
    found = kernels.krylov_block(w, rows, projected, size, width)
    assert_block(w, rows, size, width, found)


def run(extension, w, size, width, room, seed=1):
    rows, projected = basis(len(w), w.shape[1], size, room, seed)
    length = run_krylov_block(extension, w, rows, projected, size, width, cuda=True)
    return length, rows, projected


@pytest.mark.parametrize("tilt", [1e-3, 3e-6])
def test_rows_of_a_block_with_fewer_directions_than_rows_lean_on_nothing(kernels, tilt):
    """Little more is left of them than the rounding of what was taken out."""
    d, size, width = 64, 24, 8
    w = torch.diag_embed(2.0 ** -(torch.arange(2 * d) % 5).reshape(2, d)).to(HALF)
    rows, _ = basis(2, d, size, size + width)
    inside = torch.nn.functional.pad(torch.linalg.qr(randn(2, size, size))[0], (0, d - size))
    inside[:, :, size : size + 3] = tilt * randn(2, size, 3)
    rows[:, :size] = torch.linalg.qr(inside.mT)[0].mT
    _, rows, _ = kernels.krylov_block(w, rows, torch.zeros(2, 32, 32), size, width)
    block = rows[:, size:].double()
    assert float((block @ rows[:, :size].double().mT).abs().max()) < 2e-6
    lengths = torch.linalg.vector_norm(block, dim=2)
    assert ((lengths - 1).abs().minimum(lengths) < 1e-5).all() and (lengths > 0.5).any()


def draw_low_rank(seed):
    """A weight of low rank, and a basis that contains much or all of its range."""
    generator = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    d, width = pick(100, 300), pick(4, 33)
    size = width * pick(1, 4)
    rank = pick(1, size + width)
    w = torch.randn(1, d, rank, generator=generator)
    w = w @ torch.randn(1, rank, d + 20, generator=generator)
    w = (w / w.abs().max()).half()
    inside = w[0].float() @ torch.randn(d + 20, min(rank, size), generator=generator)
    outside = torch.randn(d, max(size - rank, 0), generator=generator)
    rows = torch.full((1, size + width, d), torch.nan)
    rows[0, :size] = torch.linalg.qr(torch.cat([inside, outside], 1))[0].mT
    return w, rows, size, width


def assert_orthonormal_or_zero(rows, size):
    block, earlier = rows[0, size:].double(), rows[0, :size].double()
    assert float((block @ earlier.mT).abs().max()) < 1e-5
    products = block @ block.mT
    kept = products.diagonal() > 0.5
    torch.testing.assert_close(products, kept.double().diag(), atol=1e-5, rtol=0)


def draw_tilted(seed):
    """A diagonal weight with few distinct values, and a basis tilted out of its subspaces."""
    generator = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    d, width = pick(32, 200), pick(2, 33)
    size = width * pick(1, 4)
    values, tilt = pick(2, 9), 10.0 ** -(3 + 4 * float(torch.rand((), generator=generator)))
    columns = min(pick(1, width + 1), d - size)
    w = torch.diag_embed(2.0 ** -(torch.arange(d) % values).reshape(1, d)).to(HALF)
    inside = torch.linalg.qr(torch.randn(1, size, size, generator=generator))[0]
    inside = torch.nn.functional.pad(inside, (0, d - size))
    tilted = torch.randn(1, size, columns, generator=generator)
    inside[:, :, size : size + columns] = tilt * tilted
    rows = torch.full((1, size + width, d), torch.nan)
    rows[:, :size] = torch.linalg.qr(inside.mT)[0].mT
    return w, rows, size, width


# With the last four (two below) a new row had an inner product of 0.2 to 4 with a row of the basis
# before such rows were dropped.
LOW_RANKS = (*range(20), 208, 328, 374, 580)
TILTED = (2560, 3233)


def test_blocks_are_orthogonal_to_a_basis_that_contains_their_image(kernels):
    draws = [draw_low_rank(seed) for seed in LOW_RANKS] + [draw_tilted(seed) for seed in TILTED]
    for w, rows, size, width in draws:
        projected = torch.zeros(1, size + width, size + width)
        _, rows, _ = kernels.krylov_block(w, rows, projected, size, width)
        assert_orthonormal_or_zero(rows, size)


def test_extended_bases_are_orthonormal_if_they_contain_the_image():
    for seed in LOW_RANKS:
        w, rows, size, width = draw_low_rank(seed)
        earlier, single = rows[:, :size], w.float()
        image = earlier[:, -width:] @ single @ single.mT
        column = image @ earlier.mT
        image = torch.baddbmm(image, column, earlier, alpha=-1)
        scale = torch.linalg.vector_norm(column, dim=(-2, -1)).double()
        rows[:, size:] = extend_basis(image, scale, earlier)
        assert_orthonormal_or_zero(rows, size)


def test_weights_without_columns_or_of_zeros_add_nothing(kernels):
    empty = torch.zeros(2, 40, 0, dtype=HALF), torch.zeros(2, 0, 40, dtype=BFLOAT).mT
    for w in (*empty, torch.zeros(2, 40, 9, dtype=HALF)):
        length, rows, projected = kernels.krylov_block(w, *basis(2, 40, 16, 24), 16, 8)
        assert (length == 0).all() and (rows[:, 16:] == 0).all()
        assert (projected[:, 8:16, :16] == 0).all()


def test_a_matrix_with_nan_spares_the_others_and_adds_nothing(kernels):
    w = weights(3, 40, 48, BFLOAT, False)
    rows, projected = basis(3, 40, 8, 24)
    wanted = kernels.krylov_block(w, rows, projected, 8, 8)
    w[1, 2, 3] = torch.nan
    length, after, column = kernels.krylov_block(w, rows, projected, 8, 8)
    assert length[1].isnan() and column[1, :8, :8].isnan().any() and (after[1, 8:16] == 0).all()
    for one, two in zip(wanted, (length, after, column), strict=True):
        torch.testing.assert_close(one[::2], two[::2], equal_nan=True)


def test_every_stored_number_counts_as_it_is(kernels):
    """Subnormal and the largest numbers of 16 bits, one in a row: G is diagonal."""
    for dtype in (HALF, BFLOAT):
        info = torch.finfo(dtype)
        values = torch.tensor([info.smallest_normal / 4, 1.0, -info.eps, 3.0])
        if dtype == HALF:
            values[1], values[3] = info.max, -info.smallest_normal * (1 - 2.0**-10)
        w = torch.diag(values).to(dtype)[None]
        rows, projected = torch.full((1, 4, 4), torch.nan), torch.full((1, 4, 4), torch.nan)
        rows[:] = torch.eye(4)
        _, _, column = kernels.krylov_block(w, rows, projected, 4, 4)
        exact = w[0].double() @ w[0].double().mT
        assert torch.equal(column[0], exact.float())


SIDES = [1, 7, 8, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 200, 513]


def draw_case(seed):
    """Sides around those of a tile, any layout, card, schedule, spectrum and scale."""
    pick = choices.Random(seed)
    d, n = pick.choice(SIDES), pick.choice(SIDES)
    width = min(d, pick.choice([1, 4, 8, 16, 20, 24, 31, 32, 33, 40, 64]))
    size = min(d, width * pick.randint(1, 4))
    room = max(size, size + pick.choice([-1, 0, 0, 0, 1, 40]) + width * pick.randint(0, 1))
    b = pick.randint(1, 3) if d * n < 30000 else 1
    w = weights(b, d, n, pick.choice([HALF, BFLOAT]), pick.random() < 0.5, seed)
    kind = pick.choice(["plain", "plain", "low rank", "zero", "large", "small", "outlier"])
    if kind == "low rank":
        w[:, : d // 2] = 0
    elif kind == "zero":
        w[0] = 0
    elif kind in ("large", "small"):
        w = w * 2.0 ** (10 if kind == "large" else -10)
    elif kind == "outlier":
        w[:, 0, 0] = 100
    environment = {
        "EMU_CAPABILITY": pick.choice(["75", "80", "86", "90", "90", "100", "120"]),
        "EMU_PROCESSORS": pick.choice(["1", "8", "132"]),
        "EMU_SEED": str(pick.randint(0, 5)),
        "EMU_SHARED_BYTES": pick.choice(["65536", "101376", "232448"]),
    }
    return w, size, width, room, environment


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_a_thousand_random_cases_are_what_float64_gives(monkeypatch, nan_memory, part):
    extension = load("emulated", "_emulated")
    for seed in range(250 * part, 250 * part + 250):
        w, size, width, room, environment = draw_case(seed)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        rows = basis(len(w), w.shape[1], size, room)[0]
        try:
            assert_block(w, rows, size, width, run(extension, w, size, width, room))
        except AssertionError as error:
            error.add_note(f"case {seed}")
            raise


@pytest.fixture
def asked(monkeypatch):
    """The op is asked for, and the CPU takes whole stacks as a GPU does."""
    monkeypatch.setattr(krylov, "_takes_stored", lambda *given: given[-1] is not None)
    monkeypatch.setattr(stacks, "FORCE_BATCHED", True)


def stack_of_16_bits(m, n, dtype, *exponents):
    made = [planted(m, n, power_law(min(m, n), x), i)[0] for i, x in enumerate(exponents)]
    return torch.stack(made).to(dtype)


def test_truncated_svd_finds_its_blocks_by_the_op_where_it_is_asked_for(asked):
    """Two matrices converge sooner than the third, and leave the stack."""
    w = stack_of_16_bits(800, 768, BFLOAT, 0.5, 0.5, 0.3)
    with Calls() as calls:
        basis = truncated_svd(w, 48)
    assert basis.solvers[:2] == ("krylov",) * 2 and basis.ok.all()
    # The first block is no image of another one.
    assert calls.counts["prolora::panel_qr"] == 2 and calls.counts["prolora::krylov_block"] > 8
    for i, weight in enumerate(w):
        assert true_error(lapack(weight), basis[i]) <= float(basis.bound[i])
    with Calls() as calls:  # of a scale that 16 bits do not have
        far = truncated_svd(w[:1] * 2.0**40, 48)
    assert not calls.counts["prolora::krylov_block"] and far.ok.all()


def test_a_cpu_or_a_card_without_the_kernels_multiplies_its_float32_copy():
    """Rather than make a copy for each block, as the twin would."""
    w = stack_of_16_bits(96, 120, HALF, 0.5)
    for there in (w, w.to("meta")):
        single = there.float()
        assert not krylov._takes_stored(single, single[:, 0, 0].double(), 8, 0, there)


@pytest.mark.parametrize("exponent", [-90, 70])
def test_a_length_is_told_at_every_scale(kernels, exponent):
    """Squares of it leave the range of float32; the kernels and torch tell the same."""
    w = torch.zeros(1, 8, 8, dtype=BFLOAT)
    w[0, 0, 0] = w[0, 4, 0] = 2.0 ** (exponent // 2)
    rows = torch.zeros(1, 8, 8)
    rows[:, :4] = torch.eye(8)[:4]
    length, _, _ = kernels.krylov_block(w, rows, torch.zeros(1, 8, 8), 4, 4)
    wanted = exact_block(w, rows[:, :4], 4, 4)[2]
    torch.testing.assert_close(length, wanted, rtol=1e-5, atol=0)
