"""What ranks know of each other without a collective: messages on boards, and the state of processes of one host."""

from __future__ import annotations

import errno
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_lion import peer_board, peer_watch
from megatron_lion.peer_board import FileBoard, TcpBoard, open_board, place, process_state


def test_boards_keep_the_last_message_of_each_rank(tmp_path: Path) -> None:
    """A store with several nodes and files on one node behave alike; a rank without a message is no error."""
    host = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    for boards in [
        (TcpBoard("127.0.0.1", host.port, "x"), TcpBoard("127.0.0.1", host.port, "x")),
        (FileBoard(tmp_path / "x"), FileBoard(tmp_path / "x")),
    ]:
        one, two = boards
        one.post(0, {"count": 1})
        one.post(0, {"count": 2})
        two.post(2, {"count": 3})
        # The store does not confirm a message: an answer over the same connection shows that it has arrived.
        assert one.read([0]) == {0: {"count": 2}}
        assert two.read([2]) == {2: {"count": 3}}
        assert two.read([0, 1]) == {0: {"count": 2}}
        assert one.read([1, 2]) == {2: {"count": 3}}
        one.remove()
    assert not (tmp_path / "x").exists()


def test_a_store_that_is_gone_is_reported_in_time() -> None:
    host = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    board = TcpBoard("127.0.0.1", host.port, "x")
    board.post(0, {})
    del host
    with pytest.raises(RuntimeError):
        board.read([0])


def test_a_tcp_board_asks_for_a_rank_until_its_first_message_only() -> None:
    """Every rank reads every other one each second: one more request for each pair would drown the store."""
    host = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    board = TcpBoard("127.0.0.1", host.port, "x")
    asked: list[str] = []

    class Store:
        def check(self, keys: list[str]) -> bool:
            asked.extend(keys)
            return keys == ["1"]

        def multi_get(self, keys: list[str]) -> list[str]:
            return ["{}" for _ in keys]

    board._store = Store()
    assert [board.read([1, 2]) for _ in range(3)] == [{1: {}}] * 3
    assert asked == ["1", "2", "2", "2"]


FOREIGN = ["", '{"count": 1', "[1]", '"x"', "null", "nul\0", "[" * 100_000]


@pytest.mark.parametrize("text", FOREIGN, ids=lambda text: repr(text[:9]))
def test_a_torn_or_foreign_message_hides_no_other_one(text: str, tmp_path: Path) -> None:
    host = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    files, keys = FileBoard(tmp_path / "x"), TcpBoard("127.0.0.1", host.port, "x")
    (tmp_path / "x" / "1.json").write_text(text)
    dist.PrefixStore("x", host).set("1", text)
    for board in (files, keys):
        board.post(0, {"count": 1})
        board.post(2, {"count": 2})
        assert board.read([0, 1, 2]) == {0: {"count": 1}, 2: {"count": 2}}
        board.post(1, {"count": 3})
        assert board.read([1]) == {1: {"count": 3}}


def test_a_message_that_cannot_be_written_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk must not end a run for a message, and a reader never sees a part of one."""
    board = FileBoard(tmp_path / "x")
    assert (tmp_path / "x").stat().st_mode & 0o077 == 0
    board.post(0, {"count": 1})
    write = Path.write_text

    def write_half(path: Path, text: str, **settings: Any) -> int:
        write(path, text[: len(text) // 2], **settings)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write_half)
        board.post(0, {"count": 2})
    assert board.read([0]) == {0: {"count": 1}}


def test_a_store_that_is_not_there_is_reported_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_board, "_ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(RuntimeError):
        TcpBoard("127.0.0.1", port, "x")


def test_a_rank_does_not_wait_for_ever_for_a_store_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first node is off: the backend may wait for it without an end, and no rank is known to be lost."""
    watch = peer_watch.PeerWatch(FileBoard(tmp_path / "board"), 1, 2, 600.0, "gloo")
    ended: list[Any] = []
    monkeypatch.setattr(watch, "_die", ended.append)
    monkeypatch.setattr(watch, "blame", lambda error: watch._name(error, [], []))
    now = time.monotonic()
    watch.peers[0].changed = now  # its own silence is another reason
    for waited, unanswered, dies in [(500, 900, False), (900, 500, False), (900, 900, True)]:
        watch._wait_began, watch._answered = now - waited, now - unanswered
        watch._end_if_hopeless()
        assert bool(ended) == dies
    assert "lost the first node: the job's store at its folder does not answer" in str(ended[0])


def test_restarted_workers_get_an_empty_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent may give them the same store; the last messages of the ranks before them tell of their end."""
    host = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    for store in (dist.FileStore(str(tmp_path / "store"), 1), host):
        wrapped = dist.PrefixStore("inner", dist.PrefixStore("outer", store))
        monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda wrapped=wrapped: wrapped)
        monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
        first, same, second = open_board(0), open_board(0), open_board(1)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        restarted = open_board(0)
        assert first is not None
        assert same is not None
        assert second is not None
        assert restarted is not None
        first.post(0, {"count": 1})
        assert [board.read([0]) for board in (first, same, second, restarted)] == [{0: {"count": 1}}] * 2 + [{}] * 2
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", dist.HashStore)
    assert open_board(0) is None


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_process_is_stopped_until_it_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped rank is lost, however short ago its last message is; one that goes on is not."""
    board = FileBoard(tmp_path / "board")
    watch = peer_watch.PeerWatch(board, 0, 2, 600.0, "gloo")
    ended: list[Any] = []
    monkeypatch.setattr(watch, "_die", ended.append)
    monkeypatch.setattr(watch, "blame", lambda error: watch._describe(1))
    name = tmp_path / "a) T (b"  # in the line that the kernel gives, the state follows the name
    shutil.copy(shutil.which("sleep") or "", name)
    child = subprocess.Popen([str(name), "600"])
    try:
        board.post(1, {"host": "here", "place": place(), "pid": child.pid, "count": 1})
        watch._read()
        wait_until(lambda: f"({name.name})" in Path(f"/proc/{child.pid}/stat").read_text())
        for state, number in [
            ("alive", None),
            ("stopped", signal.SIGSTOP),
            ("alive", signal.SIGCONT),
            ("stopped", signal.SIGSTOP),
        ]:
            if number is not None:
                child.send_signal(number)
            wait_until(lambda state=state: process_state(child.pid) == state)
            assert watch.state(1) == state
            watch._wait_began = time.monotonic() - 606
            watch._end_if_hopeless()
            assert [text for text in ended if "which is stopped" in text] == ended
            assert bool(ended) == (state == "stopped")
            ended.clear()
        watch._let_go_on([1])
        wait_until(lambda: process_state(child.pid) == "alive")
        child.kill()
        wait_until(lambda: process_state(child.pid) == "gone")  # a zombie
        child.wait()
        assert process_state(child.pid) == "gone"
    finally:
        child.kill()
        child.wait()
    board.post(1, {"host": "there", "place": "another host", "pid": child.pid, "count": 2})
    watch._read()
    assert watch.state(1) == "alive", "a process of another host cannot be seen"


@pytest.mark.parametrize(
    ("letter", "state"),
    [("R", "alive"), ("S", "alive"), ("D", "alive"), ("T", "stopped"), ("t", "stopped"), ("Z", "gone"), ("X", "gone")],
)
def test_the_kernels_letters(letter: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path, **settings: f"7 (a b) {letter} 1 7")
    assert process_state(7) == state
