"""Grids: parsing, the names of the runs, and the errors that are raised before any run starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_config, write_corpus

from megatron_lion.cli import main
from megatron_lion.configfile import dump_config
from megatron_lion.sweep.grid import PAPER_RATES, Axis, parse_grids, settings_of_runs, split_values
from megatron_lion.sweep.plan import as_typed, plan_runs, run_name, settings_digest


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("data") / "c_text_document")


@pytest.fixture(scope="module")
def config(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(dump_config(tiny_config("unused", corpus, train__test_every=2)))
    return path


def test_the_cross_product_optimizer_by_optimizer() -> None:
    axes = parse_grids(
        [
            "optimizer.name=lion,sgd",
            "optimizer.lr=1e-3,3e-4",
            "sgd:optimizer.lr=0.3",
            "sgd:optimizer.momentum=0.9,0.99",
            "seed=1,2",
        ]
    )
    runs = [run_name(settings) for settings in settings_of_runs(axes, "adamw")]
    assert runs == [
        "lion-lr0.001-seed1", "lion-lr0.001-seed2", "lion-lr0.0003-seed1", "lion-lr0.0003-seed2",
        "sgd-lr0.3-seed1-momentum0.9", "sgd-lr0.3-seed1-momentum0.99", "sgd-lr0.3-seed2-momentum0.9", "sgd-lr0.3-seed2-momentum0.99",
    ]  # fmt: skip


def test_named_and_bracketed_values() -> None:
    (rates,) = parse_grids(["optimizer.lr=paper"])
    assert rates == Axis(key="optimizer.lr", values=tuple(map(float, PAPER_RATES)))
    assert rates.values == (3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)
    assert parse_grids(["optimizer.lr=1e-2,paper"])[0].values == (1e-2, *rates.values)
    (betas,) = parse_grids(["optimizer.betas=[0.9,0.95],[0.9, 0.99],null"])
    assert betas.values == ((0.9, 0.95), (0.9, 0.99), None)
    assert split_values("1,(2,3),4") == ["1", "(2,3)", "4"]
    names = [run_name(settings) for settings in settings_of_runs([betas], "lion")]
    assert names == ["lion-betas0.9_0.95", "lion-betas0.9_0.99", "lion-betas_null"]


def test_a_name_says_which_setting_where_two_are_called_alike() -> None:
    settings = {
        "optimizer.name": "lion",
        "schedule.kind": "wsd",
        "optimizer.decay_all": True,
        "schedule.warmup_steps": 10,
    }
    assert run_name(settings) == "lion-schedule.kind_wsd-decay_all_true-warmup_steps10"


def test_a_run_computes_what_its_arguments_say(config: Path, tmp_path: Path) -> None:
    """The settings that were checked equal those that `pretrain` reads from the run's command line."""
    from megatron_lion.configfile import load_config

    axes = parse_grids(
        ["optimizer.lr=1e-6", "optimizer.betas=[0.9,0.99]", "schedule.warmup_steps=null,1", "optimizer.decay_all=true"]
    )
    for run in plan_runs(load_config(config), axes, tmp_path, 1):
        words = run.words(config)
        assert load_config(words[1], words[2:]) == run.config
        assert as_typed(run.config.optimizer.lr) in words


