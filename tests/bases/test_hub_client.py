"""The real client of the hub, against a server on this machine that answers as the hub does."""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from checkpoints import sparse_file, sparse_shards

pytest.importorskip("huggingface_hub")

Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
KEYS = {f"{Q}.weight": (4, 4), "conv_in.weight": (4, 4, 3, 3), "conv_out.weight": (4, 4, 3, 3)}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PREFIXES = tuple(f"/org/m/resolve/{revision}/" for revision in (COMMIT, "main", "v2"))


@pytest.fixture
def hub(tmp_path):
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
                names = [str(p.relative_to(repo)) for p in sorted(repo.rglob("*.*"))]
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


def opened(ids, address, home, offline=False):
    """What a process of its own says of each base, or the error: settings are read on import."""
    program = """
import sys, json
ids, sys.path[:0] = json.loads(sys.argv[1]), sys.argv[2:]
import prolora
for id_ in ids:
    try:
        base = prolora.open_base(id_)
    except prolora.UnsupportedFormat as error:
        print("refused:", " ".join(str(error).split()))
    else:
        print(base.name, len(base.shapes), base.read(list(base.shapes)[0]).shape)
"""
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
    line = [sys.executable, "-c", program, json.dumps(ids), *map(os.path.abspath, sys.path)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=home, env=os.environ | settings)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.slow
def test_the_client_fetches_the_shards_of_the_model_and_nothing_else(hub, tmp_path):
    address, repo, fetched = hub
    sparse_shards(repo / "unet", KEYS, 2)
    sparse_file(repo / "unet" / "diffusion_pytorch_model.fp16.safetensors", KEYS)
    sparse_file(repo / "text_encoder" / "model.safetensors", KEYS)
    home = tmp_path / "home"
    first, revision, other = opened(["org/m", "org/m@v2", "org/other"], address, home)
    assert first.startswith("org/m 3 ") and revision.startswith("org/m 3 ")
    assert other.startswith("refused: org/other: no such file or folder")
    assert "AttributeError" not in other
    stem = "unet/diffusion_pytorch_model"
    shards = {f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)}
    wanted = sorted({f"{stem}.safetensors.index.json", *shards})
    assert sorted(fetched) == wanted  # v2 is the same commit, and its files are there
    again = opened(["hf://org/m", "org/m@v2"], address, home, offline=True)
    assert all(said.startswith("org/m 3 ") for said in again)
    assert sorted(fetched) == wanted


def test_offline_a_model_that_was_never_fetched_is_a_typed_error(hub, tmp_path):
    address, _, fetched = hub
    (said,) = opened(["org/m"], address, tmp_path / "home", offline=True)
    assert said.startswith("refused: org/m: no such file or folder"), said
    assert "AttributeError" not in said
    assert not fetched
    assert not Path(tmp_path / "home" / "org").exists()
