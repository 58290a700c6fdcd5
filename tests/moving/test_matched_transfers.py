"""Transfers whose blocks are matched by similarity, and what becomes of blocks that are gone."""

import json

import pytest
import torch
from lora_files import read_lora
from mini import BLOCK, MODULES, lora_tensors, source_weights, target_weights, write_case
from spectra import related

import prolora
from prolora import Adapter, LowRank, open_base, transfer
from prolora.architectures.layouts import load_layout
from prolora.errors import UnrelatedBases

PLACE = BLOCK.format("{}", "").removesuffix(".")
COPY = {"method": "copy", "strength": 1.0, "threshold": 0.0}


def student():
    """The last two of the source's three blocks, drifted, under the numbers 0 and 1."""
    source = source_weights()
    return {
        BLOCK.format(new, name): related(source[BLOCK.format(new + 1, name)], 0.1, 50 + 4 * new + i)
        for new in range(2)
        for i, name in enumerate(MODULES)
    }


def updates_of(source):
    adapter = read_lora(lora_tensors())
    assert set(adapter.updates) == set(source)
    return adapter.updates


def test_a_verdict_has_the_size_of_the_lora_beside_its_modules():
    source, updates = source_weights(), updates_of(source_weights())
    target = {name: related(weight, 0.05, 5) for name, weight in source.items()}
    stranger = next(iter(source))  # counts neither above nor below
    target[stranger] = target[stranger].roll(5, 0)
    dense = {n: update.dense().double() for n, update in updates.items() if n != stranger}
    weights = {name: source[name].double() for name in dense}
    wanted = torch.cat([x.flatten() for x in dense.values()]).norm()
    wanted /= torch.cat([x.flatten() for x in weights.values()]).norm()
    for method in ("auto", "copy"):
        done = prolora.transfer(lora_tensors(), source, target, method=method)
        assert done.report.verdict.size == pytest.approx(float(wanted), rel=1e-5)


def test_what_is_weakened_or_left_out_as_asked_is_not_told_as_lost_for_want_of_a_place():
    source = source_weights()
    target = {name: related(weight, 0.05, 5) for name, weight in source.items()}
    half = prolora.transfer(lora_tensors(), source, target, method="copy", strength=0.5)
    told = str(half.report.in_words())
    assert "at strength 0.5" in told and "unchanged" not in told and "all of that was kept" in told
    whole = prolora.transfer(lora_tensors(), source, target).report.in_words()
    part = prolora.transfer(lora_tensors(), source, target, blocks="*attn1*=0").report.in_words()
    assert part.headline == whole.headline and "All of the LoRA (100%) has a place" in str(part)
    planned = prolora.transfer(lora_tensors(), source, target, dry_run=True).report.in_words()
    assert "were not compared" in str(planned)


def test_a_renumbered_student_gets_the_updates_of_the_blocks_it_was_made_from():
    """By name it would get those of others; auto sees from the weights that it must not."""
    source, target = source_weights(), student()
    updates = updates_of(source)
    done = prolora.transfer(lora_tensors(), source, target, match="similarity", **COPY)
    by_itself = prolora.transfer(lora_tensors(), source, target)
    assert by_itself.report.renumbered == {
        PLACE.format(new): PLACE.format(new + 1) for new in (0, 1)
    }
    said = str(by_itself.report)
    assert "2 blocks of the target hold the weights of another block" in said
    assert "2 renumbered blocks" in by_itself.adapter.metadata["prolora.match"]
    assert by_itself.report.verdict == done.report.verdict
    for name, update in done.adapter.updates.items():
        distance = (by_itself.adapter.updates[name].dense() - update.dense()).norm()
        assert distance < 0.5 * update.norm()  # auto may damp it, and swaps no block
    assert len(done.adapter.updates) == 8
    for new in range(2):
        for name in MODULES:
            moved = done.adapter.updates[BLOCK.format(new, name)]
            wanted = updates[BLOCK.format(new + 1, name)]
            torch.testing.assert_close(moved.dense(), wanted.dense())
    assert done.report.verdict.related and done.report.verdict.drift == pytest.approx(0.1, rel=1e-2)


