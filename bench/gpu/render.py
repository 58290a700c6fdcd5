"""Tables of results, from bench/:

    python -m gpu.render FILE...                                  # prints all, for gpu_model.md
    python -m gpu.render --page ../docs/performance.md FILE...    # fills the table "your card"

A FILE is the gpu.json or results.jsonl of bench/gpu.sh. The same lines give the same text. Of
several lines of the same name and case the last counts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "quality"))
from results import fill_page

from .results import FINISHED, Line, read_lines

DEFAULT = Path(__file__).parents[1] / "results" / "gpu.jsonl"
# Of truncated_svd: column -> name of its lines.
STACK_COLUMNS = {
    "ms": "truncated_svd",
    "bound": "largest bound",
    "MiB": "peak memory",
    "dispatches": "dispatches",
    "waits": "synchronisations",
}


def render_results(lines: Iterable[Line]) -> str:
    """Markdown: a section for each card."""
    cards: dict[str, list[Line]] = {}
    for line in lines:
        if line["value"] is not None and line["name"] != FINISHED:
            cards.setdefault(line["card"], []).append(line)
    return "\n\n".join(_render_card(card, found) for card, found in cards.items()) + "\n"


def fill_cards(page: str, lines: Iterable[Line]) -> str:
    """Returns the page with one row for each card and case of truncated_svd in "your card".

    Lines of dry runs are left out: they are toy sizes on a CPU.
    """
    cards: dict[str, list[Line]] = {}
    for line in lines:
        if line["value"] is not None and not line.get("dry"):
            cards.setdefault(line["card"], []).append(line)
    rows = []
    for card, found in cards.items():
        ours, anchors = _values(found), _values(found, "anchors")
        for (name, case), line in ours.items():
            if name != "truncated_svd":
                continue
            baseline = anchors.get(("torch.linalg.svd", case.partition(",")[0]))
            numbers = [_number(x) for x in (line, baseline, ours.get(("largest bound", case)))]
            rows.append(
                [card, case, *numbers, line["versions"], f"{line['date']}, {line['commit']}"]
            )
    rows = rows or [["not measured", *["–"] * 6]]
    head = ["card", "truncated_svd of", "ms", "torch.linalg.svd, ms", "bound", "versions", "run"]
    if "<!-- your card -->" not in page:
        raise ValueError("the page has no <!-- your card --> … <!-- end -->")
    return fill_page(page, {"your card": _table(head, rows)})


def _render_card(card: str, lines: list[Line]) -> str:
    last = lines[-1]
    toys = " These are toy sizes on a CPU: they mean nothing." if last.get("dry") else ""
    head = f"### {card}\n\n{last['date']}, commit {last['commit']}, by `bench/gpu.sh`.{toys}"
    parts = [head, _render_stacks(lines), _render_stages(lines), _render_kernels(lines)]
    for title, call in (
        ("What the card can do", "anchors"),
        ("Against the CPU", "correct"),
        ("Where the time goes", "why"),
    ):
        parts.append(_render_list(title, [line for line in lines if line["call"] == call]))
    return "\n\n".join(part for part in parts if part)


def _values(lines: Iterable[Line], call: str = "ours") -> dict[tuple[str, str], Line]:
    return {(line["name"], line["case"]): line for line in lines if line["call"] == call}


def _render_stacks(lines: list[Line]) -> str:
    """truncated_svd beside torch.linalg.svd on the same card, where both were measured."""
    ours, anchors = _values(lines), _values(lines, "anchors")
    cases = [case for name, case in ours if name == "truncated_svd"]
    if not cases:
        return ""
    rows = []
    for case in cases:
        cells = [_number(ours.get((name, case))) for name in STACK_COLUMNS.values()]
        baseline = anchors.get(("torch.linalg.svd", case.partition(",")[0]))
        ratio = baseline and f"{baseline['value'] / ours['truncated_svd', case]['value']:.1f} ×"
        cells += [_number(baseline), ratio or "–"]
        rows.append([case, *cells])
    return _table(
        ["truncated_svd", *STACK_COLUMNS, "torch.linalg.svd, ms (2 matrices, scaled)", "faster"],
        rows,
    )


def _render_stages(lines: list[Line]) -> str:
    by_stage = {key: line for key, line in _values(lines).items() if key[0].startswith("stage ")}
    if not by_stage:
        return ""
    stages = list(dict.fromkeys(name for name, _ in by_stage))
    cases = list(dict.fromkeys(case for _, case in by_stage))
    rows = [[case, *(_number(by_stage.get((stage, case))) for stage in stages)] for case in cases]
    return _table(["ms by stage", *(stage.removeprefix("stage ") for stage in stages)], rows)


def _render_kernels(lines: list[Line]) -> str:
    ours = _values(lines)
    rows = []
    for (name, case), line in ours.items():
        theirs = ours.get((f"torch for {name}", case))
        if theirs:
            ratio = f"{theirs['value'] / line['value']:.1f} ×"
            scaled = " (scaled)" if "scaled" in theirs else ""
            rows.append([name, case, _unit(line), _unit(theirs) + scaled, ratio])
    return _table(["op", "case", "ours", "torch", "faster"], rows) if rows else ""


def _render_list(title: str, lines: list[Line]) -> str:
    kept = {(line["name"], line["case"]): line for line in lines}
    rows = [
        [line["name"], line["case"], _unit(line), line.get("note", "")] for line in kept.values()
    ]
    return f"{title}:\n\n" + _table(["what", "case", "value", "note"], rows) if rows else ""


def _number(line: Line | None) -> str:
    return "–" if line is None else f"{line['value']:.4g}"


def _unit(line: Line) -> str:
    return f"{_number(line)} {line['unit']}".strip()


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in lines
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Tables of the results of bench/gpu.sh")
    parser.add_argument("files", nargs="*", type=Path, default=[DEFAULT])
    parser.add_argument("--page", type=Path, help="a page with the table 'your card', to be filled")
    options = parser.parse_args(arguments)
    lines = read_lines(options.files)
    if options.page:
        options.page.write_text(fill_cards(options.page.read_text("utf-8"), lines), "utf-8")
    else:
        print(render_results(lines), end="")


if __name__ == "__main__":
    main()
