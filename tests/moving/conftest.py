"""What tests of moving begin with."""

import pytest
from mini import write_case


@pytest.fixture
def case(tmp_path):
    """LoRA file, source folder and target folder."""
    return write_case(tmp_path)
