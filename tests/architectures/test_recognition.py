"""What recognition does with very many names."""

from prolora.architectures import recognition
from prolora.architectures.layouts import load_layout
from prolora.architectures.modules import matrix_shape
from prolora.architectures.recognition import NamedMatrix, recognise_families


def test_names_that_no_family_has_are_not_looked_up_in_every_family(monkeypatch):
    asked = []

    def find_parts(family, module):
        asked.append(family.id)
        return find(family, module)

    find = recognition.find_parts
    monkeypatch.setattr(recognition, "find_parts", find_parts)
    names = [f"blocks.{i}.mystery" for i in range(100)] + [f"x{i}" for i in range(100)]
    assert recognise_families(map(NamedMatrix, names)) == recognition.Recognition()
    assert not asked


def test_a_module_beside_the_blocks_of_other_channels_hides_no_family():
    shapes = load_layout("wan-t2v-14b").shapes.items()
    known = [NamedMatrix(n, True, matrix_shape(s)) for n, s in shapes if n.startswith("blocks.")]
    patches = NamedMatrix("patch_embedding", True, (5120, 37))
    found = recognise_families([*known, patches])
    assert [family.id for family in found.families] == ["wan"] and "wan-t2v-14b" in found.layouts


def test_no_family_that_has_a_name_is_passed_over():
    for family in recognition.known_families().values():
        for pattern in (*family.shapes, *family.authors, *family.aliases):
            for dotted, separator in ((True, "."), (False, "_")):
                name = pattern.replace(".", separator).replace("N", "3")
                if recognition.find_parts(family, module := NamedMatrix(name, dotted)):
                    assert family.id in recognition._list_candidates(module), name
