"""Two nodes of Ray on this machine, and what goes wrong with them: is anything lost, or done twice?

    python bench/fleet_faults.py FOLDER [--count 200] [--cases worker,node,…]
                                 [--out bench/results/fleet_faults.json]

FOLDER receives the collection of bench/fleet.py. The engine local moves it once; each case moves it
again with Ray while something is killed or missing, and its results are compared with those of the
local engine byte by byte. Nodes are started with `ray start`. The cases in which a node lacks files
hide them in a mount namespace of the node (`unshare`), so that they need Linux and its root user.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from fleet import write_bases, write_loras
from sdxl_to_ssd1b import commit, cpu

import prolora

PORT = 6411
ADDRESS = f"127.0.0.1:{PORT}"
RAY = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1"]
RAY += ["--object-store-memory=80000000", "--disable-usage-stats"]


def list_processes() -> dict[int, tuple[int, str]]:
    """Process -> its parent and its command."""
    processes = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat, line = ((entry / x).read_text(errors="replace") for x in ("stat", "cmdline"))
            except OSError:
                continue
            processes[int(entry.name)] = int(stat.rpartition(")")[2].split()[1]), line
    return processes


def list_children(parent: int) -> list[tuple[int, str]]:
    """All processes below one, with their commands."""
    processes = list_processes()
    below, waiting = [], [parent]
    while waiting:
        over = waiting.pop()
        children = [(pid, line) for pid, (above, line) in processes.items() if above == over]
        below += children
        waiting += [pid for pid, _ in children]
    return below


def kill(node: subprocess.Popen[bytes]) -> None:
    """Kills a node at once, with all that runs on it."""
    for pid in [node.pid, *(pid for pid, _ in list_children(node.pid))]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    node.wait()


@contextmanager
def start_cluster(hidden: dict[str, Path]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two nodes with a core each; on the second, files are hidden by others.

    Args:
        hidden: path of a file or folder on the second node -> what is seen there.
    """
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    head = [*RAY, "--head", f"--port={PORT}", "--include-dashboard=false"]
    nodes = [subprocess.Popen(head, **quiet)]  # type: ignore[call-overload]
    try:
        wait_for(lambda: any("raylet" in line for _, line in list_children(nodes[0].pid)))
        second = [*RAY, f"--address={ADDRESS}"]
        if hidden:
            mounts = [f"mount --bind '{shown}' '{path}'" for path, shown in hidden.items()]
            script = " && ".join([*mounts, 'exec "$@"'])
            second = ["unshare", "-m", "sh", "-c", script, "sh", *second]
        nodes.append(subprocess.Popen(second, **quiet))  # type: ignore[call-overload]
        wait_for(lambda: any("raylet" in line for _, line in list_children(nodes[1].pid)))
        yield nodes
    finally:
        for node in reversed(nodes):
            kill(node)


def wait_for(what: Callable[[], bool], seconds: float = 300) -> None:
    """Waits until something is so."""
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.2)


def list_workers(node: subprocess.Popen[bytes]) -> list[int]:
    """The processes of a node that move LoRAs."""
    return [pid for pid, line in list_children(node.pid) if line.startswith("ray::RayWorker")]


def start_driver(
    folder: Path, out: Path, *words: str, address: str | None = ADDRESS
) -> subprocess.Popen[bytes]:
    """`prolora migrate` on the cluster."""
    command = [sys.executable, "-m", "prolora", "migrate", str(folder / "plan.jsonl")]
    command += ["-o", str(out), "--engine", "ray", "--quiet", "--cache", str(folder / "cache")]
    command += ["--address", address] if address else []
    with open(out.with_suffix(".log"), "ab") as log:
        return subprocess.Popen([*command, *words], stdout=log, stderr=log)


def hash_results(out: Path) -> dict[str, str]:
    """Name -> digest of all results."""
    files = (out / "loras").rglob("*.safetensors")
    return {
        f.relative_to(out).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files
    }


def count_results(out: Path) -> int:
    """How many results there are."""
    return sum(1 for _ in (out / "loras").rglob("*.safetensors"))


def compare(folder: Path, out: Path) -> dict[str, Any]:
    """Results against those of the local engine, and the journals."""
    expected, reached = hash_results(folder / "local"), hash_results(out)
    records = [
        json.loads(line)
        for journal in (out / "journal").glob("*.jsonl")
        for line in journal.read_text().splitlines()[1:]
    ]
    done = Counter(record["key"] for record in records if record["status"] == "done")
    moved = Counter(
        record["key"] for record in records if record["status"] == "done" and "kept" not in record
    )
    return {
        "results": len(reached),
        "equal to the local engine's": reached == expected,
        "moves with a record": len(done),
        "recorded as moved twice": sum(number > 1 for number in moved.values()),
        "failed": sum(record["status"] == "failed" for record in records),
        "temporary files left": len(list(out.rglob(".prolora*"))),
    }


