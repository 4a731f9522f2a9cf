"""Settings that are auto: what is chosen, that config.yaml keeps it, and that a run which resumes keeps its own choice."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny
from distributed import run_distributed
from hypothesis import given
from hypothesis import strategies as st

from megatron_lion.cli import main
from megatron_lion.config import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_lion.config_checks import check_config
from megatron_lion.configfile import load_config, save_config
from megatron_lion.errors import ConfigError
from megatron_lion.model.micro_batch import RESERVED, USABLE, choose_micro_batch
from megatron_lion.model.sizes import memory_bytes
from megatron_lion.runs.folder import kept_choices

AUTO = {"train__precision": "bf16", "train__micro_batch_size": "auto", "optimizer__master_weights": "auto"}


@pytest.mark.parametrize(
    ("name", "precision", "sharded", "form"),
    [
        ("lion", "bf16", True, "split32"), ("lion", "bf16", False, "shards"), ("lion", "fp32", True, "shards"),
        ("lion", "fp16", True, "shards"), ("sgd", "bf16", True, "shards"), ("adamw", "bf16", True, "shards"),
    ],
)  # fmt: skip
def test_the_fused_step_is_lions_default_in_bf16(name: Any, precision: Any, sharded: bool, form: str) -> None:
    config = RunConfig(
        optimizer=OptimizerConfig(name=name),
        train=TrainConfig(precision=precision),
        parallel=ParallelConfig(use_distributed_optimizer=sharded),
    )
    check_config(config, 1)
    assert config.master_weights == config.resolved().optimizer.master_weights == form
    explicit = dataclasses.replace(config, optimizer=OptimizerConfig(name=name, master_weights="shards"))
    assert explicit.master_weights == "shards"


@given(
    st.sampled_from([(1, 1, 1), (2, 1, 1), (4, 2, 1), (4, 1, 2), (8, 2, 2)]),
    st.sampled_from([8, 64, 96, 640]),
    st.integers(min_value=2**30, max_value=2**38),
    st.sampled_from(["gpt2", "bert"]),
)
def test_the_micro_batch_is_the_largest_divisor_that_fits(
    layout: tuple[int, int, int], batch: int, memory: int, kind: Any
) -> None:
    """Every larger divisor of the share exceeds the limit of memory, of tokens or of the pipeline; checked one by one."""
    world, tensor, pipeline = layout
    config = RunConfig(
        model=ModelConfig(kind=kind),
        train=TrainConfig(global_batch_size=batch),
        parallel=ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline),
    )
    share = batch // (world // (tensor * pipeline))
    chosen = choose_micro_batch(config, world, memory)

    def is_allowed(size: int) -> bool:
        sized = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch_size=size))
        fits = sum(memory_bytes(sized, world).values()) <= USABLE * memory - RESERVED
        return fits and size * 1024 <= 65_536 and (pipeline == 1 or share // size >= 4 * pipeline)

    allowed = [size for size in range(1, share + 1) if share % size == 0 and is_allowed(size)]
    assert chosen == max(allowed, default=1)


def test_a_choice_needs_a_batch_that_the_processes_can_share() -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size: 640 is not divisible by data-parallel size 3; try 642$"):
        check_config(RunConfig(), 3)
    with pytest.raises(ConfigError, match=r"by train.micro_batch_size 2 x data-parallel size 3 = 6; try 642$"):
        check_config(RunConfig(train=TrainConfig(micro_batch_size=2)), 3)
    with pytest.raises(ConfigError, match=r"optimizer.momentum_dtype: int8 needs optimizer.master_weights"):
        check_config(
            RunConfig(optimizer=OptimizerConfig(momentum_dtype="int8"), train=TrainConfig(precision="fp32")), 1
        )
    check_config(RunConfig(optimizer=OptimizerConfig(momentum_dtype="bf16")), 1)  # auto is split32


def trained(rank: int, jobs: dict[str, list[Any]]) -> dict[str, Any]:
    """Trains each run with its configs one after the other."""
    found = {}
    for name, configs in jobs.items():
        for config in configs:
            outcome = tiny.train(config)
        found[name] = outcome
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Outcomes on two processes; "old" began with shards in micro-batches of 2 and resumes with auto for both."""
    folder = tmp_path_factory.mktemp("choices")
    corpus = tiny.write_corpus(folder / "corpus")
    shards = {**AUTO, "optimizer__master_weights": "shards", "train__micro_batch_size": 2}

    def config(name: str, **changes: Any) -> Any:
        return tiny.tiny_config(folder / name, corpus, **changes)

    jobs = {
        "new": [config("new", **AUTO)],
        "explicit": [
            config("explicit", **AUTO | {"optimizer__master_weights": "split32", "train__micro_batch_size": 4})
        ],
        "whole": [config("whole", **shards)],
        "old": [config("old", **shards, train__stop_after=3), config("old", **AUTO)],
    }
    return folder, run_distributed(trained, 2, jobs)[0]


