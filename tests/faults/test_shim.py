"""The shim injects each fault into the n-th call, and nothing elsewhere; judged from what Python and the disk show."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from faults.shim import Call, Fault, read_log

# Calls: 1 create, 2 write, 3 fsync, 4 mkdir, 5 rename, 6 link, 7 open (exists), 8 ftruncate, 9 unlink, 10 rmdir,
# 11 create by C's fopen and 12 its write.
WORK = """
import os, sys
root = sys.argv[1]
os.path.exists(root + "/a"); open("/dev/null", "w").write("x")
handle = os.open(root + "/a", os.O_WRONLY | os.O_CREAT)
print("written", os.write(handle, b"12345678"))
os.fsync(handle)
os.close(handle)
os.mkdir(root + "/d")
os.rename(root + "/a", root + "/d/b")
os.link(root + "/d/b", root + "/c")
handle = os.open(root + "/c", os.O_RDWR)
os.ftruncate(handle, 6)
os.close(handle)
os.unlink(root + "/d/b")
os.rmdir(root + "/d")
import ctypes
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
stream = libc.fopen((root + "/n").encode(), b"w")
assert stream, "fopen failed"
assert libc.fwrite(b"abcdef", ctypes.c_size_t(1), ctypes.c_size_t(6), ctypes.c_void_p(stream)) == 6, "fwrite failed"
libc.fclose(ctypes.c_void_p(stream))
print("end")
"""
OPS = ["create", "write", "fsync", "mkdir", "rename", "link", "open", "ftruncate", "unlink", "rmdir", "create", "write"]


def work(folder: Path, fault: Fault, **variables: str) -> subprocess.CompletedProcess[str]:
    (folder / "root").mkdir()
    environment = {**os.environ, **fault.environment(), **variables}
    return subprocess.run(
        [sys.executable, "-I", "-c", WORK, str(folder / "root")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def fault(folder: Path, kind: str, at: int = 0, number: int = 0) -> Fault:
    return Fault(str(folder / "root"), kind, at, number, log=str(folder / "log"))


def test_all_calls_are_listed(tmp_path: Path) -> None:
    done = work(tmp_path, fault(tmp_path, "count"))
    assert done.stdout == "written 8\nend\n", done.stderr
    calls, injected = read_log(tmp_path / "log")
    assert [call.op for call in calls] == OPS
    assert [call.number for call in calls] == list(range(1, 13))
    assert calls[4].path == f"{tmp_path}/root/a -> {tmp_path}/root/d/b"
    assert not injected
    assert sorted(os.listdir(tmp_path / "root")) == ["c", "n"]
    assert (tmp_path / "root" / "n").read_bytes() == b"abcdef"


@pytest.mark.parametrize("at", range(1, 13))
@pytest.mark.parametrize("kind", ["kill", "after", "once"])
def test_each_call_can_be_hit(tmp_path: Path, kind: str, at: int) -> None:
    done = work(tmp_path, fault(tmp_path, kind, at, errno.EIO))
    calls, injected = read_log(tmp_path / "log")
    assert injected
    if kind == "once":
        assert done.returncode == 1
        assert ("Input/output error" in done.stderr) == (at <= 10)  # the last two are called through ctypes
    else:
        assert done.returncode == -signal.SIGKILL
        assert [call.op for call in calls] == OPS[:at]
    if at == 4:
        assert (tmp_path / "root" / "d").is_dir() == (kind == "after")


@pytest.mark.parametrize(("kind", "kept"), [("half", b"1234"), ("short", b"1234"), ("flip", b"1234%678")])
def test_writes_are_cut_or_changed(tmp_path: Path, kind: str, kept: bytes) -> None:
    folder = tmp_path / "root"
    done = work(tmp_path, fault(tmp_path, kind, 2))
    assert (done.returncode == -signal.SIGKILL) == (kind == "half")
    assert ("written 4" in done.stdout) == (kind == "short")
    if kind == "half":
        assert (folder / "a").read_bytes() == kept
    else:  # WORK cuts or extends the file to 6 bytes
        assert (folder / "c").read_bytes() == kept[:6].ljust(6, b"\0")


def test_a_full_disk_still_removes_and_opens(tmp_path: Path) -> None:
    """With ENOSPC from call 7 on, the open, the ftruncate and the removals succeed, and the new file fails."""
    done = work(tmp_path, fault(tmp_path, "always", 7, errno.ENOSPC))
    assert "fopen failed" in done.stderr
    assert os.listdir(tmp_path / "root") == ["c"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("at", range(1, 13))
def test_the_driver_knows_what_the_shim_refuses(tmp_path: Path, at: int, number: int) -> None:
    work(tmp_path, fault(tmp_path, "once", at, number))
    calls, injected = read_log(tmp_path / "log")
    assert calls[at - 1].takes("once", number) == injected


def test_a_signal_stops_and_another_rank_is_left_alone(tmp_path: Path) -> None:
    assert work(tmp_path, fault(tmp_path, "signal", 3, signal.SIGTERM)).returncode == -signal.SIGTERM
    (tmp_path / "other").mkdir()
    done = work(tmp_path / "other", fault(tmp_path / "other", "kill", 3), FAULT_RANK="1", RANK="0")
    assert done.stdout.endswith("end\n")


def test_what_was_synced_is_kept(tmp_path: Path) -> None:
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    asked = fault(tmp_path, "count")
    work(tmp_path, Fault(asked.root, "count", log=asked.log, shadow=str(shadow)))
    (copy,) = shadow.iterdir()
    inode = (tmp_path / "root" / "c").stat().st_ino
    assert copy.name == f"f.{inode}.3"
    assert copy.read_bytes() == b"12345678"


def test_calls_that_take_a_fault() -> None:
    write = Call(1, "write", 8, "/a")
    assert write.takes("half")
    assert write.takes("flip")
    assert not Call(1, "write", 1, "/a").takes("short")
    assert not Call(1, "mkdir", 0, "/a").takes("flip")
