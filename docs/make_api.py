"""Writes docs/api.md from the docstrings of everything that `prolora` exports.

    python docs/make_api.py            # write the page
    python docs/make_api.py --check    # exit 1 where the page differs from the docstrings

Needs griffe2md, at the version that the extra `dev` pins: another one lays the page out
differently. The sources are read, never imported.
"""

from __future__ import annotations

import ast
import html
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import griffe
import griffe2md

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
INTRODUCTION = """\
# The Python interface

Everything that `import prolora` gives, in the words of its docstrings (`python docs/make_api.py`).
[guide.md](guide.md) shows the common jobs, [method.md](method.md) the equations,
[errors.md](errors.md) what is refused. A function with `options` also takes each option as a
keyword. `project` comes first; everything behind it is folded: click a name to open it.
"""
NAMES = """\
## Nine names for most programs

| name | what it does |
|---|---|
"""
FIRST = ("project", "project_many", "transfer", "fit", "check")
FIRST += ("convert", "extract", "merge", "migrate")
NOTES = {
    "For embedders": """\
A converter, a node or a training tool has its tensors in memory. It needs three functions:

```python
import prolora
from prolora.core import project, project_many

moved = project((up, down), W_src, W_tgt)           # one weight, or a stack of equal shapes
moved = project_many(updates, W_srcs, W_tgts)       # the weights of a LoRA: {name: (up, down)}
done = prolora.transfer(lora, source, target)       # a whole LoRA: reads its format, and decides
```

`prolora.core` needs torch alone and loads nothing else of prolora.
[by_hand.py](../examples/by_hand.py) is a whole converter on it, [embed.py](../examples/embed.py)
shows the calls, and [six hosts](../examples/hosts) (ComfyUI, diffusers, a script like kohya's,
sd-mecha, CuPy, state dicts) need at most 20 lines each.

- **Two defaults.** `project` and `project_many` project (`method="prolora"`, the published
  method). `transfer` copies the LoRA if the two models are related and refuses it if they are not
  (`method="auto"`); a copy recovered more on nearly all models of [the study](evidence.md).
  `project(…, method="auto")` does the same for one pair of weights; it needs the weights, not a
  `Basis`.
- **Pass factors**, `(up, down)` or a `LowRank`, rather than a dense update: they cost less, and
  the result is a LoRA again.
- **Compared with fifteen lines of torch** they are faster and give subspaces with a bound on their
  error, the share of the update that was kept (`return_info=True`) and, with `method="auto"`, a
  refusal if two weights have nothing in common.
- **Errors** are in `prolora.errors`. All are a `ProLoRAError`, which is a `ValueError`; a missing
  name is a `KeyError`.
- **Threads.** Every function may be called from several threads at once
  ([more](performance.md#threads-and-core-alone)).
"""
}
# What is exported and stands in no group comes last, under "Others".
GROUPS = {
    "For embedders": ["project", "project_many", "ProjectionInfo", "LowRank"],
    "LoRA files": [
        "transfer",
        "transfer_many",
        "Transfer",
        "Report",
        "Outcome",
        "TransferOptions",
        "fit",
        "fit_many",
        "FitOptions",
        "check",
        "Check",
        "Lora",
        "Adapter",
    ],
    "Base models": [
        "open_base",
        "open_experts",
        "Base",
    ],
    "Tensors": [
        "truncated_svd",
        "Basis",
        "similarity",
        "Similarity",
        "principal_angles",
        "DEFAULT_RANK",
        "METHODS",
        "Method",
    ],
    "Making LoRAs": ["convert", "extract", "merge", "MergeOptions", "bake", "migrate"],
    "Diffusers pipelines": ["load_moved_lora"],
    "Errors": ["ProLoRAError"],
}
FROM_CPP = """\
## From C++

`csrc/ops.h` declares the ops as plain functions, `<op>_cpu(args)` and `<op>_cuda(args, stream)`:
pointers and sizes in, no memory is allocated on a device. `cmake -S . -B build
-DPROLORA_LIBRARY=ON` builds the static library `prolora_ops` without Python, with
[an example](../examples/small_svd.cpp); `cmake --install build` installs it and the header.
"""
KINDS = ("reports.lora_report.LoraReport", "reports.lora_report.MovedReport")
KINDS += ("moving.transfer_report.TransferReport",)
"""Reports as verbs give them."""
SETTINGS: Any = {
    **griffe2md.default_config,
    "heading_level": 3,
    "show_root_full_path": False,
    "show_root_members_full_path": False,
    "show_object_full_path": False,
    "show_signature_annotations": True,
    "show_if_no_docstring": False,
    "inherited_members": False,
    "line_length": 100,
    "members_order": "source",
    "summary": False,
}


def render_page() -> str:
    """The whole page as Markdown."""
    package = griffe.load("prolora", search_paths=[str(ROOT / "python")], docstring_parser="google")
    _tell_options(package)
    exported = [str(name) for name in package.exports or [] if not str(name).startswith("_")]
    named = {name for names in GROUPS.values() for name in names}
    groups = GROUPS | {"Others": [name for name in exported if name not in named]}
    first = [f"| [`{name}`](#{name}) | {_begin(_find(package, name))} |" for name in FIRST]
    own = _render_object(_find(package, "project"), "project")
    parts = [INTRODUCTION, own.removeprefix("#")]
    parts.append(NAMES + "\n".join(first) + "\n")
    for title, names in groups.items():
        present = [name for name in names if name in exported and name != "project"]
        if present:
            parts += [
                f"## {title}\n",
                *([NOTES[title]] if title in NOTES else []),
                *(_fold(_find(package, name), name) for name in present),
            ]
    parts.append("## Kinds of reports\n")
    for path in KINDS:
        kind = package[path]
        parts.append(f"#### `{kind.name}`\n\n```text\n{kind.docstring.value}\n```\n")
    return "\n".join([*parts, FROM_CPP]).rstrip() + "\n"


