"""A target that kept rows and columns of the source gets the LoRA's factors, cut alike."""

import json

import narrow
import pytest
import torch
from lora_files import relative_error
from safetensors.torch import save_file

import prolora
from prolora import adapters
from prolora.comparison.width_selection import WidthFinder


def write(path, tensors):
    save_file({f"{name}.weight": tensor for name, tensor in tensors.items()}, path)
    return path


@pytest.fixture
def case(tmp_path):
    lora = tmp_path / "lora.safetensors"
    save_file(narrow.lora(), lora)
    source = write(tmp_path / "teacher.safetensors", narrow.teacher())
    return lora, source, write(tmp_path / "student.safetensors", narrow.student(1e-2))


def expected(name):
    """The rows and columns of ΔW that the student has."""
    tensors, (rows, columns) = narrow.lora(), narrow.sides()[name]
    key = f"transformer.{name}"
    whole = tensors[f"{key}.lora_B.weight"].double() @ tensors[f"{key}.lora_A.weight"].double()
    return whole[rows][:, columns]


@pytest.mark.parametrize("options", [{}, {"method": "copy"}])
def test_the_written_lora_is_the_sliced_one(case, tmp_path, options):
    out = tmp_path / "out.safetensors"
    report = prolora.transfer_file(*case, out, **options)
    updates = adapters.read_adapter(out).updates
    assert len(updates) == 8 * narrow.BLOCKS == report.totals["mapped"]
    for name, update in updates.items():
        error = relative_error(update.dense().double(), expected(name))
        assert error < 1e-6, name
    assert report.coverage == 1 and report.verdict.related


def test_the_size_of_a_sliced_lora_is_that_of_what_is_left_beside_the_weights_that_are_left(case):
    source, sides = narrow.teacher(), narrow.sides()
    done = prolora.transfer(*case)
    updates, weights = 0.0, 0.0
    for name in done.adapter.updates:
        rows, columns = sides[name]
        updates += float(expected(name).square().sum())
        weights += float(source[name].double()[rows][:, columns].square().sum())
    wanted = (updates / weights) ** 0.5
    assert done.report.verdict.size == pytest.approx(wanted, rel=1e-5)
    # Advice reads no cut weight that is not in its comparison.
    advised = prolora.advise(case[1], case[2], case[0]).verdict.size
    assert advised == pytest.approx(wanted, rel=1e-2)


def test_the_report_says_what_was_sliced_and_how_well_it_fits(case):
    done = prolora.transfer(*case)
    row = next(row for row in done.report.modules if row.source.endswith("0.attn1.to_q"))
    assert abs(row.residual - 1e-2) < 1e-4
    assert "sliced to 72 of 96 rows and 72 of 96 columns, residual 1.0" in row.reason
    key = f"transformer.{row.source}"
    down, up = (narrow.lora()[f"{key}.lora_{x}.weight"].double() for x in "AB")
    whole = float((up @ down).square().sum())
    kept = float(done.adapter.updates[row.target].norm().square())
    assert abs(row.energy / whole - 1) < 1e-5
    assert abs(row.surviving_energy - kept / whole) < 1e-5
    assert "24 modules are narrower on the target" in str(done.report)
    assert json.loads(done.report.to_json())["modules"][0]["residual"] is not None


def test_biases_lose_the_rows_that_the_weight_lost(case, tmp_path):
    lora, source, target = case
    name = "transformer_blocks.0.attn1.to_q"
    bias = torch.randn(96)
    save_file(narrow.lora() | {f"transformer.{name}.lora_B.bias": bias}, lora)
    done = prolora.transfer(lora, source, target)
    assert torch.equal(done.adapter.vectors[f"{name}.bias"], bias[narrow.sides()[name][0]])


def test_a_dry_run_says_what_a_transfer_does(case):
    planned, done = prolora.plan_report(*case), prolora.transfer(*case).report
    assert planned.totals["mapped"] == done.totals["mapped"] == 24
    assert "sliced to" in planned.modules[0].reason
    assert planned.modules[0].residual == done.modules[0].residual


