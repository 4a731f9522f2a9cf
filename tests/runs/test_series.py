"""Reading metrics.jsonl into series."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from megatron_lion.errors import CheckpointError
from megatron_lion.runs import series
from megatron_lion.runs.series import Series, read_metrics


def test_the_last_line_of_a_step_wins_and_a_torn_tail_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "a": 1.0, "b": 2}\n{"step": 2, "a": 2.0}\n\n{"step": 1, "a": 5.0}\n'
        '{"step": 2, "a": null, "c": true, "d": "text"}\n{"step": 3, "a": 9.'
    )
    metrics = read_metrics(path)
    assert metrics == {"a": Series((1,), (5.0,)), "b": Series((1,), (2.0,))}


@examples(50)
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
    # A last line that lacks only its line end counts.
    count = kept.count("\n") + (kept.rpartition("\n")[2].endswith("}"))
    for step, key, value in entries[:count]:
        expected.setdefault(key, {})[step] = value
    found = read_metrics(path)
    assert {k: dict(zip(s.steps, s.values, strict=True)) for k, s in found.items()} == expected
    assert all(list(s.steps) == sorted(s.steps) for s in found.values())


@pytest.mark.parametrize(
    "value",
    ["NaN", "Infinity", "-Infinity", "1e400", "1" + "0" * 400, "true", '"1"', "null", "[1]"],
    ids=lambda v: v[:9],
)
def test_what_is_no_finite_number_takes_the_place_of_an_earlier_one(value: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "a": 1.0}}\n{{"step": 1, "a": {value}}}\n{{"step": 2, "a": 2}}\n')
    assert read_metrics(path) == {"a": Series((2,), (2.0,))}


def test_a_name_has_no_control_characters(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "a\x1b[31m": 1.0}) + "\n")
    (name,) = read_metrics(path)
    assert name.isprintable()


def test_damage_before_the_tail_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for rubbish in ("rubbish", "[1]", "{}", '{"step": "1"}', '{"step": true}', '{"step": -1}', '{"step": 1.5}',
                    '{"step": Infinity}', 100_000 * "["):  # fmt: skip
        path.write_text(f'{{"step": 1, "a": 1}}\n{rubbish}\n{{"step": 2, "a": 1}}\n')
        with pytest.raises(CheckpointError, match=r"metrics.jsonl, line 2: not a JSON object with a step"):
            read_metrics(path)
        path.write_text(f'{{"step": 1, "a": 1}}\n{rubbish}')  # as a last line without its end it is left out
        assert read_metrics(path) == {"a": Series((1,), (1.0,))}


LINES = (
    '{"step": 1, "a": 1.5}', '{"step": 2, "a": 2}', '{"a": 3.25, "step": 3}', '{"step": 2, "b": -1}', '{"step": 4, "a": "{"}',
    '{"step": 5, "c": {"d": 1}, "a": 1}', '{"step": 6, "a": [1]}', '{"step": 7, "a": "\u00e4"}', ' {"step": 8, "a": 8}', "", "\r",
    '{"step": 9, "a": 9}\r', '{"step": 1, "a": null}',
)  # fmt: skip


@examples(60)
@given(st.lists(st.sampled_from(LINES), max_size=25), st.integers(0, 90), st.booleans())
def test_lines_of_every_form_are_read_in_blocks_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], block: int, ends: bool
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    path.write_bytes(("\n".join(lines) + "\n" * ends).encode())
    latest: dict[str, dict[int, float]] = {}
    for entry in (json.loads(line) for line in lines if line.strip()):
        for key in entry.keys() - {"step"}:
            latest.setdefault(key, {})[entry["step"]] = entry[key]
    expected = {
        key: pairs
        for key, every in latest.items()
        if (pairs := {step: value for step, value in every.items() if isinstance(value, int | float)})
    }
    with mock.patch.object(series, "BLOCK", block):
        found = read_metrics(path)
    assert {key: dict(zip(one.steps, one.values, strict=True)) for key, one in found.items()} == expected


@pytest.mark.parametrize(
    ("lines", "damaged"),
    [
        (['{"step": 1},{"step": 2}', '{"step": 3, "a": [{"b": 1}', '{"b": 2}], "c": {}}'], 1),
        (['{"step": 1}', '{"step": 2, "x}', '{": 1}'], 2),
        (['{"step": 1}, {"step": 2', '"a": 1}', '{"step": 3}'], 1),
        (['{"step": 1, "a":', "2}", '{"step": 3},{"step": 4}'], 1),
        (['{"step": 1}', '{"step": 2},"{}"', '{"step": 3}'], 2),
    ],
)
def test_lines_that_are_json_only_together_are_damage(lines: list[str], damaged: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([*lines, '{"step": 9}', ""]))
    with pytest.raises(CheckpointError, match=f"line {damaged}: not a JSON object with a step"):
        read_metrics(path)


def test_series_answers() -> None:
    found = Series((10, 20, 30), (3.0, 1.0, 2.0))
    assert found.best() == (20, 1.0)
    assert found.last == 2.0
    assert found.first_at_most(2.5) == 20
    assert found.first_at_most(0.5) is None
    assert list(found.smoothed(2).values) == [3.0, 2.0, 1.5]
    assert Series().best() is None
