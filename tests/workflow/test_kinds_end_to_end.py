"""Adapters of other kinds than LoRA through a whole transfer."""

import pytest
import reference
import torch
from mini import lora_tensors, shapes, source_weights, target_weights, write_case
from safetensors.torch import save_file

import prolora
from prolora.workflow.dry_run import plan_report


@pytest.fixture
def case(tmp_path):
    """A DoRA of the source, with a trained bias beside it."""
    lora, source, target = write_case(tmp_path)
    tensors = lora_tensors()
    for name in shapes(3):
        key = "lora_unet_" + name.replace(".", "_")
        tensors[f"{key}.dora_scale"] = 1.05 * source_weights()[name].norm(dim=1, keepdim=True)
        tensors[f"{key}.diff_b"] = torch.ones(24)
    save_file(tensors, lora)
    return lora, source, target


def test_a_dora_moves_as_merged_minus_base(case, tmp_path):
    report = prolora.transfer_file(*case, tmp_path / "out", method="prolora", rank=0.9, threshold=0)
    tensors = lora_tensors()
    for name, update in prolora.adapters.read_adapter(tmp_path / "out").updates.items():
        key = "lora_unet_" + name.replace(".", "_")
        up, down = (tensors[f"{key}.lora_{side}.weight"].double() for side in ("up", "down"))
        source, target = source_weights()[name].double(), target_weights()[name]
        merged = source + 0.5 * up @ down
        merged *= 1.05 * source.norm(dim=1, keepdim=True) / merged.norm(dim=1, keepdim=True)
        ks, kt = (reference.columns_for_energy(w, 0.9) for w in (source, target))
        expected = reference.project_dense(merged - source, source, target, ks, kt, "prolora")
        assert (update.dense().double() - expected).norm() < 3e-6 * expected.norm()
    # A bias goes where its module goes; the third block has no place on the target.
    assert (report.vectors, len(report.left_out)) == (8, 4)
    assert "4 tensors of the file stay behind" in " ".join(report.sentences())
    vectors = prolora.adapters.read_adapter(tmp_path / "out").vectors
    assert set(vectors) == {f"{name}.bias" for name in shapes(2)}
    assert all(torch.equal(vector, torch.ones(24)) for vector in vectors.values())


def test_a_dry_run_plans_a_dora(case):
    report = plan_report(*case)
    assert report.totals["mapped"] == 8 and (report.vectors, len(report.left_out)) == (8, 4)


def test_a_dry_run_reads_no_weight_and_factors_nothing(case, monkeypatch):
    from prolora.adapters.algorithms import truncation
    from prolora.bases import Base

    def never(*_):
        raise AssertionError("a dry run did work")

    monkeypatch.setattr(Base, "read", never)
    for name in ("truncate_dense", "truncate_product", "truncate_kronecker"):
        monkeypatch.setattr(truncation, name, never)
    done = plan_report(*case)
    assert {(row.source, row.target, row.shape) for row in done.rows("mapped")} == {
        (name, name, shape) for name, shape in shapes(2).items()
    }


def test_a_dry_run_refuses_what_a_transfer_would(case):
    lora, source, target = case
    tensors = lora_tensors()
    stem = "lora_unet_" + next(iter(shapes(3))).replace(".", "_")
    tensors[f"{stem}.dora_scale"] = torch.ones(7, 1)
    save_file(tensors, lora)
    for run in (plan_report, prolora.transfer):
        with pytest.raises(prolora.ShapeMismatch, match="DoRA magnitudes"):
            run(lora, source, target)


@pytest.mark.parametrize("run", [plan_report, lambda *case: prolora.transfer(*case).report])
def test_updates_that_need_weights_the_base_lacks_are_skipped_modules(case, run):
    lora, source, target = case
    tensors = lora_tensors()
    for i in range(2):
        stem = f"lora_te_text_model_encoder_layers_{i}_mlp_fc1"
        tensors[f"{stem}.lora_up.weight"] = torch.ones(6, 2)
        tensors[f"{stem}.lora_down.weight"] = torch.ones(2, 5)
        tensors[f"{stem}.dora_scale"] = torch.ones(6, 1)
    save_file(tensors, lora)
    report = run(lora, source, target)
    assert (report.totals["mapped"], report.totals["skipped"]) == (8, 6)
    assert report.coverage == pytest.approx(8 / 14) and report.left_out == {}
    rows = [row for row in report.rows("skipped") if row.source.startswith("text_encoder.")]
    assert [(row.shape, row.rank_in) for row in rows] == [((6, 5), 2)] * 2
    assert all("no such text encoder" in row.reason for row in rows)
    assert "8 of 14 modules" in str(report)
    with pytest.raises(prolora.LowCoverage, match="8 of 14 modules"):
        prolora.transfer(lora, source, target, min_coverage=0.6)
