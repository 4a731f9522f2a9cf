"""The bytes and launches with which a micro-batch's weight gradients reach the fp32 buffer."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import tiny
import torch
from distributed import run_distributed
from torch.utils._python_dispatch import TorchDispatchMode

# These return a view or memory without a value.
NO_PASS = ("view", "_unsafe_view", "t", "transpose", "detach", "empty_like", "empty", "new_empty", "slice", "alias")


class CountedGradients(TorchDispatchMode):
    """Counts the bytes that operations move of tensors with a parameter's shape, except the parameters themselves."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        super().__init__()
        self.weights = {parameter.data_ptr() for parameter in parameters}
        self.buffers = {parameter.main_grad.data_ptr() for parameter in parameters}
        # Not in transposed shapes: the operands of a product are the layer's input and its output's gradient.
        self.shapes = {parameter.shape for parameter in parameters if parameter.dim() == 2}
        self.bytes: Counter[str] = Counter()
        self.hooks = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        name = str(function.overloadpacket).removeprefix("aten.")
        if name in NO_PASS:
            return output
        if name == "add_" and args[0].data_ptr() in self.buffers:
            self.hooks += 1
        tensors = [value for value in args if isinstance(value, torch.Tensor)] + [output]
        for value in tensors:  # an operation in place reads its first argument and returns it
            if not isinstance(value, torch.Tensor) or value.shape not in self.shapes:
                continue
            if value.data_ptr() not in self.weights:
                place = "buffer" if value.data_ptr() in self.buffers else "16 bits"
                self.bytes[f"{name}, {place}"] += value.numel() * value.element_size()
        return output


def counted(rank: int, configs: dict[str, Any]) -> dict[str, Any]:
    """Runs one micro-batch of each model."""
    from megatron_lion.device import select_device
    from megatron_lion.model.build import build_model, build_objective
    from megatron_lion.parallel import process_groups

    found = {}
    device = select_device("cpu")
    for name, config in configs.items():
        batch, length = config.train.micro_batch_size, config.model.seq_length
        with process_groups(device, tensor_model_parallel_size=1, pipeline_model_parallel_size=1):
            (model,) = build_model(config, device, config.model.vocab_size)
            tokens = torch.randint(0, 100, (batch, length), generator=torch.Generator().manual_seed(0))
            fields = {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(batch, length),
                      "position_ids": torch.arange(length).expand(batch, -1)}  # fmt: skip
            output, loss_of = build_objective(config.model.kind).forward_step(iter([fields]), model)
            loss = loss_of(output)[0]
            parameters = list(model.parameters())
            with CountedGradients(parameters) as counts:
                loss.backward()
            linear = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and ".layers." in n)
            found[name] = {
                "bytes": dict(counts.bytes),
                "hooks": counts.hooks,
                "linear": linear,
                "parameters": len(parameters),
            }
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Any]:
    folder = tmp_path_factory.mktemp("bytes")
    # 48 tokens: no activation has the shape of a weight, [96 | 32 | 128, 32], [32, 128], [128, 32] or [16, 32].
    sizes = {"train__precision": "bf16", "train__micro_batch_size": 3}
    configs = {
        fusion: tiny.tiny_config(folder, "none", **sizes, train__gradient_accumulation_fusion=fusion)
        for fusion in (False, True)
    }
    results: dict[bool, Any] = run_distributed(counted, 1, configs)[0]
    return results


def test_a_linear_weights_gradient_moves_eight_bytes_in_the_place_of_twelve(found: dict[bool, Any]) -> None:
    """The product reads and adds to the buffer; without the fusion it writes 2 bytes, which the hook reads again."""
    linear = found[True]["linear"]
    off, on = Counter(found[False]["bytes"]), Counter(found[True]["bytes"])
    assert off - on == {"mm, 16 bits": 2 * linear, "add_, 16 bits": 2 * linear, "add_, buffer": 8 * linear}
    # The rest are the embeddings, of which one is the output layer's weight too: the same in both runs.
    assert on - off == {"addmm_, buffer": 8 * linear}


def test_the_hook_adds_all_but_the_linear_weights(found: dict[bool, Any]) -> None:
    assert found[False]["hooks"] == found[False]["parameters"] == 28
    assert found[True]["hooks"] == 28 - 8
