"""The key biases: their true gradient is 0, LION moves them on rounding errors, and `freeze_key_bias` keeps them."""

from __future__ import annotations

import pytest
import torch
from distributed import run_distributed
from tiny import LAYOUTS, opened_run, step_once, tiny_config, write_corpus

STEPS, LR = 4, 1e-2
SETTINGS = {
    "free": (1, {}),
    "frozen": (1, {"optimizer__freeze_key_bias": True}),
    "frozen, decay on all": (1, {"optimizer__freeze_key_bias": True, "optimizer__decay_all": True}),
    "frozen AdamW": (1, {"optimizer__freeze_key_bias": True, "optimizer__name": "adamw"}),
    "frozen TP2": (2, {"optimizer__freeze_key_bias": True, **LAYOUTS["TP2"][1]}),
    "frozen DP2, not sharded": (
        2,
        {"optimizer__freeze_key_bias": True, "parallel__use_distributed_optimizer": False},
    ),
    "frozen DP2, overlapped": (
        2,
        {
            "optimizer__freeze_key_bias": True,
            "parallel__overlap_grad_reduce": True,
            "parallel__overlap_param_gather": True,
            "train__precision": "bf16",
        },
    ),
}


def trained(rank, configs):
    """Work of one process: the joint biases [group, 3, head size] of both layers after some steps, and the losses."""
    from megatron_lion.optim.parameter_shards import named_global_parameters

    found = {}
    for name, config in configs.items():
        with opened_run(config) as run:
            batches = run.train_batches()
            losses = [step_once(run, batches).loss for _ in range(STEPS)]
            biases = [
                parameter.detach().float().view(-1, 3, 8).clone()
                for parameter_name, parameter in named_global_parameters(run.model[0])
                if parameter_name.endswith("linear_qkv.bias")
            ]
            found[name] = torch.stack(biases), losses
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("key-bias")
    corpus = write_corpus(folder / "corpus")
    by_size = {}
    for name, (size, changes) in SETTINGS.items():
        settings = {"optimizer__lr": LR, "schedule__kind": "constant", "schedule__warmup_steps": 0, **changes}
        by_size.setdefault(size, {})[name] = tiny_config(folder / name, corpus, **settings)
    found = {}
    for size, configs in by_size.items():
        found |= run_distributed(trained, size, configs)[0]
    return found


def test_lion_moves_key_biases_although_no_output_depends_on_them(results):
    biases, _ = results["free"]
    assert float(biases[:, :, 1].abs().max()) > 1.5 * LR, "with a gradient of rounding errors, by more than one step"


@pytest.mark.parametrize("case", [name for name in SETTINGS if name != "free"])
def test_frozen_key_biases_do_not_move_and_the_others_do(results, case):
    biases, losses = results[case]
    assert float(biases[:, :, 1].abs().max()) == 0.0
    for part in (0, 2):  # queries and values; an even number of steps can end where it began
        assert float((biases[:, :, part] != 0).float().mean()) > 0.5
    if "AdamW" not in case:
        assert losses == pytest.approx(results["free"][1], rel=2e-2 if "overlapped" in case else 1e-4)
