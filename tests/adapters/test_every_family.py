"""Every family that is known, in every spelling it has: read, recognised, written back."""

import re
from functools import cache

import pytest
import torch
from family_loras import measure_difference
from lora_files import adapter_for

import prolora
from prolora import LowRank
from prolora.architectures.families import known_families
from prolora.architectures.layouts import load_layout

SLOW = pytest.mark.slow
# By day every size once, in the spellings by turns.
SPELLED = [
    pytest.param(id_, size, format, marks=() if k == (i + j) % len(family.spellings) else SLOW)
    for i, (id_, family) in enumerate(known_families().items())
    if not family.unet
    for j, size in enumerate(family.layouts)
    for k, format in enumerate(family.spellings)
]


@cache
def make_updates(layout):
    """Updates of the first block of every list, and of what is outside them."""
    generator, updates = torch.Generator().manual_seed(0), {}
    for name, shape in load_layout(layout).shapes.items():
        numbers = [int(number) for number in re.findall(r"\.(\d+)\.", name)]
        if len(shape) == 2 and not (numbers and numbers[0] > 0):
            up = 0.1 * torch.randn(shape[0], 1, generator=generator)
            updates[name] = LowRank(up, 0.1 * torch.randn(1, shape[1], generator=generator))
    return updates


@pytest.mark.parametrize(("family", "layout", "format"), SPELLED)
def test_a_lora_keeps_its_family_and_updates_in_every_spelling(family, layout, format):
    updates = make_updates(layout)
    written = prolora.convert(adapter_for(family, updates), format=format).state_dict()
    converted = prolora.convert(written)
    assert converted.adapter.updates.keys() == updates.keys()
    for name, update in updates.items():
        assert measure_difference(converted.adapter.updates[name], update) <= 1e-6, name
    assert converted.adapter.format == format and not converted.report.left_out
    assert prolora.check(written).family in (None, family)
    assert converted.state_dict().keys() == written.keys()
