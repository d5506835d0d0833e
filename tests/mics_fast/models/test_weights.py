"""Weights by name: from a folder, and from a hub that a local server plays."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from mics_fast.common.errors import InputError
from mics_fast.models.weights import find_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROOT = Path(__file__).resolve().parents[3]
CONFIG = json.dumps({"architecture": "vit_tiny", "model_args": {"num_heads": 2}}).encode()
TENSORS = save({"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)})
REPOSITORIES = {
    "owner/whole": {"config.json": CONFIG, "model.safetensors": TENSORS},
    "owner/no-weights": {"config.json": CONFIG},
}


class Hub(BaseHTTPRequestHandler):
    """Serves files as huggingface.co does: /OWNER/NAME/resolve/REVISION/FILE, one commit each."""

    def _answer(self, *, body):
        owner, name, _, revision, file = self.path.strip("/").split("/", 4)
        files = REPOSITORIES.get(f"{owner}/{name}")
        content = None if files is None else files.get(file)
        error = "RepoNotFound" if files is None else "EntryNotFound" if content is None else ""
        if files is not None and revision not in ("main", COMMIT):
            error = "RevisionNotFound"
        self.send_response(404 if error else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        if error:
            self.send_header("X-Error-Code", error)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub():
    """Address of a hub with ``REPOSITORIES``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask(init, cache, **environment):
    """Find weights in a new process, because huggingface_hub reads its environment on import."""
    pytest.importorskip("huggingface_hub")
    program = (
        "import sys\n"
        "from mics_fast.common.errors import InputError\n"
        "from mics_fast.models.weights import find_weights\n"
        "try:\n"
        "    found = find_weights(sys.argv[1])\n"
        "    print(found.name, found.file, found.config['model_args']['num_heads'], sep='\\n')\n"
        "except InputError as error:\n"
        "    print('refused:', error)\n"
    )
    kept = {n: v for n, v in os.environ.items() if "proxy" not in n.lower() and n[:3] != "HF_"}
    kept |= {"HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", program, init],
        env=kept, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_name_is_downloaded_once_pinned_and_then_found_offline(hub, tmp_path):
    online = ask("hf-hub:owner/whole", tmp_path, HF_ENDPOINT=hub)
    name, file, heads = online.splitlines()
    assert name == f"hf-hub:owner/whole@{COMMIT}" and heads == "2"
    assert Path(file).read_bytes() == TENSORS
    assert ask(name, tmp_path, HF_HUB_OFFLINE="1") == online
    assert ask("hf-hub:owner/whole", tmp_path, HF_HUB_OFFLINE="1") == online


def test_offline_a_missing_file_is_one_sentence_with_the_way_out(tmp_path):
    said = ask("hf-hub:owner/whole@main", tmp_path, HF_HUB_OFFLINE="1")
    assert said.startswith("refused: model.init: config.json of owner/whole at revision main")
    for part in ("not in the cache", "HF_HUB_OFFLINE", "hf download owner/whole", "a folder with"):
        assert part in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("owner/absent", "config.json of owner/absent .* no such repository"),
        ("owner/whole@v2", "owner/whole at revision v2 .* no such revision"),
        ("owner/no-weights", "pytorch_model.bin of owner/no-weights .* has no such file"),
    ],
)
def test_what_the_hub_lacks_is_named(name, sentence, hub, tmp_path):
    said = ask(f"hf-hub:{name}", tmp_path, HF_ENDPOINT=hub)
    assert said.startswith("refused: ")
    assert re.search(sentence, said), said


@pytest.mark.parametrize("name", ["", "owner", "owner/name@", "a/b/c", "o/n@x y"])
def test_a_name_of_no_repository_is_refused_before_the_hub_is_asked(name):
    with pytest.raises(InputError, match="wanted hf-hub:OWNER/NAME"):
        find_weights(f"hf-hub:{name}")


def test_a_folder_holds_weights_and_perhaps_a_configuration(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(TENSORS)
    assert find_weights(str(tmp_path)).config == {}
    (tmp_path / "config.json").write_bytes(CONFIG)
    found = find_weights(str(tmp_path))
    assert found.file == tmp_path / "model.safetensors" and found.name == str(tmp_path)
    assert found.config["architecture"] == "vit_tiny"


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"neither model\.safetensors nor pytorch_model"):
        find_weights(str(tmp_path))


def test_a_configuration_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(TENSORS)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(InputError, match=r"config\.json is no JSON object"):
        find_weights(str(tmp_path))
