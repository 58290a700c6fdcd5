"""Hooks of the documentation site: pages that stand outside docs/, links, the doctor's Python.

README.md is the site's first page, and CONTRIBUTING.md and the like stand beside it. A link to a
file of the repository that is not a page of the site becomes plain text, or leads to the repository
once `repo_url` of mkdocs.yml names it.
"""

from __future__ import annotations

import os
import posixpath
import re
import runpy
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "integrations/comfyui/README.md": "comfyui.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
"""Pages outside docs/, and what the site calls them."""

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages from outside docs/."""
    for place, name in OUTSIDE.items():
        text = (ROOT / place).read_text("utf-8")
        files.append(File.generated(config, name, content=_translate(text, place, config)))
    for picture in (ROOT / "integrations" / "comfyui").glob("*.png"):
        files.append(File.generated(config, picture.name, content=picture.read_bytes()))
    pack = runpy.run_path(str(ROOT / "docs" / "pack_doctor.py"))["pack_package"]
    files.append(File.generated(config, "doctor/prolora.zip", content=pack()))
    # The unpacked npm package `pyodide`: 13 MB that the repository does not hold. A site that is
    # published (PROLORA_PUBLISH) has it; elsewhere the page says that it cannot work.
    runtime = os.environ.get("PROLORA_PYODIDE")
    if not runtime:
        lacks = "the page *What is this LoRA?* lacks its Python: PROLORA_PYODIDE names none"
        if os.environ.get("PROLORA_PUBLISH"):
            raise PluginError(lacks)
        print(f"docs/site.py: {lacks}", file=sys.stderr)
    for file in sorted(Path(runtime).glob("py*")) if runtime else []:
        name = f"doctor/pyodide/{file.name}"
        files.append(File.generated(config, name, content=file.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Translates the links of a page in docs/."""
    if page.file.src_uri in OUTSIDE.values():
        return markdown  # translated before
    return _translate(markdown, f"docs/{page.file.src_uri}", config)


def _translate(text: str, place: str, config: Any) -> str:
    """The text with the site's links in place of the repository's.

    Args:
        text: of a page.
        place: of that page in the repository.
        config: of the site.
    """

    def write_link(match: re.Match[str]) -> str:
        mark, words, link, anchor = match[1], match[2], match[3], match[4] or ""
        if "://" in link or link.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(place), link))
        name = OUTSIDE.get(path, path.removeprefix("docs/"))
        if path in OUTSIDE or path.startswith("docs/") or mark:
            name = posixpath.basename(name) if mark and not path.startswith("docs/") else name
            return f"{mark}[{words}]({name}{anchor})"
        home = (config.repo_url or "").rstrip("/")
        return f"[{words}]({home}/blob/main/{path})" if home else words

    return _LINK.sub(write_link, text)
