"""`Lion` in other frameworks: DDP, FSDP2, Hugging Face's Trainer, DeepSpeed."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from distributed import run_distributed
from lion_cases import same_bits, same_state

from megatron_lion.optim.lion import Lion

HYPER = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
MODES = (
    {},
    {"momentum": "bf16"},
    {"master_weights": "split32"},
    {"master_weights": "fp32", "init_exp_avg": "first_gradient"},
)


def network(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A network whose rows two processes share unequally: 3 and 2 of five, 1 and 0 of one."""
    torch.manual_seed(0)
    layers = (torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    return torch.nn.Sequential(*layers).to(dtype)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    """The same samples on every process: their mean gradient is that of one process, bit for bit."""
    dtype = next(model.parameters()).dtype
    for number in range(first, first + steps):
        samples = torch.randn(8, 6, generator=torch.Generator().manual_seed(number)).to(dtype)
        optimizer.zero_grad()
        (model(samples).float() - 1).square().mean().backward()
        optimizer.step()


def ddp(rank: int) -> bool:
    alone, wrapped = network(), torch.nn.parallel.DistributedDataParallel(network())
    optimizers = [Lion(model.parameters(), **HYPER) for model in (alone, wrapped)]
    for model, optimizer in zip((alone, wrapped), optimizers, strict=True):
        train(model, optimizer, 5)
    return same_state(*optimizers)


def test_ddp():
    assert run_distributed(ddp, 2) == [True, True]


def fsdp(rank: int) -> list[str]:
    """Returns the modes in which FSDP2's shards differ from the whole model, or from a run that loaded its state."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard

    def shard(whole: torch.Tensor) -> torch.Tensor:
        parts = whole.detach().chunk(2)
        return parts[rank] if rank < len(parts) else whole.detach()[:0]

    wrong = []
    for settings in MODES:
        dtype = torch.bfloat16 if "master_weights" in settings else torch.float32
        alone, sharded = network(dtype), network(dtype)
        fully_shard(sharded)
        one, other = (Lion(model.parameters(), **HYPER, **settings) for model in (alone, sharded))
        train(alone, one, 4)
        train(sharded, other, 4)
        for (name, whole), part in zip(alone.named_parameters(), sharded.parameters(), strict=True):
            pairs = [(whole, part), *((value, other.state[part][key]) for key, value in one.state[whole].items())]
            if not all(same_bits(shard(ours), theirs.detach().to_local()) for ours, theirs in pairs):
                wrong.append(f"{settings} {name}")
        state = copy.deepcopy(get_optimizer_state_dict(sharded, other))
        resumed = network(dtype)
        fully_shard(resumed)
        for target, source in zip(resumed.parameters(), sharded.parameters(), strict=True):
            target.data.copy_(source.data)
        third = Lion(resumed.parameters(), **HYPER, **settings)
        set_optimizer_state_dict(resumed, third, state)
        train(sharded, other, 2, first=4)
        train(resumed, third, 2, first=4)
        for part, again in zip(sharded.parameters(), resumed.parameters(), strict=True):
            if not same_bits(part.detach().to_local(), again.detach().to_local()):
                wrong.append(f"{settings} after loading")
    return wrong


def test_fsdp2_shards_are_the_whole_model():
    assert run_distributed(fsdp, 2) == [[], []]


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="transformers.Trainer needs accelerate")
def test_hugging_face_trainer(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, get_linear_schedule_with_warmup

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50, n_positions=16))
    tokens = [torch.randint(0, 9, (16,)) for _ in range(32)]
    ends = []
    for resume in (False, True):
        ours = copy.deepcopy(model)
        optimizer = Lion(ours.parameters(), lr=3e-3, weight_decay=0.1)
        settings = TrainingArguments(
            output_dir=str(tmp_path), max_steps=8, save_steps=4, per_device_train_batch_size=4, report_to=[],
            use_cpu=True, disable_tqdm=True, logging_steps=1,
        )  # fmt: skip
        trainer = Trainer(
            model=ours,
            args=settings,
            train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
            optimizers=(optimizer, get_linear_schedule_with_warmup(optimizer, 0, 8)),
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4") if resume else None)
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        assert float(losses[-1]) < float(losses[0])
        assert optimizer.param_groups[0]["lr"] == 0, "the Trainer's schedule sets our rate"
        ends.append(optimizer)
    assert same_state(*ends)


def deepspeed_engine(rank: int, stage: int) -> tuple[float, float]:
    """Returns the loss before and after eight steps of a DeepSpeed engine with our optimizer."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    model = network(torch.bfloat16 if stage else torch.float32)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": stage}, "bf16": {"enabled": stage > 0},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=Lion(model.parameters(), **HYPER), config=config)
    losses = []
    samples = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).to(next(engine.parameters()).dtype)
    for _ in range(8):
        loss = (engine(samples).float() - 1).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses[0], losses[-1]


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_deepspeed_client_optimizer(stage):
    for first, last in run_distributed(deepspeed_engine, 2, stage):
        assert last < 0.8 * first
