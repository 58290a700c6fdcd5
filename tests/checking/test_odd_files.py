"""Odd files get one mark and one sentence, in Python, in a terminal and on the page."""

import json
import subprocess
import sys

import pytest
from odd_files import ODD_FILES, ROOT, check_on_page, read_page_script, write_pairs

from prolora import ProLoRAError, check


def ask_python(path, asked):
    try:
        found = check(path, **asked)
    except ProLoRAError as error:
        return "✖", str(error).removeprefix(f"{path}: ")
    return found.mark, found.headline


@pytest.mark.parametrize("odd", ODD_FILES, ids=lambda odd: odd.name)
def test_python_and_the_page_say_of_an_odd_file_what_the_table_has(odd, tmp_path):
    path = odd.write(tmp_path)
    mark, first = ask_python(path, odd.asked)
    assert (mark, first[: len(odd.first)]) == (odd.mark, odd.first)
    if "deep" not in odd.asked:  # the page reads headers alone
        marked, line = check_on_page(path, odd.asked.get("program", ""))
        assert (marked, line[: len(odd.first)]) == (odd.mark, odd.first)


ALONE = """
import json, sys
sys.path.insert(0, sys.argv[1])
exec(sys.stdin.read())
print(json.dumps([json.loads(check(x, "", y)) for x, y in json.loads(sys.argv[2])]))
"""


def ask_page(pairs):
    """The page's answers in a Python that has nothing but the package."""
    line = [sys.executable, "-I", "-S", "-c", ALONE, ROOT / "python"]
    line.append(json.dumps(pairs, default=str))
    return json.loads(subprocess.check_output(line, input=read_page_script(), text=True))


def test_the_page_says_of_twelve_loras_and_models_what_check_says(tmp_path):
    pairs = write_pairs(tmp_path)
    mistakes = [(pairs[0][0], pairs[4][0]), (pairs[0][0], tmp_path / "none")]
    *found, with_lora, nothing = ask_page(pairs + mistakes)
    for (lora, base), answer in zip(pairs, found, strict=True):
        expected = check(lora, base=base).to_dict()
        assert answer["json"] == json.loads(json.dumps(expected)), (lora, base)
    assert "".join(one["mark"] for one in found) == "✔✖✖✖✖✔✖✖✖✖✔✔"
    assert with_lora["headline"].startswith("sdxl-lora.safetensors: is a LoRA or a model with one")
    assert nothing["mark"] == "✖" and "none: no such file" in nothing["headline"]
