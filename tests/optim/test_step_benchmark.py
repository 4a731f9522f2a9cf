"""The benchmark of optimizer steps: its tensor lists, its check of results before timing, its table."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
contenders = importlib.import_module("contenders")
optimizer_step = importlib.import_module("optimizer_step")


def test_the_tensor_lists_are_those_of_gpt2():
    small, medium = optimizer_step.SIZES["gpt2-124m"], optimizer_step.SIZES["gpt2-355m"]
    assert (len(small), sum(map(torch.Size.numel, map(torch.Size, small)))) == (148, 124_475_904)
    assert sum(map(torch.Size.numel, map(torch.Size, medium))) == 354_871_296
    shards = [optimizer_step.shard_shapes(small, 16, rank) for rank in range(16)]
    assert sum(size for shard in shards for (size,) in shard) == 124_475_904
    assert {sum(size for (size,) in shard) for shard in shards} == {124_475_904 // 16}


def test_what_computes_the_wrong_thing_is_not_timed():
    ours = next(contender for contender in contenders.CONTENDERS if contender.name == "ours")
    optimizer_step.check(ours, "cpu")
    with pytest.raises(RuntimeError, match=r"ours: off by .* after three steps; not timed"):
        optimizer_step.check(dataclasses.replace(ours, rule="sgd"), "cpu")
    reduced = next(contender for contender in contenders.CONTENDERS if contender.name.startswith("ours split24"))
    optimizer_step.check(reduced, "cpu")
    with pytest.raises(RuntimeError):
        optimizer_step.check(dataclasses.replace(reduced, rule="sgd"), "cpu")


def test_the_table_and_files_of_a_small_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(optimizer_step.SIZES, "tiny", [(40, 5), (7,)])
    monkeypatch.setattr(optimizer_step, "bandwidths", lambda device: {"copy": 1e9, "in_place": 2e9})
    names = ("ours", "ours split32", "torch AdamW fused", "lion-pytorch")
    chosen = [contender for contender in contenders.CONTENDERS if contender.name in names]
    monkeypatch.setattr(optimizer_step, "CONTENDERS", chosen)
    output = tmp_path / "results" / "step"
    arguments = ["optimizer_step.py", "--device", "cpu", "--sizes", "tiny", "--rounds", "2", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    optimizer_step.main()
    text = capsys.readouterr().out
    assert "### tiny: 207 parameters in 2 tensors" in text
    rows = {row["name"]: row for row in json.loads(Path(f"{output}.json").read_text())["rows"]}
    assert rows["ours"]["ratio"] == 1.0
    assert rows["ours split32"]["state_bytes_per_parameter"] == 6.0
    assert rows["ours"]["state_bytes_per_parameter"] == 4.0
    for row in rows.values():
        assert f"| {row['name']} |" in text
        assert row["device_ms"] > 0


def test_rows_are_written_as_they_come_and_one_that_fails_costs_itself(tmp_path, monkeypatch):
    """Contenders that do not fit together run one by one: the second is out of memory, the third is interrupted."""
    chosen = [item for item in optimizer_step.CONTENDERS if item.name in ("ours", "ours, foreach", "torch AdamW fused")]
    plain, seen = optimizer_step.measure, []

    def measure(size, contenders, *rest):
        seen.append(contenders[0].name)
        if len(seen) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if len(seen) == 3:
            raise KeyboardInterrupt
        return plain(size, contenders, *rest)

    monkeypatch.setattr(optimizer_step, "CONTENDERS", chosen)
    monkeypatch.setattr(optimizer_step, "SIZES", {"small": [(5,)]})
    monkeypatch.setattr(optimizer_step, "AT_ONCE", 0)
    monkeypatch.setattr(optimizer_step, "measure", measure)
    monkeypatch.setattr(optimizer_step, "bandwidths", lambda device: {"copy": 1e9, "in_place": 1e9})
    output = tmp_path / "out"
    monkeypatch.setattr(
        sys, "argv", ["x", "--device", "cpu", "--sizes", "small", "--rounds", "1", "--output", str(output)]
    )
    with pytest.raises(KeyboardInterrupt):
        optimizer_step.main()
    written = json.loads(output.with_suffix(".json").read_text())
    assert [row["name"] for row in written["rows"]] == ["ours"]
    assert written["rows"][0]["ratio"] == 1.0
    assert written["left_out"] == [f"{seen[1]} at small (OutOfMemoryError: CUDA out of memory)"]
