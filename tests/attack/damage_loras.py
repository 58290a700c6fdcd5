"""LoRAs in two formats, a PEFT configuration, and a map of modules."""

import json

import mini
from damages import Damage, safetensors_header
from inputs import copy, write_case, write_peft
from sandbox import Box
from truths import is_as_mapped, is_same_kohya, is_same_peft


def write_map(box: Box) -> None:
    """A map of modules that exchanges the two blocks of the target."""
    write_case(box)
    names = [(to, module) for to in (0, 1) for module in mini.MODULES]
    table = {mini.BLOCK.format(i, name): mini.BLOCK.format(1 - i, name) for i, name in names}
    (box.inputs / "map.json").write_text(json.dumps(table, indent=1))


CASES = {
    "LoRA, kohya": Damage(
        write_case,
        copy,
        lambda box: [box.inputs / "lora.safetensors"],
        120,
        "cut flip edit add",
        safetensors_header,
        is_same_kohya,
    ),
    "PEFT configuration": Damage(
        write_peft,
        lambda box: copy(box, lora="peft"),
        lambda box: [box.inputs / "peft" / "adapter_config.json"],
        120,
        is_expected=is_same_peft,
    ),
    "PEFT weights": Damage(
        write_peft,
        lambda box: copy(box, lora="peft"),
        lambda box: [box.inputs / "peft" / "adapter_model.safetensors"],
        60,
        "cut flip edit add",
        safetensors_header,
        is_same_peft,
    ),
    "map of modules": Damage(
        write_map,
        lambda box: copy(box, "--match", box.inputs / "map.json"),
        lambda box: [box.inputs / "map.json"],
        is_expected=is_as_mapped,
    ),
}
