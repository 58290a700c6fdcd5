"""Folders of LoRAs: weights are looked at once for all, one bad file stops none, runs go on."""

import os
import signal
import time
from importlib import import_module

import pytest
import torch
from fleet_files import some_tensors
from fresh import forks, start_fork
from lora_files import read_header, same_bits
from mini import lora_tensors, source_weights, write_case
from safetensors.torch import load_file, save_file

import prolora
from prolora import adapters
from prolora.bases.cache import basis_cache as cache_module


@pytest.fixture
def folder(tmp_path):
    """Three LoRAs that differ in values, ranks and modules, and the two bases."""
    lora, source, target = write_case(tmp_path)
    loras = tmp_path / "loras"
    loras.mkdir()
    for name, rank, modules in (("a", 4, 12), ("b", 2, 12), ("c", 4, 5)):
        save_file(some_tensors(rank, modules), loras / f"{name}.safetensors")
    lora.unlink()
    return sorted(loras.iterdir()), source, target, tmp_path / "moved"


def counted(monkeypatch):
    """Modules whose weight is read, in order."""
    read, real = [], prolora.Base.read
    monkeypatch.setattr(
        prolora.Base, "read", lambda base, name: read.append((base.name, name)) or real(base, name)
    )
    return read


@pytest.mark.parametrize("method", ["auto", "prolora"])
def test_together_they_become_what_each_becomes_alone(folder, tmp_path, method):
    loras, source, target, moved = folder
    options = {"method": method, "threshold": 0}
    for outcome in prolora.transfer_many(loras, source, target, moved, **options):
        alone = tmp_path / "alone.safetensors"
        more = options | {"out": alone, "overwrite": True, "cache": tmp_path / "cache"}
        report = prolora.transfer(outcome.lora, source, target, **more).report
        assert outcome.status == "moved" and str(report.modules) == str(outcome.report.modules)
        assert same_bits(outcome.out, alone)


@pytest.mark.parametrize("method, reads", [("prolora", 2), ("auto", 1)])
def test_a_weight_is_read_as_often_for_many_as_for_one(folder, monkeypatch, aged, method, reads):
    loras, source, target, moved = folder
    read = counted(monkeypatch)
    prolora.transfer_many(loras, source, target, moved, method=method)
    # Once to be judged, and once to be used, if the method uses it.
    assert {read.count(which) for which in read} == {reads}


def test_a_result_of_anything_else_is_refused_and_stays(folder):
    loras, source, target, moved = folder
    prolora.transfer_many(loras, source, target, moved)

    def statuses(**options):
        found = prolora.transfer_many(loras, source, target, moved, **options)
        return [outcome.status for outcome in found]

    assert statuses() == statuses(cache=moved.parent / "c") == ["already there"] * 3
    assert statuses(strength=0.5) == statuses(dtype=torch.float16) == ["failed"] * 3
    save_file(lora_tensors(3), loras[0])  # another LoRA of that name
    out = moved / loras[1].name
    out.write_bytes(out.read_bytes()[:-8])  # cut off
    assert statuses() == ["failed", "failed", "already there"]
    assert statuses(overwrite=True) == ["moved"] * 3
    assert read_header(out)["prolora.lora_hash"].startswith("sha256:")
    weights = next(target.glob("*.safetensors"))
    tensors = load_file(weights)
    tensors[next(iter(tensors))] *= 1.01
    save_file(tensors, weights)  # another base of that name
    assert statuses() == ["failed"] * 3


@forks
def test_a_run_that_is_killed_goes_on_where_it_was(folder):
    loras, source, target, moved = folder

    def wait_in_the_second(done, total, name):
        if name.startswith("LoRA 2"):
            time.sleep(60)

    process = start_fork(
        lambda: prolora.transfer_many(loras, source, target, moved, progress=wait_in_the_second)
    )
    until = time.monotonic() + 60
    while not (moved / loras[0].name).exists() and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    outcomes = prolora.transfer_many(loras, source, target, moved)
    assert [o.status for o in outcomes] == ["already there", "moved", "moved"]


