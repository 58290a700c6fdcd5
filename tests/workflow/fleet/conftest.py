"""A small collection of LoRAs, one base and two targets."""

import pytest
from mini import lora_tensors, shapes, target_weights, write_case, write_folder
from safetensors.torch import save_file

import prolora


@pytest.fixture
def collection(tmp_path):
    """A folder of four LoRAs, two of one file name, and of a file that is none; the bases."""
    lora, source, target = write_case(tmp_path)
    lora.unlink()
    loras = tmp_path / "loras"
    (loras / "sub").mkdir(parents=True)
    for name, rank, modules in (("a", 4, 12), ("b", 2, 12), ("sub/a", 4, 5), ("c", 2, 5)):
        kept = {"lora_unet_" + module.replace(".", "_") for module in list(shapes(3))[:modules]}
        tensors = {k: t for k, t in lora_tensors(rank).items() if k.partition(".")[0] in kept}
        save_file(tensors, loras / f"{name}.safetensors")
    (loras / "notes.safetensors").write_bytes(b"nothing")
    return loras, source, [target, write_folder(tmp_path / "target2", target_weights(0.3))]


@pytest.fixture
def plan(collection):
    loras, source, targets = collection
    rates = prolora.workflow.fleet.calibration.Rates(1e-8, 1e-3, 1e-9, 1e-10)
    return prolora.plan_migration([loras], source, targets, rates=rates)
