"""The main job, end to end: what comes out, what the report says, and what is refused."""

import json
from importlib import import_module

import pytest
import torch
from diagonal import pair_up
from lora_files import read_header, read_lora
from mini import lora_tensors, shapes, source_weights, target_weights, write_folder

import prolora
from prolora import errors
from prolora.core import reference

BY_BASES = [name for name, method in prolora.METHODS.items() if method.split]


def expected_update(name, rank=0.9, method="prolora", columns=4):
    """ΔW of the target by the dense float64 formulas, from the raw tensors."""
    key = "lora_unet_" + name.replace(".", "_")
    tensors = lora_tensors(columns)
    delta = tensors[f"{key}.lora_up.weight"].double() @ tensors[f"{key}.lora_down.weight"].double()
    source, target = source_weights()[name], target_weights()[name]
    ks, kt = (reference.columns_for_energy(w, rank) for w in (source, target))
    return reference.project_dense(delta * 2 / columns, source, target, ks, kt, method)


@pytest.mark.parametrize(
    ("method", "format"), pair_up(BY_BASES, ["kohya", "diffusers", "peft", "comfy"])
)
def test_the_written_file_holds_the_update_of_the_dense_formula(case, tmp_path, method, format):
    lora, source, target = case
    out = tmp_path / ("out" if format == "peft" else "out.safetensors")
    chosen = {"method": method, "format": format, "threshold": 0, "rank": 0.9}
    prolora.transfer(lora, source, target, out=out, **chosen)
    back = read_lora(out)
    assert set(back.updates) == set(shapes(2))
    for name, update in back.updates.items():
        expected = expected_update(name, method=method)
        assert (update.dense().double() - expected).norm() < 3e-6 * expected.norm()


def test_every_module_ends_as_mapped_or_skipped_with_the_reason(case, tmp_path):
    lora, source, target = case
    report = prolora.transfer(lora, source, target, out=tmp_path / "out.safetensors").report
    assert {row.source for row in report.modules} == set(shapes(3))
    totals = report.totals
    assert (totals["mapped"], totals["skipped"], totals["refused"]) == (8, 4, 0)
    assert totals["coverage"] == pytest.approx(8 / 12)
    for row in report.rows("skipped"):
        assert row.reason == "the target has no such module" and row.rank_out == 0


@pytest.mark.parametrize("strength", [1, 0.5])
def test_the_report_agrees_with_the_reference(case, strength):
    how = {"threshold": 0, "method": "prolora", "rank": 0.9, "strength": strength}
    done = prolora.transfer(*case, **how)
    for row in done.report.rows("mapped"):
        m = row.measures
        expected = strength * expected_update(row.source)
        copied = expected_update(row.source, method="copy")
        assert row.norm_ratio == pytest.approx(float(expected.norm() / copied.norm()), rel=1e-4)
        distance = float((expected - copied).norm() / copied.norm())
        assert row.copy_distance == pytest.approx(distance, rel=1e-3)
        weights = source_weights()[row.source], target_weights()[row.source]
        overlap = prolora.similarity(*weights, rank=0.9)
        assert m.phi_left == pytest.approx(float(overlap.left), abs=1e-5)
        assert m.above_right == pytest.approx(float(overlap.above_right), abs=1e-5)
        blocks = m.range_energy + m.null_energy + m.range_null_energy + m.null_range_energy
        assert blocks == pytest.approx(1, abs=1e-5)
        assert row.rank_in == 4 and row.rank_out <= 8


def test_pairs_below_the_threshold_get_no_update_and_keep_their_numbers(case):
    lora, source, target = case
    free = prolora.transfer(lora, source, target, threshold=0, method="prolora", rank=0.9).report
    scores = sorted(min(r.measures.phi_left, r.measures.phi_right) for r in free.rows("mapped"))
    cut = (scores[2] + scores[3]) / 2
    done = prolora.transfer(lora, source, target, threshold=cut, method="prolora", rank=0.9)
    gated = [row for row in done.report.rows("skipped") if row.measures is not None]
    assert len(gated) == 3 and len(done.adapter.updates) == 5
    for row in gated:
        assert min(row.measures.phi_left, row.measures.phi_right) < cut
        assert "below the threshold" in row.reason and row.target is None


@pytest.mark.parametrize("match", ["auto", "similarity"])
def test_a_dry_run_has_the_keys_of_a_real_one_and_reads_no_weight(case, monkeypatch, match):
    """Where the weights decide which block feeds which, it counts blocks and names none."""
    lora, source, target = case
    how = {"threshold": 0, "method": "prolora", "rank": 0.9, "match": match}
    done = prolora.transfer(lora, source, target, **how)
    monkeypatch.setattr(prolora.Base, "read", lambda *a: pytest.fail("a weight was read"))
    dry = prolora.transfer(lora, source, target, match=match, dry_run=True).report
    places = {row.target for row in dry.rows("mapped")}
    assert places == ({None} if match == "similarity" else set(done.adapter.updates))
    assert dry.totals.keys() == done.report.totals.keys()
    for key in ("mapped", "skipped", "refused", "coverage"):
        assert dry.totals[key] == done.report.totals[key]
    assert dry.totals["energy_surviving"] is None
    json.dumps(dry.to_dict(), allow_nan=False)


