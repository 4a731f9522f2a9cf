"""Reading run folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_runs import write_run

from megatron_lion.errors import CheckpointError, ConfigError
from megatron_lion.runs.record import Series, differing_settings, read_metrics, read_run, read_runs


def test_a_run_folder_is_read_whole(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "lion"))
    assert (run.model, run.optimizer, run.label) == ("gpt2-small", "lion", "LION")
    assert run.num_parameters == 124_475_904
    assert run.last_step == 1000
    assert run.tokens_per_step == 16 * 1024
    assert run.settings["optimizer.lr"] == 1e-3
    assert run.seed == 1234
    assert len(run.series("train/loss").steps) == 100
    assert run.series("perf/mfu") == Series()
    assert [r["step"] for r in run.evaluations] == [200, 400, 600, 800, 1000]
    assert run.training_seconds(1000) == pytest.approx(1000 * 16 * 1024 / 30_000, rel=0.01)
    assert run.training_seconds(500) == pytest.approx(500 * 16 * 1024 / 30_000, rel=0.01)


def test_the_last_line_of_a_step_wins_and_a_torn_tail_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "a": 1.0, "b": 2}\n{"step": 2, "a": 2.0}\n\n{"step": 1, "a": 5.0}\n'
        '{"step": 2, "a": null, "c": true, "d": "text"}\n{"step": 3, "a": 9.'
    )
    metrics = read_metrics(path)
    assert metrics == {"a": Series((1,), (5.0,)), "b": Series((1,), (2.0,))}


@settings(max_examples=50, derandomize=True, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from("ab"), st.floats(-9, 9)), max_size=30),
    st.integers(0, 40),
)
def test_any_cut_of_the_file_gives_what_the_whole_lines_say(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[int, str, float]], cut: int
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    lines = [json.dumps({"step": step, key: value}) + "\n" for step, key, value in entries]
    whole = "".join(lines)
    kept = whole[: max(0, len(whole) - cut)]
    path.write_text(kept)
    expected: dict[str, dict[int, float]] = {}
    # A last line that is complete but for its line end is as good as any.
    count = kept.count("\n") + (kept.rpartition("\n")[2].endswith("}"))
    for step, key, value in entries[:count]:
        expected.setdefault(key, {})[step] = value
    found = read_metrics(path)
    assert {k: dict(zip(s.steps, s.values, strict=True)) for k, s in found.items()} == expected
    assert all(list(s.steps) == sorted(s.steps) for s in found.values())


def test_damage_before_the_tail_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\nrubbish\n{"step": 2, "a": 1}\n')
    with pytest.raises(CheckpointError, match=r"metrics.jsonl, line 2: not a JSON object with a step"):
        read_metrics(path)


def test_series_answers() -> None:
    series = Series((10, 20, 30), (3.0, 1.0, 2.0))
    assert series.best() == (20, 1.0)
    assert series.last == 2.0
    assert series.at_or_before(25) == (20, 1.0)
    assert series.at_or_before(5) is None
    assert series.first_at_most(2.5) == 20
    assert series.first_at_most(0.5) is None
    assert series.smoothed(2).values == (3.0, 2.0, 1.5)
    assert Series().best() is None


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.write_text(""), "is a file"),
        (lambda p: p.mkdir(), "no run folder"),
        (lambda p: (p.mkdir(), (p / "config.yaml").write_text("name: x\n")), "no metrics.jsonl"),
        (lambda p: (p.mkdir(), (p / "config.yaml").write_text("a: [\n")), "config.yaml: cannot be read"),
        (lambda p: (p.mkdir(), (p / "run.json").write_text("[1]")), "should hold an object"),
        (lambda p: (write_run(p), (p / "eval" / "x.json").write_text("{}")), "no evaluation result"),
    ],
)
def test_what_is_no_run_is_named(tmp_path: Path, make: object, says: str) -> None:
    make(tmp_path / "it")  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=says):
        read_run(tmp_path / "it")


def test_labels_tell_runs_apart(tmp_path: Path) -> None:
    runs = read_runs(
        [
            write_run(tmp_path / "a"),
            write_run(tmp_path / "b", lr=5e-4),
            write_run(tmp_path / "c", optimizer="sgd"),
            write_run(tmp_path / "d", model="gpt2-medium"),
        ]
    )
    assert [run.label for run in runs] == ["LION lr=0.001", "LION lr=0.0005", "SGD", "LION"]
    same = read_runs([write_run(tmp_path / "e"), write_run(tmp_path / "f")])
    assert [run.label for run in same] == ["LION e", "LION f"]


def test_only_settings_that_matter_are_compared(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", optimizer="sgd", seed=7)])
    assert set(differing_settings(runs)) == {"seed", "optimizer.name", "optimizer.lr"}


def test_runs_with_nothing_in_common_are_refused(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", model="one", tokenizer="1" * 64, text="1" * 64)
    b = write_run(tmp_path / "b", model="two", tokenizer="2" * 64, text="2" * 64)
    with pytest.raises(CheckpointError, match="nothing in common"):
        read_runs([a, b])
    with pytest.raises(ConfigError, match="given twice"):
        read_runs([a, a])
    with pytest.raises(ConfigError, match="no run folder given"):
        read_runs([])
    assert len(read_runs([a])) == 1
