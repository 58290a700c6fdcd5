"""Rows and columns that a narrower target kept are found by the weights, and never guessed."""

import pytest
import torch
from diagonal import pair_up
from narrow import BLOCKS, as_base, sides, stranger, student, teacher
from spectra import related

from prolora.bases import Base
from prolora.comparison.comparison import compare
from prolora.comparison.width_matching import UNKNOWN, complete_by_order, match_rows
from prolora.comparison.width_selection import WidthFinder, select_base
from prolora.core.lowrank import LowRank
from prolora.errors import UnsupportedFormat

INSIDE = [name for name in sides() if name.startswith("transformer_blocks.")]


def find(source: Base, target: Base, modules=INSIDE):
    table = {name: name for name in target.shapes if name in source.shapes}
    pairs = [(name, name) for name in modules]
    found = WidthFinder(source, target).find(pairs, table)
    return {module: selection for (module, _), selection in found.items()}


def assert_right(found, kept=None):
    for name, selection in found.items():
        rows, columns = (kept or sides())[name]
        assert torch.equal(selection.rows, rows) and torch.equal(selection.columns, columns), name


@pytest.mark.parametrize(
    ("noise", "dtype"),
    pair_up([0.0, 1e-3, 1e-2, 0.2], [torch.float32, torch.float16, torch.bfloat16]),
)
def test_the_rows_and_columns_of_every_module_are_found(noise, dtype):
    found = find(as_base(teacher()), as_base(student(noise, dtype)))
    assert found.keys() == set(INSIDE)
    assert_right(found)
    rounding = {torch.float32: 0, torch.float16: 3e-4, torch.bfloat16: 3e-3}[dtype]
    for selection in found.values():
        assert abs(selection.residual - noise) <= rounding + 0.03 * noise


def test_independent_weights_are_no_selection():
    assert find(as_base(teacher()), as_base(stranger())) == {}


def test_modules_that_were_trained_anew_are_left_out_and_the_others_found():
    target, other = student(1e-3), stranger()
    anew = [name for name in INSIDE if "blocks.1.ff" in name or "blocks.2.attn1.to_q" in name]
    target |= {name: other[name] for name in anew}
    found = find(as_base(teacher()), as_base(target))
    assert found.keys() == set(INSIDE) - set(anew)
    assert_right(found)


def test_a_drift_beyond_the_limit_is_declined():
    assert find(as_base(teacher()), as_base(student(0.7))) == {}


def test_kept_channels_may_stand_in_any_order():
    target, kept = student(1e-3), sides()
    generator = torch.Generator().manual_seed(3)
    for i in range(BLOCKS):
        order = torch.randperm(
            target[f"transformer_blocks.{i}.ff.net.2"].shape[1], generator=generator
        )
        first, second = (f"transformer_blocks.{i}.ff.net.{x}" for x in ("0.proj", "2"))
        target[first], target[second] = target[first][order], target[second][:, order].contiguous()
        kept[first] = kept[first][0][order], kept[first][1]
        kept[second] = kept[second][0], kept[second][1][order]
    found = find(as_base(teacher()), as_base(target))
    assert found.keys() == set(INSIDE)
    assert_right(found, kept)


def test_rows_that_are_alike_are_not_guessed():
    """Two equal neurons of which the student kept one: which, no weight of the layer tells."""
    source, kept = teacher(), sides()
    name = "transformer_blocks.0.ff.net.0.proj"
    neurons, columns = kept[name]
    one = next(int(i) for i in neurons[5:] if i + 1 not in neurons)
    source[name][one + 1] = source[name][one]
    target = student() | {name: source[name][neurons][:, columns].contiguous()}
    found = find(as_base(source), as_base(target))
    assert_right(found)
    assert found.keys() == set(INSIDE)  # the layer that reads the neurons tells
    second = "transformer_blocks.0.ff.net.2"
    source[second][:, one + 1] = source[second][:, one]
    target[second] = source[second][kept[second][0]][:, neurons].contiguous()
    found = find(as_base(source), as_base(target))
    assert_right(found)
    assert found.keys() == set(INSIDE) - {name, second}


def test_dead_channels_of_an_embedding_are_told_by_the_other_modules():
    source, target, kept = teacher(), student(1e-3), sides()
    dead = kept["x_embedder"][0][10:20]
    for name in ("x_embedder", "context_embedder"):
        source[name][dead] = 0
        target[name] = source[name][kept[name][0]].contiguous()
    found = find(as_base(source), as_base(target))
    assert found.keys() == set(INSIDE)
    assert_right(found)


