"""megatron-core's TransformerConfig for a run, and the choice of the attention core; for both kinds of model."""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_lion.config import RunConfig
from megatron_lion.device import DTYPES, Device
from megatron_lion.errors import EnvironmentFault

gelu_tanh = functools.partial(torch.nn.functional.gelu, approximate="tanh")
GELUS = {"tanh": gelu_tanh, "erf": torch.nn.functional.gelu}


def build_transformer_config(config: RunConfig, device: Device, *, fuses_gradients: bool = False) -> TransformerConfig:
    """Builds megatron-core's settings for a run.

    megatron-core's fused kernel computes the tanh form of GELU (GPT-2's `gelu_new`) if it is given F.gelu. Its unfused
    path computes the function that it is given.

    Args:
        config: the run's settings.
        device: of the model.
        fuses_gradients: whether matrix products add weight gradients to the buffer; see `weight_gradients`.
    """
    model, parallel = config.model, config.parallel
    fused_gelu = device.has_fused_kernels and model.gelu == "tanh"
    dtype = DTYPES[config.train.precision]
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size or 4 * model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        layernorm_epsilon=model.layernorm_epsilon,
        init_method_std=model.init_method_std,
        perform_initialization=False,  # initialize_weights does it, with the same values at every layout
        activation_func=torch.nn.functional.gelu if fused_gelu else GELUS[model.gelu],
        bias_activation_fusion=fused_gelu,
        bias_dropout_fusion=device.has_fused_kernels,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=fuses_gradients,
        add_bias_linear=True,
        add_qkv_bias=True,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=config.train.precision == "bf16",
        fp16=config.train.precision == "fp16",
        calculate_per_token_loss=True,  # gradients are sums; finalize divides by the global count
        attention_softmax_in_fp32=True,
        recompute_granularity="full" if model.recompute else None,
        recompute_method="uniform" if model.recompute else None,
        recompute_num_layers=1 if model.recompute else None,
        deallocate_pipeline_outputs=True,
        batch_p2p_comm=device.kind == "cuda",
        use_cpu_initialization=device.kind == "cpu",
        # Only inside `megatron_lion.determinism.deterministic`: a model built elsewhere runs no backward pass, and
        # megatron-core refuses the mode with Transformer Engine unless the environment is set for it.
        deterministic_mode=config.train.deterministic and torch.are_deterministic_algorithms_enabled(),
    )


def transformer_engine_installed() -> bool:
    """Returns whether the package transformer_engine is installed."""
    from importlib.util import find_spec

    return find_spec("transformer_engine") is not None


def choose_attention(wanted: str, device: Device) -> str:
    """Returns the attention core of `model.attention`; "auto" is Transformer Engine if it can run, else "sdpa".

    Raises:
        EnvironmentFault: Transformer Engine is requested but not installed, or there is no CUDA device.
    """
    usable = transformer_engine_installed() and device.kind == "cuda"
    if wanted == "transformer_engine" and not usable:
        raise EnvironmentFault(
            "model.attention: transformer_engine needs Transformer Engine and a CUDA device; use auto or sdpa"
        )
    if wanted == "auto":
        return "transformer_engine" if usable else "sdpa"
    return wanted


def _build_torch_norm(
    cls: type, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
) -> torch.nn.LayerNorm:
    """Builds torch's LayerNorm and marks its parameters for sequence parallelism.

    Each tensor-parallel rank sees a part of the sequence, so the gradients are partial sums, which megatron-core adds
    up over the ranks for marked parameters only.
    """
    norm = torch.nn.LayerNorm(hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


# mcore 0.19.2: its torch LayerNorm, the one without Apex or Transformer Engine, refuses sequence parallelism although
# marking the parameters is all it takes; remove when WrappedTorchNorm does so.
WrappedTorchNorm.__new__ = staticmethod(_build_torch_norm)