@pytest.mark.parametrize("method", ["copy", "prolora"])
def test_what_was_kept_is_told_after_the_rank_was_cut(case, method):
    lora, source, target = case
    done = prolora.transfer(lora, source, target, method=method, threshold=0, out_rank=1)
    before = read_lora(lora).updates
    pairs = [(before[name].dense(), x.dense()) for name, x in done.adapter.updates.items()]
    energy, kept, apart = (
        sum(float(x.double().square().sum()) for x in tensors)
        for tensors in ([a for a, _ in pairs], [b for _, b in pairs], [b - a for a, b in pairs])
    )
    totals, told = done.report.totals, done.report.in_words()
    assert totals["energy_surviving"] == pytest.approx(kept / energy, rel=1e-4)
    assert totals["copy_distance"] == pytest.approx((apart / energy) ** 0.5, rel=1e-4)
    assert f"{kept / energy:.0%} of that was kept" in str(told)
    assert told.mark == "⚠" and "Cutting the rank took" in str(told)


def test_the_rank_is_cut_to_a_share_of_the_energy_or_of_the_loras_rank(case):
    lora, source, target = case
    options = {"threshold": 0, "method": "prolora", "rank": 0.9}
    whole = prolora.transfer(lora, source, target, **options)
    by_energy = prolora.transfer(lora, source, target, out_rank=0.9, **options)
    for row in by_energy.report.rows("mapped"):
        s = torch.linalg.svdvals(whole.adapter.updates[row.target].dense().double()).square()
        assert row.rank_out == int((s.cumsum(0) < 0.9 * s.sum()).sum()) + 1
        assert 0 <= row.rank_cut_energy <= 0.1 + 1e-6
    halved = prolora.transfer(lora, source, target, out_rank="50%", **options)
    for row in halved.report.rows("mapped"):
        assert row.rank_out == -(-row.rank_in // 2)


def test_metadata_is_kept_and_says_where_the_lora_belongs_now(case, tmp_path):
    lora, source, target = case
    out = tmp_path / "out.safetensors"
    prolora.transfer(lora, source, target, out=out, method="prolora")
    metadata = read_header(out)
    assert "trigger" in metadata["ss_tag_frequency"]
    assert metadata["ss_sd_model_name"] == "target"
    assert metadata["prolora.method"] == "prolora" and metadata["prolora.source"] == "source"


def test_the_result_does_not_depend_on_how_weights_are_stacked(case, monkeypatch):
    lora, source, target = case
    together = prolora.transfer(lora, source, target, threshold=0, method="prolora", rank=0.9)
    monkeypatch.setattr(import_module("prolora.bases.memory"), "STACK_BYTES", 1)
    alone = prolora.transfer(lora, source, target, threshold=0, method="prolora", rank=0.9)
    for name, update in alone.adapter.updates.items():
        wanted = together.adapter.updates[name].dense()
        torch.testing.assert_close(update.dense(), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", BY_BASES)
def test_a_lora_of_more_columns_than_a_layer_has_is_moved(case, method):
    """As one of rank 64 on the first convolution of a UNet, which reads 36 numbers."""
    _, source, target = case
    options = {"method": method, "threshold": 0, "rank": 0.9}
    moved = prolora.transfer(lora_tensors(30), source, target, **options).adapter.updates
    assert set(moved) == set(shapes(2))
    for name, update in moved.items():
        expected = expected_update(name, method=method, columns=30)
        assert (update.dense().double() - expected).norm() < 3e-6 * expected.norm()
        assert method == "copy" or update.rank <= 24


def test_a_target_of_another_width_is_refused_with_both_shapes(case, tmp_path):
    lora, source, _ = case
    wide = {name: torch.ones(32, 32) for name in shapes(2)}
    with pytest.raises(errors.ShapeMismatch, match="32×32 on the target but 24"):
        prolora.transfer(lora, source, write_folder(tmp_path / "wide", wide))


def test_a_lora_is_copied_between_bases_of_zeros():
    zeros = {name: torch.zeros(shape) for name, shape in shapes(3).items()}
    done = prolora.transfer(lora_tensors(), zeros, zeros, method="copy")
    before = read_lora(lora_tensors())
    for name, update in before.updates.items():
        assert torch.equal(done.adapter.updates[name].dense(), update.dense())


@pytest.mark.parametrize("empty", ["source", "target"])
def test_a_base_of_zeros_is_named_where_a_method_is_to_be_chosen(case, tmp_path, empty):
    lora, source, target = case
    tensors = {"source": source_weights(), "target": target_weights()}[empty]
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    folder = write_folder(tmp_path / "zeros", zeros)
    bases = (folder, target) if empty == "source" else (source, folder)
    with pytest.raises(errors.UnrelatedBases, match=r"zeros: every weight that .* is zero"):
        prolora.transfer(lora, *bases)
