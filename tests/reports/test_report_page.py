"""A report as a page: complete in itself, escaped, small, and with the report's own numbers."""

import base64
import dataclasses
import hashlib
import html
import json
import math
import re
import subprocess
from importlib import resources
from pathlib import Path

import pytest
import torch
from backends import find_node
from mini import write_case
from reports import KINDS, PLACES, Page, make_report, make_row

import prolora
from prolora import Outcome
from prolora.fitting.fit_report import FitReport
from prolora.fitting.gate import Gate
from prolora.fitting.probe_report import ProbeReport
from prolora.reports.outcome import OutcomesReport
from prolora.reports.page.picture_file import write_png
from prolora.reports.report import PictureGrid

HOSTILE = "<script>alert(1)</script>\"'&\x00\x1b[31m\u202e\udcff.attn1.to_q"
SHOWN = "<script>alert(1)</script>\"'&\\x00\\x1b[31m\\u202e\\udcff.attn1.to_q"


@pytest.fixture(scope="module")
def report():
    return make_report()


def policy_of(page):
    return next(a["content"] for _, a in page.tags if a.get("http-equiv"))


def test_the_page_is_well_formed_and_loads_nothing(report):
    grid = PictureGrid(["target"], ["two digits"], [[b"\x89PNG"]], "Seen.")
    text = dataclasses.replace(report, grid=grid).to_html({"command": "prolora transfer"})
    page = Page(text)
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert all(link.startswith("#") for link in page.values("href"))
    assert page.values("src") == ["data:image/png;base64,iVBORw=="]
    assert page.values("alt") == ["target: two digits"]
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    assert len(set(page.values("id"))) == len(page.values("id"))
    assert {link[1:] for link in page.values("href")} <= set(page.values("id"))
    assert page.count("h1") == page.count("main") == page.count("script") == 1


