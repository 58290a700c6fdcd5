"""Blocks are told by their weights: renumbered, pruned, drifted and unrelated ones."""

import random
import re
from functools import cache
from pathlib import Path

import pytest
import sdxl
import torch
from diagonal import keep_some

from prolora import open_base
from prolora.comparison import block_matching
from prolora.comparison.block_matching import match_blocks
from prolora.errors import NonFiniteWeights, TooLittleMemory, UnsupportedFormat
from prolora.moving.plan import find_partners

MINI = Path(__file__).parents[2] / "examples" / "mini_family" / "weights"
BLOCK = re.compile(r"(.+\.transformer_blocks)\.(\d+)\.(.+)")


def found(result):
    return {decision.target: decision.source for decision in result.decisions}


def renumbered(weights, kept):
    """(weights of the blocks `kept(place, indices)`, numbered from 0, and which was which)."""
    places = {}
    for name in weights:
        if match := BLOCK.fullmatch(name):
            places.setdefault(match[1], set()).add(int(match[2]))
    origin = {
        f"{place}.{new}": f"{place}.{old}"
        for place, indices in places.items()
        for new, old in enumerate(kept(place, sorted(indices)))
    }
    back = {old: new for new, old in origin.items()}
    moved = {}
    for name, weight in weights.items():
        match = BLOCK.fullmatch(name)
        if not match:
            moved[name] = weight
        elif f"{match[1]}.{match[2]}" in back:
            moved[f"{back[f'{match[1]}.{match[2]}']}.{match[3]}"] = weight
    return moved, origin


def weights_of(member):
    base = open_base(MINI / member)
    return {name: base.read(name) for name in base.shapes}


@pytest.fixture(scope="module")
def source():
    return open_base(MINI / "source")


@pytest.fixture(scope="module")
def student():
    return open_base(MINI / "pruned")


@pytest.fixture(scope="module")
def matched(source, student):
    """What is found of the pruned student, and what was told on the way."""
    seen = []
    result = match_blocks(source, student, progress=lambda *step: seen.append(step))
    return result, seen


def test_the_block_map_of_the_pruned_student_is_recovered(matched):
    """It kept the first block of every place, all of the last attention's, none of the middle's."""
    result, seen = matched
    assert len(result.decisions) == 12
    assert all(decision.source == decision.target for decision in result.decisions)
    assert min(decision.margin for decision in result.decisions) > 0.8
    assert min(decision.score for decision in result.decisions) > 0.85
    assert "mid_block.attentions.0.transformer_blocks.1" in result.dropped
    assert len(result.dropped) == 11
    # Progress counts every matrix that is factorised.
    assert seen[-1][0] == seen[-1][1] == 8 * (23 + 12)
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)


@pytest.mark.parametrize("seed", range(2))
def test_a_student_that_kept_other_blocks_under_new_numbers_is_recovered(source, seed):
    """Any choice of blocks of the fine-tuned member; equal names would be wrong."""
    rng = random.Random(seed)

    def some(place, indices):
        return sorted(rng.sample(indices, rng.randint(1, len(indices))))

    target, origin = renumbered(weights_of("finetuned"), some)
    result = match_blocks(source, open_base(target))
    assert found(result) == origin
    assert any(new != old for new, old in origin.items())
    assert min(decision.margin for decision in result.decisions) > 0.7


def test_renumbered_places_are_recovered_like_those_of_the_bk_students(source):
    """The student's second attention of a stage is the teacher's third."""
    target = {
        name.replace("up_blocks.0.attentions.2.", "up_blocks.0.attentions.1."): weight
        for name, weight in weights_of("finetuned").items()
        if not name.startswith("up_blocks.0.attentions.1.")
    }
    table, rule = find_partners(source, open_base(target), match_blocks(source, open_base(target)))
    module = "up_blocks.0.attentions.{}.transformer_blocks.2.attn1.to_q"
    assert table[module.format(1)] == module.format(2)
    assert table["up_blocks.0.attentions.1.proj_in"] == "up_blocks.0.attentions.2.proj_in"
    assert table["time_embedding.linear_1"] == "time_embedding.linear_1"
    assert "up_blocks.0.resnets.1.conv1" not in table
    assert rule.startswith("similarity: 20 of 20 blocks")


@cache
def pruned_pair(drift, seed, scale=16):
    """An SDXL-shaped source, an SSD-1B-shaped student of a random choice of blocks, and the map."""
    rng = random.Random(seed)
    ours, theirs = (sdxl.shapes(name, scale) for name in ("sdxl", "ssd-1b"))
    wanted = {}
    for name in theirs:
        match = BLOCK.fullmatch(name)
        wanted.setdefault(match[1], set()).add(match[2])

    def some(place, indices):
        return sorted(rng.sample(indices, len(wanted.get(place, ()))))

    names, origin = renumbered({name: name for name in ours}, some)
    source = {name: sdxl.weight(name, shape, 0.0, seed) for name, shape in ours.items()}
    target = {new: sdxl.weight(old, ours[old], drift, seed) for new, old in names.items()}
    assert target.keys() == theirs.keys()
    return open_base(source), open_base(target), origin


@pytest.mark.parametrize("drift", keep_some([0.15, 1.0, 2.0], 2.0))
@pytest.mark.parametrize("seed", keep_some(range(3), 2))
def test_sdxl_shaped_students_are_recovered_up_to_a_drift_of_twice_the_weights(drift, seed):
    """At a sixteenth of the width; drift is ‖W_t − W_s‖ / ‖W_s‖."""
    source, target, origin = pruned_pair(drift, seed)
    result = match_blocks(source, target)
    assert found(result) == origin and len(origin) == 34
    assert min(decision.margin for decision in result.decisions) > 0.1
    assert len(result.dropped) == 70 - 34


