"""What the weights of two bases promise, and what `auto` makes of it."""

import math
import re
from pathlib import Path

import pytest
import torch
from mini import lora_tensors, source_weights, target_weights
from spectra import related, weights

import prolora
from prolora.core.affinity import Affinity
from prolora.core.verdict import judge_pairs
from prolora.errors import NonFiniteWeights

MINI = Path(__file__).parents[2] / "examples" / "mini_family" / "weights"


def named(tensors):
    return {f"{name}.weight": tensor for name, tensor in tensors.items()}


def unrelated():
    return {
        name: weights(*w.shape, seed=900 + i)
        for i, (name, w) in enumerate(target_weights().items())
    }


@pytest.mark.parametrize("shape", [(24, 24), (64, 16), (16, 64)])
def test_drift_and_cosine_are_those_of_the_dense_weights(shape):
    source = weights(*shape, seed=3)
    target = related(source, 0.2, 4)
    found = Affinity.of(source, target)
    assert found.drift == pytest.approx(float((target - source).norm() / source.norm()), rel=1e-5)
    cosine = float((source * target).sum() / (source.norm() * target.norm()))
    assert found.cosine == pytest.approx(cosine, rel=1e-5)


def test_the_total_is_that_of_one_long_vector():
    pairs = [(weights(16, 24, seed=i), weights(16, 24, seed=50 + i)) for i in range(4)]
    total = Affinity.total(Affinity.of(*pair) for pair in pairs)
    source, target = (torch.cat([pair[side].flatten() for pair in pairs]) for side in (0, 1))
    assert total.drift == pytest.approx(float((target - source).norm() / source.norm()), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_neither_tiny_nor_huge_weights_overflow(scale):
    source = weights(16, 16, seed=1)
    plain = Affinity.of(source, related(source, 0.3, 2))
    scaled = Affinity.of(source.double() * scale, related(source, 0.3, 2).double() * scale)
    assert scaled.drift == pytest.approx(plain.drift, rel=1e-5)


def test_a_weight_that_is_not_finite_is_refused():
    bad = torch.ones(4, 4)
    bad[0, 0] = math.nan
    with pytest.raises(NonFiniteWeights):
        Affinity.of(torch.ones(4, 4), bad)


def test_auto_refuses_unrelated_bases_and_a_method_by_name_does_not():
    source, target = named(source_weights()), named(unrelated())
    reason = "these two models have nothing in common: they were trained apart"
    with pytest.raises(prolora.errors.UnrelatedBases, match=reason) as refused:
        prolora.transfer(lora_tensors(), source, target)
    first, _, rest = str(refused.value).partition("Next: `fit()`")
    assert "copy" not in first and ", or train the LoRA on " in rest
    assert re.search(r" \(cosine of the weights -?0\.0\d\)$", rest)
    done = prolora.transfer(lora_tensors(), source, target, method="copy")
    assert done.report.rows("mapped") and not done.report.verdict.related
    assert any("nothing in common" in line for line in str(done.report).splitlines())


def test_whatever_a_related_target_has_learnt_auto_writes_the_copy():
    """And `project` does with one weight what a transfer does with two models of one."""
    generator = torch.Generator().manual_seed(0)
    source, target = source_weights(), source_weights()
    for weight in target.values():
        new = torch.randn(len(weight), 1, generator=generator)
        new = new @ torch.randn(1, weight[0].numel(), generator=generator)
        weight += 0.3 * weight.norm() / new.norm() * new.reshape(weight.shape)
    moved, copied = (
        prolora.transfer(lora_tensors(), named(source), named(target), method=method)
        for method in ("auto", "copy")
    )
    assert moved.report.method == "copy" and moved.report.asked == "auto"
    ours, theirs = (done.state_dict() for done in (moved, copied))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    for name, update in copied.adapter.updates.items():
        found = prolora.project(update, source[name], target[name], method="auto")
        assert torch.equal(found.up, update.up) and torch.equal(found.down, update.down)


@pytest.mark.parametrize("target", ["pruned", "finetuned"])
def test_relatives_of_the_mini_family_are_a_go(target):
    done = prolora.transfer(MINI / "loras/thick.safetensors", MINI / "source", MINI / target)
    assert done.report.verdict.related and done.report.verdict.cosine > 0.9
    assert 0 < done.report.totals["energy_surviving"] <= 1


def turn(source, cosine, seed=9):
    """A weight of the source's norm, and of that cosine with it."""
    other = weights(*source.shape, seed=seed).double()
    source = source.double()
    other -= (other * source).sum() / source.square().sum() * source
    other *= source.norm() / other.norm()
    return cosine * source + (1 - cosine**2) ** 0.5 * other


@pytest.mark.parametrize(("cosine", "related"), [(0.25, False), (0.6, False), (0.75, True)])
def test_models_below_a_cosine_of_seven_tenths_are_unrelated(cosine, related):
    source = weights(16, 24, seed=1)
    target = turn(source, cosine)
    verdict = judge_pairs([Affinity.of(source, target)])
    assert verdict.related is related and verdict.cosine == pytest.approx(cosine)
    assert verdict.drift == pytest.approx((2 - 2 * cosine) ** 0.5)
    assert ("nothing in common" in verdict.sentence()) is not related
    update = torch.ones(16, 2), torch.ones(2, 24)
    if related:
        moved = prolora.project(update, source, target, method="auto")
        assert torch.equal(moved.dense(), torch.full((16, 24), 2.0))
    else:
        with pytest.raises(prolora.errors.UnrelatedBases):
            prolora.project(update, source, target, method="auto")


@pytest.mark.parametrize(("cosine", "whole"), [(0.25, 1.0), (0.35, (3 + 0.35) / 4)])
def test_a_pair_below_three_tenths_is_no_part_of_the_cosine(cosine, whole):
    """Beside three equal pairs of its norm."""
    source = weights(16, 24, seed=1).double()
    pairs = [Affinity.of(source, source)] * 3 + [Affinity.of(source, turn(source, cosine))]
    assert judge_pairs(pairs).cosine == pytest.approx(whole)


def make_pairs(strangers, relatives, heavy=1.0):
    """Affinities of pairs with nothing in common, and of equal ones of another energy."""
    strange = [
        Affinity.of(weights(16, 24, seed=2 * i), weights(16, 24, seed=2 * i + 1))
        for i in range(strangers)
    ]
    size = math.sqrt(heavy)
    equal = [size * weights(16, 24, seed=700 + i) for i in range(relatives)]
    return strange + [Affinity.of(weight, weight) for weight in equal]


def test_one_heavy_weight_that_is_the_same_does_not_make_relatives_of_strangers():
    pairs = make_pairs(strangers=44, relatives=1, heavy=44 * 19)  # 95 % of the energy
    assert Affinity.total(pairs).cosine > 0.9
    verdict = judge_pairs(pairs)
    assert not verdict.related and abs(verdict.cosine) < 0.3
    assert "nothing in common" in verdict.sentence()


def test_strangers_are_outvoted_by_as_many_relatives_of_their_energy():
    assert judge_pairs(make_pairs(strangers=10, relatives=10, heavy=1.02)).related
    assert not judge_pairs(make_pairs(strangers=11, relatives=10, heavy=1.02)).related


def test_weights_that_are_zero_in_both_bases_are_no_strangers():
    nothing = [Affinity.of(torch.zeros(16, 24), torch.zeros(16, 24))] * 5
    assert judge_pairs(make_pairs(strangers=0, relatives=2) + nothing).related


def test_auto_refuses_where_most_modules_are_unrelated_beside_a_heavy_frozen_one():
    source = source_weights()
    target = unrelated()
    heavy = next(iter(target))
    source[heavy] = source[heavy] * 30
    target[heavy] = source[heavy]
    with pytest.raises(prolora.errors.UnrelatedBases, match="nothing in common"):
        prolora.transfer(lora_tensors(), named(source), named(target))