def test_the_policy_admits_this_script_and_this_style_and_nothing_else(report):
    text = report.to_html()
    page = Page(text)
    policy = dict(part.strip().split(" ", 1) for part in policy_of(page).split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
    for name in ("script", "style"):
        code = re.search(f"<{name}>(.*?)</{name}>", text, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert policy[f"{name}-src"] == f"'sha256-{digest}'"
    # Neither attribute would be let through.
    assert not [key for _, given in page.tags for key in given if key.startswith("on")]
    assert not page.values("style")


def test_the_page_of_560_projected_modules_is_small():
    rows = [
        make_row(f"down_blocks.2.attentions.{a}.transformer_blocks.{i}.attn{n}.{kind}")
        for a in range(7)
        for i in range(10)
        for n in (1, 2)
        for kind in ("to_q", "to_k", "to_v", "to_out.0")
    ]
    assert len(rows) == 560
    assert len(make_report(rows).to_html().encode()) < 600_000


def make_pages(name):
    """Everything that is made of reports, with a name wherever one can be."""
    rows = [make_row(name, target=f"{name}2", reason=name), make_row(f"{name}.4", name)]
    rows.append(make_row(f"{name}.3", "skipped", reason=name))
    names = {"source": name, "target": name, "match": name, "provenance": {"lora_hash": name}}
    report = make_report(rows, **names, left_out={name: name}, dropped_blocks=(name,))
    grid = PictureGrid([name], [name], [[b""]], name)
    path = Path(name.replace("/", "_").replace("\x00", ""))
    moved = Outcome(path, path, report)
    failed = Outcome(path, path, error=prolora.errors.OutputError(name))
    return [
        dataclasses.replace(report, grid=grid).to_html({name: name}),
        OutcomesReport([moved, failed]).to_html({"command": name}),
    ]


def test_icons_are_shown_sharp_and_images_smooth(report):
    images = [[write_png(torch.zeros(3, side, side)) for side in (24, 128)]]
    grid = PictureGrid(["target"], ["an icon", "an image"], images, "Seen.")
    text = dataclasses.replace(report, grid=grid).to_html()
    assert re.findall(r'<img( class="tiny")? .*?alt="([^"]+)"', text) == [
        (' class="tiny"', "target: an icon"),
        ("", "target: an image"),
    ]


@pytest.mark.parametrize("name", [HOSTILE, "</title></style><img src=x onerror=alert(1)>"])
def test_no_text_becomes_markup(name):
    harmless = re.sub(r"[^\w. ]", "_", name)
    for text, other in zip(make_pages(name), make_pages(harmless), strict=True):
        page, plain = Page(text), Page(other)
        assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
        assert [[*given] for _, given in page.tags] == [[*given] for _, given in plain.tags]
        text.encode()  # no half character is left


def test_control_characters_are_spelled_out():
    assert SHOWN in Page(make_report([make_row(HOSTILE)]).to_html()).text


def test_the_table_has_the_numbers_of_the_report(report):
    text = report.to_html()
    body = text[text.index('id="modules"') :]
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", body[body.index("<tbody>") : body.index("</tbody>")])
    assert len(rows) == len(report.modules)
    names = [f"{p}.transformer_blocks.{d}.{kind}" for p in PLACES for d in "01" for kind in KINDS]
    by_name = {row.source: row for row in report.modules}
    for name, cells in zip(names, rows, strict=True):  # in the order of the model
        row = by_name[name]
        page = Page(cells)
        assert page.text.startswith(row.source + row.status)
        assert ("75%0.400.87" in page.text) == (row.status == "mapped")
        assert page.text.endswith(row.reason)


def test_tensors_that_stay_behind_have_a_table():
    page = Page(make_report(left_out={"emb": "an embedding"}).to_html())
    assert {"tensor", "emb"} <= {*page.inside["th"]} and "an embedding" in page.inside["td"]
    assert "tensor" not in Page(make_report().to_html()).inside["th"]


def test_the_verdict_in_words_comes_first_and_the_numbers_below(report):
    text = report.to_html()
    page, told = Page(text), report.in_words()
    assert page.inside["h1"] == [f"{told.mark} {told.headline}"]
    places = [text.index(html.escape(line)) for line in told.lines]
    assert places == sorted(places) and places[-1] < text.index(">In numbers<")
    assert all(sentence in page.inside["li"] for sentence in report.sentences())
    assert "sha256:aa" in page.text and "sha256:cc" in page.text


def test_what_has_no_number_is_shown_without_one(report):
    unknown = dict.fromkeys(("norm_ratio", "copy_distance"), math.nan)
    rows = [make_row("blocks.0.a", **unknown, measures=None)]
    probe = ProbeReport(0.9, Gate("go", 1.0, {"all": 0.6}, {"all": 0.1}, "60% reached"))
    fitted = FitReport(method="fit", source="a", target="b", modules=(*rows,), probe=probe)
    text = Page(fitted.to_html()).text
    assert "nan" not in text.lower() and "kept" not in text  # nothing of a copy is
    dry = dataclasses.replace(report, dry_run=True, verdict=None, asked=None, provenance={})
    rows = [dataclasses.replace(row, measures=None, energy=math.nan) for row in report.modules]
    for shown in (dataclasses.replace(dry, modules=tuple(rows)), make_report([], dry_run=True)):
        page = Page(shown.to_html())
        assert page.inside["h1"][0].endswith("A dry run: nothing was written.")
        assert "kept" not in "".join(page.inside.get("title", []))
        assert "nan" not in page.text.lower()


def test_the_report_of_a_transfer_knows_its_digests(tmp_path):
    report = prolora.transfer(*write_case(tmp_path), out=tmp_path / "out.safetensors").report
    made = report.provenance
    assert made["version"] == prolora.__version__ and made["method"] == report.method
    page = html.unescape(report.to_html())
    for key in ("source_hash", "target_hash", "lora_hash", "recipe"):
        assert made[key] in page
    assert json.loads(made["recipe"])["options"] == {"format": "auto"}
    assert report.to_dict()["provenance"] == made


SCRIPT_TEST = """
const s = require(process.argv[1]);
const check = (got, want) => {
  if (JSON.stringify(got) !== JSON.stringify(want)) throw new Error(JSON.stringify([got, want]));
};
const sorted = (texts, down) => s.sortOrder(texts, down).map((i) => texts[i]);
check(sorted(["9%", "–", "100%", "20%"], false), ["9%", "20%", "100%", "–"]);
check(sorted(["9%", "–", "100%", "20%"], true), ["100%", "20%", "9%", "–"]);
check(sorted(["a.10.q", "a.9.q", "b.1.q"], false), ["a.9.q", "a.10.q", "b.1.q"]);
check(sorted(["−0.5", "0.25", "-1"], false), ["-1", "−0.5", "0.25"]);
check(s.sortOrder(["1", "1", "1"], true), [0, 1, 2]);
check(s.rowMatches("a.Attn2.to_k mapped", "mapped", "attn2 TO_K", ""), true);
check(s.rowMatches("a.attn2.to_k mapped", "mapped", "attn1", ""), false);
check(s.rowMatches("a mapped", "mapped", "", "skipped"), false);
"""


def test_the_script_sorts_and_filters(tmp_path):
    script = resources.files("prolora.reports.page") / "script.js"
    copy = tmp_path / "script.cjs"  # a module of the old kind, wherever it lies
    copy.write_text(script.read_text("utf-8"), "utf-8")
    run = subprocess.run([find_node(), "-e", SCRIPT_TEST, copy], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