def kept(run_dir: Path) -> tuple[Any, Any]:
    config = load_config(run_dir / "config.yaml")
    return config.optimizer.master_weights, config.train.micro_batch_size


def test_a_new_run_stores_what_it_chose_and_computes_the_same_as_if_it_were_given(runs: Any) -> None:
    folder, found = runs
    assert kept(folder / "new") == kept(folder / "explicit") == ("split32", 4)
    assert found["new"]["manifest"]["state_form"] == {"master_weights": "split32", "momentum": "fp32"}
    for key in ("losses", "norms"):
        assert found["new"][key] == found["explicit"][key]


def test_an_old_run_resumes_with_its_own_choices_bit_for_bit(runs: Any) -> None:
    folder, found = runs
    assert kept(folder / "old") == ("shards", 2)
    for key in ("losses", "norms"):
        assert found["old"][key] == found["whole"][key]
    for key in ("state_fingerprint", "weights_fingerprint", "state_form"):
        assert found["old"]["manifest"][key] == found["whole"]["manifest"][key]
    assert found["new"]["losses"] != found["whole"]["losses"], (
        "the test needs ties, which the two forms round differently"
    )


def test_a_run_keeps_its_micro_batch_only_if_it_divides_the_new_share(runs: Any) -> None:
    folder, _ = runs
    command = load_config(folder / "old" / "config.yaml")
    command = dataclasses.replace(command, train=dataclasses.replace(command.train, micro_batch_size="auto"))
    assert [kept_choices(command, size).train.micro_batch_size for size in (1, 2, 4, 8)] == [2, 2, 2, "auto"]
    elsewhere = dataclasses.replace(command, run_dir=str(folder / "none"))
    assert kept_choices(elsewhere, 1) == elsewhere


def test_a_preview_names_the_choice_and_what_it_is_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for device, sentence in (
        ("cpu", "8 samples a micro-batch x 1 data-parallel process x 80 micro-batches = 640 samples"),
        ("cuda", "64 samples a micro-batch x 1 data-parallel process x 10 micro-batches = 640 samples"),
    ):
        assert main(["pretrain", "--dry-run", "--device", device, "--run_dir", str(tmp_path / "run")]) == 0
        output = capsys.readouterr().out
        assert sentence in output
        if device == "cpu":
            assert "tokens a step; chosen for a CPU" in output
        assert "bf16 parameters with split32 master weights" in output
    config = RunConfig(run_dir=str(tmp_path / "kept"), train=TrainConfig(micro_batch_size=5))
    (tmp_path / "kept" / "checkpoints" / "step_0000003").mkdir(parents=True)
    save_config(config, tmp_path / "kept" / "config.yaml")
    assert main(["pretrain", "--dry-run", "--run_dir", config.run_dir]) == 0
    output = capsys.readouterr().out
    assert "5 samples a micro-batch" in output
    assert "chosen for" not in output


def settled_by_the_smallest(rank: int, config: Any) -> tuple[Any, Any]:
    """Settles with much memory on both ranks, then with little on the second one; returns the two numbers of samples."""
    from megatron_lion.device import Device, select_device
    from megatron_lion.parallel import process_groups
    from megatron_lion.train.choices import settle

    device, found = select_device("cpu"), []
    with process_groups(device) as ranks, pytest.MonkeyPatch.context() as patch:
        for on_the_second in (80, 1):
            memory = (80, on_the_second)[ranks.rank] * 2**30
            patch.setattr(Device, "memory_bytes", lambda self, memory=memory: memory)
            found.append(settle(config, device, ranks).train.micro_batch_size)
    return found[0], found[1]


def test_the_device_with_the_least_memory_decides_for_all_ranks(tmp_path: Path) -> None:
    config = tiny.tiny_config(tmp_path / "run", "none", **AUTO)
    assert run_distributed(settled_by_the_smallest, 2, config) == [(4, 1), (4, 1)]


def settled_without_triton(rank: int, run_dir: str) -> tuple[Any, Any]:
    """The numbers of samples with Triton and without, on a device of 24 GiB."""
    from megatron_lion.device import Device, select_device
    from megatron_lion.parallel import process_groups
    from megatron_lion.train import choices

    device, found = select_device("cpu"), []
    with process_groups(device) as ranks, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Device, "memory_bytes", lambda self: 24 * 2**30)
        for reason in (None, "no C compiler"):
            patch.setattr(choices, "why_no_triton", lambda reason=reason: reason)
            found.append(choices.settle(RunConfig(run_dir=run_dir), device, ranks).train.micro_batch_size)
    return found[0], found[1]


def test_without_triton_the_estimate_is_that_of_megatrons_loss(tmp_path: Path) -> None:
    memory = 24 * 2**30
    chosen = [choose_micro_batch(RunConfig(model=ModelConfig(loss=loss)), 1, memory) for loss in ("fused", "megatron")]
    assert chosen[0] > chosen[1]
    assert run_distributed(settled_without_triton, 1, str(tmp_path / "run")) == [tuple(chosen)]