def lose_worker(folder: Path, out: Path) -> dict[str, Any]:
    """A worker is killed in the middle."""
    with start_cluster({}) as nodes:
        driver = start_driver(folder, out)
        wait_for(lambda: count_results(out) > 20 and bool(list_workers(nodes[0])))
        os.kill(list_workers(nodes[0])[0], signal.SIGKILL)
        return {"results when it was killed": count_results(out), "exit code": driver.wait()}


def lose_node(folder: Path, out: Path) -> dict[str, Any]:
    """The second node is killed in the middle, with all its processes."""
    with start_cluster({}) as nodes:
        driver = start_driver(folder, out)
        wait_for(lambda: count_results(out) > 20 and bool(list_workers(nodes[1])))
        kill(nodes[1])
        return {"results when it was killed": count_results(out), "exit code": driver.wait()}


def lose_driver(folder: Path, out: Path) -> dict[str, Any]:
    """The driver is interrupted as by Ctrl-C, then killed, then run to the end."""
    codes = []
    with start_cluster({}) as nodes:
        for number, ending in enumerate((signal.SIGINT, signal.SIGKILL, None), 1):
            driver = start_driver(folder, out)
            if ending is not None:
                aim = 30 * number
                wait_for(lambda aim=aim: count_results(out) > aim)  # type: ignore[misc]
                driver.send_signal(ending)
            codes.append(driver.wait())
            wait_for(lambda: not any(map(list_workers, nodes)), 60)
    return {"exit codes": codes, "workers left behind": 0}


def stop_own_ray(folder: Path, out: Path) -> dict[str, Any]:
    """A driver with a Ray of its own is interrupted: nothing of that Ray is left."""
    driver = start_driver(folder, out, address=None)
    wait_for(lambda: count_results(out) > 20)
    below = [pid for pid, _ in list_children(driver.pid)]
    driver.send_signal(signal.SIGINT)
    codes = [driver.wait()]
    wait_for(lambda: not set(below) & list_processes().keys(), 60)
    codes.append(start_driver(folder, out, address=None).wait())
    return {"exit codes": codes, "processes of Ray": len(below), "of them left behind": 0}


def run_two_drivers(folder: Path, out: Path) -> dict[str, Any]:
    """Two drivers work on one folder at the same time."""
    with start_cluster({}):
        drivers = [start_driver(folder, out, "--workers", "1") for _ in range(2)]
        codes = [driver.wait() for driver in drivers]
    journals = (out / "journal").glob("*.jsonl")
    shares = [len(journal.read_text().splitlines()) - 1 for journal in journals]
    return {"exit codes": codes, "records of each": sorted(shares)}


def miss_files(folder: Path, out: Path) -> dict[str, Any]:
    """The second node lacks a LoRA and a shard of a base, and has a cache folder of its own."""
    nothing = folder / "nothing"
    nothing.mkdir(exist_ok=True)
    hidden = {str(folder / "loras"): nothing, str(folder / "target-1"): nothing}
    hidden |= {str(folder / "cache"): nothing}
    with start_cluster(hidden):
        return {"exit code": start_driver(folder, out).wait()}


CASES = {
    "worker": lose_worker,
    "node": lose_node,
    "driver": lose_driver,
    "own": stop_own_ray,
    "two": run_two_drivers,
    "missing": miss_files,
}


def main() -> None:
    """Runs the cases and notes what became of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folder = args.folder.resolve()
    source, targets = write_bases(folder)
    loras = sorted(write_loras(folder / "loras", args.count).iterdir())[: args.count]
    if not (folder / "local" / "summary.json").exists():
        prolora.plan_migration(loras, source, targets[:2]).save(folder / "plan.jsonl")
        prolora.migrate(folder / "plan.jsonl", folder / "local", cache=folder / "cache")
    results: dict[str, Any] = {}
    if args.out and args.out.exists():
        results = json.loads(args.out.read_text())
    results["what"] = f"{args.count} LoRAs onto two bases; two nodes of Ray with a core each"
    results["command"] = f"python bench/fleet_faults.py FOLDER --count {args.count}"
    results["machine"] = {"cpu": cpu()}
    for name in args.cases.split(","):
        out = folder / f"ray-{name}"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        started = time.monotonic()
        facts = CASES[name](folder, out) | {"seconds": round(time.monotonic() - started, 1)}
        facts |= compare(folder, out) | {"commit": commit(), "date": str(date.today())}
        results[name] = {"case": str(CASES[name].__doc__)} | facts
        print(json.dumps({name: results[name]}, indent=1), flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
