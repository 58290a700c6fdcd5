"""Every published size of every family opens in diffusers' names and in those of its authors."""

import pytest
import torch
from checkpoints import sparse_file, sparse_gguf
from diagonal import mark_size
from family_files import make_authors_file, name_key
from family_shapes import TRANSFORMERS, list_authors_keys, list_diffusers_keys

from prolora import open_base
from prolora.architectures.families import known_families
from prolora.architectures.layouts import load_layout

EACH = pytest.mark.parametrize(
    ("family", "id_"),
    [pytest.param(*pair, marks=mark_size(pair[1])) for pair in TRANSFORMERS],
)


# One of each kind of table: names alone, fused, halves swapped.
QUICK = ("flux", "sd3", "wan", "hunyuan-video", "krea2", "z-image")


def assert_complete(base, family, id_):
    assert base.shapes == dict(load_layout(id_).shapes)
    assert (base.layout, base.family) == (id_, family)


@EACH
def test_in_either_spelling_with_the_prefixes_of_single_files(family, id_, tmp_path):
    shapes = dict(load_layout(id_).shapes)
    path = tmp_path / "x.safetensors"
    assert_complete(open_base(sparse_file(path, list_diffusers_keys(shapes))), family, id_)
    stored = list_authors_keys(known_families()[family], shapes)
    prefix = ("", "model.diffusion_model.", "net.")[len(id_) % 3]
    keys = {prefix + key: shape for key, shape in stored.items()}
    assert_complete(open_base(sparse_file(path, keys, "BF16")), family, id_)


@pytest.mark.parametrize(
    ("family", "id_"),
    [
        pytest.param(*pair, marks=mark_size(pair[1]) if pair[0] in QUICK else pytest.mark.slow)
        for pair in TRANSFORMERS
    ],
)
def test_as_gguf_and_in_float8_with_scales(family, id_, tmp_path):
    pytest.importorskip("gguf")
    shapes = dict(load_layout(id_).shapes)
    stored = list_authors_keys(known_families()[family], shapes)
    assert_complete(open_base(sparse_gguf(tmp_path / "x.gguf", stored)), family, id_)
    large = {key: s for key, s in stored.items() if key.endswith(".weight") and len(s) == 2}
    other = {key: ("F16", shape) for key, shape in stored.items() if key not in large}
    other |= {key.replace(".weight", ".scale_weight"): ("F32", (1,)) for key in large}
    other["scaled_fp8"] = ("F8_E4M3", (2,))
    path = sparse_file(tmp_path / "x.safetensors", large, "F8_E4M3", other=other)
    assert_complete(open_base(path), family, id_)


@pytest.mark.parametrize("family", dict(TRANSFORMERS))
def test_every_row_of_the_authors_is_where_the_table_has_it(family):
    """Blocks 0 and 1 and the layers around; a value of its own in every row."""
    id_, known = dict(reversed(TRANSFORMERS))[family], known_families()[family]

    def is_early(name):
        return not any(f".{number}." in name for number in range(2, 100))

    shapes = {name: shape for name, shape in load_layout(id_).shapes.items() if is_early(name)}
    made = make_authors_file(known, id_, is_early)
    sizes = list_authors_keys(known, shapes)
    stored = {}
    for name, rows in made.stored.items():
        columns = sizes[name_key(name)][1:]
        stored[name_key(name)] = rows.float().reshape(-1, *[1] * len(columns)).expand(-1, *columns)
    base = open_base(stored)
    assert base.shapes == shapes
    for name, rows in made.expected.items():
        if rows.shape[0] * torch.Size(base.shapes[name][1:]).numel() < 1 << 24:
            assert torch.equal(base.read(name).flatten(1)[:, :1], rows.float()), name


def test_a_model_is_called_by_no_family_that_has_other_names_besides_or_lacks_some(tmp_path):
    """At a size that is not published, names alone tell, and then all of them must agree."""
    shapes = {
        name: tuple(2 * size for size in shape)
        for name, shape in load_layout("pixart-sigma").shapes.items()
    }
    path = tmp_path / "x.safetensors"
    assert open_base(sparse_file(path, list_diffusers_keys(shapes))).family == "pixart"
    more = shapes | {"transformer_blocks.0.gate.linear": (8, 8)}
    less = {name: shape for name, shape in shapes.items() if "caption_projection" not in name}
    for other in (more, less):
        base = open_base(sparse_file(path, list_diffusers_keys(other)))
        assert base.family is None and base.shapes == other


def test_blocks_with_names_of_both_kinds_are_of_another_family(tmp_path):
    """Bria Fibo 2 has Z-Image's names of diffusers in one stack and its authors' in another."""
    shapes = {}
    for i in range(2):
        for name in ("attention.to_q", "attention.to_k", "feed_forward.w1", "feed_forward.w2"):
            shapes[f"noise_refiner.{i}.{name}"] = (8, 8)
            shapes[f"layers.{i}.{name}"] = (8, 8)
        shapes[f"layers.{i}.attention.qkv"] = (24, 8)
    base = open_base(sparse_file(tmp_path / "x.safetensors", list_diffusers_keys(shapes)))
    assert base.shapes == shapes and base.family is None


def test_hidream_o1_is_known_by_its_authors_folder_and_by_comfyuis_file_with_less_in_it(tmp_path):
    """ComfyUI's lacks what nothing runs, the authors' has a head for words."""
    shapes = dict(load_layout("hidream-o1").shapes)
    unused = {name for name in shapes if name.startswith("visual.deepstack_merger_list.")}
    assert len(unused) == 6
    whole = {f"model.{name}.weight": shape for name, shape in shapes.items()}
    fewer = {name: shape for name, shape in shapes.items() if name not in unused}
    comfy = {f"model.diffusion_model.{name}.weight": shape for name, shape in fewer.items()}
    for stored, read in ((whole | {"lm_head.weight": (151936, 4096)}, shapes), (comfy, fewer)):
        base = open_base(sparse_file(tmp_path / "x.safetensors", stored))
        assert base.shapes == read
        assert (base.layout, base.family) == ("hidream-o1", "hidream-o1")
