"""file_lock: one holder at a time across processes, release however a holder ends, and the file system's errors."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import filelock
import pytest

from megatron_lion.errors import BusyError, StorageError
from megatron_lion.files import file_lock

REPO = Path(__file__).resolve().parent.parent

# Takes the lock, reports it, and keeps it until its input ends.
HOLDER = """
import sys
from megatron_lion.files import file_lock
with file_lock(sys.argv[1], "THE RUN", "WAIT"):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(path: Path, code: str = HOLDER) -> Iterator[subprocess.Popen[str]]:
    """Starts a second process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPO
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        with process:  # waits, and closes the pipes
            process.kill()


def mine(path: Path, **named: float) -> None:
    """Acquires the lock and releases it."""
    with file_lock(path, "THE RUN", "WAIT", **named):
        pass


def kernel_says_held(path: Path) -> bool:
    """Whether some process holds the lock, asked by flock without this project's code."""
    with open(path, "rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_the_second_process_is_refused_and_learns_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "lock"
    with holder(path) as process:
        expected = f"THE RUN: in use by another process (pid {process.pid} on {socket.gethostname()}); WAIT"
        for _ in range(2):  # the first waiter must not erase what the second one reads
            with pytest.raises(BusyError) as refusal:
                mine(path)
            assert str(refusal.value) == expected
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=60)
    mine(path)
    assert path.read_text() == f"pid {os.getpid()} on {socket.gethostname()}\n"


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_the_end_of_the_block_frees_it(
    error: type[Exception] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of the block, not when Python deletes the lock object."""
    kept = []
    real = filelock.FileLock
    monkeypatch.setattr(filelock, "FileLock", lambda *words, **named: kept.append(real(*words, **named)) or kept[0])
    with pytest.raises(error) if error else nullcontext(), file_lock(tmp_path / "lock", "THE RUN", "WAIT"):
        assert kernel_says_held(tmp_path / "lock")
        if error:
            raise error
    assert len(kept) == 1
    assert not kernel_says_held(tmp_path / "lock")


def test_a_killed_holder_frees_it(tmp_path: Path) -> None:
    with holder(tmp_path / "lock") as process:
        assert kernel_says_held(tmp_path / "lock")
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        mine(tmp_path / "lock")


def test_a_waiter_gets_it_when_the_holder_is_done(tmp_path: Path) -> None:
    with holder(tmp_path / "lock") as process:
        with pytest.raises(BusyError):
            mine(tmp_path / "lock", wait_s=0.2)
        assert process.stdin is not None
        subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(0.5); os.kill({process.pid}, 9)"])
        started = time.monotonic()
        mine(tmp_path / "lock", wait_s=60)
        assert 0.2 < time.monotonic() - started < 50


def test_a_forked_child_that_stays_does_not_hold_it(tmp_path: Path) -> None:
    """A loader worker may outlive its run; the run must be able to resume meanwhile."""
    path = tmp_path / "lock"
    code = HOLDER.replace(
        '    print("held"',
        "    import os, time\n"
        "    if os.fork() == 0:\n"
        "        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)\n"
        "        open(sys.argv[1] + '.child', 'w').write(str(os.getpid()))\n"
        "        time.sleep(120)\n"
        '        os._exit(0)\n    print("held"',
    )
    child = tmp_path / "lock.child"
    try:
        with holder(path, code) as process:
            while not (child.exists() and child.read_text()):
                time.sleep(0.01)
            assert kernel_says_held(path), "the fork must not release the parent's lock"
            process.kill()
            process.wait(timeout=60)
            assert Path(f"/proc/{child.read_text()}").exists() or sys.platform != "linux"
            mine(path)
    finally:
        os.kill(int(child.read_text()), signal.SIGKILL)


def test_a_child_that_leaves_the_block_does_not_release_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with file_lock(path, "THE RUN", "WAIT"):
        child = os.fork()
        if child == 0:
            os._exit(0 if leaves_block_of_parent(path) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert kernel_says_held(path)


def leaves_block_of_parent(path: Path) -> bool:
    """Called in a forked child: the parent holds the lock, and the child cannot acquire it."""
    try:
        mine(path)
    except BusyError as refusal:
        return f"pid {os.getppid()} " in str(refusal)
    return False


def test_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    victim = tmp_path / "thesis.tex"
    victim.write_text("irreplaceable")
    for target in (victim, tmp_path / "nothing"):
        link = tmp_path / "lock"
        link.symlink_to(target)
        with pytest.raises(StorageError, match=r"lock: cannot be locked: it is a symbolic link; remove the link"):
            mine(link)
        link.unlink()
    assert victim.read_text() == "irreplaceable"
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF])
def test_a_file_system_without_locks_is_named_as_such(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    with holder(tmp_path / "held") if number == errno.ENOLCK else nullcontext():
        monkeypatch.setattr(fcntl, "flock", flock)
        for name in ("lock", "held"):
            with pytest.raises(StorageError, match=r"file system offers no locks .*choose a folder on another disk"):
                mine(tmp_path / name)
        monkeypatch.undo()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_file_that_cannot_be_opened_is_not_in_use(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    real = os.open

    def refuse(name: str, flags: int, *others: int, **named: int) -> int:
        if os.fspath(name) == str(path) and flags & (os.O_RDWR | os.O_WRONLY):
            raise OSError(number, os.strerror(number), str(path))
        return real(name, flags, *others, **named)

    mine(path)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError, match=f"lock: cannot be locked: {os.strerror(number)}; check its permissions"):
        mine(path)


def test_one_who_may_only_read_it_learns_whether_it_is_held() -> None:
    """Another user's run folder: both messages, as a user without the right to write."""
    ask = (
        "import os, sys\nimport filelock  # before the rights to read its folder are dropped\n"
        "from megatron_lion.files import file_lock\n"
        "if os.geteuid() == 0:\n    os.setgroups([])\n    os.setegid(65534)\n    os.seteuid(65534)\n"
        "try:\n    with file_lock(sys.argv[1], 'THE RUN', 'WAIT'):\n        print('mine')\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lock"
        Path(folder).chmod(0o755)

        def asked() -> str:
            return subprocess.run(
                [sys.executable, "-c", ask, str(path)], capture_output=True, text=True, check=True, cwd=REPO
            ).stdout

        with holder(path) as process:
            path.chmod(0o444)
            assert asked() == (
                f"BusyError THE RUN: in use by another process (pid {process.pid} on {socket.gethostname()}); WAIT\n"
            )
        assert asked().startswith(f"StorageError {path}: cannot be locked: Permission denied")


def test_text_of_others_is_not_shown(tmp_path: Path) -> None:
    with holder(tmp_path / "lock"):
        (tmp_path / "lock").write_text("\x1b[31mpid 1 on\nelsewhere")
        with pytest.raises(BusyError, match=r"^THE RUN: in use by another process; WAIT$"):
            mine(tmp_path / "lock")