def test_a_run_is_its_settings_not_how_it_is_watched(config: Path, tmp_path: Path) -> None:
    from megatron_lion.configfile import load_config

    base = load_config(config)
    digest = settings_digest(base)
    for same in (
        ["--run_dir", "else"],
        ["--probe.every", "5"],
        ["--data.cache", "c"],
        ["--train.micro_batch_size", "2"],
    ):
        assert settings_digest(load_config(config, same)) == digest, same
    for other in (["--seed", "1"], ["--data.path", "[x]"], ["--train.stop_after", "2"], ["--optimizer.lr", "0.1"]):
        assert settings_digest(load_config(config, other)) != digest, other


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], ["--grid", "at least one"]),
        (["--grid", "optimizer.lrr=1,2"], ["optimizer.lrr", "did you mean optimizer.lr?"]),
        (["--grid", "optimizer.lr"], ["optimizer.lr", "KEY=VALUE"]),
        (["--grid", "=1,2"], ["KEY=VALUE"]),
        (["--grid", "optimizer.lr="], ["no values"]),
        (["--grid", "optimizer.lr=1e-3,,1e-4"], ["empty value"]),
        (["--grid", "optimizer.lr=1e-3,0.001"], ["0.001 is given twice"]),
        (["--grid", "optimizer.lr=fast"], ["optimizer.lr=fast", "expected float", "fast"]),
        (["--grid", "optimizer.name=lion,lino"], ["optimizer.name", "lino"]),
        (["--grid", "optimizer=1,2"], ["group of settings", "optimizer.name"]),
        (["--grid", "optimizer.lr=1,2", "--grid", "optimizer.lr=3"], ["has a grid already"]),
        (["--grid", "run_dir=a,b"], ["run_dir", "--output"]),
        (["--grid", "data.path=[a],[b]"], ["data.path", "are not comparable"]),
        (["--grid", "train.test_batches=1,2"], ["train.test_batches", "are not comparable"]),
        (["--grid", "model.kind=gpt2,bert"], ["model.kind", "are not comparable"]),
        (["--grid", "probe.every=1,2"], ["probe.every", "does not change what is trained"]),
        (["--grid", "adam:optimizer.lr=1,2"], ["'adam' is not an optimizer", "adamw"]),
        (["--grid", "sgd:optimizer.lr=1,2"], ["no run of this sweep has that optimizer", "optimizer.name=lion"]),
        (["--grid", "sgd:optimizer.name=lion"], ["leave 'sgd:' out"]),
        (["--grid", "optimizer.name=lion,sgd", "--grid", "optimizer.momentum=0.9,0.8"], ["sgd:optimizer.momentum"]),
        (["--grid", "optimizer.eps=1e-3,-1"], ["lion does not read it"]),
        (["--grid", "optimizer.weight_decay=0,-1"], ["lion-weight_decay_-1: optimizer.weight_decay", "finite number of at least 0"]),
        (["--grid", "optimizer.lr=1e-3,1e-4", "--train.steps", "0"], ["train.steps: must be an integer of at least 1, got 0"]),
        (["--grid", "optimizer.lr=1", "--train.test_every", "0"], ["train.test_every", "no validation loss"]),
        (["--grid", "optimizer.lr=1", "--data.path", "[]"], ["data.path: no dataset"]),
        (["--grid", "optimizer.lr=1", "--run_dir", "x"], ["--run_dir", "--output"]),
        (["--grid", "optimizer.lr=1", "--processes", "0"], ["--processes 0"]),
        (["--grid", "optimizer.lr=1", "--processes", "3"], ["train.global_batch_size"]),
        (["--grid", "optimizer.lr=1", "--dry-run", "--print"], ["give one of them"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)  # fmt: skip
def test_bad_input_is_one_message_and_nothing_is_made(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], named: list[str]
) -> None:
    output = tmp_path / "sweep"
    assert main(["sweep", str(config), *words, "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert error.count("megatron-lion: ") == 1
    assert "Traceback" not in error
    assert "\n" not in error.strip()
    for part in named:
        assert part in error
    assert not output.exists()


def test_files_that_are_not_there(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = ["--grid", "optimizer.lr=1", "--output", str(tmp_path / "sweep")]
    assert main(["sweep", *rest]) == 2
    assert "no config file given; run: megatron-lion sweep CONFIG" in capsys.readouterr().err
    assert main(["sweep", "nowhere.yaml", *rest]) == 2
    assert "nowhere.yaml does not exist" in capsys.readouterr().err
    assert main(["sweep", str(config), *rest, "--data.path", f"[{tmp_path}/nothing]"]) == 3
    assert "data.path" in capsys.readouterr().err
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("irreplaceable")
    assert main(["sweep", str(config), "--grid", "optimizer.lr=1", "--output", str(tmp_path / "thesis")]) == 2
    assert "contains chapter.tex but no sweep" in capsys.readouterr().err
    assert [entry.name for entry in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_the_config_may_stand_first_or_as_a_flag(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ["--grid", "optimizer.lr=1e-3,1e-4", "--output", str(tmp_path / "sweep"), "--dry-run", "--train.steps", "7"]
    shown = []
    for words in ([str(config), *rest], ["--config", str(config), *rest], [*rest, "--config", str(config)]):
        assert main(["sweep", *words]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert "2 to run" in shown[0]
    assert f"{2 * 7 * 8 * 16:,} tokens" in shown[0]
    assert "30,080 parameters" in shown[0]
    assert shown[0].count("waiting") == 2
    assert not (tmp_path / "sweep").exists(), "a dry run writes nothing"