def test_several_loras_are_sliced_and_each_weight_is_matched_once(case, tmp_path, monkeypatch):
    lora, source, target = case
    second = tmp_path / "second.safetensors"
    save_file(narrow.lora(2), second)
    solved, solve = [], WidthFinder._solve_pair
    monkeypatch.setattr(
        WidthFinder, "_solve_pair", lambda self, *pair: solved.append(pair) or solve(self, *pair)
    )
    prolora.transfer_many([lora], source, target, tmp_path / "one")
    for_one = len(solved)
    outcomes = prolora.transfer_many([lora, second], source, target, tmp_path / "out")
    assert [outcome.status for outcome in outcomes] == ["moved", "moved"]
    assert len(solved) == 2 * for_one
    alone = prolora.transfer(second, source, target).adapter.updates
    for name, update in adapters.read_adapter(outcomes[1].out).updates.items():
        assert relative_error(update.dense(), alone[name].dense()) < 1e-6


def test_a_target_of_independent_weights_is_refused_with_both_shapes(case, tmp_path):
    lora, source, _ = case
    other = write(tmp_path / "other.safetensors", narrow.stranger())
    for run in (prolora.transfer, prolora.plan_report):
        with pytest.raises(
            prolora.ShapeMismatch, match="not a selection of the source's"
        ) as refused:
            run(lora, source, other)
        assert "72×72 on the target but 96×96 on the source" in str(refused.value)


def test_modules_that_are_no_selection_are_refused_and_the_others_moved(case, tmp_path):
    lora, source, _ = case
    name = "transformer_blocks.1.ff.net.2"
    mixed = narrow.student(1e-3) | {name: narrow.stranger()[name]}
    report = prolora.transfer(lora, source, write(tmp_path / "mixed.safetensors", mixed)).report
    assert report.totals["mapped"] == 23 and report.totals["refused"] == 1
    (row,) = report.rows("refused")
    assert row.source == name and "not a selection of the source's" in row.reason


def test_bases_of_equal_shapes_are_not_searched(case, tmp_path, monkeypatch):
    lora, source, _ = case
    monkeypatch.setattr(WidthFinder, "_solve_all", lambda *a: pytest.fail("searched"))
    target = {name: weight + 0.01 for name, weight in narrow.teacher().items()}
    done = prolora.transfer(lora, source, write(tmp_path / "same.safetensors", target))
    assert done.report.totals["mapped"] == 24
    assert all(row.residual is None for row in done.report.modules)


def test_a_wider_target_is_refused_without_reading_a_weight(case, tmp_path, monkeypatch):
    _, teacher, student = case
    lora = tmp_path / "narrow.safetensors"
    name = "transformer_blocks.0.attn1.to_q"
    save_file(
        {
            f"transformer.{name}.lora_A.weight": torch.randn(2, 72),
            f"transformer.{name}.lora_B.weight": torch.randn(72, 2),
        },
        lora,
    )
    monkeypatch.setattr(prolora.Base, "read", lambda *a: pytest.fail("a weight was read"))
    with pytest.raises(prolora.ShapeMismatch, match="source: no published data-free method"):
        prolora.transfer(lora, student, teacher)


def test_the_cache_tells_a_sliced_weight_from_the_whole_one(case, tmp_path):
    lora, source, target = case
    options = {"method": "prolora", "rank": 0.9, "threshold": 0, "cache": tmp_path / "cache"}
    first = prolora.transfer(lora, source, source, again=True, **options)
    second = prolora.transfer(lora, source, target, **options)
    third = prolora.transfer(lora, source, target, **options)
    plain = prolora.transfer(lora, source, target, **(options | {"cache": None}))
    assert first.report.totals["mapped"] == 24
    for name, update in plain.adapter.updates.items():
        for other in (second, third):
            assert relative_error(other.adapter.updates[name].dense(), update.dense()) < 1e-4