def _find(package: Any, name: str) -> Any:
    """Finds a public name where it is loaded from, or any other by its path."""
    home = _read_homes().get(name)
    return package[f"{home}.{name}" if home else name]


@cache
def _read_homes() -> dict[str, str]:
    """Reads where the public names stand."""
    tree = ast.parse((ROOT / "python" / "prolora" / "__init__.py").read_text("utf-8"))
    (homes,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES"
    )
    found: dict[str, str] = ast.literal_eval(homes)
    return found


def _begin(item: Any) -> str:
    """Returns the first line of a docstring."""
    return str(_resolve(item).docstring.value).splitlines()[0]


def _tell_options(package: Any) -> None:
    """Gives the fields of options objects the help that `option(default, help, …)` tells."""
    told: dict[str, dict[str, tuple[str, str]]] = {}
    for path in ("TransferOptions", "fitting.settings.FitSettings", "FitOptions", "MergeOptions"):
        kind, title = _resolve(_find(package, path)), path.rpartition(".")[2]
        # What the package itself makes of options is no part of the interface.
        for name, member in list(kind.members.items()):
            if name != "__init__" and (member.is_function or "property" in member.labels):
                kind.del_member(name)
        told[title] = fields = {}
        for name, member in kind.attributes.items():
            call = ast.parse(str(member.value or "None"), mode="eval").body
            if not isinstance(call, ast.Call):
                continue
            if ast.unparse(call.func) == "option":
                fields[name] = ast.unparse(call.args[0]), str(ast.literal_eval(call.args[1]))
            elif ast.unparse(call.func) == "take_option":
                default, text = told[ast.unparse(call.args[0])][name]
                changed = [word.value for word in call.keywords if word.arg == "help"]
                fields[name] = default, str(ast.literal_eval(changed[0])) if changed else text
        for parameter in kind.parameters:
            for known in told.values():
                if parameter.name in known:
                    parameter.default = known[parameter.name][0]
        known = [] if title == "TransferOptions" else told["TransferOptions"].items()
        same = [name for name, one in known if fields.get(name, ("", ""))[1] == one[1]]
        lines = [f"    {name}: {text}" for name, (_, text) in fields.items() if name not in same]
        if same:
            kind.docstring.value += f"\n\nAs in `TransferOptions`: {', '.join(same)}."
        kind.docstring.value += "\n\nAttributes:\n" + "\n".join(lines)


def _fold(item: Any, name: str) -> str:
    """Renders an object behind its name and first sentence."""
    line = html.escape(_begin(item), quote=False).replace("`", "")
    summary = f"<details><summary><code>{name}</code>: {line}</summary>"
    return f"{summary}\n\n{_render_object(item, name)}\n</details>\n"


def _resolve(item: Any) -> Any:
    return item.final_target if item.is_alias else item


def _render_object(item: Any, name: str) -> str:
    target = _resolve(item)
    if target.is_attribute:  # a constant: its value is what people look for
        comment = target.docstring.value if target.docstring else ""
        return f"### `{name}`\n\n```python\n{name} = {target.value}\n```\n\n{comment}\n"
    text = griffe2md.render_object_docs(target, SETTINGS)
    # Types and names come as links to headings that this page does not have.
    text = re.sub(r"\[([^\[\]]*)\]\(#[^)]*\)", r"\1", text)
    text = re.sub(r"<code>(.*?)</code>", lambda code: f"`{_unescape(code[1])}`", text)
    text = re.sub(r"(?<=```python\n)(.+)(?=\n```)", lambda code: _wrap_signature(code[1]), text)
    # The signature has the types; a sentence about a result is one, however many lines it takes.
    text = re.sub(r"^(- \*\*\S+\*\*) \(`[^\n]*?`\) –", r"\1 –", text, flags=re.M)
    text = re.sub(r"(?<=\*\*Returns:\*\*\n\n)(?:- [^\n]*\n)+", lambda x: _join(x[0]), text)
    text = re.sub(r"^- \*\*\*\*\w+\*\* – single options by name.*\n", "", text, flags=re.M)
    text = re.sub(r"(?<=#### )`(\w+)`\n\n```python\n(\1: .*)\n```\n", r"`\2`\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _join(lines: str) -> str:
    """Returns what stands behind the types of a list of results."""
    return " ".join(re.sub(r"^- `.*?` – ", "", line) for line in lines.splitlines()) + "\n"


def _unescape(code: str) -> str:
    return code.replace("\\[", "[").replace("\\]", "]").replace("&#124;", "|")


def _wrap_signature(signature: str) -> str:
    """The signature as ruff breaks it: one parameter a line where it is long."""
    definition = subprocess.run(
        ["ruff", "format", "--line-length", "100", "-"],
        input=f"def {signature}: ...\n",
        capture_output=True,
        text=True,
    )
    if definition.returncode:  # an attribute, or no signature
        return signature
    return definition.stdout.strip().removeprefix("def ").removesuffix(": ...")


def main() -> int:
    """Writes or checks the page."""
    page = render_page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page, "utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text("utf-8") == page:
        return 0
    print("docs/api.md differs from the docstrings: run `python docs/make_api.py`")
    return 1


if __name__ == "__main__":
    sys.exit(main())
