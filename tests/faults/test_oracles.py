"""The judges of the fault cases: what a power cut leaves, the independent reader of an index, the digest of a checkpoint."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from faults.cases_data import mutated, parse
from faults.cases_disk import one_of_each
from faults.cases_power import durable_step
from faults.power import cut, snapshot
from faults.shim import Call, Fault

WORK = """
import os, sys
root = sys.argv[1]
def put(name, text, sync):
    handle = os.open(root + "/" + name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.write(handle, text.encode())
    if sync:
        os.fsync(handle)
    return handle
def sync(name):
    handle = os.open(root + "/" + name, os.O_RDONLY)
    os.fsync(handle)
os.mkdir(root + "/d")
put("d/synced", "one", True)
put("d/not-synced", "two", False)
sync("d")
sync("")
os.write(put("d/synced-then-written", "three", True), b" and more")
put("old", "new text", False)
os.rename(root + "/d/synced", root + "/d/renamed")
os.unlink(root + "/removed")
put("unlisted", "four", True)
"""


@pytest.mark.parametrize("model", ["strict", "names"])
def test_what_a_power_cut_leaves(tmp_path: Path, model: str) -> None:
    root, shadow = tmp_path / "root", tmp_path / "shadow"
    shadow.mkdir()
    root.mkdir()
    (root / "old").write_text("old text")
    (root / "removed").write_text("kept")
    before = snapshot(root)
    fault = Fault(str(root), "count", shadow=str(shadow))
    environment = {**os.environ, **fault.environment()}
    subprocess.run([sys.executable, "-I", "-c", WORK, str(root)], env=environment, check=True)
    cut(root, before, shadow, model)
    found = {str(path.relative_to(root)): path.read_text() for path in sorted(root.rglob("*")) if path.is_file()}
    expected = {"d/not-synced": "", "old": "old text"}
    if model == "strict":  # the folders list what they listed at their last fsync
        expected |= {"d/synced": "one", "removed": "kept"}
    else:
        expected |= {"d/renamed": "one", "d/synced-then-written": "three", "unlisted": "four"}
    assert found == expected


def test_a_commit_is_durable_with_the_fsync_of_its_parent() -> None:
    calls = [
        Call(1, "rename", 0, "/r/checkpoints/step_0000002.tmp-1 -> /r/checkpoints/step_0000002"),
        Call(2, "fsync", 0, "/r/checkpoints"),
        Call(3, "rename", 0, "/r/checkpoints/step_0000004.tmp-1 -> /r/checkpoints/step_0000004"),
        Call(4, "rename", 0, "/r/probe/.step_0000004.json.tmp -> /r/probe/step_0000004.json"),
        Call(5, "rename", 0, "/r/checkpoints/step_0000002 -> /r/checkpoints/step_0000002.tmp-removed"),
    ]
    assert [durable_step(calls[:number]) for number in range(6)] == [0, 0, 2, 2, 2, 2]


def test_the_index_reader_agrees_with_the_writer_and_rejects_any_cut(tmp_path: Path) -> None:
    prefix = tiny.write_corpus(tmp_path / "a", documents=5)
    content, size = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").stat().st_size
    found = parse(content, size)
    assert found is not None
    assert [first for first, _ in found] == [sum(length for _, length in found[:number]) for number in range(5)]
    assert 2 * sum(length for _, length in found) == size
    assert not any(parse(content[:length], size) for length in range(len(content)))
    assert parse(content, size + 2) is None
    chosen = random.Random(5)
    changed = [mutated(content, chosen) for _ in range(300)]
    assert sum(parse(one, size) is None for one in changed) > 200
    assert sum(one == content for one in changed) < 10


def test_one_call_of_each_kind_is_chosen() -> None:
    calls = [
        Call(1, "mkdir", 0, "/r/checkpoints/.step_0000002.tmp-1a2b"), Call(2, "write", 9, "/r/checkpoints/step_0000002/__0_0.distcp"),
        Call(3, "write", 9, "/r/checkpoints/step_0000002/__1_0.distcp"), Call(4, "fsync", 0, "/r/checkpoints/step_0000002/__1_0.distcp"),
        Call(5, "write", 9, "/r/checkpoints/step_0000002/manifest.json"), Call(6, "mkdir", 0, "/r/checkpoints/.step_0000004.tmp-9c8d"),
    ]  # fmt: skip
    assert [call.number for call in one_of_each(calls)] == [6, 3, 4, 5]
