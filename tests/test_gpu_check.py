"""The GPU check without its steps: lines, time, workers that fail, tables, counts."""

import json
import sys
import time
from pathlib import Path

import dispatches
import gpu_model
import pytest
import torch
from gpu import __main__ as check
from gpu import (
    anchors,
    build,
    calls,
    correct,
    machine,
    ours,
    registers,
    render,
    results,
    sanitize,
    why,
)
from gpu.counters import counting
from gpu.stages import stage_of
from gpu.steps import Bench, Step

import prolora
from prolora.core.ops import krylov_block, native, precise_product
from prolora.core.svd import stacks

ROOT = Path(__file__).parents[1]
MACHINE = {"card": "a card", "date": "2026-01-01", "commit": "abc", "sources": "123"}
MACHINE["versions"] = "torch 2.9"


@pytest.fixture
def bench(tmp_path):
    return Bench("ours", tmp_path, MACHINE, "bench/gpu.sh ours", dry=True, step="a step")


def test_every_number_is_in_the_file_at_once_and_says_where_it_comes_from(bench):
    bench.record("time", 1.5, "ms", "a case", repeats=20, scaled=32)
    (line,) = results.read_lines([bench.results])
    assert line["value"] == 1.5 and line["card"] == "a card" and line["step"] == "a step"
    with bench.results.open("a") as file:
        file.write('{"call": "ours", "na')  # a process that was killed
    assert len(results.read_lines([bench.results])) == 1
    bench.record("time", float("nan"), "ms")
    first, second = results.read_lines([bench.results])
    assert first == line and second["value"] is None and second["error"] == "nan"


@pytest.mark.parametrize("change", [{"value": "fast"}, {"colour": 1}, {"repeats": 1.5}])
def test_a_line_of_another_form_is_refused(bench, change):
    bench.record("time", 1.5, "ms")
    (line,) = results.read_lines([bench.results])
    with pytest.raises(ValueError):
        results.check_line(line | change)
    del line["card"]
    with pytest.raises(ValueError, match="card"):
        results.check_line(line)


def test_a_step_counts_as_done_for_its_card_and_sources_alone(bench):
    bench.record(results.FINISHED, 2.0, "s")
    bench.step = "failed"
    bench.record(results.FINISHED, None, "s", error="no")
    lines = results.read_lines([bench.results])
    assert results.finished_steps(lines, "ours", "a card", "123") == {"a step"}
    assert not results.finished_steps(lines, "ours", "another card", "123")
    assert not results.finished_steps(lines, "ours", "a card", "other sources")
    assert not results.finished_steps(lines, "why", "a card", "123")


WORKER = """
import sys, json, time
order = json.loads(sys.argv[1])
for name in order["steps"]:
    print("BEGIN", name, flush=True)
    if name == "hangs":
        time.sleep(60)
    if name == "crashes":
        sys.exit(139)
    print("number", name, flush=True)
    print("END", name, flush=True)
"""


def test_a_step_that_hangs_or_ends_its_process_costs_itself_alone(bench, monkeypatch, capsys):
    names = ["first", "hangs", "second", "crashes", "third"]
    monkeypatch.setattr(check, "WORKER", [sys.executable, "-S", "-c", WORKER])
    monkeypatch.setattr(check, "GRACE", 0.2)
    steps = [Step(name, 0.1, lambda bench: None) for name in names]
    monkeypatch.setattr(calls, "list_steps", lambda bench: steps)
    assert check.run_call(bench, time.time() + 30, bench.out / "none") == 1
    printed = capsys.readouterr().out
    assert all(f"number {name}" in printed for name in ("first", "second", "third"))
    assert "FAILED ours/hangs" in printed and "FAILED ours/crashes" in printed
    # And a call ends at its deadline.
    steps[:] = [Step(name, 100, lambda bench: None) for name in ("hangs", "never")]
    began = time.time()
    assert check.run_call(bench, began + 0.5, bench.out / "none") == 1
    assert time.time() - began < 10
    assert "left for another call of `bench/gpu.sh ours`: never" in capsys.readouterr().out


def on_the_second_call(function, change):
    """The function, its result changed in every second call: what the GPU's would be."""
    calls = iter(range(10**6))

    def wrapped(*arguments, **options):
        found = function(*arguments, **options)
        return change(found) if next(calls) % 2 else found

    return wrapped


def of_field(name, change):
    """Changes one field of a result."""

    def changed(found):
        object.__setattr__(found, name, change(getattr(found, name)))
        return found

    return changed


def of_last_update(done):
    """Changes one update of a transfer a little."""
    name, update = list(done.adapter.updates.items())[-1]
    done.adapter.updates[name] = prolora.LowRank(WRONG[1](update.up), update.down)
    return done