def test_progress_names_the_loras_and_what_is_done(folder):
    loras, source, target, moved = folder
    said = []
    prolora.transfer_many(
        loras, source, target, moved, method="prolora", progress=lambda *what: said.append(what)
    )
    for i, lora in enumerate(loras):
        start = f"LoRA {i + 1} of 3: "
        words = [(*what, n.removeprefix(start)) for *what, n in said if n.startswith(start)]
        assert words[-2][:2] == (8, 8) or lora.name == "c.safetensors"
        assert words[-1][0] == words[-1][1] and words[-1][2] == f"writing {lora.name}"
    assert all(name.startswith("LoRA ") for _, _, name in said)


def test_inputs_are_never_written_to(folder):
    loras, source, target, _ = folder
    before = {path: path.read_bytes() for path in loras}
    outcomes = prolora.transfer_many(loras, source, target, loras[0].parent, overwrite=True)
    assert all(isinstance(outcome.error, prolora.errors.OutputError) for outcome in outcomes)
    assert {path: path.read_bytes() for path in loras} == before


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied"),
        MemoryError(),
        RecursionError("too deep"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("where", ["read_adapter", "cut_rank"])
def test_an_error_inside_one_lora_stops_no_other(folder, monkeypatch, error, where):
    loras, source, target, moved = folder
    module, is_bad = {
        "read_adapter": (adapters, lambda lora, **_: lora.path == loras[1]),
        # Of the second LoRA alone every update has rank 2.
        "cut_rank": (
            import_module("prolora.moving.ledger"),
            lambda update, *_: update.rank == 2,
        ),
    }[where]
    real = getattr(module, where)

    def fail(*arguments, **options):
        if is_bad(*arguments, **options):
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(module, where, fail)
    outcomes = prolora.transfer_many(loras, source, target, moved, method="copy")
    assert [outcome.status for outcome in outcomes] == ["moved", "failed", "moved"]
    assert isinstance(outcomes[1].error, prolora.ProLoRAError)
    said = error.strerror if isinstance(error, OSError) else str(error) or type(error).__name__
    assert said in str(outcomes[1].error)
    assert outcomes[1].to_dict()["error"]["message"]


def test_files_that_no_system_or_parser_takes_stop_no_other(folder):
    loras, source, target, moved = folder
    huge, long = loras[0].with_name("huge.safetensors"), loras[0].with_name("x" * 300)
    tensors = load_file(loras[0])
    save_file(tensors, huge, {"unet.r": "1" + "0" * 400})
    raw = huge.read_bytes()
    huge.write_bytes(raw.replace(b'"1' + b"0" * 400 + b'"', b"  1" + b"0" * 399 + b"0"))
    outcomes = prolora.transfer_many([huge, long, *loras], source, target, moved)
    assert [outcome.status for outcome in outcomes][1:] == ["failed"] + ["moved"] * 3


def test_an_interruption_is_no_failure_of_a_lora(folder, monkeypatch):
    loras, source, target, moved = folder

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(adapters, "read_adapter", stop)
    with pytest.raises(KeyboardInterrupt):
        prolora.transfer_many(loras, source, target, moved)


def test_a_result_of_bases_in_memory_is_not_known_again_since_they_may_be_others(folder):
    loras, _, target, moved = folder
    weights = source_weights()
    for factor, status in ((1.0, "moved"), (2.0, "failed")):
        source = {f"{name}.weight": factor * weight for name, weight in weights.items()}
        (outcome,) = prolora.transfer_many(loras[:1], source, target, moved, method="copy")
        assert outcome.status == status


def test_many_loras_without_a_cache_do_not_factorise_again(folder, monkeypatch, aged):
    loras, source, target, moved = folder
    real, calls = cache_module.find_projectors, []

    def count(stacks, *rest):
        calls.extend(len(stack) for stack in stacks)
        return real(stacks, *rest)

    monkeypatch.setattr(cache_module, "find_projectors", count)
    outcomes = prolora.transfer_many(loras, source, target, moved, method="prolora")
    assert [outcome.status for outcome in outcomes] == ["moved"] * 3 and sum(calls) == 16
