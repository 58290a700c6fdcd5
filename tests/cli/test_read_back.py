"""Maps that come from outside: read by kind and within bounds, or refused by name."""

from pathlib import Path

import pytest
from mini import lora_tensors, source_weights, target_weights

import prolora


@pytest.mark.parametrize(
    "content, said",
    [
        ('{"a": {"b": "c"}}', "'a' leads to"),
        ('{"a": "' + "b" * 5000 + '"}', "'a' leads to"),
        ('{"' + "a" * 5000 + '": "b"}', "leads to 'b'"),
        ("[" * 100_000, "not JSON"),
        ('{"a": "' + "b" * (17 << 20) + '"}', "too large"),
    ],
    ids=["nested", "long name", "long target", "deep", "huge"],
)
def test_a_map_made_to_harm_is_refused_in_a_sentence(tmp_path: Path, content: str, said: str):
    path = tmp_path / "map.json"
    path.write_text(content)
    with pytest.raises(prolora.ProLoRAError, match=said) as caught:
        prolora.transfer(lora_tensors(), source_weights(), target_weights(), match=path)
    assert len(str(caught.value)) < 1000
