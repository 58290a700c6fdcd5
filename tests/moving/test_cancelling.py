"""What the caller's progress raises ends the call, and leaves nothing half done."""

import pytest

import prolora


class Stopped(Exception):
    """A stop button."""


def stop_at(call):
    """A progress that raises at its n-th call."""
    calls = []

    def progress(done, total, name):
        calls.append(name)
        if len(calls) == call:
            raise Stopped(name)

    return progress


@pytest.mark.parametrize(("method", "call"), [("auto", 1), ("prolora", 1), ("prolora", 2)])
def test_a_transfer_stops_and_writes_nothing(case, tmp_path, method, call):
    out = tmp_path / "out" / "moved.safetensors"
    out.parent.mkdir()
    known = {"method": method, "progress": stop_at(call), "cache": tmp_path / "cache"}
    with pytest.raises(Stopped):
        prolora.transfer(*case, out=out, **known)
    assert not list(out.parent.iterdir())
    prolora.transfer(*case, out=out, method=method, cache=tmp_path / "cache")


def test_of_several_loras_those_that_are_done_stay(case, tmp_path):
    lora, source, target = case
    loras = [lora, tmp_path / "second.safetensors"]
    loras[1].write_bytes(lora.read_bytes())
    with pytest.raises(Stopped):
        prolora.transfer_many(loras, source, target, tmp_path / "out", progress=stop_at(1))
    assert not list((tmp_path / "out").iterdir())
    outcomes = prolora.transfer_many(loras, source, target, tmp_path / "out")
    assert [outcome.status for outcome in outcomes] == ["moved", "moved"]


def test_a_comparison_and_a_survey_stop(case, tmp_path):
    lora, source, target = case
    with pytest.raises(Stopped):
        prolora.check(lora, source=source, target=target, progress=stop_at(1))
