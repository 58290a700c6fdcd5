"""SDXL to SSD-1B with real names, at an eighth of the width; bench/ runs the same at full size."""

import diffusers_check
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_diffusers_attaches_all_272_modules_without_a_warning(tmp_path, format):
    found = diffusers_check.check(tmp_path, 8, format, "prolora")
    assert found["computed"] == found["attached"] == 272 and found["same modules"]
    assert found["warnings"] == []
    assert found["largest relative difference"] < 1e-6
