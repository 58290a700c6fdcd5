"""Every family that is known, in every spelling it has: read, told, written back.

The LoRAs have the published sizes, two blocks of every list and rank 1.
"""

import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from diagonal import pair_up

from prolora import Adapter, LowRank
from prolora.adapters import encode_state_dict, read_adapter
from prolora.architectures.families import known_families
from prolora.architectures.identify import Model
from prolora.architectures.layouts import load_layout
from prolora.errors import UnsupportedFormat

FAMILIES = {id_: family for id_, family in known_families().items() if not family.unet}


def list_spelled():
    """(Family, layout, format)."""
    for id_, family in FAMILIES.items():
        for pair in pair_up(family.layouts, list(family.spellings)):
            yield pytest.param(id_, *pair.values, marks=pair.marks)


SPELLED = list(list_spelled())


@cache
def lora(layout):
    """Updates of the modules of the first two blocks of every list, and of those outside."""
    generator = torch.Generator().manual_seed(0)
    updates = {}
    for name, shape in load_layout(layout).shapes.items():
        numbers = [int(number) for number in re.findall(r"\.(\d+)\.", name)]
        if len(shape) != 2 or (numbers and numbers[0] > 1):
            continue
        up = torch.randn(shape[0], 1, generator=generator)
        down = torch.randn(1, shape[1], generator=generator)
        updates[name] = LowRank(0.1 * up, 0.1 * down)
    return updates


def check_equal(updates, wanted):
    assert updates.keys() == wanted.keys()
    for name, update in wanted.items():
        ours, theirs = updates[name], update
        scale = theirs.norm()
        difference = LowRank(
            torch.cat([ours.up.double(), -theirs.up.double()], 1),
            torch.cat([ours.down.double(), theirs.down.double()]),
        ).norm()
        assert difference <= 1e-6 * scale, name


def guess(adapter):
    return replace(adapter, origin=None).model.family


@pytest.mark.parametrize(("family", "layout", "format"), SPELLED)
def test_a_lora_keeps_its_family_and_updates_in_every_spelling(family, layout, format):
    updates = lora(layout)
    written = encode_state_dict(
        Adapter(updates, format=format, origin=Model.of(family)), format=format
    )
    back = read_adapter(written)
    check_equal(back.updates, updates)
    assert back.format == format and not back.left_out
    assert guess(back) in (None, family)
    again = encode_state_dict(back)
    assert again.keys() == written.keys()


def test_a_format_that_no_program_reads_is_refused_and_names_those_that_are_read(monkeypatch):
    flux = known_families()["flux"]
    fewer = replace(flux, spellings={"comfy": flux.spellings["comfy"]})
    monkeypatch.setitem(known_families(), "flux", fewer)
    adapter = Adapter(lora("flux1-dev"), origin=Model.of("flux"))
    with pytest.raises(UnsupportedFormat, match=r"no program reads.*FLUX\.1.*format='comfy'"):
        encode_state_dict(adapter, format="peft")
