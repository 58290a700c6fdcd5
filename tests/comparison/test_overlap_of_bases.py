"""What two bases have in common: in the report of a transfer, and known when it is asked again."""

import math

import pytest
import torch
from mini import source_weights, target_weights, write_case

import prolora
from prolora.bases.cache.basis_cache import BasisCache
from prolora.comparison import overlap
from prolora.core.similarity import ANGLE_SHARES

pytestmark = pytest.mark.usefixtures("aged")
OPTIONS = {"method": "prolora", "rank": 0.9, "threshold": 0}


def moved(case, folder, **options):
    """The measures of every module of a transfer."""
    done = prolora.transfer(*case, cache=folder, **(OPTIONS | options))
    return {row.source: row.measures for row in done.report.rows("mapped")}


def test_the_report_has_the_principal_angles_of_every_pair(tmp_path):
    rows = moved(write_case(tmp_path), None, rank=8)
    shares = torch.tensor(ANGLE_SHARES, dtype=torch.float64)
    for name, found in rows.items():
        bases = [
            prolora.truncated_svd(weights()[name], 8)
            for weights in (source_weights, target_weights)
        ]
        for side, angles in (("U", found.angles_left), ("V", found.angles_right)):
            exact = prolora.principal_angles(*(getattr(basis, side) for basis in bases))
            assert angles == pytest.approx(exact.quantile(shares).tolist(), abs=1e-5)
            assert found.angle >= angles[2] > 0.01


def test_a_pair_that_is_known_is_not_computed_again(tmp_path, monkeypatch):
    case, folder = write_case(tmp_path), tmp_path / "cache"
    cold = moved(case, folder)
    monkeypatch.setattr(overlap, "angle_quantiles", None)
    monkeypatch.setattr(overlap, "basis_similarity", None)
    assert moved(case, folder) == cold


@pytest.mark.parametrize("note", [[0.5] * 4, [0.5] * 13 + ["x"]])
def test_a_note_of_another_kind_is_computed_again_and_the_others_are_not(
    tmp_path, monkeypatch, note
):
    case, folder = write_case(tmp_path), tmp_path / "cache"
    cold = moved(case, folder)
    real, calls, spoilt = BasisCache.pairs, [], []

    def pairs(self, source, target):
        notes = real(self, source, target)
        if not spoilt:
            spoilt.append(next(key for key in notes._entries if key.startswith(overlap.KEY_PREFIX)))
            notes.put(spoilt[0], note)
        return notes

    def counted(ours, theirs):
        calls.append(len(ours.U))
        return found(ours, theirs)

    found = overlap.angle_quantiles
    monkeypatch.setattr(BasisCache, "pairs", pairs)
    monkeypatch.setattr(overlap, "angle_quantiles", counted)
    again = moved(case, folder)
    assert calls == [1] and set(again) == set(cold)
    for name, measures in cold.items():
        assert again[name].angles_left == pytest.approx(measures.angles_left, abs=1e-9)
        assert math.isclose(again[name].phi_left, measures.phi_left, rel_tol=1e-9)
