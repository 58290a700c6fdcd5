"""Ray, for real: the files of one process, and no LoRA is lost with a worker."""

import json
import os
from pathlib import Path

import pytest
import ray_faults
from fleet_files import RATES, records, results
from safetensors.torch import load_file, save_file

import prolora

pytest.importorskip("ray", reason="needs the extra ray")

SUPPORT = Path(ray_faults.__file__).parent


@pytest.fixture(scope="session")
def cluster():
    """Two workers on this machine; what breaks them is in ray_faults."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # writes nothing into the user's home
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(SUPPORT), prepend=os.pathsep)
        ray.init(
            address="local",
            num_cpus=2,
            num_gpus=0,
            include_dashboard=False,
            object_store_memory=80_000_000,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"worker_process_setup_hook": "ray_faults.break_workers"},
        )
        yield ray
        ray.shutdown()


def test_workers_give_the_files_of_one_process(cluster, plan, tmp_path):
    alone = prolora.migrate(plan, tmp_path / "alone")
    shared = prolora.migrate(plan, tmp_path / "shared", engine="ray", workers=2)
    assert results(tmp_path / "shared") == results(tmp_path / "alone")
    assert (shared.count("done"), shared.count("refused")) == (8, 2)
    assert alone.count("done") == 8
    assert cluster.is_initialized()  # it is the caller's
    assert not list((tmp_path / "shared").glob(".*"))


def test_a_lora_that_ends_its_process_fails_alone(cluster, collection, tmp_path):
    loras, source, targets = collection
    tensors = load_file(loras / "c.safetensors")
    for name in ("b", "c"):
        (loras / f"{name}.safetensors").unlink()
    for name in ("kills", "a-once"):
        save_file(tensors, loras / f"{name}.safetensors")
    plan = prolora.plan_migration([loras], source, targets[:1], rates=RATES)
    out = tmp_path / "moved"
    # One ends the process of the batch, the other the one in which it is alone.
    summary = prolora.migrate(plan, out, engine="ray", workers=2, retries=0)
    assert [summary.count(s) for s in ("done", "failed", "refused")] == [3, 1, 1]
    lines = map(json.loads, (out / "failed.jsonl").read_text().splitlines())
    (lost,) = [line for line in lines if line["error"]["code"] == "lost-worker"]
    assert lost["lora"].endswith("kills.safetensors")
    assert "its process ended" in lost["error"]["message"]
    keys = [record["key"] for record in records(out)]
    assert len(keys) == len(set(keys)) == 4  # nothing is lost, and nothing comes twice


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sleeps", "stops"])
def test_a_worker_that_does_not_get_on_is_replaced(cluster, collection, tmp_path, name):
    loras, source, targets = collection
    (loras / "b.safetensors").rename(loras / f"{name}.safetensors")
    plan = prolora.plan_migration([loras], source, targets[:1], rates=RATES)
    out = tmp_path / "moved"
    summary = prolora.migrate(plan, out, engine="ray", workers=2, time_limit=4)
    assert [summary.count(s) for s in ("done", "failed", "refused")] == [3, 1, 1]
    lines = map(json.loads, (out / "failed.jsonl").read_text().splitlines())
    (hung,) = [line for line in lines if line["error"]["code"] == "hung-worker"]
    assert hung["lora"].endswith(f"{name}.safetensors")
    assert "did not get on" in hung["error"]["message"]
