"""The trial that decides between a kernel and torch, with a card played by the CPU."""

import logging
import os
import re
import sys
import time
from dataclasses import replace

import pytest
import torch
from backends import load
from spectra import planted, power_law, randn

import prolora
from prolora import errors
from prolora.bases.cache.tables import JsonTable
from prolora.core.ops import child, native, probe, project_pair, trial
from prolora.core.ops.panel_qr import panel_qr
from prolora.core.ops.precise_product import precise_product, run_precise_product
from prolora.core.ops.small_svd import small_singular_values, small_svd
from prolora.core.ops.subspace_overlap import subspace_overlap
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


# A child on another card: the ops but those known already; one of them ends it, or says something.
CHILD = """
import os, sys, time
device, *known = sys.argv[1:]
for op in {ops}:
    if op not in known:
        print("BEGIN", op, flush=True)
        {fault}
        print("END", op, "", flush=True)
"""


def play(monkeypatch, fault="pass"):
    program = CHILD.format(ops=sorted(probe.CASES), fault=fault)
    monkeypatch.setattr(child, "command", lambda: [sys.executable, "-S", "-c", program])


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(trial, "_choices", {})
    monkeypatch.setattr(trial, "_probes", {})
    play(monkeypatch)
    monkeypatch.setattr(trial, "_read", lambda key: None)
    monkeypatch.setattr(trial, "_write", lambda key, value: None)
    made = Card(load("cpu", "_C"))
    monkeypatch.setattr(native, "serving", lambda device: native.Choice(made, cuda=True))
    return made


@pytest.fixture
def table():
    """Where choices are kept for the next process."""
    kept = JsonTable(None)
    trial.keep_choices(kept.get, kept.put)
    return kept


def operands(m=64):
    u = torch.linalg.qr(randn(2, m, 8).float())[0]
    return u, u.flip(0), randn(2, 4, m).float()


def call_op(m=64):
    """Does the op, which is right whoever does it, and returns the choice that was made."""
    moved = project_pair.project_pair(*operands(m))
    torch.testing.assert_close(moved, project_pair.project_twice(*operands(m)))
    return next(iter(trial.list_choices().values()), None)


def change(monkeypatch, op="project_pair", **ways):
    monkeypatch.setitem(native.OPS, op, replace(native.OPS[op], **ways))


def slow_torch(monkeypatch, op="project_pair"):
    twin = native.OPS[op].twin

    def slow(*given):
        time.sleep(0.02)
        return twin(*given)

    change(monkeypatch, op, twin=slow)


def test_a_kernel_that_is_right_and_fast_is_taken_and_the_next_process_knows(card, monkeypatch):
    slow_torch(monkeypatch)
    wins, why = call_op()
    assert wins and " s over " in why
    (key,) = trial.list_choices()
    assert native.describe_installation()[f"trial of {key}"] == f"extension ({why})"
    assert key.startswith("project_pair float32 2×4×64×8×8 on cpu, torch")
    assert key.endswith(f"kernels {card.sources}")
    assert re.fullmatch(r"\d+\.\d+.*-[0-9a-f]{12}", card.sources)
    monkeypatch.setattr(trial, "_try", lambda *_: pytest.fail("tried again"))
    assert call_op() == (wins, why)
    call_op(40)  # of the same size by powers of two
    assert len(trial.list_choices()) == 1


@pytest.mark.parametrize("wrong", [1.001, torch.nan])
def test_a_kernel_that_is_wrong_is_left_and_the_log_warns(card, monkeypatch, caplog, wrong):
    slow_torch(monkeypatch)
    run = project_pair.run_project_pair
    change(monkeypatch, run=lambda *given: tuple(x * wrong for x in run(*given)))
    with caplog.at_level(logging.WARNING):
        assert not call_op()[0]
    assert "off by" in caplog.text


@pytest.mark.parametrize(("factor", "wins"), [(1 + 1e-8, False), (1.0, True)])
def test_a_product_that_is_no_better_than_float32_is_left(card, monkeypatch, factor, wins):
    """Whatever its operands are: what comes of it is taken for float64's."""
    slow_torch(monkeypatch, "precise_product")
    run = run_precise_product
    change(monkeypatch, "precise_product", run=lambda *x: (run(*x)[0] * factor, run(*x)[1]))
    precise_product(operands()[2].half())
    assert [choice[0] for choice in trial.list_choices().values()] == [wins]


@pytest.mark.parametrize(
    ("fault", "words"), [({"seconds": 0.02}, " s over "), ({"fails": True}, "too many resources")]
)
def test_a_kernel_that_is_slow_or_does_not_launch_is_left_and_the_log_says_so(
    card, caplog, fault, words
):
    vars(card).update(fault)
    with caplog.at_level(logging.INFO):
        wins, why = call_op()
    assert not wins and words in why and caplog.records[-1].getMessage().endswith(f"({why})")
    assert (caplog.records[-1].levelno == logging.WARNING) == ("fails" in fault)


