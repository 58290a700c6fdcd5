"""The page of a report in a real browser: sizes, colours, keyboard, no request and no error.

Needs playwright and a Chromium: its own, or the system's (`PROLORA_CHROMIUM` names another one).
"""

import os
import shutil

import pytest
from reports import KINDS, PLACES, make_report, make_row

from prolora import Outcome
from prolora.reports.outcome import OutcomesReport
from prolora.reports.report import PictureGrid

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

# One dark pixel.
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d494844520000000100000001080000000"
    "03a7e9b550000000a49444154789c636000000002000148afa4710000000049454e44ae426082"
)
LIGHT, DARK = "rgb(255, 255, 255)", "rgb(20, 23, 28)"


@pytest.fixture(scope="module")
def browser():
    path = os.environ.get("PROLORA_CHROMIUM") or shutil.which("chromium") or None
    with sync_api.sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"playwright finds no Chromium: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    rows = [
        make_row(
            f"{place}.transformer_blocks.{i}.{kind}",
            "skipped" if i == 1 else "mapped",
            reason="<script>document.title = 'run'</script>" if i == 1 else "projected",
            norm_ratio=(0.1 * i) ** 0.5,
        )
        for place in PLACES
        for i in range(9)
        for kind in KINDS
    ]
    path = tmp_path_factory.mktemp("pages") / "report.html"
    grid = PictureGrid(["target"], ["dot"], [[PNG]], "Seen.")
    path.write_text(make_report(rows, grid=grid).to_html(), "utf-8")
    return path


@pytest.fixture
def open_page(browser):
    """Opens a file; at the end nothing was asked of the network, and nothing went wrong."""
    contexts, problems, requests = [], [], []

    def open_file(file, width=1280, scheme="light", scripts=True):
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            java_script_enabled=scripts,
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url.split(":")[0]))
        page.goto(file.as_uri())
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert not problems and set(requests) <= {"file", "data"}


def shown(page):
    return page.eval_on_selector_all(
        "#modules tbody tr:not([hidden])", "rows => rows.map(row => row.cells[0].textContent)"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_the_window_in_the_readers_colours(open_page, file, width, scheme):
    page = open_page(file, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": LIGHT, "dark": DARK}[scheme]
    assert page.evaluate("document.images[0].naturalWidth") == 1
    assert page.title() == "sdxl → ssd-1b – prolora"


def test_a_keyboard_sorts_and_filters_the_table(open_page, file):
    page = open_page(file)
    heads = page.locator("#modules th button")
    kept = next(i for i in range(heads.count()) if heads.nth(i).inner_text().startswith("kept"))
    column = f"rows => rows.map(row => row.cells[{kept}].textContent)"
    orders = []
    for _ in range(2):
        heads.nth(kept).press("Enter")
        orders.append(page.eval_on_selector_all("#modules tbody tr", column))
    assert orders[0][:2] == ["0%", "0%"] and orders[1][0] == "80%"
    assert orders[0][-12:] == orders[1][-12:] == ["–"] * 12
    assert page.get_attribute(f"#modules th:nth-child({kept + 1})", "aria-sort") == "descending"
    page.locator("input[type=search]").press_sequentially("mid to_q")
    assert shown(page) and all(name.startswith(PLACES[1]) for name in shown(page))
    assert page.inner_text("output") == f"{len(shown(page))} of {9 * 12}"
    page.locator("select").select_option("skipped")
    assert shown(page) == [f"{PLACES[1]}.transformer_blocks.1.attn1.to_q"]


def test_it_reads_without_scripts(open_page, file):
    page = open_page(file, scripts=False)
    assert len(shown(page)) == 9 * 12 and page.locator(".filter, th button").count() == 0
    assert shown(page)[0].startswith(PLACES[0])


def test_the_index_of_several_loras_sorts_and_fits(open_page, tmp_path):
    outcomes = [Outcome(tmp_path / f"{name}.safetensors", tmp_path, make_report()) for name in "ba"]
    file = tmp_path / "index.html"
    file.write_text(OutcomesReport(outcomes).to_html(), "utf-8")
    for width in (390, 1280):
        page = open_page(file, width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.locator(".index th button").first.press("Enter")
        assert page.locator(".index tbody th").first.inner_text().startswith("⚠ a.safetensors")
