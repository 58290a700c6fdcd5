"""Stand-ins for the Hugging Face Hub: its client, and a server that answers as the hub does."""

import http.server
import json
import os
import subprocess
import sys
import threading
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from prolora.adapters.hub_adapters import fetch_adapter

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PREFIXES = tuple(f"/org/m/resolve/{revision}/" for revision in (COMMIT, "main", "v2"))


class Hub(ModuleType):
    """What the package has, over a folder that stands for the hub."""

    def __init__(self, folder: Path, offline: bool = False) -> None:
        super().__init__("huggingface_hub")
        self.folder, self.fetched = folder, []
        self.refusal = None
        self.constants = SimpleNamespace(HF_HUB_OFFLINE=offline)
        self.collections = {}
        self.HfApi = lambda: SimpleNamespace(
            model_info=self.model_info, get_collection=self.collections.__getitem__
        )

    def model_info(self, repo, revision=None):
        if self.refusal:
            raise self.refusal
        if not (self.folder / repo).is_dir():
            raise LookupError(f"404: {repo}")
        assert not self.constants.HF_HUB_OFFLINE
        names = [
            p.relative_to(self.folder / repo).as_posix() for p in (self.folder / repo).rglob("*.*")
        ]
        self.asked = revision
        siblings = [SimpleNamespace(rfilename=name) for name in names]
        return SimpleNamespace(sha=COMMIT, siblings=siblings)

    def hf_hub_download(self, repo, name, revision=None):
        if revision == COMMIT:  # what is asked for by branch is of another commit here
            self.fetched.append(name)
        else:
            assert revision == self.asked
        return str(self.folder / repo / name)

    def snapshot_download(self, repo, revision=None, local_files_only=False, allow_patterns=("*",)):
        assert local_files_only or allow_patterns != ("*",)
        if not local_files_only:
            self.fetched += [
                name
                for name in sorted(x.rfilename for x in self.model_info(repo, revision).siblings)
                if any(fnmatch(name, pattern) for pattern in allow_patterns)
            ]
        return str(self.folder / repo)


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A hub that is empty so far; the working folder has nothing of the same name."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    cloud = Hub(tmp_path / "cloud")
    monkeypatch.setitem(sys.modules, "huggingface_hub", cloud)
    fetch_adapter.cache_clear()
    return cloud


@pytest.fixture
def hub_server(tmp_path):
    """(its address, the folder of org/m on it, the files that were fetched)."""
    repo, fetched = tmp_path / "cloud", []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(body=True)

        def do_HEAD(self):
            self.answer(body=False)

        def answer(self, body):
            path = self.path.partition("?")[0]
            prefix = next((p for p in PREFIXES if path.startswith(p)), "//")
            if path.startswith("/api/models/org/m"):
                names = [p.relative_to(repo).as_posix() for p in sorted(repo.rglob("*.*"))]
                siblings = [{"rfilename": name} for name in names]
                content = json.dumps({"id": "org/m", "sha": COMMIT, "siblings": siblings}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
            elif prefix != "//" and (repo / path.removeprefix(prefix)).is_file():
                name = path.removeprefix(prefix)
                content = (repo / name).read_bytes()
                self.send_response(200)
                self.send_header("ETag", f'"{hash(name) & 0xFFFFFFFF:08x}"')
                self.send_header("X-Repo-Commit", COMMIT)
                if body:
                    fetched.append(name)
            else:
                content = b""
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", repo, fetched
    server.shutdown()
    thread.join()
    server.server_close()


def ask_client(program, ids, address, home, offline=False):
    """What a process of its own prints, given a program: settings are read on import."""
    start = "import sys, json; ids, sys.path[:0] = json.loads(sys.argv[1]), sys.argv[2:]\n"
    settings = {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    home.mkdir(exist_ok=True)
    line = [sys.executable, "-c", start + program, json.dumps(ids), *map(os.path.abspath, sys.path)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=home, env=os.environ | settings)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()
