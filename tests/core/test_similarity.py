"""Overlap of two weights' subspaces, with its chance level."""

import math

import pytest
import reference
import torch
from spectra import related, weights

from prolora import similarity
from prolora.core.svd import stacks
from prolora.errors import ShapeMismatch


@pytest.fixture(autouse=True, params=[False, True], ids=["in turn", "whole stacks"])
def both_ways(request, monkeypatch):
    """As on a CPU, and as on a GPU."""
    monkeypatch.setattr(stacks, "FORCE_BATCHED", request.param)


def test_similarity_equals_the_dense_formula():
    source = weights(40, 60, seed=0)
    target = related(source, 0.3, seed=1)
    found = similarity(source, target, rank=10)
    exact = [reference.leading_vectors(w, 10) for w in (source, target)]
    for side, (us, ut) in zip((found.left, found.right), zip(*exact, strict=True), strict=True):
        assert side == pytest.approx(float(reference.subspace_overlap(us, ut)) / 10, abs=1e-6)
    assert found.chance_left == 10 / 40 and found.chance_right == 10 / 60
    with pytest.raises(ShapeMismatch, match="differ"):
        similarity(source, target.T, rank=2)


def test_unrelated_weights_score_the_chance_level():
    stack = [torch.stack([weights(64, 64, seed=s + d) for s in range(8)]) for d in (0, 100)]
    found = similarity(*stack, rank=16)
    assert found.left.mean() == pytest.approx(0.25, abs=0.02)
    assert found.above_left.mean() == pytest.approx(0, abs=0.03)


def test_whole_spaces_say_nothing_and_the_above_chance_value_admits_it():
    found = similarity(weights(8, 8, 0), weights(8, 8, 1), rank=8)
    assert found.left == pytest.approx(1)
    assert math.isnan(found.above_left)
