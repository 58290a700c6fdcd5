"""The emulator must accept right kernels and catch wrong ones."""

import math

import pytest
import torch


def test_a_barrier_orders_threads_and_a_missing_one_shows(emulator):
    assert emulator.reverse(256, True) == list(range(255, -1, -1))
    assert any(math.isnan(x) for x in emulator.reverse(256, False))
    assert all(math.isnan(x) for x in emulator.stale_shared(8))  # in every block anew
    assert emulator.count(70) == [35] * 70
    assert emulator.early_exit(64) == [0] * 32 + [1] * 32  # who leaves early holds up nobody


def test_masked_shuffle(emulator):
    expected = [-1] * 8 + [sum(range(8, 16))] * 8 + [-1] * 16
    assert emulator.masked_sum(0x0000FF00, 8) == expected


def test_ballot_counts_only_lanes_in_the_mask(emulator):
    assert emulator.ballot(32, 0xFFFFFFFF) == [0xAAAAAAAA] * 32
    assert emulator.ballot(32, 0x0000000F)[:4] == [0b1010] * 4
    assert emulator.ballot(8, 0xFFFFFFFF) == [0b10101010] * 8


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [("divergent", "deadlock"), ("stray_read", "takes no part"), ("outsider", "not in the mask")],
)
def test_threads_that_wait_or_read_wrongly_are_reported(emulator, kernel, reason):
    assert emulator.numbers() == list(range(2 * 3 * 4 * 5 * 6 * 7))
    with pytest.raises(RuntimeError, match=reason):
        getattr(emulator, kernel)()


@pytest.mark.parametrize(
    ("grid", "threads", "shared_bytes", "reason"),
    [
        (0, 32, 0, "empty grid"),
        (1, 0, 0, "empty grid"),
        (1, 1025, 0, "more threads"),
        (1, 32, 300 << 10, "shared memory than the GPU has"),
        (1, 32, 60 << 10, "cudaFuncSetAttribute"),
    ],
)
def test_launches_that_a_gpu_refuses_are_refused(emulator, grid, threads, shared_bytes, reason):
    with pytest.raises(RuntimeError, match=reason):
        emulator.launch(grid, threads, shared_bytes)


def test_lost_updates_are_not_modelled(emulator):
    # A known limit, written down: only racecheck on a GPU finds these.
    assert emulator.lost_update() == 64


def test_a_warp_multiplies_fragments_laid_out_as_ptx_says_and_no_others(emulator):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-9, 10, (n, 8), generator=generator) for n in (16, 8))
    given = a.flatten().tolist(), b.flatten().tolist(), 3.0, 32
    assert emulator.product(*given, False, True) == (a @ b + 3).flatten().tolist()
    assert emulator.product(*given, True, True) != (a @ b + 3).flatten().tolist()


def test_tensor_cores_take_numbers_of_eleven_bits_and_lose_bits_towards_zero(emulator):
    with pytest.raises(RuntimeError, match="not rounded to TF32"):
        emulator.product([1 / 3] * 128, [1.0] * 64, 0.0, 32, False, False)
    assert emulator.product([1 / 3] * 128, [1.0] * 64, 0.0, 32, False, True)[0] != 8 / 3
    # The nearest float would be the next one above 1.
    small = [3 * 2.0**-28] + [0.0] * 127
    assert emulator.product(small, [8.0] * 64, 1.0, 32, False, True)[0] == 1


def test_a_product_on_tensor_cores_needs_the_whole_warp(emulator):
    with pytest.raises(RuntimeError, match="takes no part"):
        emulator.product([1.0] * 128, [1.0] * 64, 0.0, 16, False, True)


@pytest.mark.parametrize(("waited", "there"), [(2, 8), (1, 4), (0, 0)])
def test_an_asynchronous_copy_is_there_after_the_wait_and_not_before(emulator, waited, there):
    copied = emulator.copy(waited, 0)
    assert copied[:there] == [1, 2, 3, 4, 5, 6, 7, 0][:there]
    assert all(math.isnan(x) for x in copied[there:])


def test_a_misaligned_asynchronous_copy_is_reported(emulator):
    with pytest.raises(RuntimeError, match="misaligned"):
        emulator.copy(2, 1)
