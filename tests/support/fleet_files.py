"""A small collection of LoRAs with a base and two targets, for tests of migrations."""

import hashlib
import json

from mini import lora_tensors, shapes, target_weights, write_case, write_folder
from safetensors.torch import save_file

from prolora.workflow.fleet.calibration import Rates

RATES = Rates(per_byte=1e-8, per_module=1e-3, per_operation=1e-10)


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
    files = sorted((folder / "loras").rglob("*.safetensors"))
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def records(folder):
    """The lines of all journals, but for the first of each."""
    lines = [
        json.loads(line)
        for file in sorted((folder / "journal").iterdir())
        for line in file.read_text().splitlines()
    ]
    return [line for line in lines if "journal" not in line]


def seal(lines):
    """The bytes of a plan of these lines, with the count and the digest that belong to them."""
    head = json.loads(lines[0])
    moves = head["moves"] if type(head["moves"]) is not int else len(lines) - 1
    head |= {"written_by": f"prolora:plan:sha256:{'0' * 64}", "moves": moves}
    content = "".join(f"{line}\n" for line in (json.dumps(head), *lines[1:]))
    digest = hashlib.sha256(content.encode()).hexdigest()
    return content.replace("0" * 64, digest, 1).encode()