def test_methods_that_are_asked_for_and_dry_runs_keep_to_the_names():
    source, target = source_weights(), student()
    named = prolora.transfer(lora_tensors(), source, target, **COPY)
    assert not named.report.renumbered and named.report.match == "same name"
    assert named.report.verdict.cosine < 0.1
    assert transfer(lora_tensors(), source, target, dry_run=True).report.match == "same name"


def test_auto_leaves_out_a_stranger_among_related_modules_and_says_so():
    """It would be noise there: one module holds weights that no block of the source has."""
    source = source_weights()
    target = {name: related(weight, 0.05, 5) for name, weight in source.items()}
    stranger = BLOCK.format(2, "ff.net.2")
    target[stranger] = torch.randn_like(target[stranger])
    done = prolora.transfer(lora_tensors(), source, target)
    (row,) = done.report.rows("skipped")
    assert (row.source, row.target, row.rank_out) == (stranger, None, 0)
    assert abs(row.cosine) < 0.3 and "nothing in common" in row.reason
    assert stranger not in done.adapter.updates and len(done.adapter.updates) == 11
    # It says nothing of the others, whose drift alone decides.
    assert done.report.verdict.drift == pytest.approx(0.05, rel=0.05)
    forced = prolora.transfer(lora_tensors(), source, target, **COPY)
    assert stranger in forced.adapter.updates and "Careful" in str(forced.report)


def test_a_pairing_that_is_wrong_in_part_is_pointed_out():
    """One module holds the weights of another block: in total the bases still look related."""
    source = source_weights()
    target = {name: related(weight, 0.05, 5) for name, weight in source.items()}
    swapped = dict(target)
    swapped[BLOCK.format(2, "attn1.to_q")] = target[BLOCK.format(1, "attn1.to_q")]
    done = prolora.transfer(lora_tensors(), source, swapped, method="copy", threshold=0.0)
    said = str(done.report)
    assert done.report.verdict.related
    assert "Careful" in said and "1 pairs" in said
    fine = prolora.transfer(lora_tensors(), source, target, method="copy", threshold=0.0)
    assert "Careful" not in str(fine.report)


def test_the_report_holds_every_decision_with_its_runner_up_and_margin():
    bases = source_weights(), student()
    done = prolora.transfer(lora_tensors(), *bases, match="similarity", **COPY)
    told = json.loads(done.report.to_json())
    place = BLOCK.format(0, "").rpartition(".0.")[0]
    assert [(d["target"], d["source"]) for d in told["decisions"]] == [
        (f"{place}.{new}", f"{place}.{new + 1}") for new in range(2)
    ]
    for decision in told["decisions"]:
        assert decision["runner_up"] not in (None, decision["source"])
        assert decision["margin"] == pytest.approx(decision["score"] - decision["runner_up_score"])
        assert decision["margin"] > 0.3
    assert told["dropped_blocks"] == [f"{place}.0"]
    assert told["match"].startswith("similarity: 2 of 2 blocks")
    assert "match" in told["seconds"]


def test_text_encoders_are_projected_when_asked_for():
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 24, generator=generator)
    source = source_weights() | {name: weight}
    target = target_weights() | {name: related(weight, 0.1, 3)}
    tensors = lora_tensors()
    key = "lora_te_" + name.removeprefix("text_encoder.").replace(".", "_")
    tensors[f"{key}.lora_up.weight"] = torch.randn(24, 4, generator=generator)
    tensors[f"{key}.lora_down.weight"] = torch.randn(4, 24, generator=generator)
    how = {"method": "prolora", "threshold": 0.0}
    projected = prolora.transfer(tensors, source, target, text_encoder="project", **how)
    (row,) = [row for row in projected.report.modules if row.source == name]
    assert row.measures and row.reason == "projected (prolora)" and row.drift
    copied = prolora.transfer(tensors, source, target, **how)
    (row,) = [row for row in copied.report.modules if row.source == name]
    assert "carried over" in row.reason
    change = copied.adapter.updates[name].dense() - projected.adapter.updates[name].dense()
    assert change.norm() > 0.05 * copied.adapter.updates[name].norm()
    with pytest.raises(ValueError, match="`text_encoder` must be one of"):
        prolora.transfer(tensors, source, target, text_encoder="average")


