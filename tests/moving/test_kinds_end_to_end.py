"""Adapters of other kinds than LoRA through a whole transfer."""

from functools import partial

import pytest
import torch
from lora_files import read_lora
from mini import lora_tensors, shapes, source_weights, target_weights, write_case
from reports import Page
from safetensors.torch import save_file

import prolora
from prolora import transfer
from prolora.core import reference


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
    how = {"method": "prolora", "rank": 0.9, "threshold": 0}
    report = transfer(*case, out=tmp_path / "out", **how).report
    tensors = lora_tensors()
    for name, update in read_lora(tmp_path / "out").updates.items():
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
    assert "4 tensors of the file stay behind" in str(report)
    vectors = read_lora(tmp_path / "out").vectors
    assert set(vectors) == {f"{name}.bias" for name in shapes(2)}
    assert all(torch.equal(vector, torch.ones(24)) for vector in vectors.values())


def test_a_dry_run_reads_no_weight_and_factors_nothing(case, monkeypatch):
    from prolora import Base
    from prolora.adapters.algorithms import truncation

    def never(*_):
        raise AssertionError("a dry run did work")

    monkeypatch.setattr(Base, "read", never)
    for name in ("truncate_dense", "truncate_product", "truncate_kronecker"):
        monkeypatch.setattr(truncation, name, never)
    done = transfer(*case, dry_run=True).report
    assert {(row.source, row.target, row.shape) for row in done.rows("mapped")} == {
        (name, name, shape) for name, shape in shapes(2).items()
    }


def test_a_dry_run_refuses_what_a_transfer_would(case):
    lora, source, target = case
    tensors = lora_tensors()
    stem = "lora_unet_" + next(iter(shapes(3))).replace(".", "_")
    tensors[f"{stem}.dora_scale"] = torch.ones(7, 1)
    save_file(tensors, lora)
    for run in (partial(transfer, dry_run=True), transfer):
        with pytest.raises(prolora.errors.ShapeMismatch, match="DoRA magnitudes"):
            run(lora, source, target)


@pytest.mark.parametrize("dry_run", [True, False])
def test_updates_that_need_weights_the_base_lacks_are_skipped_modules(case, dry_run):
    lora, source, target = case
    tensors = lora_tensors()
    for i in range(2):
        stem = f"lora_te_text_model_encoder_layers_{i}_mlp_fc1"
        tensors[f"{stem}.lora_up.weight"] = torch.ones(6, 2)
        tensors[f"{stem}.lora_down.weight"] = torch.ones(2, 5)
        tensors[f"{stem}.dora_scale"] = torch.ones(6, 1)
    save_file(tensors, lora)
    report = transfer(lora, source, target, dry_run=dry_run).report
    assert (report.totals["mapped"], report.totals["skipped"]) == (8, 6)
    assert report.coverage == pytest.approx(8 / 14) and report.left_out == {}
    rows = [row for row in report.rows("skipped") if row.source.startswith("text_encoder.")]
    assert [(row.shape, row.rank_in) for row in rows] == [((6, 5), 2)] * 2
    assert all("no such text encoder" in row.reason for row in rows)
    assert "8 of 14 modules" in str(report)


def test_a_lora_of_biases_alone_is_not_told_as_a_dry_run(case, tmp_path):
    keys = ["lora_unet_" + name.replace(".", "_") for name in shapes(3)]
    save_file({f"{key}.diff_b": torch.ones(24) for key in keys}, case[0])
    report = transfer(*case, out=tmp_path / "out", method="copy").report
    assert report.vectors == 8 and "dry run" not in str(report)
    assert report.in_words().mark == "⚠"
    assert report.in_words().headline.endswith("normalisation layers alone; 8 of 12 go over.")


def test_only_a_lora_of_which_all_was_read_is_told_as_zero(case):
    lora = case[0]
    stem = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    parts = {"lora_up.weight": (6, 2), "lora_down.weight": (2, 5), "dora_scale": (6, 1)}
    save_file({f"{stem}.{part}": torch.ones(shape) for part, shape in parts.items()}, lora)
    for options in ({}, {"text_encoder": "skip"}):
        planned = transfer(*case, **options, dry_run=True).report
        assert "is zero" not in str(planned) and "dry run" in planned.in_words().headline
    zeros = {k: x * ("lora_up" not in k) for k, x in lora_tensors().items() if "alpha" not in k}
    keys = ["lora_unet_" + name.replace(".", "_") for name in shapes(3)]
    save_file(zeros | {f"{key}.diff_b": torch.ones(24) for key in keys}, lora)
    for asked in ({"dry_run": True}, {"method": "copy"}):
        moved = transfer(*case, **asked).report
        assert "is zero" not in str(moved) and moved.vectors == 8
    assert "8 of 12 go over" in moved.in_words().headline and "dry run" not in str(moved)


def write_kind(path, kind):
    """An adapter of a kind whose third block, which the target lacks, does most."""
    torch.manual_seed(0)
    tensors = {}
    for name, (out, inputs) in shapes(3).items():
        key, size = f"lora_unet_{name.replace('.', '_')}", 3.0 if ".2." in name else 1.0
        if kind == "lora":
            parts = {"lora_up.weight": (out, 2), "lora_down.weight": (2, inputs)}
        elif kind == "loha":
            pairs = {"a": (out, 2), "b": (2, inputs)}
            parts = {f"hada_w{i}_{side}": shape for i in (1, 2) for side, shape in pairs.items()}
        elif kind == "lokr":
            parts = {"lokr_w1": (2, 4), "lokr_w2_a": (out // 2, 2), "lokr_w2_b": (2, inputs // 4)}
        else:
            parts = {"diff": (out, inputs)}
        values = {f"{key}.{part}": torch.randn(shape) for part, shape in parts.items()}
        values[next(iter(values))] *= size
        tensors |= values
        if kind != "full":
            tensors[f"{key}.alpha"] = torch.tensor(0.02)
    save_file(tensors, path)


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "full"])
def test_a_dry_run_tells_the_share_that_the_transfer_tells(case, kind):
    write_kind(case[0], kind)
    planned = transfer(*case, dry_run=True).report
    done = transfer(*case, method="copy").report
    (told,) = (line for line in planned.in_words().lines if "has a place" in line)
    assert any(told.removesuffix(".") in line for line in done.in_words().lines)
    assert planned.totals["energy_mapped"] == pytest.approx(done.totals["energy_mapped"], rel=1e-4)
    assert done.totals["energy_mapped"] < 0.4 < done.coverage


def test_blocks_left_out_as_asked_have_a_place_in_a_dry_run_as_in_a_transfer(case):
    write_kind(case[0], "lora")
    blocks = {"down_blocks.1.attentions.0.transformer_blocks.0": 0}
    planned = transfer(*case, method="copy", blocks=blocks, dry_run=True).report
    done = transfer(*case, method="copy", blocks=blocks).report
    (place,) = (x.partition(",")[0] for x in done.in_words().lines if "has a place" in x)
    assert planned.in_words().lines[0] == f"{place}."
    assert "(21%)" in place and done.totals["energy_mapped"] < 0.15


def test_a_dry_run_counts_parts_where_it_cannot_know_what_they_do(case):
    """What a DoRA does takes the weights of its base, which a dry run does not read."""
    planned = transfer(*case, dry_run=True).report
    assert "8 of the LoRA's 12 parts (67%) have a place" in planned.in_words().lines[0]
    assert planned.totals["energy_mapped"] is None
    assert planned.to_dict()["modules"][0]["energy"] is None
    assert "nan" not in Page(planned.to_html()).inside["td"]
