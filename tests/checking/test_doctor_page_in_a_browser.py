"""The page *What is this LoRA?* says in a browser what `check` says, and asks nobody for anything.

Needs playwright, a Chromium, and the unpacked npm package `pyodide` (PROLORA_PYODIDE names it).
"""

import functools
import http.server
import json
import os
import runpy
import shutil
import threading
from pathlib import Path

import pytest
from odd_files import ODD_FILES, write_pairs
from property_examples import AT_NIGHT
from safetensors.torch import save_file

from prolora import check

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
DOCS = Path(__file__).parents[2] / "docs"
MAKER = runpy.run_path(str(DOCS / "make_conformance.py"))
FILES = list(MAKER["list_files"]())[:: 1 if AT_NIGHT else 12]
RUNTIME = os.environ.get("PROLORA_PYODIDE", "")


@pytest.fixture
def address(tmp_path):
    if not Path(RUNTIME, "pyodide.mjs").is_file():
        pytest.skip("PROLORA_PYODIDE names no unpacked npm package `pyodide`")
    folder = tmp_path / "page"
    shutil.copytree(DOCS / "doctor", folder)
    (folder / "prolora.zip").write_bytes(
        runpy.run_path(str(DOCS / "pack_doctor.py"))["pack_package"]()
    )
    (folder / "pyodide").symlink_to(RUNTIME)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def browser():
    with sync_api.sync_playwright() as playwright:
        path = os.environ.get("PROLORA_CHROMIUM") or shutil.which("chromium")
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


READ = "[...document.querySelectorAll('article')].map(x => [x.querySelector('h2').textContent, x])"
LINES = f"Object.fromEntries({READ}.map(([n, x]) => [n, x.querySelector('p').textContent]))"


def open_page(browser, address, *files, width=1280, seen=None):
    """The page, once all files are answered."""
    page = browser.new_page(viewport={"width": width, "height": 800})
    if seen:
        page.on("request", lambda request: seen[0].append(request.url))
        page.on("console", lambda line: seen[1].append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: seen[1].append(str(error)))
    page.goto(address)
    page.wait_for_selector("#files:not([disabled])", state="attached", timeout=120_000)
    page.set_input_files("#files", [str(file) for file in files])
    done = f"document.querySelectorAll('article h2').length == {len(files)}"
    page.wait_for_function(done, timeout=240_000)
    return page


@pytest.mark.slow
def test_the_page_says_of_every_file_what_check_says_and_asks_nobody(address, browser, tmp_path):
    for name, *case in FILES:
        save_file(MAKER["make_file"](*case), tmp_path / name)
    asked, errors = [], []
    page = open_page(browser, address, *tmp_path.glob("*.safetensors"), seen=(asked, errors))
    assert not errors
    assert all(url.startswith((address, "data:", "blob:")) for url in asked)
    found = page.evaluate(f"{READ}.map(([name, x]) => [name, x.dataset.json])")
    for name, text in found:
        own = json.loads(json.dumps(check(tmp_path / name).to_dict() | {"path": name}))
        assert json.loads(text) | {"path": name} == own
    assert {name for name, _ in found} == {name for name, *_ in FILES}


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_table_of_odd_files_is_answered_as_in_a_terminal(address, browser, tmp_path, width):
    odd = [one for one in ODD_FILES if not one.asked]
    page = open_page(browser, address, *(one.write(tmp_path) for one in odd), width=width)
    found = page.evaluate(LINES)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert len(found) == len(odd)
    for one in odd:
        text = found[f"{one.name}.safetensors"]
        assert text.startswith(f"{one.mark} {one.first}") and "\n" not in text, text
        assert not any(word in text for word in ("Traceback", "/in/", "python -c")), text


@pytest.mark.slow
def test_a_model_dropped_beside_loras_is_compared_and_the_answer_copied(address, browser, tmp_path):
    pairs = write_pairs(tmp_path)
    loras, bases = (list(dict.fromkeys(side)) for side in zip(*pairs, strict=True))
    page = open_page(browser, address, *loras)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    for base in bases:
        page.evaluate("document.querySelectorAll('article').forEach(x => x.replaceChildren())")
        page.set_input_files("#model", str(base))
        done = f"document.querySelectorAll('article h2').length == {len(loras)}"
        page.wait_for_function(done, timeout=120_000)
        assert page.text_content("#model-name") == f"Your model: {base.name}"
        found = page.evaluate(f"{READ}.map(([name, x]) => [name, x.dataset.json])")
        for name, text in found:
            own = check(tmp_path / name, base=base).to_dict() | {"path": name}
            assert json.loads(text) | {"path": name} == json.loads(json.dumps(own))
    page.locator("article button").last.click()
    page.wait_for_selector("text=Copied")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith(f"{loras[0].name}\n✖ this LoRA is for Stable Diffusion 1.5")


@pytest.mark.slow
def test_from_the_disk_the_page_says_what_to_do(browser):
    page = browser.new_page()
    page.goto((DOCS / "doctor" / "index.html").as_uri())
    assert page.text_content("#state") == "This page cannot work from the disk"
    assert page.is_visible("#server") and "python -m http.server" in page.text_content("#server")


@pytest.mark.slow
def test_the_page_is_used_by_the_keyboard_alone(address, browser):
    page = browser.new_page()
    page.goto(address)
    page.wait_for_selector("#files:not([disabled])", state="attached", timeout=120_000)
    reached = []
    for _ in range(4):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert {"program", "files", "model"} <= set(reached)
