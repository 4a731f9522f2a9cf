"""A transformer layer of megatron-core with the project's element-wise kernels, through the seams of its layer spec.

Between two matrix products a layer of megatron-core adds a bias, computes GELU, drops, adds the residual or normalises. On
CUDA it compiles some of these together; LayerNorm, the residual connection's gradient and the sums for the biases' gradients
stay apart. Here each place is one kernel forward and one backward:

- LayerNorm also returns its input as the residual (megatron-core's pair (output, residual)). The gradients of both then
  arrive together, and the backward kernel adds them.
- The bias's gradient is summed by the kernel that writes the gradient of GELU, of dropout, or of query, key and value.
- The bias of query, key and value is added by the matrix product.

What is saved for the backward pass is what megatron-core's fused operations save, less dropout's mask.

mcore 0.19.2: `_ProductWithBias` fills the fields that the backward pass of megatron-core's linear layer reads, and
`QkvLinear` overrides the method `_forward_impl`; tests/model/test_fused_layer.py compares both with megatron-core's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.parallel_state import get_global_memory_buffer
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    LinearWithGradAccumulationAndAsyncCommunication,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.autograd.function import once_differentiable

from megatron_lion.model import elementwise_launch
from megatron_lion.model.mcore_settings import GELUS


def with_fused_elementwise(spec: ModuleSpec) -> ModuleSpec:
    """Puts the fused operations into a layer spec of linear layers, torch norms and SelfAttention; returns the spec."""
    layer, attention = spec.submodules, spec.submodules.self_attention
    layer.input_layernorm = layer.pre_mlp_layernorm = FusedLayerNorm
    layer.self_attn_bda = layer.mlp_bda = fused_bias_dropout_add
    layer.mlp = functools.partial(FusedMlp.as_mlp_submodule, **layer.mlp.keywords)
    attention.module = FusedSelfAttention
    attention.submodules.linear_qkv = QkvLinear
    return spec


class FusedLayerNorm(torch.nn.LayerNorm):
    """LayerNorm that returns (output, residual), for `input_layernorm` and `pre_mlp_layernorm` of a layer spec."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """Returns the normed [..., H] and x itself."""
        pair: tuple[torch.Tensor, torch.Tensor] = _LayerNorm.apply(x, self.weight, self.bias, self.eps)
        return pair


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.contiguous()
        y, means_N, inverses_N = elementwise_launch.layer_norm(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, means_N, inverses_N)
        ctx.set_materialize_grads(False)  # an unused residual has no gradient to read
        return y, x

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: torch.Tensor | None, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None]:
        if dy is None:
            return residual, None, None, None
        if residual is not None:
            residual = residual.contiguous()
        dx, d_weight, d_bias = elementwise_launch.layer_norm_backward(dy.contiguous(), residual, *ctx.saved_tensors)
        return dx, d_weight, d_bias, None


class FusedMlp(MLP):
    """megatron-core's MLP with bias and GELU in one kernel."""

    def forward(
        self, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **unused: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the output [S, B, H] without its bias, and the bias."""
        assert per_token_scale is None, "for mixtures of experts only"
        intermediate_SBF, bias_F = self.linear_fc1(hidden_states)
        is_erf = self.config.activation_func is GELUS["erf"] and not self.config.bias_activation_fusion
        output: tuple[torch.Tensor, torch.Tensor | None] = self.linear_fc2(
            _BiasGelu.apply(intermediate_SBF, bias_F, is_erf)
        )
        return output


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor, is_erf: bool) -> torch.Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, bias)
        ctx.is_erf = is_erf
        y: torch.Tensor = elementwise_launch.bias_gelu(x, bias, erf=is_erf)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        dx, d_bias = elementwise_launch.bias_gelu_backward(dy.contiguous(), *ctx.saved_tensors, erf=ctx.is_erf)
        return dx, d_bias, None


def fused_bias_dropout_add(training: bool, fused: bool) -> Callable[..., torch.Tensor]:
    """Returns residual + dropout(x + bias) as one operation, for `self_attn_bda` and `mlp_bda` of a layer spec."""

    def add(x_with_bias: tuple[torch.Tensor, torch.Tensor], residual: torch.Tensor, probability: float) -> torch.Tensor:
        x, bias = x_with_bias
        out: torch.Tensor = _BiasDropoutAdd.apply(x, bias, residual, probability if training else 0.0)
        return out

    return add


class _BiasDropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, probability: float
    ) -> torch.Tensor:
        dropout = ctx.dropout = elementwise_launch.Dropout.draw(probability, x.device)
        ctx.save_for_backward(bias)
        out: torch.Tensor = elementwise_launch.bias_dropout_add(x.contiguous(), bias, residual.contiguous(), dropout)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        dy = dy.contiguous()
        (bias,) = ctx.saved_tensors
        dx, d_bias = elementwise_launch.bias_dropout_add_backward(dy, bias, ctx.dropout)
        return dx, d_bias, dy, None


class FusedSelfAttention(SelfAttention):
    """megatron-core's SelfAttention; the gradients of query, key and value are joined, and summed for the bias, in one pass."""

    def get_query_key_value_tensors(
        self, hidden_states: torch.Tensor, key_value_states: torch.Tensor | None = None, **options: Any
    ) -> tuple[torch.Tensor, ...]:
        """Returns query, key and value, each [S, B, N, D], from the hidden states [S, B, H]."""
        mixed_SBNC, _ = super().get_query_key_value_tensors(hidden_states, split_qkv=False)
        parts: tuple[torch.Tensor, ...] = _Split.apply(mixed_SBNC, self.linear_qkv.bias)
        return parts


class _Split(torch.autograd.Function):
    """Splits [S, B, N, 3 D] into three; computes the gradient of the bias that `QkvLinear` has added."""

    @staticmethod
    def forward(ctx: Any, mixed_SBNC: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(bias)
        return mixed_SBNC.chunk(3, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients_SBND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        joined_SBNC, d_bias = elementwise_launch.join_qkv(gradients_SBND, *ctx.saved_tensors)
        return joined_SBNC, d_bias


class QkvLinear(ColumnParallelLinear):
    """megatron-core's column-parallel layer, with the bias added by the matrix product; `_Split` has the bias's gradient."""

    def _forward_impl(
        self, input: torch.Tensor, weight: torch.Tensor, *, bias: torch.Tensor, gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool, sequence_parallel: bool, tp_group: Any, **unused: Any,
    ) -> torch.Tensor:  # fmt: skip
        output: torch.Tensor = _ProductWithBias.apply(
            input, weight, bias.detach(), gradient_accumulation_fusion, allreduce_dgrad, sequence_parallel, None, 0,
            tp_group, 1,
        )  # fmt: skip
        return output


class _ProductWithBias(LinearWithGradAccumulationAndAsyncCommunication):
    """The forward pass in one product; the backward pass is megatron-core's, which computes no gradient of the bias."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda")  # megatron-core's backward pass is decorated with its counterpart
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool, sequence_parallel: bool, grad_output_buffer: None, wgrad_deferral_limit: int, tp_group: Any,
        gtp_remat_size: int,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(input, weight)
        ctx.main_grad = getattr(weight, "main_grad", None) if gradient_accumulation_fusion else None
        ctx.use_bias = False
        ctx.gradient_accumulation_fusion = gradient_accumulation_fusion
        ctx.allreduce_dgrad, ctx.sequence_parallel, ctx.tp_group = allreduce_dgrad, sequence_parallel, tp_group
        ctx.grad_output_buffer, ctx.wgrad_deferral_limit = grad_output_buffer, wgrad_deferral_limit
        ctx.gtp_remat_size = gtp_remat_size
        whole = input
        if sequence_parallel:
            shape = [input.shape[0] * tp_group.size(), *input.shape[1:]]
            whole = get_global_memory_buffer().get_tensor(shape, input.dtype, "mpu")
            torch.distributed.all_gather_into_tensor(whole, input, group=tp_group)
        rows_NH = whole.reshape(-1, whole.shape[-1])
        return torch.addmm(bias, rows_NH, weight.t()).view(*whole.shape[:-1], -1)
