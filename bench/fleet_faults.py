"""What goes wrong while a collection moves: is anything lost, changed, or left running?

    python bench/fleet_faults.py FOLDER [--count 27] [--out bench/results/fleet_faults.json]

FOLDER receives the collection of bench/fleet.py. One process moves it undisturbed; then each case
moves it again, and its results are compared with those, byte by byte.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from fleet import TARGETS, list_some, write_bases, write_loras
from sdxl_to_ssd1b import commit

CODE = """
import sys, prolora
from prolora.workflow.fleet import migration, on_ray
on_ray.TIME_LIMIT, migration._BATCH = 120.0, 8
loras, source, folder, ray, *targets = sys.argv[1:]
prolora.migrate(loras, source, targets, folder, ray=ray or None)
"""


RAY = ("ray::", "raylet", "gcs_server")


def list_processes(*words: str) -> set[int]:
    """The processes whose command has one of the words in it."""
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True)
    return {
        int(line.split()[0])
        for line in found.stdout.splitlines()
        if any(word in line for word in words)
    }


def read_results(out: Path) -> dict[str, bytes]:
    """Name below the folder -> bytes."""
    return {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*.safetensors")}


def start(folder: Path, count: int, out: Path, ray: str = "") -> subprocess.Popen[bytes]:
    """A driver."""
    targets = sorted(map(str, folder.glob("target-*")))
    words = [list_some(folder, count), folder / "source", out, ray]
    return subprocess.Popen([sys.executable, "-c", CODE, *map(str, words), *targets])


def wait_for(driver: subprocess.Popen[bytes], out: Path, more: int) -> None:
    """Waits for results, or for the end of the driver."""
    before = len(list(out.rglob("*.safetensors")))
    while driver.poll() is None and len(list(out.rglob("*.safetensors"))) < before + more:
        time.sleep(0.01)


def kill_drivers(folder: Path, count: int, out: Path) -> int:
    """SIGKILL again and again, then a run to the end."""
    kills = 0
    for _ in range(8):
        driver = start(folder, count, out)
        wait_for(driver, out, random.randrange(1, TARGETS * count // 8))
        kills += driver.poll() is None
        driver.kill()
        driver.wait()
    assert start(folder, count, out).wait() == 0
    return kills


def start_two(folder: Path, count: int, out: Path) -> int:
    """Two drivers at once."""
    drivers = [start(folder, count, out) for _ in range(2)]
    assert [driver.wait() for driver in drivers] == [0, 0]
    return 2


def strike_ray(folder: Path, count: int, out: Path) -> int:
    """A worker of Ray is frozen and another one killed."""
    driver = start(folder, count, out, "local")
    struck: list[int] = []
    for what in (signal.SIGSTOP, signal.SIGKILL):
        wait_for(driver, out, 3)
        works = list_processes("ray::_work") - set(struck)
        if works:
            struck.append(works.pop())
            os.kill(struck[-1], what)
    assert driver.wait() == 0
    return len(struck)


def kill_ray_driver(folder: Path, count: int, out: Path) -> int:
    """The driver of a Ray of its own is killed, and run again."""
    driver = start(folder, count, out, "local")
    wait_for(driver, out, 5)
    driver.kill()
    driver.wait()
    assert start(folder, count, out, "local").wait() == 0
    return 1


CASES: dict[str, Callable[[Path, int, Path], int]] = {
    "killed": kill_drivers,
    "two drivers at once": start_two,
    "Ray: a worker frozen, one killed": strike_ray,
    "Ray: the driver killed": kill_ray_driver,
}


def main() -> None:
    """Runs the cases and notes what became of the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=27)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    write_bases(args.folder)
    write_loras(args.folder / "loras", args.count)
    whole = args.folder / "undisturbed"
    shutil.rmtree(whole, ignore_errors=True)
    assert start(args.folder, args.count, whole).wait() == 0
    expected = read_results(whole)
    figures: dict[str, Any] = {"moves": len(expected), "commit": commit()}
    figures["date"] = str(date.today())
    for name, case in CASES.items():
        out, running = args.folder / "disturbed", list_processes(*RAY)
        shutil.rmtree(out, ignore_errors=True)
        started = time.monotonic()
        faults = case(args.folder, args.count, out)
        seconds, found = time.monotonic() - started, read_results(out)
        while list_processes(*RAY) - running and time.monotonic() - started < seconds + 120:
            time.sleep(1)
        figures[name] = {
            "faults": faults,
            "seconds": round(seconds, 1),
            "lost": len(expected.keys() - found.keys()),
            "other bytes": sum(data != expected.get(name) for name, data in found.items()),
            "processes left": len(list_processes(*RAY) - running),
            "seconds until none was left": round(time.monotonic() - started - seconds),
        }
        print(name, figures[name], flush=True)
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
