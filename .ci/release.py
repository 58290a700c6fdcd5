"""What a release must be, compared with what the repository says: a dry run before a tag.

    python .ci/release.py check            # runners, wheels, versions, metadata, the pack, the root
    python .ci/release.py build FOLDER     # pure wheel, sdist and the demo's models, built and used
    python .ci/release.py wheels FOLDER linux|all   # is every promised wheel there?
    python .ci/release.py pack VERSION     # writes what the ComfyUI pack asks for, and checks it

Exits with 1 and a line for each fault.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# GitHub's machines that exist; a label that is retired leaves this list.
RUNNERS = {"ubuntu-24.04", "ubuntu-24.04-arm", "windows-2022", "macos-15"}
PYTHONS = ("cp310", "cp311", "cp312", "cp313", "cp314")
# The first cibuildwheel that builds all of them.
CIBUILDWHEEL = (3, 4)
LINUX = ("manylinux*_x86_64", "manylinux*_aarch64")
OTHERS = ("win_amd64", "macosx*_arm64")
PURE = (
    "prolora-{}-py3-none-any.whl",
    "prolora-{}.tar.gz",
    "prolora_icon_family-{}-py3-none-any.whl",
)
MOST_PURE_BYTES = 1_000_000
# The tracked files and folders in the root.
ROOT_ENTRIES = {
    *(".ci", ".clang-format", ".github", ".gitignore", ".pre-commit-config.yaml"),
    *("CHANGELOG.md", "CITATION.cff", "CMakeLists.txt", "CONTRIBUTING.md", "LICENSE", "README.md"),
    *("RELEASE.md", "SECURITY.md", "bench", "build_backend.py", "cmake", "csrc", "docs"),
    *("examples", "integrations", "mkdocs.yml", "pyproject.toml", "python", "tests"),
}
PACK = "integrations/comfyui"


def read(root: Path, name: str) -> str:
    """The text of a file; "" where it is missing."""
    return (root / name).read_text("utf-8") if (root / name).is_file() else ""


def find_value(text: str, name: str) -> str:
    """The value of the first line `name = "value"`, or `name: value`."""
    found = re.search(rf'^{name}(?: = "([^"]*)"|: *(\S+))', text, re.MULTILINE)
    return (found[1] or found[2] or "") if found else ""


def check_runners(root: Path) -> list[str]:
    """Labels of machines that exist no more."""
    labels = set()
    for file in sorted((root / ".github/workflows").glob("*.yml")):
        text = file.read_text("utf-8")
        named = re.findall(r"runs-on: ([\w.-]+)$", text, re.MULTILINE)
        named += [x.strip() for row in re.findall(r" os: \[(.*)\]", text) for x in row.split(",")]
        labels |= {f"{file.name}: no machine is called {x}" for x in named if x not in RUNNERS}
    return sorted(labels)


def check_wheels_asked_for(root: Path) -> list[str]:
    """Pythons, systems and processors that wheels are built for."""
    project, faults = read(root, "pyproject.toml"), []
    built = find_value(project.partition("[tool.cibuildwheel]")[2], "build").split()
    if built != [f"{python}-*" for python in PYTHONS]:
        faults.append(f"pyproject.toml builds wheels for {built}, not for {PYTHONS}")
    macos = project.partition("[tool.cibuildwheel.macos]")[2]
    if 'archs = ["arm64"]' not in macos:
        faults.append("pyproject.toml: macOS has torch 2.4 and later for arm64 alone")
    used = re.search(
        r"pypa/cibuildwheel@v(\d+)\.(\d+)", read(root, ".github/workflows/release.yml")
    )
    if not used or (int(used[1]), int(used[2])) < CIBUILDWHEEL:
        faults.append(f"release.yml: cibuildwheel before {CIBUILDWHEEL} knows no {PYTHONS[-1]}")
    return faults


def check_jobs(root: Path) -> list[str]:
    """What the jobs of a release wait for and count."""
    text, faults = read(root, ".github/workflows/release.yml"), []
    jobs = dict(re.findall(r"^  (\w+):\n((?:    .*\n|\n)+)", text.partition("\njobs:\n")[2], re.M))
    waits = re.findall(r"needs: \[?([\w, ]+)", jobs.get("publish", ""))
    if not waits or {x.strip() for x in waits[0].split(",")} != {"linux", "pure"}:
        faults.append("release.yml: one red system keeps pure and Linux wheels from publishing")
    for job, command in (
        ("pure", "release.py check"),
        ("pure", "release.py build"),
        ("publish", "release.py wheels dist linux"),
        ("publish_others", "release.py wheels dist all"),
        ("pack", "release.py pack"),
    ):
        if command not in jobs.get(job, ""):
            faults.append(f"release.yml: job {job} runs no `{command}`")
    return faults


def check_versions(root: Path) -> list[str]:
    """Places that have the version."""
    version = find_value(read(root, "pyproject.toml"), "version")
    others = ("CITATION.cff", f"{PACK}/pyproject.toml", "examples/icon_family/pyproject.toml")
    told = {name: find_value(read(root, name), "version") for name in others}
    return [f"{name} has version {x}, not {version}" for name, x in told.items() if x != version]


def check_pack(root: Path, publish: bool = False) -> list[str]:
    """The ComfyUI pack; an address is needed where it is to be published."""
    text, faults = read(root, f"{PACK}/pyproject.toml"), []
    if find_value(text, "name") != "prolora":
        faults.append("the pack's id is `prolora`, which can never be changed later")
    if not read(root, f"{PACK}/.comfyignore"):
        faults.append("the pack has no .comfyignore: the registry would get what Python leaves")
    if publish and not re.search(r'^Repository = "https://', text, re.MULTILINE):
        faults.append("the pack has no Repository, without which the registry refuses it")
    if "prolora==" in text + read(root, f"{PACK}/requirements.txt"):
        faults.append("the pack asks for one version of prolora, and breaks the next pack's")
    if publish and not re.search(r"prolora>=[\d.]+,<\d", text):
        faults.append("the pack asks for no prolora")
    missing = [f for f in ("LICENSE", "README.md", "icon.svg") if not read(root, f"{PACK}/{f}")]
    return faults + [f"the pack has no {name}" for name in missing]


def list_tracked(root: Path) -> list[str]:
    """The paths that git tracks; none if `root` is not a checkout or git is not installed."""
    if not (root / ".git").exists() or not shutil.which("git"):
        return []
    # GIT_DIR and others, which git sets in a hook, name another repository. The checkout may belong
    # to another user, for example in a container.
    environment = {name: x for name, x in os.environ.items() if not name.startswith("GIT_")}
    line = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listed = subprocess.check_output(line, cwd=root, env=environment, text=True, encoding="utf-8")
    return listed.split("\0")[:-1]


def check_root(root: Path) -> list[str]:
    """Tracked files and folders in the root that ROOT_ENTRIES lacks.

    Untracked ones are not in a release: a venv, a notebook, the folder of `prolora demo`.
    """
    tracked = {path.partition("/")[0] for path in list_tracked(root)}
    return [f"the root has an unknown {name}" for name in sorted(tracked - ROOT_ENTRIES)]


def check_words(root: Path) -> list[str]:
    """Commands that the issue form names, and extras that pages name."""
    commands = re.search(
        r"^COMMANDS = \{(.*?)^\}", read(root, "python/prolora/cli/commands.py"), re.M | re.S
    )
    known = set(re.findall(r'^    "(\w+)": \(', commands[1] if commands else "", re.MULTILINE))
    faults = []
    for file in sorted((root / ".github/ISSUE_TEMPLATE").glob("*.yml")):
        named = re.findall(r"`prolora (\w+)", file.read_text("utf-8"))
        faults += [f"{file.name}: there is no `prolora {x}`" for x in named if x not in known]
    project = read(root, "pyproject.toml").partition("[project.optional-dependencies]")[2]
    extras = set(re.findall(r"^(\w+) = \[", project.partition("\n[")[0], re.MULTILINE))
    pages = [root / name for name in sorted(ROOT_ENTRIES) if name.endswith(".md")]
    for file in [*filter(Path.is_file, pages), *sorted(root.glob("docs/*.md"))]:
        for words in re.findall(r"""["'](?:\.|prolora)\[([\w,]+)\]""", file.read_text("utf-8")):
            faults += [f"{file.name}: no extra {x}" for x in words.split(",") if x not in extras]
    return faults


