"""Transfers, a migration and a fit that are killed and run again."""

import inputs
from inputs import RANK, transfer, write_case
from kills import Kills
from sandbox import Box, Words


def replace(box: Box, method: str = "prolora") -> Words:
    words = transfer(box, *RANK, "--method", method, "--card", "--overwrite")
    return [*words, "--cache", box.cache]


def replace_folder(box: Box, method: str = "prolora") -> Words:
    words = transfer(box, *RANK, "--method", method, "--format", "peft", "--overwrite")
    return [*words, "-o", box.out / "moved", "--cache", box.cache]


def write_old(box: Box) -> None:
    """What the LoRA became an earlier time by another method."""
    write_case(box)
    box.must(*replace(box, "copy"))


def write_old_folder(box: Box) -> None:
    """The same as a PEFT folder, with a file of the user's."""
    write_case(box)
    box.must(*replace_folder(box, "copy"))
    inputs.write_foreign_lora(box.out / "moved" / "mine.safetensors")


def cached(words: Words, box: Box) -> Words:
    return [*words, "--cache", box.cache]


CASES = {
    "transfer of one": Kills(write_case, replace, 120),
    "transfer over an older result": Kills(write_old, replace, 120),
    "transfer into a PEFT folder": Kills(write_old_folder, replace_folder, 120),
    "transfer of eight": Kills(
        lambda box: inputs.write_loras(box, 8),
        lambda box: cached(inputs.move_batch(box), box),
        80,
        0.5,
    ),
    # Of a collection one is no LoRA.
    "migrate": Kills(
        inputs.write_collection, lambda box: cached(inputs.migrate(box), box), 80, 0.5, (0, 2)
    ),
    "fit with resume": Kills(inputs.write_pipelines, inputs.fit, 16, 0.4),
    "fit between other latents": Kills(
        lambda box: inputs.write_pipelines(box, vae_seed=3), inputs.fit, 6, 0.4
    ),
}
