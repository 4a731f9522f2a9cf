"""Child processes of `Jobs`: which interpreter a launcher of an installed package uses, and how their ends are reported."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_lion.commands.demo import _Demo
from megatron_lion.errors import MegatronLionError, PeerError
from megatron_lion.jobs import Jobs


def test_launchers_run_this_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHON", raising=False)
    script = '[ "$PYTHON" = "$1" ]'
    with Jobs() as jobs:
        assert jobs.run_command(["sh", "-c", script, "sh", sys.executable]) == 0
        monkeypatch.setenv("PYTHON", "/opt/python-without-the-package")
        assert jobs.run_command(["sh", "-c", script, "sh", sys.executable]) == 0


@pytest.mark.parametrize(("code", "wanted", "end"), [(-signal.SIGKILL, 8, "SIGKILL; "), (3, 3, "code 3;")])
def test_a_demo_whose_step_was_killed_has_the_code_of_a_lost_peer(
    tmp_path: Path, code: int, wanted: int, end: str
) -> None:
    class Ended:
        asked = False

        def run(self, *_: Any) -> int:
            return code

    jobs: Any = Ended()
    with pytest.raises(MegatronLionError, match=f"`megatron-lion pretrain` ended with {end}") as caught:
        _Demo(tmp_path, 1, True, False, jobs).verb("pretrain")
    assert caught.value.exit_code == wanted
    assert isinstance(caught.value, PeerError) == (wanted == 8)