FAULTS = {
    "os.abort() if op == 'project_pair' else 0": f"exit code {3 if os.name == 'nt' else -6}",
    "op == 'project_pair' and sys.exit('an illegal memory access was encountered')": "illegal",
    "time.sleep(9 * (op == 'project_pair'))": "it takes more than",
    "if op == 'project_pair': print('END', op, 'no such kernel'); continue": "no such kernel",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_that_ends_its_process_does_not_run_in_the_callers(
    card, table, monkeypatch, fault
):
    monkeypatch.setattr(child, "SECONDS", 0.7)
    play(monkeypatch, fault)
    slow_torch(monkeypatch)
    card.fails = True  # whoever runs it here is seen
    wins, why = call_op()
    assert why.startswith("it fails in a process of its own: ") and FAULTS[fault] in why
    place = f"on cpu, torch {torch.__version__}, kernels {card.sources}"
    assert not wins and set(table.get(place)) == set(probe.CASES)
    # The next process starts no child, and another op is not lost.
    trial._choices.clear(), trial._probes.clear()
    monkeypatch.setattr(child, "command", lambda: pytest.fail("a second child"))
    card.fails = False
    assert call_op() == (False, why)
    small_svd(operands()[0])
    assert " s over " in list(trial.list_choices().values())[1][1]


NOTHING_RUNS = {
    "no memory": "op == 'project_pair' and sys.exit('CUDA error: out of memory')",
    "no memory, said": "if op == 'project_pair': print('END', op, 'CUDA out of memory'); continue",
    "no interpreter": None,
}


@pytest.mark.parametrize("fault", NOTHING_RUNS.values(), ids=NOTHING_RUNS)
def test_what_has_not_run_in_a_process_of_its_own_is_left_this_time(
    card, table, monkeypatch, fault
):
    if fault:
        play(monkeypatch, fault)
    else:
        monkeypatch.setattr(child, "command", lambda: [])
    card.fails = True
    assert call_op() is None
    trial._probes.clear()
    play(monkeypatch)
    card.fails = False
    assert " s over " in call_op()[1]


def test_the_child_runs_every_kernel():
    load("cpu", "_C")
    assert child.probe_ops("cpu") == (dict.fromkeys(probe.CASES, ""), True)


def test_an_application_with_an_interpreter_inside_is_not_started_again(monkeypatch):
    assert child.command()[0] == sys.executable
    for other in ("/opt/app/ComfyUI", "", None):
        monkeypatch.setattr(child.sys, "executable", other)
        assert child.command() == []


def test_a_graph_takes_what_has_won_before_and_tries_nothing(card, table, monkeypatch):
    slow_torch(monkeypatch)
    monkeypatch.setattr(trial, "is_capturing", lambda device: True)
    assert call_op() is None
    monkeypatch.setattr(trial, "is_capturing", lambda device: False)
    call_op()
    trial._choices.clear()
    monkeypatch.setattr(trial, "is_capturing", lambda device: True)
    calls, run = [], project_pair.run_project_pair
    change(monkeypatch, run=lambda *x: calls.append(1) or run(*x))
    assert call_op()[0] and calls


@pytest.mark.parametrize("entry", [None, True, [1, "x"], [True], {"wins": True}, "x"])
def test_a_damaged_choice_is_made_again(card, table, entry):
    call_op()
    (key,) = trial.list_choices()
    table.put(key, entry)
    trial._choices.clear()
    assert call_op() == tuple(table.get(key))


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError, errors.KernelFailure])
def test_a_kernel_that_lacked_memory_is_tried_again(card, monkeypatch, caplog, error):
    slow_torch(monkeypatch)
    run = project_pair.run_project_pair

    def exhausted(*given):
        raise error("CUDA error: out of memory")

    change(monkeypatch, run=exhausted)
    with caplog.at_level(logging.WARNING):
        assert call_op() is None
    assert "out of memory" in caplog.text
    change(monkeypatch, run=run)
    assert call_op()[0]


def test_every_op_is_tried(card, monkeypatch):
    monkeypatch.setattr(stacks, "FORCE_BATCHED", True)
    u, _, x = operands()
    subspace_overlap([u], [u])
    panel_qr(x)
    small_svd(u)
    small_singular_values(u)
    call_op()
    weight = planted(768, 768, power_law(768, 0.5))[0].half()
    assert prolora.truncated_svd(weight[None], 32).ok
    tried = {key.partition(" ")[0] for key in trial.list_choices()}
    assert tried == probe.CASES.keys()
