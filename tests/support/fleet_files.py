"""A small collection of LoRAs with a base and two targets, for tests of migrations."""

import hashlib

from mini import lora_tensors, shapes, target_weights, write_case, write_folder
from safetensors.torch import save_file


def write_collection(folder):
    """A folder of four LoRAs, two of one file name, and of a file that is none; the bases."""
    lora, source, target = write_case(folder)
    lora.unlink()
    loras = folder / "loras"
    (loras / "sub").mkdir(parents=True)
    for name, rank, modules in (("a", 4, 12), ("b", 2, 12), ("sub/a", 4, 5), ("c", 2, 5)):
        save_file(some_tensors(rank, modules), loras / f"{name}.safetensors")
    (loras / "notes.safetensors").write_bytes(b"nothing")
    return loras, source, [target, write_folder(folder / "target2", target_weights(0.3))]


def some_tensors(rank, modules):
    """A LoRA on the first modules."""
    kept = {"lora_unet_" + module.replace(".", "_") for module in list(shapes(3))[:modules]}
    return {k: t for k, t in lora_tensors(rank).items() if k.partition(".")[0] in kept}


def results(folder):
    """Name below the folder -> digest, of all results."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*.safetensors"))
    }
