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
import torch
from property_examples import AT_NIGHT
from safetensors.torch import save_file

from prolora.checking.check import check

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


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_says_of_every_file_what_check_says(address, width, tmp_path):
    paths = {}
    for name, *case in FILES:
        paths[name] = tmp_path / name
        save_file(MAKER["make_file"](*case), paths[name])
    asked, errors = [], []
    with sync_api.sync_playwright() as playwright:
        path = os.environ.get("PROLORA_CHROMIUM") or shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#files:not([disabled])", state="attached", timeout=120_000)
        page.set_input_files("#files", list(map(str, paths.values())))
        done = f"document.querySelectorAll('article[data-json]').length == {len(paths)}"
        page.wait_for_function(done, timeout=240_000)
        read = "x => [x.querySelector('h2').textContent, x.dataset.json]"
        told = page.evaluate(f"[...document.querySelectorAll('article')].map({read})")
        wide = page.evaluate("document.documentElement.scrollWidth")
        browser.close()
    assert not errors and wide <= width
    assert all(url.startswith((address, "data:", "blob:")) for url in asked)
    for name, text in told:
        own = json.loads(json.dumps(check(paths[name]).to_dict() | {"path": name}))
        assert json.loads(text) | {"path": name} == own
    assert {name for name, _ in told} == paths.keys()


@pytest.fixture
def browser():
    with sync_api.sync_playwright() as playwright:
        path = os.environ.get("PROLORA_CHROMIUM") or shutil.which("chromium")
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.slow
def test_whatever_is_dropped_is_answered_by_a_sentence(address, browser, tmp_path):
    save_file({"down_blocks.0.conv.weight": torch.ones(4, 4)}, tmp_path / "base.safetensors")
    (tmp_path / "web.safetensors").write_text("<html>")
    (tmp_path / "empty.safetensors").touch()
    torch.save({"a": torch.ones(2)}, tmp_path / "pickle.safetensors")
    names = [f"{name}.safetensors" for name in ("base", "web", "empty", "pickle")]
    page = browser.new_page()
    page.goto(address)
    page.wait_for_selector("#files:not([disabled])", state="attached", timeout=120_000)
    page.set_input_files("#files", [str(tmp_path / name) for name in names])
    done = f"document.querySelectorAll('article h2').length == {len(names)}"
    page.wait_for_function(done, timeout=120_000)
    read = "x => [x.querySelector('h2').textContent, x.querySelector('p').textContent]"
    told = dict(page.evaluate(f"[...document.querySelectorAll('article')].map({read})"))
    assert "whole model, not a LoRA" in told["base.safetensors"]
    assert told.keys() == set(names)
    for text in told.values():
        assert text.startswith("✖ ") and "\n" not in text and len(text) < 300, text
        assert "Traceback" not in text and "/in/" not in text and "python -c" not in text, text


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
    for _ in range(3):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert {"program", "files"} <= set(reached)
