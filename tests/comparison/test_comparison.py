"""Go or no-go from weights alone: lineage, overlaps, coverage, and a picture of them."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import sdxl
import torch
from mini import BLOCK, source_weights, target_weights, write_case
from reports import Page
from spectra import related, weights

import prolora
from prolora import (
    NonFiniteWeights,
    UnrelatedBases,
    UnsupportedFormat,
    cli,
    open_base,
    similarity,
    truncated_svd,
)
from prolora.bases import load_layout, memory
from prolora.bases.cache import basis_cache
from prolora.comparison import comparison
from prolora.workflow.tables import map_pairs

MINI = Path(__file__).parents[2] / "examples" / "mini_family" / "weights"
INDEPENDENT = Path(__file__).parent / "data" / "independent.safetensors"


def judged(source, target):
    """The verdict without overlaps: it does not need them."""
    return comparison.compare(source, target, rank=None).verdict


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("source", "pruned"),
        ("source", "finetuned"),
        ("pruned", "source"),
        ("finetuned", "source"),
        ("pruned", "finetuned"),
        ("finetuned", "pruned"),
    ],
)
def test_relatives_of_the_mini_family_are_a_go_in_either_direction(source, target):
    verdict = judged(MINI / source, MINI / target)
    assert verdict.related and verdict.cosine > 0.95


@pytest.mark.parametrize("member", ["source", "pruned", "finetuned"])
def test_a_model_trained_apart_is_a_no_go_for_all_of_the_mini_family(member):
    """Same shape, data and labels, other initial weights; only its attention is kept, in float8."""
    for pair in ((MINI / member, INDEPENDENT), (INDEPENDENT, MINI / member)):
        verdict = judged(*pair)
        assert not verdict.related and abs(verdict.cosine) < 0.05
    found = comparison.compare(MINI / member, INDEPENDENT, rank=8)
    assert found.verdict == judged(MINI / member, INDEPENDENT) and abs(found.mean("above")) < 0.1
    said = " ".join(found.sentences())
    assert "nothing in common" in said and "No common lineage" in said
    with pytest.raises(UnrelatedBases, match=r"No-go: no transformer block.*beyond chance"):
        comparison.compare(MINI / member, INDEPENDENT, match="similarity")


def generated(seed, scale=32):
    """The attention weights of a Vega at a small width, another model for each seed."""
    shapes = sdxl.shapes("segmind-vega", scale, False)
    return {name: sdxl.weight(name, shape, 0.0, seed) for name, shape in shapes.items()}


def test_72_generated_pairs_are_told_apart_without_a_false_verdict():
    """36 drifted by 5 % to 60 % of their norm in directions of their own; 36 trained apart."""
    models = {seed: open_base(generated(seed)) for seed in range(9)}
    false_go = false_no_go = 0
    drifts = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6)
    for seed in range(6):
        for i, drift in enumerate(drifts):
            moved = {
                name: related(weight.read(), drift, 1000 * i + seed)
                for name, weight in models[seed].weights.items()
            }
            verdict = judged(models[seed], moved)
            assert verdict.drift == pytest.approx(drift, rel=1e-3)
            false_no_go += not (verdict.related and verdict.related)
    pairs = [(a, b) for a in models for b in models if a < b]
    for a, b in pairs:
        verdict = judged(models[a], models[b])
        false_go += verdict.related or verdict.related
    assert (len(pairs), len(drifts) * 6) == (36, 36)
    assert (false_go, false_no_go) == (0, 0)


def test_a_merged_lora_leaves_the_lineage_as_it_is():
    """However much it changes few directions: lineage is one thing, whether to move another."""
    generator = torch.Generator().manual_seed(0)
    source = generated(0)
    for drift in (0.02, 0.1, 0.3):
        merged = {}
        for name, weight in source.items():
            m, n = weight.shape
            delta = torch.randn(m, 2, generator=generator) @ torch.randn(2, n, generator=generator)
            merged[name] = weight + drift * weight.norm() * delta / delta.norm()
        verdict = judged(source, merged)
        assert verdict.related and verdict.spread < 0.3


def test_the_answer_is_in_plain_sentences_with_the_numbers():
    found = comparison.compare(MINI / "source", MINI / "pruned")
    said = found.sentences()
    assert said[0] == found.verdict.sentence()
    assert "Same lineage" in said[1] and f"cosine {found.verdict.cosine:.2f}" in said[1]
    assert "above chance" in said[2] and "140 of 140 pairs" in said[2]
    assert "96 of 184 modules (52%)" in said[-1] and "140 of 252 (56%)" in said[-1]
    told = json.loads(json.dumps(found.to_dict()))
    assert told["verdict"]["related"] and told["summary"] == said
    assert told["coverage"] == {"attention": [96, 184], "adaptable": [140, 252]}


def test_the_verdict_needs_no_decomposition(monkeypatch):
    source, target = MINI / "source", MINI / "finetuned"
    whole = comparison.compare(source, target)
    monkeypatch.setattr(basis_cache, "truncated_svd", None)
    quick = comparison.compare(source, target, rank=None)
    assert quick.verdict == whole.verdict and math.isnan(quick.mean("above"))
    assert quick.sweep == []
    assert not any("above chance" in sentence for sentence in quick.sentences())


def test_weights_of_one_shape_are_factorised_together_and_small_stacks_give_the_same(monkeypatch):
    """252 pairs of eight shapes; and stacks of one, as a tight bound of memory makes them."""
    calls, steps = [], []
    factorise = basis_cache.truncated_svd
    monkeypatch.setattr(
        basis_cache, "truncated_svd", lambda w, *a: calls.append(len(w)) or factorise(w, *a)
    )
    source, target = open_base(MINI / "source"), open_base(MINI / "finetuned")
    whole = comparison.compare(source, target, progress=lambda *at: steps.append(at))
    shapes = {target.shapes[module.target] for module in whole.modules}
    assert len(calls) == 2 * len(shapes) and sum(calls) == 2 * len(whole.modules) == 504
    assert steps[-1][:2] == (252, 252) and len(steps) == len(shapes)
    assert [m.target for m in whole.modules] == [n for n in target.shapes if n in told(whole)]

    few = dict(list(source.weights.items())[:40])
    source = replace(source, weights=few)
    apart, calls[:] = comparison.compare(source, target), []
    monkeypatch.setattr(memory, "STACK_BYTES", 1)
    alone = comparison.compare(source, target)
    assert set(calls) == {1} and [m.target for m in alone.modules] == [
        m.target for m in apart.modules
    ]
    for one, other in zip(alone.modules, apart.modules, strict=True):
        numbers = [flatten(m.to_dict()) for m in (one, other)]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-5, nan_ok=True)


def told(found):
    """The modules of the target."""
    return {module.target for module in found.modules}


def flatten(value):
    """All numbers in a structure."""
    if isinstance(value, dict):
        value = value.values()
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        return [] if isinstance(value, str) else [float(value)]
    return [number for part in value for number in flatten(part)]


@pytest.mark.parametrize("rank", [40, 0.9])
def test_a_row_of_the_sweep_is_the_similarity_at_that_rank(rank):
    names = [BLOCK.format(i, "attn1.to_q") for i in range(4)]
    source = {name: weights(64, 72, seed=i) for i, name in enumerate(names)}
    target = {name: related(source[name], 0.3 * i + 0.1, 50 + i) for i, name in enumerate(names)}
    found = comparison.compare(source, target, rank=rank)
    held = {m.target: min(m.columns_source, m.columns_target) for m in found.modules}
    assert [row.columns for row in found.sweep][:2] == [16, 32] and found.sweep[-1].whole == 4
    for row in found.sweep:
        asked = {name: row.columns if row.columns < held[name] else rank for name in names}
        exact = [similarity(source[name], target[name], rank=asked[name]) for name in names]
        for field in ("left", "right"):
            expected = [getattr(one, field).item() for one in exact]
            assert getattr(row, f"phi_{field}") == pytest.approx(sum(expected) / 4, abs=1e-5)
            chance = [getattr(one, f"chance_{field}").item() for one in exact]
            assert getattr(row, f"chance_{field}") == pytest.approx(sum(chance) / 4)
        above = [min(one.above_left.item(), one.above_right.item()) for one in exact]
        assert row.above == pytest.approx(sum(above) / 4, abs=1e-5)
        least = [min(one.left.item(), one.right.item()) for one in exact]
        assert row.passing == {f"{t:g}": sum(x >= t for x in least) for t in (0.7, 0.8, 0.9)}
        energy = [
            truncated_svd(w[name], asked[name]).energy.item()
            for w in (source, target)
            for name in names
        ]
        assert row.energy == pytest.approx(sum(energy) / 8, abs=1e-5)
    told = found.to_dict()
    assert [row["columns"] for row in told["sweep"]] == [row.columns for row in found.sweep]
    first = found.modules[0]
    assert told["modules"][0]["points"][-1] == [
        first.columns_source,
        first.columns_target,
        pytest.approx(first.phi_left),
        pytest.approx(first.phi_right),
    ]


def test_subspaces_are_kept_for_the_transfer_that_follows(tmp_path, monkeypatch):
    lora, source, target = write_case(tmp_path)
    options = {"rank": 0.9, "cache": tmp_path / "cache"}
    comparison.compare(source, target, **options)
    calls = []
    monkeypatch.setattr(basis_cache, "truncated_svd", lambda *a: calls.append(a))
    done = prolora.transfer(lora, source, target, method="prolora", **options)
    assert done.report.totals["mapped"] == 8 and not calls


def test_blocks_are_matched_by_similarity_and_the_decisions_told():
    found = comparison.compare(MINI / "source", MINI / "pruned", match="similarity", rank=None)
    told = found.to_dict()
    assert len(told["decisions"]) == 12 and len(told["dropped_blocks"]) == 11
    assert all(decision["margin"] > 0.5 for decision in told["decisions"])
    assert "12 of 12 blocks of the target were recognised" in found.sentences()[-1]


def full(layout):
    """A base of full size whose weights take no room."""
    zero = torch.zeros(())
    return open_base(
        {name: zero.expand(shape) for name, shape in load_layout(layout).shapes.items()}
    )


def test_across_widths_the_counts_are_those_of_the_layouts():
    found = comparison.compare(full("sd15"), full("sdxl"), rank=None)
    assert found.coverage.attention == (66, 128) and not found.verdict.related
    attention = [m for m in found.modules if ".attn" in m.target]
    assert len({m.source for m in attention}) == 66
    assert (
        f"{found.other_shape} pairs have different widths and are refused"
        in (found.sentences()[-1])
    )


def test_other_architectures_are_refused_with_the_reason():
    with pytest.raises(UnsupportedFormat, match=r"different architectures.*No data-free method"):
        comparison.compare(full("sdxl"), full("flux1-dev"))


def test_a_weight_that_is_not_finite_is_named():
    target = target_weights()
    name = list(target)[3]
    target[name] = target[name].clone()
    target[name][1, 2] = math.inf
    with pytest.raises(NonFiniteWeights, match=name.replace(".", r"\.")):
        comparison.compare(source_weights(), target, rank=None)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command line; gives exit code, standard output and standard error."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["prolora", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        streams = capsys.readouterr()
        return stop.value.code or 0, streams.out, streams.err

    return run


def test_the_command_line_answers_draws_and_prints_json(run, tmp_path):
    _, source, target = write_case(tmp_path)
    line = ("advise", "--source", source, "--target", target, "--cache=none")
    page, asked = tmp_path / "map.html", ("--match", "similarity", "--overlap", 8)
    code, text, _ = run(*line, *asked, "--report", page)
    assert code == 0 and "differ by 10.0%" in text and "Same lineage" in text
    assert "down_blocks.1" in text and "0←0 1←1" in text
    assert run(*line, *asked, "--report", page)[0] == 2  # what exists is refused
    code, text, _ = run(*line, "--json")
    told = json.loads(text)["comparison"]
    assert code == 0 and told["verdict"]["related"] and told["means"]["above_left"] is None
    code, text, _ = run(*line)
    assert code == 0 and "Φ l" not in text and "Rank sweep" not in text
    code, text, _ = run(*line, "--sweep")
    assert code == 0 and "Rank sweep over 8 pairs" in text and "≥ 0.8" in text
    assert all(len(row) <= 80 for row in text.splitlines() if not row.startswith("prolora"))
    (tmp_path / "file").touch()
    code, _, text = run(*line, "--report", tmp_path / "file" / "x.html")
    assert code == 2 and "x.html" in text
    page.write_text("<p>mine</p>")
    assert run(*line, "--report", page)[0] == 2 and page.read_text() == "<p>mine</p>"


@pytest.mark.parametrize("overlap", [None, 8])
def test_the_map_of_two_models_has_every_pair_in_its_place(overlap):
    found = prolora.advise(MINI / "source", MINI / "pruned", overlap=overlap)
    places = map_pairs(found.comparison)
    assert len(places.spots) == len(found.comparison.modules) > 30
    for spot, module in zip(places.spots, found.comparison.modules, strict=True):
        assert spot.name == module.target
        assert spot.share == pytest.approx(module.cosine if overlap is None else module.above)
        assert f"drift {module.drift:.2f}" in spot.text
    page = Page(found.to_html())
    assert {link[1:] for link in page.values("href")} <= set(page.values("id"))
    titles = [text for text in page.inside["title"] if "drift" in text]
    assert sum(text.count("drift") for text in titles) == len(places.spots)


def test_sdxl_to_flux_is_refused_on_the_command_line(run, tmp_path):
    from checkpoints import sparse_file

    paths = []
    for layout in ("sdxl", "flux1-dev"):
        keys = {f"{name}.weight": shape for name, shape in load_layout(layout).shapes.items()}
        paths.append(sparse_file(tmp_path / f"{layout}.safetensors", keys))
    code, out, said = run("advise", "--source", paths[0], "--target", paths[1])
    assert code == 2 and not out and "different architectures" in said
    assert "No data-free method maps between them" in said
