"""What two bases have in common: in the report of a transfer, and known when it is asked again."""

import pytest
import torch
from mini import source_weights, target_weights, write_case

import prolora
from prolora.comparison import overlap
from prolora.core.subspaces import ANGLE_SHARES

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
