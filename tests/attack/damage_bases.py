"""Bases as folders, in shards and as GGUF files."""

import mini
from damages import Damage, safetensors_header
from inputs import transfer, write_case, write_ggufs, write_shards
from sandbox import Box, Words


def gguf_header(data: bytes) -> int:
    """Where the table of tensors ends: after the last name, its shape, type and offset."""
    at = max(data.find(f"{name}.weight".encode()) + len(name) for name in mini.shapes(3))
    return at + 7 + 4 + 16 + 4 + 8


def transfer_ggufs(box: Box) -> Words:
    names = {box.inputs / name: box.inputs / f"{name}.gguf" for name in ("source", "target")}
    return [names.get(word, word) for word in transfer_uncached(box)]


def transfer_uncached(box: Box) -> Words:
    return transfer(box, "--cache=none")


CASES = {
    "base, safetensors": Damage(
        write_case,
        transfer_uncached,
        lambda box: list(box.inputs.glob("*/*.safetensors")),
        120,
        "cut flip edit spoil",
        safetensors_header,
    ),
    "base, config.json": Damage(
        write_case, transfer_uncached, lambda box: list(box.inputs.glob("*/config.json"))
    ),
    "base, GGUF": Damage(
        write_ggufs,
        transfer_ggufs,
        lambda box: list(box.inputs.glob("*.gguf")),
        120,
        "cut flip flip stamp",
        gguf_header,
    ),
    "index of shards": Damage(
        write_shards, transfer_uncached, lambda box: list(box.inputs.glob("source/*.index.json"))
    ),
}