def compare_shape(bench):
    correct.compare_shape(bench, (320, 320), torch.float16)


WRONG = [lambda x: x * float("nan"), lambda x: x * (1 + 2e-3)]
# A function, what is wrong with every second result, the step that notices, and its words.
FAULTS = [
    *(("project", wrong, compare_shape, "relative difference") for wrong in WRONG),
    *(("principal_angles", wrong, compare_shape, "relative difference") for wrong in WRONG),
    *(("similarity", of_field("left", x), compare_shape, "relative difference") for x in WRONG),
    ("truncated_svd", of_field("U", WRONG[0]), compare_shape, "not finite"),
    ("truncated_svd", of_field("U", torch.zeros_like), compare_shape, "exceeds the bounds"),
    ("transfer", of_last_update, correct.compare_transfer, "transfer"),
]


@pytest.mark.parametrize(("what", "change", "step", "words"), FAULTS)
def test_a_wrong_result_fails_the_check(bench, monkeypatch, what, change, step, words):
    monkeypatch.setattr(prolora, what, on_the_second_call(getattr(prolora, what), change))
    with pytest.raises(AssertionError, match=words):
        step(bench)


def test_a_krylov_block_slower_than_torch_or_not_run_fails_the_check(on_a_card, monkeypatch):
    on_a_card.step = "krylov_block"
    monkeypatch.setattr(Bench, "size", lambda self, n: max(8, n // 32))
    with pytest.raises(AssertionError, match="krylov_block runs in torch here"):
        ours.time_krylov_block(on_a_card)
    monkeypatch.setattr(ours, "compare_kernel", lambda *_: 0.9)
    ours.time_krylov_block(on_a_card)
    monkeypatch.setattr(ours, "compare_kernel", lambda *_: 1.1)
    with pytest.raises(AssertionError, match=r"krylov_block over torch is 1\.1"):
        ours.time_krylov_block(on_a_card)


@pytest.fixture
def on_a_card(tmp_path, monkeypatch):
    """A bench that takes the processor for a GPU."""
    monkeypatch.setattr(Bench, "device", "cpu")
    return Bench("correct", tmp_path, MACHINE, "bench/gpu.sh correct", dry=False, step="panel_qr")


def test_a_gpu_that_runs_no_kernel_fails_the_check(on_a_card, monkeypatch):
    monkeypatch.setattr(Bench, "run_command", lambda *_, **__: (0, ""))
    monkeypatch.setattr(native, "cuda_status", lambda: (0, "there is none"))
    with pytest.raises(AssertionError, match="no GPU: there is none"):
        correct.count_gpus(on_a_card)
    monkeypatch.setattr(native, "choose", lambda *_: native.Choice(None, "it is old"))
    with pytest.raises(AssertionError, match="panel_qr runs in torch here: it is old"):
        ours.compare_kernel(on_a_card, "a case", lambda: 0, lambda: 0)


@pytest.mark.parametrize("said", ["134 skipped in 2s", "1 passed, 1 failed in 2s"])
def test_tests_that_are_skipped_or_fail_fail_the_check(on_a_card, monkeypatch, said):
    asked = {}

    def run(self, log, *command, **options):
        asked.update(options)
        return int("failed" in said), said

    monkeypatch.setattr(Bench, "run_command", run)
    with pytest.raises(AssertionError):
        correct.run_tests(on_a_card)
    assert asked["PROLORA_REQUIRE"] == "cuda"


def test_a_sanitizer_that_finds_something_and_a_spill_fail_the_check(bench, monkeypatch):
    monkeypatch.setattr(Bench, "run_command", lambda *_, **__: (9, "invalid read"))
    with pytest.raises(AssertionError, match="invalid read"):
        sanitize.sanitize(bench, "panel_qr", "memcheck")
    spilled = registers.Resources("a kernel", "sm_90", 255, 0, 8)
    monkeypatch.setattr(correct, "parse_resources", lambda text: [spilled])
    with pytest.raises(AssertionError, match="spilled"):
        correct.list_registers(bench)


@pytest.mark.parametrize("call", calls.CALLS)
def test_a_call_declares_no_more_than_its_time(tmp_path, call):
    steps = calls.list_steps(Bench(call, tmp_path, MACHINE, "", dry=False))
    assert sum(step.seconds for step in steps) <= check.BUDGET * 2 / 3
    assert check.LOAN + check.GRACE < 600


def test_the_build_takes_none_of_the_time_of_the_steps(tmp_path, monkeypatch):
    now, deadlines = [0.0], []
    monkeypatch.setattr(check.time, "time", lambda: now[0])
    monkeypatch.setattr(
        check, "run_call", lambda bench, deadline, _: deadlines.append(deadline) or 0
    )
    for seconds in (90.0, 250.0):
        monkeypatch.setattr(build, "install", lambda _, s=seconds: now.__setitem__(0, now[0] + s))
        assert check.main(["ours", "--out", str(tmp_path)]) == 0
    assert deadlines == [90 + check.BUDGET, 90 + check.LOAN]


def test_a_stack_that_a_card_cannot_hold_ends_the_larger_ones_and_no_step(bench, monkeypatch):
    batches = []

    def solve(stack):
        batches.append(len(stack))
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(anchors.solvers, "descending_eigh", solve)
    monkeypatch.setattr(Bench, "batch", lambda self, b: b)
    anchors.time_eigh(bench, 1280)
    lines = results.read_lines([bench.results])
    lost = [line for line in lines if "out of memory" in line.get("error", "")]
    assert batches == [1, 1] and len(lost) == 2  # in float32, in float64
    assert 277 not in anchors.list_batches(bench, 1280) and 277 in anchors.list_batches(bench, 544)


def test_three_files_are_brought_back(bench):
    bench.out = bench.out / "out"
    bench.out.mkdir()
    bench.record("time", 1.0, "ms")
    for name in ("a.txt", "b.txt"):
        (bench.logs / name).write_text("x")
    check.pack_logs(bench.out)
    results.pack_results(bench.out)
    files = ["gpu.json", "logs.tar.gz", "results.jsonl"]
    assert sorted(p.name for p in bench.out.iterdir()) == files


def test_a_call_ends_with_one_json_file_and_where_to_send_it(bench, monkeypatch, capsys):
    monkeypatch.setattr(check, "run_call", lambda *_: 0)
    assert check.main(["ours", "--dry", "--out", str(bench.out)]) == 0
    assert not (bench.out / "gpu.json").exists()  # nothing was measured
    bench.record("time", 1.0, "ms")
    capsys.readouterr()
    assert check.main(["ours", "--dry", "--out", str(bench.out)]) == 0
    file = bench.out / "gpu.json"
    assert capsys.readouterr().out == f"Results: {file}. {check.SEND}\n"
    assert results.read_lines([file]) == results.read_lines([bench.results])


def test_tools_watch_the_kernels_of_prolora_alone_and_touch_no_clock(on_a_card, monkeypatch):
    asked = []
    monkeypatch.setattr(Bench, "run_command", lambda self, log, *c, **_: asked.extend(c) or (0, ""))
    why.run_ncu(on_a_card, "krylov_block")
    assert asked[asked.index("--clock-control") + 1] == "none"
    assert asked[asked.index("--kernel-name") + 1] == "regex:prolora"
    assert asked[asked.index("--kernel-name-base") + 1] == "demangled"
    sanitize.sanitize(on_a_card, "krylov_block", "memcheck")
    assert asked[asked.index("--report-api-errors") + 1] == "no"


def test_a_line_names_versions_and_a_commit_that_git_does_not_know(monkeypatch):
    monkeypatch.setenv("COMMIT", "0123abc")
    found = machine.describe_machine()
    assert found["commit"] == "0123abc"
    for name in ("torch", "CUDA", "driver"):
        assert name in found["versions"]


def test_the_tables_put_our_times_beside_the_baselines_of_the_same_card(bench):
    bench.record("truncated_svd", 50.0, "ms", "64 x 1280x1280, k=128")
    bench.record("stage panel", 5.0, "ms", "64 x 1280x1280, k=128")
    bench.record("small_svd", 2.0, "µs", "512 x 64x64")
    bench.record("torch for small_svd", 600.0, "µs", "512 x 64x64", scaled=256)
    bench.call = "anchors"
    bench.record("torch.linalg.svd", 1500.0, "ms", "64 x 1280x1280", scaled=32)
    text = render.render_results(results.read_lines([bench.results]))
    assert "| 64 x 1280x1280, k=128 | 50 | – | – | – | – | 1500 | 30.0 × |" in text
    assert "| small_svd | 512 x 64x64 | 2 µs | 600 µs (scaled) | 300.0 × |" in text
    assert "toy sizes" in text


def test_the_table_of_cards_is_filled_from_sent_files(bench, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n\n<!-- your card -->\n\nold\n\n<!-- end -->\n\nafter\n")
    render.main([str(bench.results), "--page", str(page)])
    assert "| not measured |" in page.read_text()
    bench.dry = False
    bench.record("truncated_svd", 50.0, "ms", "64 x 1280x1280, k=128")
    bench.record("largest bound", 1e-5, "sine", "64 x 1280x1280, k=128")
    bench.call = "anchors"
    bench.record("torch.linalg.svd", 1500.0, "ms", "64 x 1280x1280", scaled=32)
    sent = results.pack_results(bench.results.parent)
    render.main([str(sent), "--page", str(page)])
    text = page.read_text()
    row = "| a card | 64 x 1280x1280, k=128 | 50 | 1500 | 1e-05 | torch 2.9 | 2026-01-01, abc |"
    assert row in text and text.startswith("before\n") and text.endswith("\nafter\n")
    assert "old" not in text and "not measured" not in text
    page.write_text("no table")
    with pytest.raises(ValueError, match="your card"):
        render.main([str(sent), "--page", str(page)])


def test_registers_are_read_from_cuobjdump_and_metrics_from_ncu():
    text = """
Fatbin elf code:
arch = sm_90
 Function overlap:
  REG:128 STACK:0 SHARED:17408 LOCAL:8 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert list(registers.parse_resources(text)) == [
        registers.Resources("overlap", "sm_90", 128, 17408, 8)
    ]
    text = """==PROF== Connected
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","small_svd(Args)","gpu__time_duration.sum","us","1,234.5"
"0","small_svd(Args)","something else","","1"
"""
    assert list(why.parse_ncu(text)) == [
        ("small_svd(Args)", "gpu__time_duration.sum", 1234.5, "us")
    ]


def test_products_waits_and_passes_are_counted_by_stage():
    x = torch.randn(3, 8, 8)
    with counting(lambda frame: "here") as tally:
        y = x @ x.mT
        torch.linalg.eigh(y)
        assert bool(y.sum() > 0)
        y[0, 0].tolist()
        y.mul_(2)
    assert tally.flops("float32") == 3 * 2 * 8**3
    assert tally.factorisations() == {"eigh float32 3x8x8": 1}
    assert tally.waits == {"here": 3}  # the solver's info, the sum, the list
    assert tally.dispatches == 6  # bmm, eigh, sum, >, the number, mul_
    w, x = torch.zeros(2, 48, 64, dtype=torch.float16), torch.zeros(2, 48, 64)
    rows, projected = torch.zeros(2, 40, 48), torch.zeros(2, 40, 40)
    with counting(lambda frame: "here") as tally:
        krylov_block.krylov_block(w, rows, projected, 16, 8)
        precise_product.precise_product(x)
    assert tally.flops("float32") == 2 * 8 * (4 * 48 * 64 + 8 * 48 * 16)
    assert tally.flops("float64") == 2 * 2 * 48 * 64 * (5 * 48 // 8)
    assert tally.dispatches == 2


def test_the_calls_of_a_truncated_svd_belong_to_stages_of_it(monkeypatch):
    monkeypatch.setattr(stacks, "FORCE_BATCHED", True)  # as on a GPU
    weights = torch.randn(2, 24, 24)
    with counting(stage_of) as tally:
        prolora.truncated_svd(weights, 4)
    stages = {call.stage for call in tally.calls}
    assert {"scaling and norms", "dense", "eigensolver"} <= stages and "other" not in stages


with_results = pytest.mark.skipif(
    not (ROOT / "bench/results").exists(), reason="a source distribution holds no results"
)


@with_results
def test_the_page_of_the_model_has_its_tables_and_those_of_the_counts():
    counts = json.loads((ROOT / "bench/results/dispatches.json").read_text())
    page = (ROOT / "bench/gpu_model.md").read_text("utf-8")
    for table in gpu_model.render_model(counts).strip().split("\n\n"):
        assert table in page


@pytest.mark.slow
@with_results
def test_a_stack_asks_no_more_of_a_gpu_than_the_stored_counts_say():
    counts = json.loads((ROOT / "bench/results/dispatches.json").read_text())
    labels = {"after": "", "stored": "torch", "krylov_block": "krylov_block"}
    for label, stored in labels.items():
        known = counts[label]["cases"][0]
        case = (known[name] for name in ("matrices", "rows", "columns", "rank"))
        found = dispatches.count_case(*case, stored=stored)
        for what in ("dispatches", "synchronisations"):
            assert found[what] <= known[what], label


def test_what_a_stack_asks_of_a_gpu_does_not_grow_with_it():
    few, many = (dispatches.count_case(b, 40, 48, 0.9) for b in (2, 9))
    assert few["solver"] == many["solver"] == "gram-f64"
    assert many["dispatches"] <= few["dispatches"]
    assert many["synchronisations"] == few["synchronisations"] <= 8
    assert many["float64 flops"] == pytest.approx(4.5 * few["float64 flops"], rel=0.2)
    assert json.loads(dispatches._format({"x": few})) == {"x": json.loads(json.dumps(few))}
