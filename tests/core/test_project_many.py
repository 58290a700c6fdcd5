"""project_many: equal to `project` for each name, within the memory that it is given."""

import json
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from fresh import run_fresh
from spectra import random_update, related, weights

from prolora import METHODS, LowRank, project, project_many, truncated_svd
from prolora.errors import NonFiniteWeights, ShapeMismatch, TooLittleMemory, UnrelatedBases


class Lazy(Mapping):
    """Weights that are made when they are asked for, as from a file, and not kept."""

    def __init__(self, tensors):
        self.tensors, self.reads = tensors, []

    def __getitem__(self, name):
        self.reads.append(name)
        return self.tensors[name].clone()

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


def pairs(shapes, drift=0.3):
    """Source and target weights of these shapes, by name."""
    sources = {name: weights(m, n, i) for i, (name, (m, n)) in enumerate(shapes.items())}
    targets = {name: related(w, drift, 100 + i) for i, (name, w) in enumerate(sources.items())}
    return sources, targets


def dense(update):
    if isinstance(update, LowRank):
        return update.dense()
    if isinstance(update, tuple):
        up, down = (torch.as_tensor(x) for x in update)
        return up.flatten(1) @ down.flatten(1)
    return torch.as_tensor(update)


def assert_equal_to_project(deltas, sources, targets, **options):
    """`project_many` gives what `project` gives: order, form, dtype and values."""
    found = project_many(deltas, sources, targets, **options)
    assert list(found) == list(deltas)
    for name, delta in deltas.items():
        one = project(delta, sources[name], targets[name], **options)
        assert type(found[name]) is type(one), name
        if isinstance(one, LowRank | tuple):
            assert [(x.shape, x.dtype) for x in found[name]] == [(x.shape, x.dtype) for x in one]
        else:
            assert (found[name].shape, found[name].dtype) == (one.shape, one.dtype), name
        expected = dense(one).double()
        difference = (dense(found[name]).double() - expected).norm()
        assert difference <= 1e-5 * expected.norm(), name
    return found


SHAPES = {"q": (48, 48), "k": (48, 48), "wide": (40, 90), "v": (48, 48), "tall": (90, 40)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [0.99, 0.6, 7])
def test_equals_project_for_every_name(rank, method):
    """Shapes are mixed, and three modules of one shape have updates of two ranks."""
    sources, targets = pairs(SHAPES)
    deltas = {
        name: random_update(m, n, 2 + (name == "v"), seed=i)
        for i, (name, (m, n)) in enumerate(SHAPES.items())
    }
    assert_equal_to_project(deltas, sources, targets, rank=rank, method=method)


def test_every_form_of_an_update_comes_back_in_its_form():
    sources, targets = pairs({**SHAPES, "half": (48, 48), "array": (48, 48)})
    sources["conv"], targets["conv"] = (torch.randn(12, 5, 3, 3, dtype=torch.double),) * 2
    sources["stack"], targets["stack"] = torch.randn(2, 3, 20, 16, dtype=torch.double).unbind()
    up, down = random_update(48, 48, 4)
    deltas = {
        "q": random_update(48, 48, 4).dense(),
        "k": (up, down),
        "wide": random_update(40, 90, 2).dense(),
        "v": LowRank(up.float(), down.float()),
        "half": LowRank(up.half(), down.half()),
        "array": (up.numpy(), down.numpy()),
        "conv": (torch.randn(12, 2, 1, 1).double(), torch.randn(2, 5, 3, 3).double()),
        "stack": random_update(20, 16, 3, batch=(3,)),
    }
    found = assert_equal_to_project(deltas, sources, targets, rank=0.9)
    assert isinstance(found["array"][0], np.ndarray)
    assert found["conv"][1].shape == (4, 5, 3, 3)


def test_weights_of_several_dtypes_and_bases_are_mixed():
    sources, targets = pairs({name: (32, 24) for name in "abcd"})
    sources["b"], targets["b"] = sources["b"].bfloat16(), targets["b"].half()
    sources["c"] = truncated_svd(sources["c"], 6)
    sources["d"], targets["d"] = (truncated_svd(w["d"], 9) for w in (sources, targets))
    deltas = {name: random_update(32, 24, 3, seed=i) for i, name in enumerate("abcd")}
    assert_equal_to_project(deltas, sources, targets, rank=5)


def test_a_share_of_energy_gives_each_weight_its_own_columns():
    """They are those that `project` reports."""
    sources, targets = pairs({name: (40, 56) for name in "abcde"})
    deltas = {name: random_update(40, 56, 2, seed=i) for i, name in enumerate("abcde")}
    for share in (0.5, 0.9, 0.99):
        found = project_many(deltas, sources, targets, rank=share)
        for name, delta in deltas.items():
            _, info = project(delta, sources[name], targets[name], rank=share, return_info=True)
            k, kt = int(info.rank_source), int(info.rank_target)
            exact = project(
                delta, truncated_svd(sources[name], k), truncated_svd(targets[name], kt)
            ).dense()
            assert (found[name].dense() - exact).norm() < 1e-5 * exact.norm()


def test_a_method_of_ones_own_is_called_for_every_name():
    sources, targets = pairs({"a": (6, 5), "b": (6, 5)})
    deltas = {"a": random_update(6, 5, 1), "b": random_update(6, 5, 2).dense()}

    def double(delta, source, target):
        return 2 * delta.up, delta.down

    found = project_many(deltas, sources, targets, method=double)
    torch.testing.assert_close(found["a"].dense(), 2 * deltas["a"].dense())
    torch.testing.assert_close(found["b"], 2 * deltas["b"])


