"""What the weights of two bases promise, and what `auto` makes of it."""

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from mini import lora_tensors, source_weights, target_weights
from spectra import related, weights

import prolora
from prolora.core.affinity import Affinity
from prolora.core.verdict import (
    MAX_DAMPING,
    MIN_COSINE,
    MIN_DAMPING,
    Verdict,
    judge_affinity,
    judge_pairs,
)
from prolora.errors import NonFiniteWeights

MINI = Path(__file__).parents[2] / "examples" / "mini_family" / "weights"


def named(tensors):
    return {f"{name}.weight": tensor for name, tensor in tensors.items()}


def unrelated():
    return {
        name: weights(*w.shape, seed=900 + i)
        for i, (name, w) in enumerate(target_weights().items())
    }


def low_rank_drift(strength, rank=1):
    """A target that learnt something: a drift along few directions of every weight."""
    found = {}
    for i, (name, weight) in enumerate(list(source_weights().items())[:8]):
        generator = torch.Generator().manual_seed(i)
        m, n = weight.shape
        drift = torch.randn(m, rank, generator=generator) @ torch.randn(
            rank, n, generator=generator
        )
        found[name] = weight + strength * weight.norm() / drift.norm() * drift
    return found


@pytest.mark.parametrize("shape", [(24, 24), (64, 16), (16, 64)])
def test_drift_and_cosine_are_those_of_the_dense_weights(shape):
    source = weights(*shape, seed=3)
    target = related(source, 0.2, 4)
    found = Affinity.of(source, target)
    assert found.drift == pytest.approx(float((target - source).norm() / source.norm()), rel=1e-5)
    cosine = float((source * target).sum() / (source.norm() * target.norm()))
    assert found.cosine == pytest.approx(cosine, rel=1e-5)


def test_spread_is_near_one_for_noise_and_near_nothing_for_a_single_direction():
    source = weights(192, 128, seed=5)
    generator = torch.Generator().manual_seed(6)
    noise = torch.randn(192, 128, generator=generator)
    line = torch.outer(noise[:, 0], noise[0])
    assert Affinity.of(source, source + 0.1 * noise).spread > 0.85
    assert Affinity.of(source, source + 0.1 * line).spread < 0.05


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


def test_equal_bases_are_copied_at_full_strength():
    verdict = judge_affinity(Affinity.of(weights(32, 32, seed=1), weights(32, 32, seed=1)))
    assert verdict.go and verdict.strength == 1 and verdict.kappa == 0
    assert verdict.decide().method == "copy"


def test_the_more_a_target_learnt_the_weaker_the_update():
    told = [Verdict(drift, 0.99, 0.2) for drift in (0.0, 0.05, 0.1, 0.2)]
    strengths, kappas = [v.strength for v in told], [v.kappa for v in told]
    assert strengths == sorted(strengths, reverse=True) and strengths[0] == 1
    assert kappas == sorted(kappas) and kappas[0] == 0


def test_drift_that_looks_like_noise_weakens_nothing():
    noise = Verdict(0.3, 0.95, 0.6)
    assert noise.go and noise.decide().method == "copy" and noise.strength > 0.999


def test_a_small_drift_along_few_directions_weakens_little_and_a_large_one_is_a_no_go():
    merged, many = Verdict(0.04, 0.999, 0.02), Verdict(0.2, 0.98, 0.045)
    assert merged.go and merged.kappa < 2
    assert many.related and not many.go


def test_the_damping_that_bases_ask_for_has_no_knee_and_little_of_it_is_not_done():
    steps = torch.linspace(0, 1, 4001).tolist()
    by_spread = [Verdict(0.15, 0.97, spread) for spread in steps]
    by_drift = [Verdict(drift / 5, 0.97, 0.25) for drift in steps]
    for verdicts in (by_spread, by_drift):
        factors = [1 / (1 + verdict.kappa / 5) for verdict in verdicts]
        slopes = [b - a for a, b in itertools.pairwise(factors)]
        assert max(map(abs, slopes)) < 0.01
        assert max(abs(b - a) for a, b in itertools.pairwise(slopes)) < 0.001
        for verdict, factor in zip(verdicts, factors, strict=True):
            done = verdict.decide(strength="auto")
            if verdict.kappa < MIN_DAMPING:
                assert (done.method, done.strength, done.damping) == ("copy", 1.0, 0.0)
            else:
                assert (done.method, done.damping) == ("damped", verdict.kappa)
                assert verdict.strength == pytest.approx(factor)


def test_no_go_is_said_of_unrelated_bases_and_of_targets_that_learnt_something_else():
    apart, changed = Verdict(1.4, MIN_COSINE - 0.1, 0.9), Verdict(MAX_DAMPING / 10, 0.95, 0.2)
    assert not apart.go and "No-go" in apart.sentence() and "nothing in common" in apart.sentence()
    assert not changed.go and changed.related and "No-go" in changed.sentence()


