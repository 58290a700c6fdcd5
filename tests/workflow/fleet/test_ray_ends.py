"""Ray's own processes, and those that it leaves: their end is told within seconds."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray_faults
from fleet_files import RATES
from safetensors.torch import load_file, save_file

import prolora
from prolora.workflow.fleet.engines.ray_minder import list_descendants
from prolora.workflow.fleet.engines.ray_vitals import RayVitals

pytest.importorskip("ray", reason="needs the extra ray")
linux_only = pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs /proc")

SUPPORT = Path(ray_faults.__file__).parent

DRIVER = """
import sys, prolora
from prolora.workflow.fleet.engines import ray_session
hook = {"worker_process_setup_hook": "ray_faults.break_workers"}
ray_session._QUIET["runtime_env"] = hook
prolora.migrate(sys.argv[1], sys.argv[2], engine="ray", workers=1)
"""


def read_command(process):
    try:
        return Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def is_alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(what, seconds):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def driver(collection, tmp_path):
    """A process with a Ray of its own, whose worker does not get on; and the processes below it."""
    loras, source, targets = collection
    tensors = load_file(loras / "c.safetensors")
    save_file(tensors, tmp_path / "sleeps.safetensors")
    plan = prolora.plan_migration(
        [tmp_path / "sleeps.safetensors"], source, targets[:1], rates=RATES
    )
    plan.save(tmp_path / "plan.jsonl")
    words = [str(tmp_path / "plan.jsonl"), str(tmp_path / "moved")]
    path = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": path}
    command = [sys.executable, "-c", DRIVER, *words]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)

    def is_at_work():
        assert child.poll() is None, child.stderr.read()
        return any("RayWorker.move" in read_command(p) for p in list_descendants(child.pid))

    wait_until(is_at_work, 120)
    below = list(list_descendants(child.pid))
    yield child, below
    for process in [child.pid, *below]:
        if is_alive(process):
            os.kill(process, signal.SIGKILL)
    child.wait(10)
    child.stderr.close()


@linux_only
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_the_end_of_a_process_of_ray_is_told_and_nothing_is_left(driver, name):
    child, below = driver
    (process,) = (p for p in below if read_command(p).split(" ")[0].endswith(f"/{name}"))
    os.kill(process, signal.SIGKILL)
    assert child.wait(40) != 0
    said = child.stderr.read()
    assert "has ended" in said and name in said
    wait_until(lambda: not any(map(is_alive, below)), 20)


@linux_only
@pytest.mark.slow
def test_nothing_outlives_a_driver_that_is_killed(driver):
    child, below = driver
    assert any("DashboardAgent" in read_command(process) for process in below)
    child.kill()
    wait_until(lambda: not any(map(is_alive, below)), 20)


def test_a_process_that_does_not_answer_several_times_has_ended():
    vitals = RayVitals([("the head", "127.0.0.1", 9)])
    with pytest.raises(prolora.ProLoRAError, match=r"the head at 127\.0\.0\.1:9 has ended"):
        for _ in range(3):
            vitals._looked = 0.0
            vitals.check()


@linux_only
def test_what_is_minded_ends_with_the_process_that_minds_it():
    code = """
import subprocess, sys, time, os
from prolora.workflow.fleet.engines.ray_minder import list_descendants, mind_processes
child = subprocess.Popen(["sleep", "100"], start_new_session=True)
with mind_processes(list_descendants(os.getpid())):
    print(child.pid, flush=True)
    time.sleep(100)
"""
    minder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(minder.stdout.readline())
    assert is_alive(child)
    minder.kill()
    wait_until(lambda: not is_alive(child), 10)
    minder.wait()
    minder.stdout.close()