def test_every_weight_is_read_once_and_those_without_an_update_never():
    sources, targets = (Lazy(w) for w in pairs({**SHAPES, "unused": (48, 48)}))
    deltas = {name: random_update(m, n, 2) for name, (m, n) in SHAPES.items()}
    for options in ({}, {"method": "copy"}, {"method": "auto"}, {"max_bytes": 1 << 30}):
        sources.reads, targets.reads = [], []
        if options.get("method") == "auto":
            targets.tensors = sources.tensors
        project_many(deltas, sources, targets, **options)
        assert sorted(sources.reads) == sorted(targets.reads) == sorted(SHAPES)


def test_a_missing_name_is_refused_before_a_weight_is_read():
    sources, targets = (Lazy(w) for w in pairs({"blocks.0.to_q": (8, 8), "x": (8, 8)}))
    deltas = {name: random_update(8, 8, 2) for name in ("x", "blocks.0.to_k", "y")}
    with pytest.raises(KeyError, match=r"W_srcs has no 'blocks.0.to_k' and 1 more; one of its"):
        project_many(deltas, sources, targets)
    del deltas["blocks.0.to_k"], deltas["y"], targets.tensors["x"]
    with pytest.raises(KeyError, match="W_tgts has no 'x'"):
        project_many(deltas, sources, targets)
    assert sources.reads == targets.reads == []
    with pytest.raises(TypeError, match=r"W_srcs is a list.*needs keys\(\)"):
        project_many(deltas, [], targets)


def test_errors_begin_with_the_name():
    sources, targets = pairs({"a": (8, 6), "b": (8, 6)})
    deltas = {name: random_update(8, 6, 2) for name in "ab"}
    with pytest.raises(ShapeMismatch, match=r"^b: W_tgt"):
        project_many(deltas, sources, targets | {"b": torch.randn(6, 8)})
    with pytest.raises(NonFiniteWeights, match=r"^b: .*W_src"):
        project_many(deltas, sources | {"b": torch.full((8, 6), torch.nan)}, targets)
    with pytest.raises(NonFiniteWeights, match=r"^a: .*delta"):
        project_many(deltas | {"a": torch.full((8, 6), torch.inf)}, sources, targets)
    with pytest.raises(UnrelatedBases, match=r"^b: "):
        unrelated = {"a": sources["a"], "b": torch.randn(8, 6, dtype=torch.double)}
        project_many(deltas, sources, unrelated, method="auto")
    with pytest.raises(ValueError, match="rank must be"):
        project_many({}, {}, {}, rank=0)


def test_without_updates_nothing_is_done():
    assert project_many({}, {}, {}) == {}


def test_a_bound_on_memory_changes_no_result():
    sources, targets = pairs({str(i): (64, 64) for i in range(9)})
    deltas = {name: random_update(64, 64, 3, seed=int(name)) for name in sources}
    free = project_many(deltas, sources, targets)
    bound = project_many(deltas, sources, targets, max_bytes=1 << 20)
    for name, update in free.items():
        difference = (update.dense() - bound[name].dense()).norm()
        assert difference < 1e-5 * update.dense().norm()


def test_too_little_memory_is_refused_before_a_weight_is_read():
    sources, targets = (Lazy(w) for w in pairs({"small": (4, 4), "large": (256, 128)}))
    deltas = {"small": random_update(4, 4, 1), "large": random_update(256, 128, 2)}
    with pytest.raises(TooLittleMemory, match=r"100,000 is too little for large \[256, 128\]"):
        project_many(deltas, sources, targets, max_bytes=100_000)
    assert sources.reads == targets.reads == []


PEAK = """
import json, pathlib, sys
import torch
from prolora import LowRank, project_many

def resident(field):  # in bytes
    status = pathlib.Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line[:5] == field) << 10

class Weights(dict):
    def __getitem__(self, name):
        return torch.randn(super().__getitem__(name))

torch.set_num_threads(1)
shape, count, max_bytes = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
weights = Weights({"x" * (i + 1): shape for i in range(count)})
m, n = shape
deltas = {name: LowRank(torch.randn(m, 4), torch.randn(4, n)) for name in weights}
small = {"x": LowRank(torch.randn(8, 2), torch.randn(2, 8))}
project_many(small, Weights(x=[8, 8]), Weights(x=[8, 8]))  # libraries are loaded
before = resident("VmRSS")
pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
moved = project_many(deltas, weights, weights, max_bytes=max_bytes)
results = sum(x.nbytes for pair in moved.values() for x in pair)
print(json.dumps([resident("VmHWM") - before, results]))
"""


@pytest.mark.parametrize(
    ("shape", "megabytes"), [([640, 640], 70), ([640, 640], 300), ([1024, 512], 200)]
)
def test_the_peak_of_memory_is_what_was_allowed(shape, megabytes):
    """At most `max_bytes`, the largest pair of weights and the results, in a process of its own."""
    printed = run_fresh(PEAK, json.dumps(shape), 12, megabytes * 10**6, OMP_NUM_THREADS="1")
    peak, results = json.loads(printed)
    pair = 2 * 4 * shape[0] * shape[1]
    assert 0 < peak <= megabytes * 10**6 + pair + results
