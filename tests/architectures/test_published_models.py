"""The tables are what diffusers' classes make, at the sizes that are published."""

import pytest
from published_elsewhere import ELSEWHERE
from published_models import PUBLISHED
from published_others import OTHERS
from published_videos import VIDEOS
from torch import nn

from prolora.architectures import layouts
from prolora.architectures.families import known_families
from prolora.architectures.modules import is_linear

MODELS = {**PUBLISHED, **VIDEOS, **OTHERS, **ELSEWHERE}
diffusers = pytest.importorskip("diffusers")
from make_layouts import TABLES, build_model, format_table, list_shapes  # noqa: E402

FIRST = {family.layouts[0] for family in known_families().values()}


@pytest.mark.parametrize(
    "id_", [pytest.param(id_, marks=() if id_ in FIRST else pytest.mark.slow) for id_ in MODELS]
)
def test_a_table_has_the_names_and_shapes_of_the_class(id_: str) -> None:
    if MODELS[id_].cls and not hasattr(diffusers, MODELS[id_].cls):
        pytest.skip(f"this diffusers has no {MODELS[id_].cls}")
    model = build_model(MODELS[id_])
    layout = layouts.load_layout(id_)
    assert dict(layout.shapes) == list_shapes(model)
    if not MODELS[id_].cls.startswith("UNet"):
        linear = {name for name, module in model.named_modules() if type(module) is nn.Linear}
        assert {name for name, shape in layout.shapes.items() if is_linear(name, shape)} == linear
    assert (layout.title, layout.text_encoders) == (
        MODELS[id_].title,
        MODELS[id_].text_encoders,
    )
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert round(billions, 1) == MODELS[id_].billions


def test_tables_are_written_as_they_are_stored() -> None:
    stored = (TABLES / "z-image.json").read_text("utf-8")
    assert format_table("z-image", PUBLISHED["z-image"]) == stored
