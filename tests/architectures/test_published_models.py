"""The tables are what diffusers' classes make, at the sizes that are published."""

import pytest
from published_models import PUBLISHED

from prolora.architectures import layouts

diffusers = pytest.importorskip("diffusers")
from make_layouts import TABLES, build_model, format_table, list_shapes  # noqa: E402


@pytest.mark.parametrize("id_", PUBLISHED)
def test_a_table_has_the_names_and_shapes_of_the_class(id_: str) -> None:
    if not hasattr(diffusers, PUBLISHED[id_].cls):
        pytest.skip(f"this diffusers has no {PUBLISHED[id_].cls}")
    model = build_model(PUBLISHED[id_])
    layout = layouts.load_layout(id_)
    assert dict(layout.shapes) == list_shapes(model)
    assert (layout.title, layout.text_encoders) == (
        PUBLISHED[id_].title,
        PUBLISHED[id_].text_encoders,
    )
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert round(billions, 1) == PUBLISHED[id_].billions


def test_tables_are_written_as_they_are_stored() -> None:
    stored = (TABLES / "z-image.json").read_text("utf-8")
    assert format_table("z-image", PUBLISHED["z-image"]) == stored
