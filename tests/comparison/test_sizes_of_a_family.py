"""Two published sizes of one family: equal names where the blocks are the same, and else not."""

import pytest
from checkpoints import sparse_file
from family_files import name_key
from small_models import authors_weights, small_weights

from prolora import open_base
from prolora.architectures.layouts import load_layout
from prolora.architectures.modules import find_block
from prolora.comparison.block_matching import match_blocks
from prolora.comparison.module_map import find_partners
from prolora.errors import UnsupportedFormat


def open_size(folder, id_):
    shapes = {name_key(name): shape for name, shape in load_layout(id_).shapes.items()}
    return open_base(sparse_file(folder / f"{id_}.safetensors", shapes))


@pytest.mark.parametrize(
    ("source", "target", "rule"),
    [
        ("wan-t2v-14b", "wan2.1-i2v-14b", "wan-t2v-14b to wan2.1-i2v-14b: "),
        ("anima", "cosmos-predict2-2b", "anima to cosmos-predict2-2b: "),
        ("wan-t2v-1.3b", "wan2.2-ti2v-5b", "same name, as wan-t2v-1.3b and wan2.2-ti2v-5b have"),
    ],
)
def test_sizes_with_as_many_blocks_are_paired_by_equal_names(source, target, rule, tmp_path):
    """Whether widths agree is another question, and is asked of every module."""
    pair = open_size(tmp_path, source), open_size(tmp_path, target)
    table, given = find_partners(*pair)
    assert all(ours == theirs for ours, theirs in table.items())
    assert set(table) == set(pair[0].shapes) & set(pair[1].shapes)
    assert given.startswith(rule)


@pytest.mark.parametrize(
    ("source", "target", "counts"),
    [
        ("sana-1.6b", "sana-4.8b", "20 blocks in .* 60 in"),
        ("flux2-dev", "flux2-klein-9b", "48 blocks in .* 24 in"),
    ],
)
def test_sizes_of_other_depth_are_not_paired_by_numbers_of_blocks(source, target, counts, tmp_path):
    pair = open_size(tmp_path, source), open_size(tmp_path, target)
    with pytest.raises(UnsupportedFormat, match=counts) as refused:
        find_partners(*pair)
    assert 'match "similarity" recognises them' in str(refused.value)


def test_neither_are_two_models_of_no_known_size(tmp_path):
    """A checkpoint with its last blocks cut off, or with some of them pruned."""
    bases = []
    for blocks in (4, 3):
        names = [f"blocks.{i}.self_attn.q_proj.weight" for i in range(blocks)]
        path = sparse_file(tmp_path / f"{blocks}.safetensors", dict.fromkeys(names, (8, 8)))
        bases.append(open_base(path))
    assert find_partners(bases[0], bases[0])[1] == "same name"
    for pair in (bases, bases[::-1]):
        with pytest.raises(UnsupportedFormat, match=r"blocks has . blocks in .\.safetensors"):
            find_partners(*pair)


def test_chroma_is_flux_without_modulation_and_its_blocks_are_recognised():
    """In the authors' names too, which both families share."""
    flux = small_weights("flux1-dev", blocks=5)
    chroma = small_weights("chroma", blocks=5)
    noisy = small_weights("flux1-dev", drift=0.3, blocks=5)
    chroma |= {name: noisy[name] for name in chroma if find_block(name) and name in noisy}
    assert not any(".norm" in name for name in chroma)
    for stored in (chroma, authors_weights("chroma", chroma)):
        source, target = open_base(authors_weights("flux", flux)), open_base(stored)
        result = match_blocks(source, target)
        assert len(result.decisions) == 10
        assert all(decision.source == decision.target for decision in result.decisions)
        assert result.table["single_transformer_blocks.4.proj_mlp"]


def test_a_flux_that_kept_8_of_19_double_blocks_is_recovered_in_the_authors_names():
    flux = {
        name: weight
        for name, weight in small_weights("flux1-dev", blocks=19).items()
        if name.startswith("transformer_blocks.")
    }
    noisy = small_weights("flux1-dev", drift=0.3, blocks=19)
    kept = (0, 1, 2, 4, 9, 15, 16, 18)
    origin = {
        f"transformer_blocks.{new}": f"transformer_blocks.{old}" for new, old in enumerate(kept)
    }
    lite = {
        new + name.removeprefix(old): noisy[name]
        for new, old in origin.items()
        for name in flux
        if name.startswith(f"{old}.")
    }
    source, target = (
        open_base(authors_weights("flux", flux)),
        open_base(authors_weights("flux", lite)),
    )
    result = match_blocks(source, target)
    assert {decision.target: decision.source for decision in result.decisions} == origin
    assert len(result.dropped) == 11