@pytest.mark.parametrize("drift", [3.0, 4.0])
def test_beyond_that_blocks_are_declined_and_not_guessed(drift):
    source, target, origin = pruned_pair(drift, 0)
    result = match_blocks(source, target)
    declined = [decision for decision in result.decisions if decision.source is None]
    assert declined and (drift < 4 or len(declined) == 34)
    assert all(d.source in (None, origin[d.target]) for d in result.decisions)
    assert all(decision.score < block_matching.MIN_SCORE for decision in declined)


def test_signs_of_singular_vectors_decide_nothing():
    """The negative of a matrix has the same subspaces, with the signs of one side turned."""
    source, target, _ = pruned_pair(0.5, 0)
    turned = {name: -target.read(name) for name in target.shapes}
    plain, other = match_blocks(source, target), match_blocks(source, open_base(turned))
    assert plain.table == other.table
    for one, two in zip(plain.decisions, other.decisions, strict=True):
        assert one.runner_up == two.runner_up and one.score == pytest.approx(two.score, abs=1e-5)


def test_too_little_memory_for_matching_is_refused_before_a_weight_is_read(
    source, student, monkeypatch
):
    monkeypatch.setattr(type(source), "read", lambda *a: pytest.fail("a weight was read"))
    with pytest.raises(TooLittleMemory, match="needs"):
        match_blocks(source, student, max_memory="1MiB")


@pytest.mark.slow
def test_the_cache_gives_the_same_decisions(source, student, matched, tmp_path):
    cold = match_blocks(source, student, cache=tmp_path)
    assert match_blocks(source, student, cache=tmp_path) == cold
    for kept, exact in zip(cold.decisions, matched[0].decisions, strict=True):
        assert (kept.source, kept.runner_up) == (exact.source, exact.runner_up)
        assert kept.score == pytest.approx(exact.score, abs=1e-4)  # bases of 16 bits
    assert any(tmp_path.rglob("*.safetensors"))


def test_blocks_of_an_unrelated_model_of_the_same_shape_are_not_matched():
    source, _, _ = pruned_pair(0.0, 0)
    _, target, _ = pruned_pair(0.0, 1)
    result = match_blocks(source, target)
    assert not any(decision.source for decision in result.decisions) and not result.table
    # The variance that the deviations are counted in is that of unrelated subspaces.
    deviations = torch.tensor([decision.deviations for decision in result.decisions])
    assert 1 < deviations.mean() < 4  # the largest of 70 or so normal numbers
    names = [f"transformer_blocks.{i}.attn.to_q" for i in range(4)]
    generator = torch.Generator().manual_seed(2)
    small = [{n: torch.randn(8, 8, generator=generator) for n in names} for _ in range(2)]
    decisions = match_blocks(*map(open_base, small)).decisions
    # So small that chance makes a score of a third, which is three standard deviations.
    assert max(one.score for one in decisions) > 0.3 and not any(one.source for one in decisions)


def test_inserted_copies_are_refused_where_they_resemble_a_block_as_well(tmp_path):
    leaves = ("to_q", "to_k", "to_v")
    names = [f"transformer_blocks.{i}.attn.{leaf}" for i in range(3) for leaf in leaves]
    source = {name: sdxl.weight(name, (48, 48), 0.0, 0) for name in names}
    deeper = {}
    for new, old in enumerate((0, 1, 1, 2)):
        for leaf in leaves:
            there = f"transformer_blocks.{old}.attn.{leaf}"
            weight = sdxl.weight(there, (48, 48), 0.1 * new, 0)  # the copies score 0.8 to 0.99
            deeper[f"transformer_blocks.{new}.attn.{leaf}"] = weight
    with pytest.raises(UnsupportedFormat, match=r"blocks\.[12] and .*nearly alike.*`fit\(\)`"):
        match_blocks(open_base(source), open_base(deeper))
    # A new block between the old ones is no copy.
    deeper |= {n: torch.randn(48, 48) for n in deeper if n.startswith("transformer_blocks.2.")}
    assert [
        d.source and d.source[-1]
        for d in match_blocks(open_base(source), open_base(deeper)).decisions
    ] == ["0", "1", None, "2"]


def test_deviations_of_random_subspaces_are_standard_normal():
    generator = torch.Generator().manual_seed(0)
    stacks = [
        torch.linalg.qr(torch.randn(40, 24, k, generator=generator, dtype=torch.float64)).Q
        for k in (3, 5)
    ]
    ranks = [torch.full((40,), k) for k in (3, 5)]
    phi, chance, spread = block_matching._measure_overlaps(stacks[0], ranks[0], stacks[1], ranks[1])
    normal = (phi - chance) / spread.sqrt()
    assert abs(float(normal.mean())) < 0.05 and abs(float(normal.std()) - 1) < 0.05


def test_bases_without_common_blocks_and_damaged_weights_are_refused(source):
    with pytest.raises(UnsupportedFormat, match=r"different widths\. Only `fit"):
        match_blocks(source, open_base({"transformer_blocks.0.attn.to_q": torch.ones(8, 8)}))
    weights = weights_of("pruned")
    name = "up_blocks.0.attentions.2.transformer_blocks.1.attn1.to_k"
    weights[name] = weights[name].clone()
    weights[name][3, 4] = float("nan")
    with pytest.raises(NonFiniteWeights, match=re.escape(name)):
        match_blocks(source, open_base(weights))
