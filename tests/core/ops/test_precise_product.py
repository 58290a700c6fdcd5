"""precise_product against float64 twice as wide, on every backend."""

import itertools
import random as choices
from pathlib import Path

import numpy as np
import pytest
import torch
from backends import load
from diagonal import pair_up
from spectra import randn

from prolora import errors
from prolora.core.ops import precise_product as module
from prolora.core.ops.precise_product import (
    DIGITS,
    MAX_DEPTH,
    STEP,
    STORED,
    precise_product,
    run_precise_product,
)

DTYPES = list(STORED)
# batch, rows, columns (None: the rows once more), depth: tiles that are cut, stacks, sums that no
# step divides, and one number.
SHAPES = [
    (2, 70, None, 100),
    (1, 64, None, 64),
    (3, 130, None, 33),
    (2, 65, 40, 96),
    (1, 5, 129, 31),
    (4, 1, 1, 1),
    (1, 130, None, 1),
]


def exact(x, y=None):
    """By 64 bits of mantissa, where the machine has them."""
    x, y = (np.asarray(one.double(), dtype=np.longdouble) for one in (x, x if y is None else y))
    return x @ np.swapaxes(y, -1, -2)


def assert_product(x, y, found):
    """To 2^-46 of a row's largest for each number of the other, and for the products left out."""
    other = x if y is None else y
    large, small = x.double().abs(), other.double().abs()
    depth = x.shape[2]
    each = large.amax(2)[:, :, None] * small.sum(2)[:, None]
    each = each + large.sum(2)[:, :, None] * small.amax(2)[:, None]
    ends = large.amax(2)[:, :, None] * small.amax(2)[:, None]
    allowed = 2.0**-46 * (each + (2 * depth + 20) * ends) + 2.0**-52 * (large @ small.mT)
    missed = torch.from_numpy(
        np.abs(np.asarray(found, dtype=np.longdouble) - exact(x, y)).astype(float)
    )
    assert (missed <= allowed).all(), float((missed / allowed.clamp_min(1e-300)).max())


def run(extension, x, y=None, cuda=True):
    return run_precise_product(extension, x, y, cuda)[0]


@pytest.mark.parametrize(("shape", "dtypes"), pair_up(SHAPES, list(itertools.pairwise(DTYPES * 2))))
def test_a_product_is_that_of_float64(kernels, shape, dtypes):
    b, rows, columns, depth = shape
    x = randn(b, rows, depth, dtype=dtypes[0])
    y = None if columns is None else randn(b, columns, depth, seed=1, dtype=dtypes[1])
    assert_product(x, y, kernels.precise_product(x, y))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_emulated_gpu_and_the_cpu_give_the_same_bits(monkeypatch, dtype, nan_memory):
    """Nothing is rounded before the sums are whole: cards cannot differ either."""
    extension, emulated = load("cpu", "_C"), load("emulated", "_emulated")
    x, y = randn(1, 70, 40, dtype=dtype), randn(1, 33, 40, seed=1, dtype=torch.float32)
    monkeypatch.setenv("EMU_SEED", "1")
    for other in (None, y):
        assert torch.equal(run(emulated, x, other), run(extension, x, other, cuda=False))
    found = run(emulated, x)
    assert torch.equal(run(emulated, x, x), found) and torch.equal(found, found.mT)


@pytest.mark.parametrize("power", [-1000, -400, -40, 0, 40, 400])
def test_rows_of_any_size_keep_their_digits(kernels, power):
    """Each row has its own power of two; squares beyond the range of float64 end as torch's do."""
    x = randn(1, 40, 50) * 2.0 ** torch.arange(-20, 20)[:, None].double()
    x[0, 3] = 0
    found = kernels.precise_product(torch.ldexp(x, torch.tensor(power)), x)
    assert_product(x, x, torch.ldexp(found, torch.tensor(-power)) if power > -960 else x @ x.mT)
    assert (found[0, 3] == 0).all() and (found[0, :, 3] == 0).all()


def test_the_ends_of_every_digit(kernels):
    """Numbers of which digits are -128, 127 or carry, and the largest that a row holds."""
    units = [2.0**46, 2.0**46 - 1, 0x7F7F7F7F7F7F / 2, 0x808080808080 / 4, 127, 128, 129, 255, 256]
    numbers = torch.tensor([*units, *(-x for x in units), 0.5, 1.5], dtype=torch.float64)
    x = torch.stack([numbers, numbers.flip(0), numbers.abs()])[None]
    assert_product(x, None, kernels.precise_product(x, None))
    ones = torch.zeros(1, 2, len(numbers), dtype=torch.float64)
    ones[0, :, 0] = 1
    assert kernels.precise_product(x, ones)[0, 0, 0] == 2.0**46


