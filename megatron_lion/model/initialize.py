"""Initial weights that are the same at every layout and on every device.

Each tensor is drawn whole, on the CPU, from a generator seeded by (seed, global name), and every rank keeps its slice.
So a run at TP 2 x DP 2 starts from the same weights as a run on one process, and adding a layer changes no other.
"""

from __future__ import annotations

import math

import torch
from megatron.core import parallel_state

from megatron_lion.optim.parameter_shards import named_global_parameters
from megatron_lion.parallel import derive_seed


@torch.no_grad()
def initialize_weights(model: torch.nn.Module, *, seed: int, std: float, num_layers: int) -> None:
    """Fills every parameter in place.

    Matrices and embeddings ~ N(0, std²); the two matrices that write into the residual stream (attention projection
    and second MLP matrix) ~ N(0, std² / (2 num_layers)); biases 0; norm gains 1. This is GPT-2's scheme.

    Args:
        model: the local part of the network, before DDP.
        seed: the run's seed.
        std: standard deviation of matrices and embeddings.
        num_layers: number of layers of the whole model.
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for name, parameter in named_global_parameters(model):
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            shape = list(parameter.shape)
            dimension = getattr(parameter, "partition_dim", -1)
            split = size > 1 and getattr(parameter, "tensor_model_parallel", False) and dimension >= 0
            if split:
                shape[dimension] *= size
            residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            scale = std / math.sqrt(2.0 * num_layers) if residual else std
            # On the CPU: CUDA's generator gives other numbers for a seed. In float32: every precision starts from the
            # same numbers, rounded.
            generator = torch.Generator().manual_seed(derive_seed(seed, f"init:{name}"))
            whole = torch.randn(shape, generator=generator, dtype=torch.float32) * scale
            parameter.copy_(whole.chunk(size, dim=dimension)[rank] if split else whole)
