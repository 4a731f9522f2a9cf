"""benchmarks/gpu_report.py: verdicts, rejected input, and a document that contains only the result files' values."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

REPO = Path(__file__).resolve().parent.parent
FACTS = {
    "time": "2027-01-02T03:04:05Z", "rehearsal": False, "card": "NVIDIA H100 80GB HBM3", "memory_gib": 79.6, "driver": "580.1",
    "python": "3.12.3", "torch": "2.11.0", "triton": "3.6.0", "megatron_core": "0.19.2", "commit": "abc1234",
}  # fmt: skip


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.setattr(sys, "path", [str(REPO / "benchmarks"), *sys.path])
    import gpu_report
    import gpu_wheels

    return SimpleNamespace(report=gpu_report, wheels=gpu_wheels)


def row(stage: str, part: str, **values: Any) -> dict[str, Any]:
    return {**FACTS, "stage": stage, "part": part, **values}


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rows))
    return folder


EXACT = [f"{size} split32, fp32 momentum" for size in ("gpt2-124m", "gpt2-355m", "flat-1b")]


@pytest.mark.parametrize(
    ("goal", "rows", "expected"),
    [
        ("bits", [row("correct", "kernel = reference", passed=True)], "met"),
        ("bits", [row("correct", "kernel = reference", passed=False)], "failed"),
        ("bits", [], "not measured"),
        # Both parts must pass; one that is missing leaves the goal open, one that fails decides it.
        ("shards", [row("correct", "clip 0: fp32 = shards", passed=True)], "not measured"),
        ("shards", [row("correct", "clip 1: fp32 = shards", passed=False)], "failed"),
        ("shards", [row("correct", f"clip {c}: fp32 = shards", passed=True) for c in (0, 1)], "met"),
        # The largest of the three sizes counts; lower is better.
        ("kernel-exact", [row("kernel", part, over_bound=1.03) for part in EXACT], "met, stretch too"),
        ("kernel-exact", [row("kernel", EXACT[0], over_bound=1.03), row("kernel", EXACT[1], over_bound=1.2)], "missed by 0.12"),
        ("kernel-exact", [row("kernel", part, over_bound=1.08) for part in EXACT], "met"),
        # If parts are missing, a figure above the limit is decided, one below it is not.
        ("kernel-exact", [row("kernel", EXACT[0], over_bound=1.03)], "not measured"),
        ("tokens-124m", [row("loop", "micro-batch 16, dropout 0", tokens_per_s=4e5)], "met"),
        ("tokens-124m", [row("loop", "micro-batch 16, dropout 0", tokens_per_s=3e5)], "not measured"),
        # Of a part that was measured again, the last row counts.
        ("waits", [row("kernel", EXACT[0], waits=9), row("kernel", EXACT[0], waits=0)], "met"),
        ("kernel-exact", [row("kernel", EXACT[0], error="OutOfMemoryError: too small")], "not measured"),
        # Higher is better.
        ("adamw", [row("peers", "gpt2-124m torch AdamW fused + copy", over_ours=1.75)], "missed by 0.25"),
        ("adamw", [row("peers", "gpt2-124m torch AdamW fused + copy", over_ours=2.4)], "met"),
        ("adamw", [row("peers", "gpt2-124m torch AdamW fused + copy", over_ours=2.5)], "met, stretch too"),
        ("tokens-124m", [row("loop", f"micro-batch {n}, dropout 0", tokens_per_s=n * 25_000.0) for n in (8, 16)], "met"),
        # Rows of another stage with the same name do not count.
        ("adamw", [row("kernel", "gpt2-124m torch AdamW fused + copy", over_ours=9.0)], "not measured"),
        ("waits", [row("kernel", "gpt2-124m split32, fp32 momentum", waits=0)], "met"),
        ("waits", [row("kernel", "gpt2-124m split32, fp32 momentum", waits=2)], "missed by 2"),
    ],
)  # fmt: skip
def test_verdicts(scripts: SimpleNamespace, goal: str, rows: list[dict[str, Any]], expected: str) -> None:
    chosen = next(item for item in scripts.report.goals() if item["id"] == goal)
    value, _ = scripts.report.measured(chosen, rows)
    assert scripts.report.verdict(chosen, value) == expected


def test_report_is_written_with_its_rows(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row("kernel", EXACT[0], error="OutOfMemoryError: a | b"), row("facts", "bandwidth", copy_gb_per_s=3012.4)]
    folder = write(tmp_path / "out", rows)
    results = tmp_path / "results"
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(folder), "--results", str(results)])
    assert scripts.report.main() == 0
    text = (results / "gpu-2027-01-02-h100-80gb-hbm3.md").read_text()
    assert (results / "gpu-2027-01-02-h100-80gb-hbm3.jsonl").read_text() == (folder / "results.jsonl").read_text()
    for fact in ("H100 80GB HBM3", "79.6 GiB", "580.1", "2.11.0", "3.6.0", "abc1234"):
        assert fact in text
    assert r"not measured: OutOfMemoryError: a \| b" in text
    assert "copy_gb_per_s 3012" in text
    table = scripts.report.docs_table(results)
    assert "[NVIDIA H100 80GB HBM3, 2027-01-02](../benchmarks/results/gpu-2027-01-02-h100-80gb-hbm3.md)" in table


def test_a_rehearsal_is_not_written(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder = write(tmp_path / "out", [row("kernel", EXACT[0], over_bound=1.0) | {"rehearsal": True}])
    results = tmp_path / "results"
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(folder), "--results", str(results)])
    assert scripts.report.main() == 0
    assert not results.exists()
    printed = capsys.readouterr().out
    assert "no figure here is about a GPU" in printed
    assert "| met" not in printed


def test_a_goal_of_which_a_part_is_missing_says_so(scripts: SimpleNamespace) -> None:
    goal = next(item for item in scripts.report.goals() if item["id"] == "kernel-exact")
    rows = [row("kernel", EXACT[0], over_bound=1.03), row("kernel", EXACT[2], error="OutOfMemoryError")]
    assert scripts.report.measured(goal, rows) == (None, "1 of 3 measured, 1.03")
    assert scripts.report.measured(goal, [row("kernel", EXACT[0], over_bound=2.0)]) == (2.0, "1 of 3 measured")


def test_another_run_of_the_same_day_does_not_replace_the_first(scripts: SimpleNamespace, tmp_path: Path) -> None:
    results = tmp_path / "results"
    first = write(tmp_path / "first", [row("facts", "device"), row("facts", "matmul", tflops=700.0)])
    scripts.report.report_folder(first, results)
    before = (results / "gpu-2027-01-02-h100-80gb-hbm3.jsonl").read_bytes()
    scripts.report.report_folder(write(tmp_path / "second", [row("facts", "bandwidth")]), results)
    assert (results / "gpu-2027-01-02-h100-80gb-hbm3.jsonl").read_bytes() == before
    assert (results / "gpu-2027-01-02-h100-80gb-hbm3-2.jsonl").exists()
    # The same output folder with more rows is the same run.
    write(first, [row("facts", "device"), row("facts", "matmul", tflops=700.0), row("peers", "stage")])
    scripts.report.report_folder(first, results)
    assert len((results / "gpu-2027-01-02-h100-80gb-hbm3.jsonl").read_bytes()) > len(before)
    assert len(list(results.glob("*.jsonl"))) == 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "does not exist; run benchmarks/gpu.py --output"),
        ("", "no rows; run benchmarks/gpu.py"),
        ("{}\n", "line 1: no stage, so it is no row of benchmarks/gpu.py"),
        ("nonsense\n", "line 1: not a JSON object"),
        ("".join(json.dumps(row("facts", "device") | {"commit": c}) + "\n" for c in ("a", "b")), "several values of commit (a, b)"),
        ("".join(json.dumps(row("facts", "device") | {"card": c}) + "\n" for c in ("H100", "H200")), "several values of card"),
    ],
)  # fmt: skip
def test_what_is_no_result_is_refused(
    scripts: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    lines: str | None,
    message: str,
) -> None:
    if lines is not None:
        (tmp_path / "results.jsonl").write_text(lines)
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(tmp_path), "--results", str(tmp_path / "results")])
    assert scripts.report.main() == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_the_documents_table_is_that_of_the_result_files(scripts: SimpleNamespace) -> None:
    text = scripts.report.DOCUMENT.read_text(encoding="utf-8")
    table = text.split(scripts.report.BEGIN)[1].split(scripts.report.END)[0]
    assert table == scripts.report.docs_table(scripts.report.RESULTS), "run python benchmarks/gpu_report.py --docs"


def test_a_document_without_the_marks_is_left_alone(scripts: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("text\n")
    with pytest.raises(ValueError, match="no lines <!-- begin"):
        scripts.report.write_docs(tmp_path, tmp_path / "page.md")
    with pytest.raises(ValueError, match="no such folder"):
        scripts.report.write_docs(tmp_path / "nowhere", scripts.report.DOCUMENT)
    assert (tmp_path / "page.md").read_text() == "text\n"


@pytest.mark.parametrize(
    ("package", "expected"),
    [("megatron-core", "megatron-core==0.19.2"), ("docstring_parser", "docstring_parser=="), ("lion-pytorch", "lion-pytorch=="),
     ("flashoptim==0.1.4", "flashoptim==0.1.4"), ("bitsandbytes", "bitsandbytes")],
)  # fmt: skip
def test_wheels_have_the_pinned_versions(scripts: SimpleNamespace, package: str, expected: str) -> None:
    assert scripts.wheels.pinned(package).startswith(expected)


def test_another_folder_is_not_replaced_by_wheels(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "precious").write_text("x")
    monkeypatch.setattr(sys, "argv", ["gpu_wheels.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit):
        scripts.wheels.main()
    assert "not made by this script" in capsys.readouterr().err
    assert (tmp_path / "precious").exists()
