"""RANK, WORLD_SIZE and the like: wrong or incomplete values are refused with one line, before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist
from tiny import tiny_config, write_corpus

from megatron_lion.cli import entry, main
from megatron_lion.configfile import dump_config
from megatron_lion.device import Device
from megatron_lion.errors import DataError
from megatron_lion.exit_report import leave, report
from megatron_lion.jobs import STORE, Place, place_from_env
from megatron_lion.rendezvous import join_job

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", STORE)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A pretraining into tmp_path/run."""
    corpus = write_corpus(tmp_path / "c_text_document")
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(tiny_config(tmp_path / "run", corpus, train__steps=1)))
    return ["pretrain", "--config", str(path)]


ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
WRONG = [
    ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2 without RANK and MASTER_ADDR", "launch/torchrun.sh", "megatron_lion.launcher"]),
    ({"WORLD_SIZE": "2", "RANK": "0"}, ["WORLD_SIZE=2 without MASTER_ADDR", "unset WORLD_SIZE and RANK"]),
    ({"WORLD_SIZE": "2", "RANK": "1"}, ["[rank 1]: WORLD_SIZE=2 without MASTER_ADDR"]),
    ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "", STORE: ""}, ["WORLD_SIZE=2 without MASTER_ADDR"]),
    ({"WORLD_SIZE": "2", **ADDRESS}, ["WORLD_SIZE=2 without RANK"]),
    ({"RANK": "1"}, ["RANK='1'", "from 0 to 0 (WORLD_SIZE is 1)"]),
    ({"RANK": "3", "WORLD_SIZE": "2", **ADDRESS}, ["RANK='3'", "from 0 to 1 (WORLD_SIZE is 2)"]),
    ({"WORLD_SIZE": "abc"}, ["WORLD_SIZE='abc'", "whole number"]),
    ({"WORLD_SIZE": "0"}, ["WORLD_SIZE='0'", "from 1"]),
    ({"WORLD_SIZE": "-1"}, ["WORLD_SIZE='-1'", "from 1"]),
    ({"WORLD_SIZE": "9" * 5000}, ["WORLD_SIZE='999"]),
    ({"RANK": "x"}, ["RANK='x'"]),
    ({"RANK": "-1", "WORLD_SIZE": "2", **ADDRESS}, ["RANK='-1'"]),
    ({"LOCAL_RANK": "z"}, ["LOCAL_RANK='z'"]),
    ({"LOCAL_WORLD_SIZE": "2\n"}, [r"LOCAL_WORLD_SIZE='2\n'"]),
    ({"LOCAL_WORLD_SIZE": "2"}, ["LOCAL_WORLD_SIZE='2'", "from 1 to 1 (WORLD_SIZE is 1)"]),
    ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "1"}, ["LOCAL_RANK='1'", "(LOCAL_WORLD_SIZE is 1)"]),
]  # fmt: skip


@pytest.mark.parametrize(("variables", "named"), WRONG, ids=lambda value: str(value)[:50])
def test_a_wrong_place_is_refused(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    named: list[str],
) -> None:
    """By the command line as users start it: the exit after the message reads these variables too."""
    set_all(monkeypatch, variables)
    monkeypatch.setattr("sys.argv", ["megatron-lion", *words])
    monkeypatch.setattr("os._exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    with pytest.raises(SystemExit) as ended:
        entry()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    for part in named:
        assert part in error
    assert not (tmp_path / "run").exists()
    assert not dist.is_initialized()


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, dict.fromkeys(NAMES, ""))
    assert place_from_env() == Place(rank=0, world_size=1, local_rank=0, local_world_size=1)
    join_job(Device("cpu", 0, "gloo"), 30)
    assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
    dist.destroy_process_group()


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": "1", "RANK": "0"}, {"RANK": "0"}], ids=str)
def test_a_single_process_needs_no_address(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    set_all(monkeypatch, variables)
    join_job(Device("cpu", 0, "gloo"), 30)
    assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
    dist.destroy_process_group()


def test_a_place_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"})
    assert place_from_env() == Place(rank=5, world_size=8, local_rank=1, local_world_size=4)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name)
    assert place_from_env().local_rank == 1, "it chooses the GPU of a single process"


def test_a_dry_run_needs_the_number_of_processes_only(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the launcher's check of the settings, before there is a store."""
    set_all(monkeypatch, {"WORLD_SIZE": "2"})
    assert main([*words, "--dry-run"]) == 0
    assert "processes    2:" in capsys.readouterr().out


def test_every_verb_refuses_a_wrong_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_all(monkeypatch, {"RANK": "x"})
    assert main(["compare", str(tmp_path / "no_run"), "--output", str(tmp_path / "out")]) == 2
    assert "RANK='x'" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "files"), [("x", []), ("", []), ("3", ["exit.3.json"])])
def test_the_report_of_an_error_works_with_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, files: list[str]
) -> None:
    set_all(monkeypatch, {"RANK": rank, "MEGATRON_LION_EXIT_DIR": str(tmp_path)})
    report(DataError("an error that a rank reports about itself"))
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == files
    assert [json.loads(path.read_text())["printed"] for path in tmp_path.iterdir()] == [True] * len(files)
    with pytest.raises(SystemExit) as ended:
        leave(2)
    assert ended.value.code == 2
