"""The trial that decides between a kernel and torch, with a card played by the CPU."""

import logging
import re
import time

import pytest
import torch
from backends import load
from fresh import run_fresh
from spectra import planted, power_law

import prolora
from prolora.bases.cache.tables import JsonTable
from prolora.core.ops import native, precise_product, project_pair, torch_twin, trial, tridiagonal
from prolora.core.ops.overlap_table import overlap_table
from prolora.core.ops.panel_qr import panel_qr
from prolora.core.ops.small_svd import small_singular_values, small_svd
from prolora.core.svd import stacks


class Card:
    """The kernels of a card: the emulator's, or the CPU's under their name, which take no time."""

    def __init__(self, kernels, cuda=False):
        self.kernels, self.cuda, self.seconds, self.fails = kernels, cuda, 0.0, False
        self.sources = kernels.sources

    def __getattr__(self, name):
        """Scratch sizes: their last argument says which kernels."""
        return lambda *sizes: getattr(self.kernels, name)(*sizes[:-1], self.cuda)

    def run(self, op, numbers, float64, cuda, stream):
        assert cuda
        if self.fails:
            raise RuntimeError("too many resources requested for launch")
        time.sleep(self.seconds)
        self.kernels.run(op, numbers, float64, self.cuda, stream)


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(trial, "_choices", {})
    monkeypatch.setattr(trial, "_read", lambda key: None)
    monkeypatch.setattr(trial, "_write", lambda key, value: None)
    made = Card(load("cpu", "_C"))
    monkeypatch.setattr(native, "serving", lambda device: native.Choice(made, cuda=True))
    return made


def operands(m=64):
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(2, m, 8, generator=generator))[0]
    return u, u.flip(0), torch.randn(2, 4, m, generator=generator)


def slow_torch(monkeypatch, op="project_pair"):
    twin = getattr(torch_twin, op)

    def slow(*given):
        time.sleep(0.02)
        return twin(*given)

    monkeypatch.setattr(torch_twin, op, slow)


def chosen():
    (key,) = trial.list_choices()
    return key, *trial.list_choices()[key]


def test_a_kernel_that_is_right_and_fast_is_taken_and_the_next_process_knows(card, monkeypatch):
    slow_torch(monkeypatch)
    expected = torch_twin.project_pair(*operands())
    torch.testing.assert_close(project_pair.project_pair(*operands()), expected)
    key, wins, why = chosen()
    assert wins and " s over " in why
    assert native.describe_installation()[f"trial of {key}"] == f"extension ({why})"
    assert key.startswith("project_pair float32 2×4×64×8×8 on cpu, torch")
    assert key.endswith(f"kernels {load('cpu', '_C').sources}")
    assert re.fullmatch(r"\d+\.\d+.*-[0-9a-f]{12}", load("cpu", "_C").sources)
    monkeypatch.setattr(trial, "_try", lambda *_: pytest.fail("tried again"))
    project_pair.project_pair(*operands())
    assert chosen() == (key, wins, why)
    project_pair.project_pair(*operands(40))  # of the same size by powers of two


def test_a_kernel_that_is_right_and_slow_is_left(card):
    card.seconds = 0.02
    project_pair.project_pair(*operands())
    _, wins, why = chosen()
    assert not wins and " s over " in why


@pytest.mark.parametrize(
    "wrong", [lambda x: x * 1.001, lambda x: x * torch.nan], ids=["off", "NaN"]
)
def test_a_kernel_that_is_wrong_is_left_and_the_log_warns(card, monkeypatch, caplog, wrong):
    slow_torch(monkeypatch)
    run = project_pair.run_project_pair
    monkeypatch.setattr(
        project_pair, "run_project_pair", lambda *given: tuple(map(wrong, run(*given)))
    )
    with caplog.at_level(logging.WARNING):
        found = project_pair.project_pair(*operands())
    torch.testing.assert_close(found, torch_twin.project_pair(*operands()))
    assert not chosen()[1] and "off by" in caplog.text


