"""A checkpoint written on one kind of device resumes on the other, with new random states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from distributed import run_distributed

TRACKER = "tracker.model-parallel-rng"


def resume_from_a_gpu(rank: int, config: Any) -> dict[str, Any]:
    """Saves a run, restores it with random states as CUDA saves them, and takes a step; returns what changed."""
    from megatron_lion.train import checkpoint as ckpt
    from megatron_lion.train.random_state import rng_state
    from megatron_lion.train.restore import restore_run
    from megatron_lion.train.run import save_run

    with tiny.opened_run(config) as run:
        tiny.step_once(run, run.train_batches())
        checkpoint = save_run(run)
        own = ckpt.read_rng(checkpoint, run.ranks)
        assert own is not None
        restore_run(run, checkpoint)
        same_device = rng_state()
        # The state of a CUDA generator is a seed and an offset, 8 bytes each.
        of_cuda = {**own, "cuda": torch.zeros(16, dtype=torch.uint8), TRACKER: torch.zeros(16, dtype=torch.uint8)}
        patch = pytest.MonkeyPatch()
        patch.setattr(ckpt, "read_rng", lambda *_: of_cuda)
        try:
            restore_run(run, checkpoint)
        finally:
            patch.undo()
        fresh = rng_state()
        result = tiny.step_once(run, run.train_batches())
    return {
        "step": result, "kept": torch.equal(same_device[TRACKER], own[TRACKER]),
        "fresh": not torch.equal(fresh[TRACKER], own[TRACKER]), "size": len(fresh[TRACKER]) == len(own[TRACKER]),
    }  # fmt: skip


def test_a_cpu_resumes_with_dropout_what_a_gpu_saved(tmp_path: Path) -> None:
    corpus = tiny.write_corpus(tmp_path / "corpus")
    config = tiny.tiny_config(tmp_path / "run", corpus, model__hidden_dropout=0.1, model__attention_dropout=0.1)
    found = run_distributed(resume_from_a_gpu, 1, config)[0]
    assert found["kept"], "on the same kind of device the streams continue"
    assert found["fresh"]
    assert found["size"]
    assert not found["step"].skipped
