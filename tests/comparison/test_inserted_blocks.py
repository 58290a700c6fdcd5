"""Blocks that a deeper model has inserted are told from those it had before."""

import anima_depth
import pytest
import torch
from diagonal import pair_up

from prolora import LowRank, open_base
from prolora.adapters.adapter import Adapter
from prolora.comparison.block_matching import match_blocks, resolve_match
from prolora.comparison.comparison import compare
from prolora.workflow.plan import make_plan

INSERTED = {f"{anima_depth.STACK}.{i}" for i in anima_depth.INSERTED}


def find_sources(result):
    return {decision.target: decision.source for decision in result.decisions}


def test_anima_has_as_many_inserted_blocks_as_its_sizes_differ_by():
    """28 → 40, in the numbers of the deeper model: block 2 is 3 there, block 27 is 39."""
    origins = anima_depth.list_origins(28, anima_depth.INSERTED)
    assert len(origins) == 40 and len(INSERTED) == 12
    assert (origins[0], origins[3], origins[20], origins[39]) == (0, 2, 14, 27)


@pytest.mark.parametrize(
    ("insertion", "kind"), pair_up(list(anima_depth.INSERTIONS), ["noise", "low rank"])
)
def test_the_28_blocks_are_found_among_40_under_drift_of_half_their_norm(insertion, kind):
    source, target, truth = anima_depth.make_pair(insertion, 0.5, kind, 0)
    result = match_blocks(open_base(source), open_base(target))
    assert find_sources(result) == truth and not result.dropped
    for decision in result.decisions:
        before = decision.target in INSERTED and insertion != "fresh"
        assert (decision.resembles is not None) == before


def test_a_mixture_is_not_taken_for_a_block_however_far_few_directions_drift():
    """Distances say nothing where the drift is larger than the weights; overlaps still do."""
    source, target, truth = anima_depth.make_pair("mixture", 2.0, "low rank", 0)
    result = match_blocks(open_base(source), open_base(target))
    assert find_sources(result) == truth and not any(d.tied for d in result.decisions)


@pytest.mark.parametrize("insertion", anima_depth.INSERTIONS)
def test_beyond_what_can_be_told_blocks_are_declined_and_not_mistaken(insertion):
    """A copy may be taken for the block it is a copy of where that one is no longer recognised."""
    source, target, truth = anima_depth.make_pair(insertion, 4.0, "noise", 0)
    result = match_blocks(open_base(source), open_base(target))
    assert sum(decision.source is None for decision in result.decisions) > 12
    number = {name: int(name.rpartition(".")[2]) for name in truth}
    for decision in result.decisions:
        if decision.source is not None and decision.source != truth[decision.target]:
            before = truth[f"{anima_depth.STACK}.{number[decision.target] - 1}"]
            assert insertion in ("copy", "zeroed copy") and decision.source == before


def test_of_two_equal_copies_the_first_is_the_old_one_and_it_is_said_that_this_is_a_choice():
    source, target, truth = anima_depth.make_pair("copy", 0.0, "noise", 0)
    result = match_blocks(open_base(source), open_base(target))
    assert find_sources(result) == truth
    tied = {decision.target for decision in result.decisions if decision.tied}
    assert tied == {f"{anima_depth.STACK}.{i - 1}" for i in anima_depth.INSERTED}
    assert "12 with a copy as near" in result.rule
    sentences = compare(open_base(source), open_base(target), match=result, rank=None).sentences()
    assert any("12 blocks have a copy that is as near" in sentence for sentence in sentences)


def test_where_the_copy_comes_first_the_nearer_one_is_still_the_old_one():
    """The copy stands before its original here, and trained more."""
    weights = {f"blocks.{i}.attn.to_{x}": torch.randn(48, 48) for i in range(6) for x in "qkv"}
    target = {name.replace("blocks.3.", "blocks.4."): w for name, w in weights.items()}
    target = {
        f"blocks.{int(n.split('.')[1]) + (int(n.split('.')[1]) > 2)}.{n.split('.', 2)[2]}": w
        for n, w in weights.items()
    }
    for x in "qkv":
        one = weights[f"blocks.3.attn.to_{x}"]
        target[f"blocks.3.attn.to_{x}"] = one + 0.05 * torch.randn(48, 48)
    result = match_blocks(open_base(weights), open_base(target))
    assert find_sources(result)["blocks.4"] == "blocks.3"
    assert find_sources(result)["blocks.3"] is None
    assert not any(decision.tied for decision in result.decisions)


def test_a_lora_of_28_blocks_gets_its_places_among_40():
    source, target, truth = anima_depth.make_pair("zeroed copy", 0.1, "noise", 0)
    pair = open_base(source), open_base(target)
    adapter = Adapter(
        {
            name: LowRank(torch.ones(weight.shape[0], 1), torch.ones(1, weight.shape[1]))
            for name, weight in source.items()
            if ".attn" in name or ".ff." in name
        }
    )
    plan = make_plan(adapter, *pair, match_blocks(*pair))
    assert len(plan.pairs) == len(adapter.updates) == 280 and not plan.skipped
    assert {(pair.target, pair.source) for pair in plan.pairs if "attn1.to_q" in pair.target} == {
        (f"{block}.attn1.to_q", f"{origin}.attn1.to_q") for block, origin in truth.items() if origin
    }


def test_blocks_are_recognised_by_themselves_where_their_number_differs():
    source, target, truth = anima_depth.make_pair("zeroed copy", 0.1, "noise", 0)
    pair = open_base(source), open_base(target)
    assert find_sources(resolve_match("auto", *pair)) == truth
    assert resolve_match("auto", *pair[:1], pair[0]) == "auto"  # names tell
    assert resolve_match("name", *pair) == "name"