@pytest.mark.parametrize(("factor", "wins"), [(1 + 1e-8, False), (1.0, True)])
def test_a_product_that_is_no_better_than_float32_is_left(card, monkeypatch, factor, wins):
    """Whatever its operands are: what comes of it is taken for float64's."""
    slow_torch(monkeypatch, "precise_product")
    run = precise_product.run_precise_product
    monkeypatch.setattr(
        precise_product, "run_precise_product", lambda *x: (run(*x)[0] * factor, run(*x)[1])
    )
    precise_product.precise_product(operands()[2].half())
    assert chosen()[1] == wins


def test_a_kernel_that_does_not_launch_is_left_and_the_log_warns(card, caplog):
    card.fails = True
    with caplog.at_level(logging.WARNING):
        project_pair.project_pair(*operands())
    assert "too many resources" in chosen()[2] and "too many resources" in caplog.text


def test_choices_outlive_a_process_in_the_store_that_is_given(card, monkeypatch):
    slow_torch(monkeypatch)
    kept = JsonTable(None)
    trial.keep_choices(kept.get, kept.put)
    project_pair.project_pair(*operands())
    key, wins, why = chosen()
    assert kept.get(key) == [wins, why] == [True, why]
    trial._choices.clear()
    monkeypatch.setattr(trial, "_try", lambda *_: pytest.fail("tried again"))
    project_pair.project_pair(*operands())
    assert chosen() == (key, wins, why)


@pytest.mark.parametrize("entry", [None, True, [1, "x"], [True], {"wins": True}, "x"])
def test_a_damaged_choice_is_made_again(card, entry):
    kept = JsonTable(None)
    trial.keep_choices(kept.get, kept.put)
    project_pair.project_pair(*operands())
    key, *made = chosen()
    kept.put(key, entry)
    trial._choices.clear()
    project_pair.project_pair(*operands())
    assert chosen()[1:] == tuple(kept.get(key)) and isinstance(made[0], bool)


def test_a_kernel_that_lacked_memory_is_tried_again(card, monkeypatch, caplog):
    slow_torch(monkeypatch)
    run = project_pair.run_project_pair

    def exhausted(*given):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(project_pair, "run_project_pair", exhausted)
    with caplog.at_level(logging.WARNING):
        project_pair.project_pair(*operands())
    assert not trial.list_choices() and "out of memory" in caplog.text
    monkeypatch.setattr(project_pair, "run_project_pair", run)
    project_pair.project_pair(*operands())
    assert chosen()[1]


NO_FILES = """
import os, sys, torch
from pathlib import Path
import prolora
from prolora.core.ops import native, trial
native.serving = lambda device: native.Choice(native.EXTENSION.kernels, cuda=False)
native.choose = lambda op, device: native.Choice(native.EXTENSION.kernels, cuda=True)
trial._try = lambda *given: (False, "a test")
prolora.project((torch.randn(64, 4), torch.randn(4, 48)), *torch.randn(2, 64, 48), rank=16)
assert trial.list_choices()
print(sorted(str(path) for path in Path(os.environ["HOME"]).rglob("*")))
"""


def test_the_mathematics_writes_nothing(tmp_path):
    load("cpu", "_C")
    assert run_fresh(NO_FILES, HOME=str(tmp_path), XDG_CACHE_HOME="", PROLORA_CACHE="").endswith(
        "[]\n"
    )


def test_every_op_is_tried(card, monkeypatch):
    monkeypatch.setattr(stacks, "CPU_AS_GPU", True)
    u, _, x = operands()
    overlap_table([u], [u])
    panel_qr(x)
    small_svd(u)
    small_singular_values(u)
    project_pair.project_pair(*operands())
    _, _, *ends = tridiagonal.tridiagonalise(u.mT @ u)
    tridiagonal.tridiagonal_vectors(*ends, tridiagonal.tridiagonal_values(*ends, 3))
    weight = planted(768, 768, power_law(768, 0.5))[0].half()
    assert prolora.truncated_svd(weight[None], 32).ok
    tried = {key.partition(" ")[0] for key in trial.list_choices()}
    assert tried == set(native.ON_CPU)
