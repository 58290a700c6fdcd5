"""What a value prints: what it is, in a line."""

import torch
from spectra import related, weights

from prolora import LowRank, project, similarity, truncated_svd


def test_a_value_prints_its_shape_rank_and_dtype():
    update = LowRank(torch.zeros(64, 8), torch.zeros(8, 48))
    assert repr(update) == "LowRank(64×48, rank 8, float32)"
    stack = LowRank(torch.zeros(3, 64, 8).half(), torch.zeros(3, 8, 48).half())
    assert repr(stack.to("meta")) == "LowRank(3 of 64×48, rank 8, float16 on meta)"


def test_a_basis_prints_how_it_was_made_and_how_good_it_is():
    basis = truncated_svd(weights(64, 48, 0).double(), 8)
    text = repr(basis)
    assert text.startswith("Basis(64×48, rank 8, float64, gram-f64, bound ") and len(text) < 70
    assert "bound ?" in repr(basis.to("meta"))
    several = truncated_svd(torch.stack([torch.eye(5), torch.ones(5, 5)]), 4)
    assert "2 of 5×5, rank 1 to 4" in repr(several)


def test_similarity_and_account_print_their_main_numbers():
    source = weights(24, 36, 0)
    target = related(source, 0.3, 1)
    found = similarity(source, target, rank=6)
    assert repr(found) == (
        f"Similarity(left {found.left:.2f}, right {found.right:.2f}, by chance 0.25 and 0.17)"
    )
    _, info = project(source, source, target, return_info=True)
    assert repr(info).startswith("ProjectionInfo(energy kept ") and len(repr(info)) < 90
