"""What Windows leaves to programs: patterns, quotes, and files that Notepad wrote."""

import os
import shutil
import signal
import subprocess

from lora_files import read_lora
from mini import MODULES

from prolora.cli.running import expand_patterns
from prolora.errors import join_words


def test_patterns_are_expanded_where_no_shell_does_and_brackets_belong_to_names(
    prolora, case, tmp_path, monkeypatch
):
    def run(*words):
        return prolora(*(words if os.name == "nt" else expand_patterns([*map(str, words)])))

    monkeypatch.chdir(tmp_path)
    for name in ("style1", "style[1]", "other"):
        shutil.copy("lora.safetensors", f"{name}.safetensors")
    _, text, _ = run("check", "sty*.safetensors")
    assert [line.partition(":")[0] for line in text.splitlines()[:2]] == [
        "style1.safetensors",
        "style[1].safetensors",
    ]
    _, text, _ = run("check", "style[1].safetensors")
    assert text.split("file")[1].split()[0] == "style[1].safetensors"
    assert run("check", "*[[]1*.safetensors")[0] == 2  # no name has "[[" in it
    code, _, text = run("check", "no*.safetensors")
    assert code == 2 and "no name matches this pattern" in text
    bases = ("--source", "source", "--target", "target", "--cache=none")
    blocks = ("--blocks", "*=0.5")  # what no file has the name of stays as it is
    move = ("transfer", "o*.safetensors", *bases, *blocks)
    assert run(*move, "-o", "half[1].safetensors")[0] == 0
    assert len(read_lora("half[1].safetensors").updates) == 2 * len(MODULES)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert run("check", f"~{os.sep}other.safetensors")[0] == 3
    code, _, text = run("check", "~other.safetensors")
    assert code == 2 and text.startswith("Error: ~other.safetensors: no such file")


def test_commands_for_people_to_copy_are_quoted_as_their_shell_reads_them(monkeypatch):
    words = ["prolora", r"C:\my models\a&b.safetensors", "--blocks=OUT*=0", 'say "hi"', "end\\ \\"]
    if os.name != "nt":
        assert join_words(words[:2]) == r"prolora 'C:\my models\a&b.safetensors'"
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        spelled, quoted = join_words(words), [join_words([word]) for word in words]
        plain = join_words([r"C:\models\a-b_1.safetensors"])
    assert plain == r"C:\models\a-b_1.safetensors"
    assert spelled == (
        r'prolora "C:\my models\a&b.safetensors" "--blocks=OUT*=0" "say \"hi\"" "end\ \\"'
    )
    for i in (1, 3, 4):  # by the rules of Microsoft's C runtime
        assert quoted[i] == subprocess.list2cmdline([words[i]])


def test_texts_of_notepad_and_powershell_are_read_without_their_mark(prolora, case, tmp_path):
    lora, source, target = case
    name = f"down_blocks.1.attentions.0.transformer_blocks.0.{MODULES[0]}"
    for encoding in ("utf-8-sig", "utf-16"):
        match, listed = tmp_path / f"{encoding}.json", tmp_path / f"{encoding}.txt"
        match.write_text(f'{{"{name}":\r\n "{name}"}}', "utf-8-sig")
        listed.write_text(f"{lora}\r\n", encoding)
        bases = ("--source", source, "--target", target, "--cache=none")
        out = tmp_path / f"{encoding}.safetensors"
        code, _, errors = prolora("transfer", lora, *bases, "--match", match, "-o", out)
        assert code == 0 and list(read_lora(out).updates) == [name], errors
        code, text, _ = prolora("migrate", listed, *bases, "-o", tmp_path / encoding)
        assert code == 0 and "target: 1 moved" in text


def test_ctrl_break_ends_a_command_as_a_request_to_stop(prolora, monkeypatch):
    if not hasattr(signal, "SIGBREAK"):
        monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)

    def press(*_, **__):
        signal.raise_signal(signal.SIGBREAK)

    monkeypatch.setattr("prolora.cli.check.CheckRequest.check", press)
    assert prolora("check", "x")[0] == 143
