"""What other programs write is understood by the family it is of.

`support/written_keys.json` is {family: {program: module paths}}, from the programs' own code:
OneTrainer's converters, and the networks of musubi-tuner and sd-scripts, were run on models of
every family; the names of ai-toolkit, diffusion-pipe, DiffSynth-Studio and SimpleTuner are those of
the models they train behind the prefix their code writes. In a path, N is any number.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from prolora.architectures.families import known_families
from prolora.architectures.family import Family

PATHS = json.loads((Path(__file__).parents[1] / "support" / "written_keys.json").read_text())
# Prefix, and whether dots follow; OneTrainer writes Anima's as in its authors' checkpoint.
PREFIXES = {
    **dict.fromkeys(("lora_unet_", "lora_transformer_", "lycoris_"), False),
    **dict.fromkeys(("diffusion_model.", "transformer.", "net.", ""), True),
}
CASES = [
    (family, program)
    for family, programs in PATHS.items()
    for program in programs
    if not known_families()[family].unet
]


def is_understood(family: Family, path: str) -> bool:
    prefix = next(prefix for prefix in PREFIXES if path.startswith(prefix))
    name = re.sub(r"(?<![0-9A-Za-z])N(?![0-9A-Za-z])", "1", path.removeprefix(prefix))
    dotted = PREFIXES[prefix]
    return bool(family.find_weight(name, dotted=dotted) or family.find_module(name, dotted=dotted))


@pytest.mark.parametrize(("id_", "program"), CASES)
def test_a_family_understands_the_names_that_a_program_writes_for_it(
    id_: str, program: str
) -> None:
    family = known_families()[id_]
    assert not [path for path in PATHS[id_][program] if not is_understood(family, path)]