CHECKS = (
    check_runners,
    check_wheels_asked_for,
    check_jobs,
    check_versions,
    check_pack,
    check_root,
    check_words,
)


def check(root: Path = ROOT) -> list[str]:
    """All that can be seen without building."""
    return [fault for one in CHECKS for fault in one(root)]


def check_wheels(names: list[str], version: str, systems: tuple[str, ...]) -> list[str]:
    """Files that a release promises, and that are not there."""
    wanted = [name.format(version) for name in PURE]
    wanted += [f"prolora-{version}-{p}-{p}-{system}.whl" for p in PYTHONS for system in systems]
    # auditwheel names the older tag of a platform beside the newer one.
    return [f"no {x}" for x in wanted if not fnmatch.filter(names, x.replace(".whl", "*.whl"))]


def build(folder: Path) -> list[str]:
    """Builds what everybody can install, and uses it in fresh environments."""
    folder.mkdir(parents=True, exist_ok=True)
    pure = os.environ | {"PROLORA_NATIVE": "OFF"}
    for what, place in (("--wheel", "."), ("--sdist", "."), ("--wheel", "examples/icon_family")):
        line = [sys.executable, "-m", "build", what, "--outdir", folder, place]
        subprocess.run(line, cwd=ROOT, env=pure, check=True)
    (wheel,) = folder.glob("prolora-*-none-any.whl")
    (sdist,) = folder.glob("prolora-*.tar.gz")
    (models,) = folder.glob("prolora_icon_family-*.whl")
    faults = []
    if wheel.stat().st_size > MOST_PURE_BYTES:
        faults.append(f"the pure wheel has {wheel.stat().st_size} bytes")
    faults += use_without_torch(wheel.resolve(), folder / "without-torch")
    for archive in (wheel, sdist):
        home = folder / f"with-{archive.suffix[1:]}"
        faults += [f"{archive.name}: {x}" for x in use(archive.resolve(), models.resolve(), home)]
    return faults


