"""HiDream-O1's checkpoints: its authors' folder, and ComfyUI's file with less in it."""

from checkpoints import sparse_file

from prolora import open_base
from prolora.architectures.layouts import load_layout

SHAPES = dict(load_layout("hidream-o1").shapes)
UNUSED = "visual.deepstack_merger_list."


def test_the_authors_prefix_and_the_head_for_words_are_left_behind(tmp_path):
    stored = {f"model.{name}.weight": shape for name, shape in SHAPES.items()}
    stored["lm_head.weight"] = (151936, 4096)
    base = open_base(sparse_file(tmp_path / "x.safetensors", stored))
    assert base.shapes == SHAPES and base.layout == "hidream-o1"


def test_comfyuis_file_lacks_what_nothing_runs(tmp_path):
    shapes = {name: shape for name, shape in SHAPES.items() if not name.startswith(UNUSED)}
    assert len(SHAPES) - len(shapes) == 6
    stored = {f"model.diffusion_model.{name}.weight": shape for name, shape in shapes.items()}
    base = open_base(sparse_file(tmp_path / "x.safetensors", stored))
    assert base.shapes == shapes and base.layout == "hidream-o1"
    assert base.family == "hidream-o1"