def test_one_wrong_channel_among_many_declines_the_module():
    """Its share of the residual is small; that of its own column is not."""
    source, target, kept = teacher(), student(), sides()
    name = "transformer_blocks.1.attn1.to_q"
    rows, columns = kept[name]
    other = next(i for i in range(96) if i not in columns)
    target[name] = target[name].clone()
    target[name][:, 4] = 0.05 * source[name][rows, other]
    found = find(as_base(source), as_base(target))
    assert found.keys() == set(INSIDE) - {name}


def test_convolutions_are_selected_by_channels():
    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.randn(24, 4, 3, 3, generator=generator),
        torch.randn(32, 24, 3, 3, generator=generator),
    )
    a, b = torch.arange(0, 24, 2), torch.arange(5, 25)
    source = {"conv_in": first, "down_blocks.0.resnets.0.conv1": second}
    target = {
        "conv_in": related(first[a], 1e-3, 1),
        "down_blocks.0.resnets.0.conv1": related(second[b][:, a], 1e-3, 2),
    }
    source, target = as_base(source), as_base(target)
    name = "down_blocks.0.resnets.0.conv1"
    found = find(source, target, [name])[name]
    assert torch.equal(found.rows, b) and torch.equal(found.columns, a)
    update = LowRank(torch.randn(32, 2), torch.randn(2, 24 * 9))
    wanted = update.dense().reshape(32, 24, 3, 3)[b][:, a].flatten(1)
    assert (found.take_update(update).dense() - wanted).norm() <= 1e-6 * wanted.norm()
    selected = select_base(source, {name: found})
    assert selected.shapes[name] == target.shapes[name]
    assert torch.equal(selected.read(name), second[b][:, a])
    assert torch.equal(selected.weights[name].read_rows(2, 5), second[b][:, a][2:5])


def test_equal_shapes_and_wider_targets_are_not_looked_at(monkeypatch):
    monkeypatch.setattr(Base, "read", lambda *a: pytest.fail("a weight was read"))
    assert find(as_base(teacher()), as_base(teacher())) == {}
    assert find(as_base(student()), as_base(teacher())) == {}


def test_the_weights_are_looked_at_once_for_several_loras(monkeypatch):
    source, target = as_base(teacher()), as_base(student())
    finder, pairs = WidthFinder(source, target), [(name, name) for name in INSIDE]
    table = {name: name for name in target.shapes}
    first = finder.find(pairs, table)
    monkeypatch.setattr(Base, "read", lambda *a: pytest.fail("a weight was read"))
    assert finder.find(pairs, table) == first


@pytest.mark.parametrize("seed", range(20))
def test_no_row_of_unrelated_matrices_is_matched(seed):
    generator = torch.Generator().manual_seed(seed)
    for c in (4, 16, 64, 300):
        ours, theirs = (torch.randn(n, c, generator=generator) for n in (400, 200))
        assert bool((match_rows(ours, theirs) == UNKNOWN).all())


@pytest.mark.parametrize("c", [6, 8, 64, 300])
def test_no_row_is_matched_with_another_whatever_the_noise(c):
    generator = torch.Generator().manual_seed(c)
    ours = torch.randn(300, c, generator=generator)
    rows = torch.randperm(300, generator=generator)[:200]
    for noise in (0, 1e-3, 1e-2, 0.1, 0.3, 1):
        theirs = ours[rows] + noise * torch.randn(200, c, generator=generator)
        match = match_rows(ours, theirs)
        wrong = (match != rows) & (match != UNKNOWN)
        assert int(wrong.sum()) == 0
        assert noise > 0.01 or torch.equal(match, rows)


def test_zero_rows_are_told_by_their_neighbours_where_these_leave_no_choice():
    u = UNKNOWN
    assert complete_by_order(torch.tensor([0, u, 2, 5]), 9).tolist() == [0, 1, 2, 5]
    assert complete_by_order(torch.tensor([u, 1, 2, 5]), 9).tolist() == [0, 1, 2, 5]
    assert complete_by_order(torch.tensor([3, 4, u, u]), 7).tolist() == [3, 4, 5, 6]
    for unsure in ([0, u, 3, 5], [3, u, 1, 0], [u, u, u, 3], [u, u, u, u]):
        assert complete_by_order(torch.tensor(unsure), 9).tolist() == unsure


def test_bases_are_compared_by_what_the_narrower_one_kept():
    found = compare(as_base(teacher()), as_base(student(1e-2)), rank=None)
    assert len(found.modules) == len(found.residuals) == 8 * BLOCKS - BLOCKS  # all but norm1.linear
    assert (
        found.other_shape == 0 and found.verdict.related and abs(found.verdict.drift - 1e-2) < 1e-3
    )
    assert any(
        "kept rows and columns of the source's to within 1.0" in s for s in found.sentences()
    )
    with pytest.raises(UnsupportedFormat, match="no weight of the target is a selection"):
        compare(as_base(teacher()), as_base(stranger()), rank=None)
