"""Identifying with very many names, and with a changed module."""

from prolora.architectures import identify as room
from prolora.architectures.identify import NamedMatrix, identify
from prolora.architectures.layouts import load_layout
from prolora.architectures.modules import matrix_shape


def test_names_that_no_family_has_are_not_looked_up_in_every_family(monkeypatch):
    asked = []
    find = room.find_parts
    monkeypatch.setattr(room, "find_parts", lambda *ask: asked.append(ask) or find(*ask))
    names = [f"blocks.{i}.mystery" for i in range(100)] + [f"x{i}" for i in range(100)]
    assert not identify({}, {}, map(NamedMatrix, names)).names and not asked


def test_a_module_beside_the_blocks_of_other_channels_hides_no_family():
    shapes = load_layout("wan-t2v-14b").shapes.items()
    known = {n: matrix_shape(s) for n, s in shapes if n.startswith("blocks.")}
    found = identify(known | {"patch_embedding": (5120, 37)}, {})
    assert found.families == ("wan",) and "wan-t2v-14b" in found.sizes


def test_no_family_that_has_a_name_is_passed_over():
    for family in room.known_families().values():
        for pattern in (*family.shapes, *family.authors, *family.aliases):
            for dotted, separator in ((True, "."), (False, "_")):
                name = pattern.replace(".", separator).replace("N", "3")
                if room.find_parts(family, module := NamedMatrix(name, dotted)):
                    assert family.id in room._list_candidates(module), name
