"""What is expected of a pair of bases: shares of measured pairs near it, and nothing elsewhere."""

import json
import sys
from pathlib import Path

import pytest

from prolora.comparison import expectation
from prolora.comparison.expectation import expect_shares, find_quantile, load_calibration

QUALITY = Path(__file__).parents[2] / "bench/quality"


def expected(drift, spread, method="copy"):
    return next(e for e in expect_shares(drift, spread) if e.method == method)


def test_a_pair_like_the_near_ones_is_expected_to_give_nearly_all():
    copy = expected(0.035, 0.32)
    assert copy.low <= copy.share <= copy.high and copy.share > 0.7
    assert "digits" in copy.worlds and copy.kinds >= 1


def test_where_no_pair_like_it_was_measured_nothing_is_expected():
    assert expect_shares(20.0, 0.9) == ()
    assert expect_shares(0.0001, 0.0) == ()


def test_the_shipped_file_is_small_and_says_how_its_intervals_did():
    calibration = load_calibration()
    file = Path(expectation.__file__).with_name(expectation.FILE)
    assert file.stat().st_size < 100_000
    assert 0.5 < calibration.checked["coverage"] <= 1 and calibration.checked["answered"] >= 2 / 3
    assert {"copy", "auto", "prolora"} <= calibration.methods.keys()


def test_a_quantile_of_equal_weights_is_the_usual_one():
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert find_quantile(values, [1.0] * 5, 0.5) == 3.0
    assert find_quantile(values, [1.0] * 5, 0.2) == pytest.approx(1.5)
    assert find_quantile(values, [0, 0, 0, 0, 1.0], 0.1) == 4.0


def test_a_kind_with_more_seeds_does_not_count_more():
    calibration = load_calibration()

    def pair(kind, seed, share):
        names = {"world": "w", "arch": "a", "kind": kind, "seed": seed}
        return names | {"drift": 0.1, "spread": 0.3, "look": {"copy": [share]}}

    one = [pair("near", 0, 1.0), pair("far", 0, 0.0)]
    more = one + [pair("far", seed, 0.0) for seed in (1, 2)]
    for pairs in (one, more):
        made = expectation.Calibration({}, calibration.kernel, {}, {"copy": ""}, pairs)
        assert made.expect("copy", "look", 0.1, 0.3).share == pytest.approx(0.5)


def test_the_calibration_takes_every_world_and_both_yardsticks(tmp_path, monkeypatch):
    pytest.importorskip("PIL")
    monkeypatch.syspath_prepend(str(QUALITY))
    import calibrate

    for name, drift in (("quality", 0.1), ("quality_icons", 0.2)):
        rows = []
        for kind, loss in (("near", 0.2), ("far", 0.6)):
            losses = {"losses": {"copy @ 1": loss}, "none": 1.0, "oracle": 0.0}
            facts = {"verdict": {"drift": drift, "cosine": 0.99, "spread": 0.3}}
            names = {"arch": "unet", "kind": kind, "seed": 0, "adapter": "x"}
            rows.append(names | losses | facts | {"own": losses})
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(
        sys, "argv", ["", "--results", str(tmp_path), "--out", str(tmp_path / "out.json")]
    )
    calibrate.main()
    made = expectation.read_calibration(json.loads((tmp_path / "out.json").read_text()))
    assert made.worlds == ("digits", "icons")
    shares = [made.expect("copy", want, 0.14, 0.3).share for want in ("look", "own")]
    assert shares == [pytest.approx(0.6), pytest.approx(0.6)]
