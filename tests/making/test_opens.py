"""Every verb opens a LoRA once, and leaves no file open."""

from __future__ import annotations

import json

import mini
from fresh import run_fresh

VERBS = {
    "transfer": "prolora.transfer(lora, source, target, out=out)",
    "check": "prolora.check(lora)",
    "check for a base": "prolora.check(lora, base=source, deep=True)",
    "check of two bases": "prolora.check(lora, source=source, target=target)",
    "convert": "prolora.convert(lora, out=out, out_rank=2)",
    "convert with its base": "prolora.convert(lora, source, out=out, alpha=2)",
    "merge": "prolora.merge([lora, other], out=out)",
    "bake": "prolora.bake([lora, other], source, out + ' baked')",
}
CALLS = """
import gc, json, sys
import prolora
lora, source, target, other, folder = sys.argv[1:]
opened, told = [], {}
sys.addaudithook(lambda event, given: event == "open" and given and opened.append(str(given[0])))
for number, (name, verb) in enumerate(VERBS.items()):
    opened.clear()
    out = f"{folder}/{number}.safetensors"
    exec(verb)
    left = sum(type(one).__name__ == "SharedFile" for one in gc.get_objects())
    told[name] = [opened.count(lora), left]
print(json.dumps(told))
"""


def test_every_verb_opens_a_lora_once_and_closes_it(tmp_path):
    lora, source, target = mini.write_case(tmp_path)
    other = tmp_path / "other.safetensors"
    other.write_bytes(lora.read_bytes())
    said = run_fresh(f"VERBS = {VERBS!r}\n{CALLS}", lora, source, target, other, tmp_path)
    assert json.loads(said.splitlines()[-1]) == {verb: [1, 0] for verb in VERBS}
