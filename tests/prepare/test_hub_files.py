"""`hf:NAME` as a tokenizer: with a hub that answers, one that does not, and an earlier download."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tokenizers import ByteLevelBPETokenizer

COMMIT = "0123456789" * 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["the cat and the dog"], vocab_size=270, special_tokens=["<|endoftext|>"])
    bpe.save(str(folder / "tokenizer.json"))
    return folder


@contextmanager
def hub(folder: Path) -> Iterator[str]:
    """A server on this machine that answers as the hub does for the repository some/name; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            repository, _, name = self.path.strip("/").partition("/resolve/main/")
            if not name and f"/resolve/{COMMIT}/" in self.path:
                repository, _, name = self.path.strip("/").partition(f"/resolve/{COMMIT}/")
            path = folder / name
            found = repository == "some/name" and bool(name) and path.is_file()
            content = path.read_bytes() if found else b""
            self.send_response(200 if found else 404)
            if repository == "some/name":
                self.send_header("X-Repo-Commit", COMMIT)
            if not found:
                self.send_header("X-Error-Code", "EntryNotFound" if repository == "some/name" else "RepoNotFound")
            self.send_header("ETag", f'"{len(content)}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def load(endpoint: str, cache: Path, name: str = "hf:some/name", **variables: str) -> subprocess.CompletedProcess[str]:
    """Loads a tokenizer in a process: the client reads its variables when it is imported."""
    code = (
        "import sys\n"
        "from megatron_lion.data.tokenizers import load_tokenizer\n"
        "from megatron_lion.errors import MegatronLionError\n"
        "from megatron_lion.logs import install_last_resort\n"
        "install_last_resort()\n"
        "try:\n    print(load_tokenizer(sys.argv[1]).sha256)\n"
        "except MegatronLionError as error:\n    print(error, file=sys.stderr); sys.exit(error.exit_code)\n"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    kept |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "no_proxy": "*"}
    return subprocess.run(
        [sys.executable, "-c", code, name], env=kept | variables, capture_output=True, text=True, check=False
    )


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_without_a_network_there_is_one_line(tmp_path: Path) -> None:
    done = load(closed_port(), tmp_path)
    assert done.returncode == 9
    (line,) = done.stderr.splitlines()
    assert line.startswith("hf:some/name: not downloaded, and the hub cannot be used (")
    assert line.endswith("download it on a machine with network access and give its folder")


def test_a_hub_that_never_answers_is_given_up(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)  # connections are accepted by the kernel, and nobody reads them
        started = time.monotonic()
        done = load(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path, HF_HUB_ETAG_TIMEOUT="1")
    assert done.returncode == 9
    assert len(done.stderr.splitlines()) == 1
    assert "timed out" in done.stderr or "no answer in 1 s" in done.stderr
    assert time.monotonic() - started < 25, "the client's own retries take minutes"


def test_an_answering_hub_is_downloaded_from_and_the_download_serves_without_it(
    tokenizer: Path, tmp_path: Path
) -> None:
    with hub(tokenizer) as address:
        first = load(address, tmp_path)
        assert (first.returncode, first.stderr) == (0, "")
        unknown = load(address, tmp_path, "hf:other/name")
    again = load(address, tmp_path)
    assert again.returncode == 0
    assert again.stdout == first.stdout != ""
    (line,) = again.stderr.splitlines()
    assert "an earlier download is used: tokenizer.json" in line
    assert unknown.returncode == 3
    assert unknown.stderr == (
        "hf:other/name: the hub has no such repository, or it needs a login; check the name, or set HF_TOKEN\n"
    )


def test_a_repository_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text(json.dumps({}))
    with hub(tmp_path / "hub") as address:
        done = load(address, tmp_path / "cache")
    assert done.returncode == 3
    assert done.stderr == "hf:some/name: the repository has no tokenizer.json, vocab.json + merges.txt or vocab.txt\n"