def test_convolutions_are_moved_as_flattened_matrices_and_take_the_targets_form():
    """A 1×1 convolution becomes a linear layer and back; a 3×3 one keeps its kernel."""
    generator = torch.Generator().manual_seed(0)
    place = "down_blocks.1.attentions.0.proj_in"
    conv = "down_blocks.1.resnets.0.conv1"
    square = torch.randn(24, 24, generator=generator)
    kernel = torch.randn(24, 24, 3, 3, generator=generator)
    convolved = {place: square[..., None, None], conv: kernel}
    linear = {place: related(square, 0.1, 1), conv: related(kernel, 0.1, 2)}
    updates = {
        name: LowRank(*(torch.randn(size, generator=generator) for size in ((24, 2), (2, columns))))
        for name, columns in ((place, 24), (conv, 216))
    }
    for pair in ((convolved, linear), (linear, convolved)):
        done = prolora.transfer(Adapter(updates), *pair, method="prolora", rank=8, threshold=0.0)
        assert done.report.totals["mapped"] == 2
        for name in (place, conv):
            ours, theirs = (base[name].reshape(24, -1) for base in pair)
            wanted = prolora.project(updates[name].dense(), ours, theirs, rank=8)
            dense = done.adapter.updates[name].dense()
            torch.testing.assert_close(dense, wanted, atol=1e-4, rtol=1e-4)
        kernels = {conv: (3, 3)} | ({place: (1, 1)} if pair[1] is convolved else {})
        assert done.adapter.kernels == kernels


def test_nothing_is_written_where_no_block_is_recognised(tmp_path):
    lora, source, _ = write_case(tmp_path)
    generator = torch.Generator().manual_seed(0)
    apart = {n: torch.randn(w.shape, generator=generator) for n, w in target_weights().items()}
    for method in ("auto", "copy"):
        asked = {"match": "similarity", "method": method, "out": tmp_path / "out.safetensors"}
        with pytest.raises(UnrelatedBases, match="No-go: no transformer block"):
            prolora.transfer(lora, source, apart, **asked)
    assert not (tmp_path / "out.safetensors").exists()


def zeros(layout):
    zero = torch.zeros(())
    return {name: zero.expand(shape) for name, shape in load_layout(layout).shapes.items()}


def test_a_bk_student_gets_the_updates_of_the_blocks_it_was_made_from():
    """At full width, with weights: under equal names the very same transfer is refused."""
    old, new = (f"up_blocks.1.attentions.{i}.transformer_blocks.0.attn1.to_q" for i in (2, 1))
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(1280, 1280, generator=generator) / 36 for _ in range(2)]
    source, target = zeros("sd15"), zeros("bk-sdm-base")
    source[old], source[new] = weights
    target[new] = related(source[old], 0.1, 1)
    assert open_base(target).layout == "bk-sdm-base"
    updates = {
        name: LowRank(*(torch.randn(s, generator=generator) for s in ((1280, 4), (4, 1280))))
        for name in (old, new)
    }
    done = prolora.transfer(Adapter(updates), source, target)
    assert list(done.adapter.updates) == [new] and done.report.verdict.related
    moved, wanted = done.adapter.updates[new].dense(), updates[old].dense()
    assert (moved - wanted).norm() < 0.2 * wanted.norm()
    assert done.report.verdict.drift == pytest.approx(0.1, rel=1e-2)
    with pytest.raises(UnrelatedBases):
        prolora.transfer(Adapter(updates), source, target, match={new: new})