def test_auto_refuses_unrelated_bases_and_a_method_by_name_does_not():
    source, target = named(source_weights()), named(unrelated())
    said = "these two models have nothing in common: they were trained apart. Nothing was written"
    with pytest.raises(prolora.UnrelatedBases, match=said) as refused:
        prolora.transfer(lora_tensors(), source, target)
    first, _, rest = str(refused.value).partition("Next: `fit()`")
    assert "copy" not in first and ", or train the LoRA on " in rest
    assert re.search(r" \(drift [\d.]+, cosine -?[\d.]+, spread [\d.]+\)$", rest)
    done = prolora.transfer(lora_tensors(), source, target, method="copy")
    assert done.report.rows("mapped") and not done.report.verdict.go
    assert any("No-go" in sentence for sentence in done.report.sentences())


def test_auto_damps_strongly_and_warns_where_the_target_became_something_else():
    source, target = named(source_weights()), named(low_rank_drift(0.3))
    done = prolora.transfer(lora_tensors(), source, target)
    assert done.report.verdict.related and not done.report.verdict.go
    assert done.report.method == "damped" and done.report.damping > 9
    assert any(sentence.startswith("No-go") for sentence in done.report.sentences())
    assert done.report.totals["energy_surviving"] < 0.95


def test_auto_damps_where_the_target_learnt_something_and_says_so():
    source, target = named(source_weights()), named(low_rank_drift(0.05))
    done = prolora.transfer(lora_tensors(), source, target)
    assert done.report.method == "damped" and done.report.asked == "auto"
    assert done.report.damping == pytest.approx(done.report.verdict.kappa)
    assert any("'auto' chose 'damped'" in sentence for sentence in done.report.sentences())
    row = done.report.rows("mapped")[0]
    wanted = prolora.damped(
        prolora.transfer(lora_tensors(), source, target, method="copy").adapter.updates[row.target],
        source[f"{row.source}.weight"],
        target[f"{row.target}.weight"],
        done.report.damping,
    )
    torch.testing.assert_close(done.adapter.updates[row.target].dense(), wanted.dense())
    assert row.norm_ratio < 1 and row.copy_distance > 0


def test_auto_copies_where_the_drift_is_noise():
    source = named(source_weights())
    target = {
        name: weight
        + 0.05
        * weight.norm()
        / weight.numel() ** 0.5
        * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
        for i, (name, weight) in enumerate(source.items())
    }
    done = prolora.transfer(lora_tensors(), source, target)
    assert done.report.method == "copy" and done.report.strength == 1


def test_the_look_of_the_lora_is_never_weakened_and_the_report_says_why():
    source, target = named(source_weights()), named(low_rank_drift(0.06))
    for method in ("auto", "copy"):
        done = prolora.transfer(
            lora_tensors(), source, target, method=method, strength="auto", look="lora"
        )
        assert done.report.method == "copy" and done.report.strength == 1
    chosen = prolora.transfer(lora_tensors(), source, target, look="lora")
    assert any("look 'lora' aims at" in sentence for sentence in chosen.report.sentences())
    with pytest.raises(prolora.InvalidOption, match="`look` must be one of target, lora"):
        prolora.transfer(lora_tensors(), source, target, look="mine")


def test_automatic_strength_is_applied_to_every_update():
    source, target = named(source_weights()), named(low_rank_drift(0.06))
    plain = prolora.transfer(lora_tensors(), source, target, method="copy")
    weaker = prolora.transfer(lora_tensors(), source, target, method="copy", strength="auto")
    factor = weaker.report.verdict.strength
    assert 0 < factor < 1 and weaker.report.strength == factor
    for name, update in weaker.adapter.updates.items():
        torch.testing.assert_close(update.dense(), factor * plain.adapter.updates[name].dense())


@pytest.mark.parametrize("target", ["pruned", "finetuned"])
def test_relatives_of_the_mini_family_are_a_go(target):
    done = prolora.transfer(MINI / "loras/thick.safetensors", MINI / "source", MINI / target)
    assert done.report.verdict.go and done.report.verdict.cosine > 0.9
    assert 0 < done.report.totals["energy_surviving"] <= 1


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
    assert judge_pairs(make_pairs(strangers=10, relatives=10, heavy=1.02)).go
    assert not judge_pairs(make_pairs(strangers=11, relatives=10, heavy=1.02)).related


def test_weights_that_are_zero_in_both_bases_are_no_strangers():
    nothing = [Affinity.of(torch.zeros(16, 24), torch.zeros(16, 24))] * 5
    assert judge_pairs(make_pairs(strangers=0, relatives=2) + nothing).go


def test_auto_refuses_where_most_modules_are_unrelated_beside_a_heavy_frozen_one():
    source = source_weights()
    target = unrelated()
    heavy = next(iter(target))
    source[heavy] = source[heavy] * 30
    target[heavy] = source[heavy]
    with pytest.raises(prolora.UnrelatedBases, match="nothing in common"):
        prolora.transfer(lora_tensors(), named(source), named(target))
