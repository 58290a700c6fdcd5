"""The files of the project without the stray files beside them, and copies for tests of `.ci`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Without git (an unpacked source distribution) only these belong to the project.
FOLDERS = ("bench", "csrc", "docs", "examples", "integrations", "python", "tests")
ROOT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "README.md", "RELEASE.md", "SECURITY.md")
# The files that the scripts in .ci read.
READ_BY_CI = (
    ".ci",
    ".github",
    ".gitignore",
    "CITATION.cff",
    "README.md",
    "docs/guide.md",
    "pyproject.toml",
    "examples/icon_family/pyproject.toml",
    "integrations/comfyui",
    "python/prolora/cli/commands.py",
)


def run_git(root: Path, *words: str) -> str:
    """Runs git in `root` and returns its output.

    The variables of an outer git, such as GIT_DIR in a hook, are removed: they name another
    repository. A checkout may belong to another user, for example in a container.
    """
    environment = {name: x for name, x in os.environ.items() if not name.startswith("GIT_")}
    line = ["git", "-c", "safe.directory=*", *words]
    return subprocess.check_output(line, cwd=root, env=environment, text=True, encoding="utf-8")


def list_files(root: Path = ROOT) -> list[Path]:
    """Returns the files that git tracks; without git, those in the folders of the project."""
    if (root / ".git").exists() and shutil.which("git"):
        paths = [root / name for name in run_git(root, "ls-files", "-z").split("\0") if name]
    else:
        paths = [path for folder in FOLDERS for path in (root / folder).rglob("*")]
        paths += [root / name for name in ROOT_PAGES]
    return sorted(path for path in paths if path.is_file())


def make_clone(root: Path) -> Path:
    """Copies the files that .ci reads into `root`, and adds them to a new git repository."""
    for name in READ_BY_CI:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name)
        else:
            shutil.copy(ROOT / name, root / name)
    if shutil.which("git"):
        run_git(root, "init", "--quiet")
        run_git(root, "add", ".")
    return root


def add_stray_files(root: Path) -> None:
    """Writes what a user leaves in the root: a venv, a notebook, outputs and notes.

    Each text would break a rule if it belonged to the project.
    """
    for name, text in {
        "venv/lib/python3/site-packages/other.py": "import prolora.nothing\n",
        "venv/lib/python3/site-packages/LICENSE.md": "[broken](missing.md)\n",
        "outputs/notes.md": "`pip install prolora`, [broken](missing.md)\n",
        "outputs/script.py": "import os, sys\n",
        "prolora-demo/neon-on-pruned.html": "",
        "notebook.ipynb": "no JSON",
        "notes.md": 'It never fails. `pip install "prolora[nothing]"` [broken](missing.md)\n',
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, "utf-8")
