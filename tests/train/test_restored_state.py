"""A resumed run compares the restored state with the saved one: one wrong bit anywhere is an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from distributed import run_distributed

from megatron_lion.errors import CheckpointError
from megatron_lion.optim.parameter_shards import local_shards
from megatron_lion.optim.train_optimizer import TrainOptimizer
from megatron_lion.runs.steps import open_checkpoint, step_folder

# restore_run calls this method after all tensors are loaded and before anything is compared.
BETWEEN_LOAD_AND_COMPARISON = TrainOptimizer, "load_extra_state"


def flip_lowest_bit(values: torch.Tensor) -> None:
    """Changes the middle element by one unit in the last place."""
    bits = values.detach().view(-1).view(torch.int16 if values.element_size() == 2 else torch.int32)
    bits[bits.numel() // 2] ^= 1


def in_master_weight(run: Any) -> None:
    flip_lowest_bit(list(local_shards(run.model, run.optimizer))[3].main)


def in_momentum(run: Any) -> None:
    flip_lowest_bit(list(local_shards(run.model, run.optimizer))[3].state["exp_avg"])


def in_second_moment(run: Any) -> None:
    flip_lowest_bit(list(local_shards(run.model, run.optimizer))[3].state["exp_avg_sq"])


def in_packed_momentum(run: Any) -> None:
    """Changes one int8 value by one unit. At the same shards int8 is loaded exactly, so a difference is no rounding."""
    packed = next(state["exp_avg"] for state in run.optimizer.inner.state.values())
    assert packed.dtype == torch.uint8
    packed[3] ^= 1


def in_model_weight(run: Any) -> None:
    flip_lowest_bit(list(run.model[0].parameters())[3])


def nowhere(run: Any) -> None:
    pass


INT8 = {"train__precision": "bf16", "optimizer__master_weights": "split32", "optimizer__momentum_dtype": "int8"}
BF16 = {"train__precision": "bf16", "optimizer__master_weights": "shards"}
UNSHARDED = {"parallel__use_distributed_optimizer": False}
# name: where one bit is wrong, which fingerprint shows it ("" if none does), settings
CASES: dict[str, tuple[Callable[[Any], None], str, dict[str, Any]]] = {
    "bf16: nothing": (nowhere, "", BF16),
    "fp32: weight": (in_master_weight, "state", {}),
    "fp32: momentum": (in_momentum, "state", {}),
    "fp32 unsharded: weight": (in_master_weight, "state", UNSHARDED),
    "fp32 unsharded: momentum": (in_momentum, "state", UNSHARDED),
    "fp32 adamw: second moment": (in_second_moment, "state", {"optimizer__name": "adamw"}),
    "bf16: master weight": (in_master_weight, "state", BF16),
    "bf16: momentum": (in_momentum, "state", BF16),
    "int8: nothing": (nowhere, "", INT8),
    "int8: momentum": (in_packed_momentum, "state", INT8),
    "bf16: weight of the model": (in_model_weight, "weights", BF16),
    "bf16 unsharded: weight of the model": (in_model_weight, "weights", {**BF16, **UNSHARDED}),
}


def refusals(rank: int, jobs: dict[str, Any]) -> dict[str, tuple[str, str, int]]:
    """(error, message, exit code) of restoring a checkpoint with one wrong bit; ("", "", 0) if it is accepted."""
    from megatron_lion.train.restore import restore_run
    from megatron_lion.train.run import save_run

    found = {}
    for name, config in jobs.items():
        with tiny.opened_run(config) as run:
            tiny.step_once(run, run.train_batches())
            save_run(run)
        owner, method = BETWEEN_LOAD_AND_COMPARISON
        unpatched = getattr(owner, method)
        with tiny.opened_run(config) as run:

            def and_damage(*args: Any, run: Any = run, name: str = name, unpatched: Any = unpatched) -> None:
                unpatched(*args)
                with torch.no_grad():
                    CASES[name][0](run)

            setattr(owner, method, and_damage)
            try:
                restore_run(run, open_checkpoint(step_folder(Path(config.run_dir), 1)))
                found[name] = "", "", 0
            except CheckpointError as error:
                found[name] = type(error).__name__, str(error), error.exit_code
            finally:
                setattr(owner, method, unpatched)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, device: str) -> dict[str, tuple[str, str, int]]:
    folder = tmp_path_factory.mktemp(f"restored-{device}")
    corpus = tiny.write_corpus(folder / "corpus")
    jobs = {
        name: tiny.tiny_config(folder / f"run{number}", corpus, device=device, **changes)
        for number, (name, (_, _, changes)) in enumerate(CASES.items())
    }
    result: dict[str, tuple[str, str, int]] = run_distributed(refusals, 1, jobs, device=device)[0]
    return result


@pytest.mark.parametrize("name", list(CASES))
def test_one_wrong_bit_in_what_was_loaded_is_refused(found: dict[str, tuple[str, str, int]], name: str) -> None:
    kind, message, code = found[name]
    shown_by = CASES[name][1]
    if not shown_by:
        assert (kind, message, code) == ("", "", 0)
        return
    assert kind == "CheckpointError"
    assert code == 4
    assert "checkpoints/step_0000001: the restored " + shown_by in message
    assert "resume from another step" in message


def unfitting(rank: int, config: Any) -> dict[str, tuple[str, str]]:
    """What reading a checkpoint is refused for if its tensors are not those that are asked for."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megatron_lion.train.checkpoint_tensors import read_tensors
    from megatron_lion.train.model_state import model_sharded_state
    from megatron_lion.train.run import save_run

    with tiny.opened_run(config) as run:
        folder = save_run(run).folder
        wanted = model_sharded_state(run.model)
        name = sorted(wanted)[0]
        longer = torch.zeros(*(size + 1 for size in wanted[name].data.shape))
        asked = {
            "fits": wanted,
            "absent": {"x": ShardedTensor.from_rank_offsets("model.of_another", torch.zeros(3))},
            "shape": {name: ShardedTensor.from_rank_offsets(name, longer)},
        }
        found = {case: tiny.error_of(read_tensors, sharded, folder) for case, sharded in asked.items()}
        for path in folder.glob("*.distcp"):
            path.write_bytes(b"")
        found["empty file"] = tiny.error_of(read_tensors, wanted, folder)
        (folder / ".metadata").unlink()
        return {**found, "no metadata": tiny.error_of(read_tensors, wanted, folder)}


def test_tensors_that_are_not_in_the_checkpoint_are_refused(tmp_path: Path) -> None:
    config = tiny.tiny_config(tmp_path / "run", tiny.write_corpus(tmp_path / "corpus"))
    found = run_distributed(unfitting, 1, config)[0]
    assert found.pop("fits") == ("", "")
    assert found.keys() == {"absent", "shape", "empty file", "no metadata"}
    for case, (kind, message) in found.items():
        assert kind == "CheckpointError", (case, message)
        assert "checkpoints/step_0000000: does not fit this model: " in message, case
        assert "\n" not in message
    assert "model.of_another" in found["absent"][1]