@pytest.mark.slow
def test_sums_of_the_greatest_depth_do_not_overflow(kernels):
    """All digits at an end: -128 times -128 in all six products of a weight."""
    lowest = -(128 * (256**6 - 1) // 255) / 2**2  # as many digits of -128 as there are
    x = torch.full((1, 1, MAX_DEPTH), lowest, dtype=torch.float64)
    found = kernels.precise_product(x, None)
    assert abs(float(found) / (lowest**2 * MAX_DEPTH) - 1) < 2.0**-44


def test_nan_and_inf_stay_in_their_row_and_matrix(kernels):
    x = randn(3, 70, 40)
    x[1, 2, 3], x[1, 66, 0] = torch.nan, torch.inf
    found = kernels.precise_product(x, None)
    bad = torch.zeros(70, dtype=torch.bool)
    bad[[2, 66]] = True
    assert not found[1, bad].isfinite().all(1).any() and found[1][~bad][:, ~bad].isfinite().all()
    assert_product(x[::2], None, found[::2])


def test_cards_without_the_units_refuse_and_sums_that_are_too_long_are_torchs(monkeypatch):
    emulated = load("emulated", "_emulated")
    monkeypatch.setenv("EMU_CAPABILITY", "75")
    with pytest.raises(errors.KernelFailure, match=r"take too few integers.*PROLORA_NATIVE=OFF"):
        run(emulated, randn(1, 4, 5))
    long = randn(1, 2, MAX_DEPTH + 1, dtype=torch.float16)
    with pytest.raises(ValueError, match="sums of up to 21824 numbers"):
        run(emulated, long)
    assert torch.equal(precise_product(long), module.multiply_wide(long)[0])


def test_the_layout_of_digits_is_that_of_the_kernel():
    text = (Path(__file__).parents[3] / "csrc/precise_product.h").read_text()
    assert f" kDigits = {DIGITS};" in text and f" kDigitStep = {STEP};" in text


def draw_case(seed):
    """Sides around those of a tile, any dtypes, scale, outliers, schedule."""
    pick = choices.Random(seed)
    b, depth = pick.randint(1, 3), pick.choice([1, 3, 16, 31, 32, 33, 64, 100, 200])
    rows, columns = (pick.choice([1, 7, 16, 33, 63, 64, 65, 90, 128, 129]) for _ in range(2))
    x = randn(b, rows, depth, seed=seed)
    y = randn(b, columns, depth, seed=seed + 1)
    for one in (x, y):
        kind = pick.choice(["plain", "plain", "outlier", "equal", "zero", "graded", "scaled"])
        if kind == "outlier":
            one[:, :, pick.randrange(depth)] *= 2.0 ** pick.randint(0, 12)
        elif kind == "equal":
            one.copy_(one.sign() / 3)
        elif kind == "zero":
            one[0, 0] = 0
        elif kind == "graded":
            one *= 2.0 ** -torch.linspace(0, 13, depth, dtype=torch.float64)
        elif kind == "scaled":
            one *= 2.0 ** pick.randint(-10, 10)
    x, y = (one.to(pick.choice(DTYPES)) for one in (x, y))
    with_itself = pick.random() < 0.4
    return x, None if with_itself else y, str(pick.randint(0, 5))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_a_thousand_random_cases_are_what_float64_gives(monkeypatch, nan_memory, part):
    extension, emulated = load("cpu", "_C"), load("emulated", "_emulated")
    for case in range(250 * part, 250 * part + 250):
        x, y, seed = draw_case(case)
        monkeypatch.setenv("EMU_SEED", seed)
        try:
            found = run(emulated, x, y)
            assert_product(x, y, found)
            assert torch.equal(found, run(extension, x, y, cuda=False))
        except AssertionError as error:
            error.add_note(f"case {case}")
            raise


def test_no_matrices_have_no_products():
    extension = load("cpu", "_C")
    x, y = torch.zeros(0, 3, 5), torch.zeros(0, 4, 5)
    for other, cols in ((None, 3), (y, 4)):
        product, error = module.run_precise_product(extension, x, other, False)
        assert product.shape == (0, 3, cols) and error.shape == (0,)