def use_without_torch(wheel: Path, home: Path) -> list[str]:
    """Installs the pure wheel beside what `check` needs, which is no torch, and runs that."""
    venv.create(home, with_pip=True, clear=True)
    scripts = home / ("Scripts" if sys.platform == "win32" else "bin")
    subprocess.run([scripts / "pip", "install", "-q", "--no-deps", wheel], check=True)
    needs = ("numpy", "safetensors", "typer", "jinja2")
    subprocess.run([scripts / "pip", "install", "-q", *needs], check=True)
    lora = ROOT / "examples/icon_family/weights/loras/neon.safetensors"
    done = subprocess.run([scripts / "prolora", "check", lora], cwd=home, capture_output=True)
    # 3: it is of no known family, and no base is given.
    if done.returncode == 3 and b"rank 16" in done.stdout:
        return []
    return [f"`check` without torch: {done.stderr.decode(errors='replace')}"]


def use(archive: Path, models: Path, home: Path) -> list[str]:
    """Installs an archive, and runs `check`, `transfer` and `demo` from it."""
    venv.create(home, with_pip=True, clear=True)
    scripts = home / ("Scripts" if sys.platform == "win32" else "bin")
    pure = os.environ | {"PROLORA_NATIVE": "OFF"}
    line = [scripts / "pip", "install", "-q", f"{archive}[demo]", models]
    subprocess.run(line, check=True, env=pure)
    weights = ROOT / "examples/icon_family/weights"
    lora, bases = weights / "loras/neon.safetensors", ("--source", weights / "source")
    faults = []
    for words in (
        ("check", lora, "--base", weights / "source"),
        ("transfer", lora, *bases, "--target", weights / "pruned", "-o", "moved.safetensors"),
        ("demo",),
    ):
        done = subprocess.run([scripts / "prolora", *words], cwd=home, capture_output=True)
        messages = done.stderr.decode(errors="replace")
        if done.returncode or "WARNING" in messages:  # of a library that this environment lacks
            faults.append(f"`prolora {words[0]}`: {messages}")
    return faults


def stamp_pack(version: str, root: Path = ROOT) -> None:
    """Lets the pack ask for this version of prolora, and for later ones like it."""
    wish = f"prolora>={version},<{int(version.split('.')[0]) + 1}"
    project = root / PACK / "pyproject.toml"
    text = re.sub(
        r"^version = .*", f'version = "{version}"', project.read_text("utf-8"), flags=re.M
    )
    text = re.sub(r"^dependencies = .*", f'dependencies = ["{wish}"]', text, flags=re.MULTILINE)
    project.write_text(text, "utf-8")
    (root / PACK / "requirements.txt").write_text(f"{wish}\n", "utf-8")


def main(what: str = "", *words: str) -> list[str]:
    """Does one of the things above, and returns the faults."""
    version = find_value(read(ROOT, "pyproject.toml"), "version")
    if what == "build":
        return build(Path(words[0]))
    if what == "wheels":
        systems = LINUX if words[1] == "linux" else LINUX + OTHERS
        return check_wheels(os.listdir(words[0]), version, systems)
    if what == "pack":
        stamp_pack(words[0])
        return check_pack(ROOT, publish=True)
    if what == "check":
        return check()
    return [str(__doc__)]


if __name__ == "__main__":
    problems = main(*sys.argv[1:])
    print(*problems, sep="\n")
    sys.exit(bool(problems))
