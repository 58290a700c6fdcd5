"""The emulator must accept right kernels and catch wrong ones."""

import math

import pytest
import torch


def test_barrier(emulator):
    assert emulator.reverse(256, True) == list(range(255, -1, -1))


def test_missing_barrier_is_visible(emulator):
    assert any(math.isnan(x) for x in emulator.reverse(256, False))


def test_shared_memory_starts_as_nan_in_every_block(emulator):
    assert all(math.isnan(x) for x in emulator.stale_shared(8))


def test_masked_shuffle(emulator):
    expected = [-1] * 8 + [sum(range(8, 16))] * 8 + [-1] * 16
    assert emulator.masked_sum(0x0000FF00, 8) == expected


def test_ballot_counts_only_lanes_in_the_mask(emulator):
    assert emulator.ballot(32, 0xFFFFFFFF) == [0xAAAAAAAA] * 32
    assert emulator.ballot(32, 0x0000000F)[:4] == [0b1010] * 4
    assert emulator.ballot(8, 0xFFFFFFFF) == [0b10101010] * 8


def test_counting_barrier_gives_every_thread_the_count(emulator):
    assert emulator.count(70) == [35] * 70


def test_indices(emulator):
    assert emulator.numbers() == list(range(2 * 3 * 4 * 5 * 6 * 7))


def test_divergence_is_reported(emulator):
    with pytest.raises(RuntimeError, match="deadlock"):
        emulator.divergent()


def test_reading_an_absent_lane_is_reported(emulator):
    with pytest.raises(RuntimeError, match="takes no part"):
        emulator.stray_read()


def test_a_lane_outside_its_own_mask_is_reported(emulator):
    with pytest.raises(RuntimeError, match="not in the mask"):
        emulator.outsider()


def test_a_thread_that_leaves_early_does_not_hold_up_a_barrier(emulator):
    assert emulator.early_exit(64) == [0] * 32 + [1] * 32


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
