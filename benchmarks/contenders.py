"""The optimizers that `optimizer_step.py` compares: how each is built, the bytes it moves, its update rule.

Every contender updates the same tensors from the same gradients. The members of a class have the same precision:
float32 parameters; bfloat16 parameters with an exact 32-bit master; bfloat16 parameters with less. Bytes are those read
and written in device memory per parameter and step, counted from the code.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_lion.optim.lion import Lion

HYPER = {"lr": 1e-2, "weight_decay": 0.1}
BETAS = (0.9, 0.99)
FLOAT32, MASTER, REDUCED = "float32 parameters", "bfloat16 parameters, exact 32-bit master", "bfloat16 parameters, less"


@dataclass
class Case:
    """A contender on concrete tensors.

    Attributes:
        step: function that takes one step.
        params: the model's tensors; `grads` has the same order.
        grads: gradient tensors, filled in place.
        masters: function that returns the most precise values of the parameters as float32.
        optimizer: the optimizer, whose state is counted as state.
        extra_bytes: bytes of state outside the optimizer, such as a float32 copy.
    """

    step: Callable[[], object]
    params: list[torch.Tensor]
    grads: list[torch.Tensor]
    masters: Callable[[], list[torch.Tensor]]
    optimizer: torch.optim.Optimizer
    extra_bytes: int = 0

    def state_bytes(self) -> int:
        tensors = {id(v): v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)}
        params = {param.data_ptr() for param in self.params}
        return self.extra_bytes + sum(t.nbytes for t in tensors.values() if t.data_ptr() not in params)


@dataclass(frozen=True)
class Contender:
    """A way to take an optimizer step.

    Attributes:
        name: name in the table.
        kind: precision class: FLOAT32, MASTER or REDUCED.
        rule: update rule: "lion", "adamw" or "sgd".
        build: function that makes a Case from start values.
        bytes_per_parameter: bytes moved per parameter and step, counted from the code; None if unknown.
        needs: package that must be installed, or None.
        devices: kinds of devices on which it runs.
        exact: whether each element after three steps must be within rounding of the float64 result.
    """

    name: str
    kind: str
    rule: str
    build: Callable[[list[torch.Tensor]], Case]
    bytes_per_parameter: float | None
    needs: str = "torch"
    devices: tuple[str, ...] = ("cpu", "cuda")
    exact: bool = True

    def runs_on(self, device: str) -> bool:
        return device in self.devices and importlib.util.find_spec(self.needs) is not None


def _plain(starts: list[torch.Tensor], make: Callable[[list[torch.Tensor]], torch.optim.Optimizer]) -> Case:
    params = [torch.nn.Parameter(start.clone()) for start in starts]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer = make(params)
    grads = [param.grad for param in params]
    return Case(optimizer.step, params, grads, lambda: [p.detach() for p in params], optimizer)


def _with_copy(starts: list[torch.Tensor], make: Callable[[list[torch.Tensor]], torch.optim.Optimizer]) -> Case:
    """A float32 optimizer on master weights, followed by the copy into bfloat16 parameters that Megatron makes."""
    case = _plain(starts, make)
    models = [start.to(torch.bfloat16) for start in starts]
    update = case.step

    def step() -> None:
        update()
        torch._foreach_copy_(models, case.params)

    extra = sum(param.nbytes for param in case.params)
    return Case(step, models, case.grads, case.masters, case.optimizer, extra)


def ours(
    master_weights: str, momentum: str, grad_dtype: torch.dtype, implementation: str = "auto"
) -> Callable[[list[torch.Tensor]], Case]:
    """Returns a builder of `Lion` with one form of its state; every state tensor is allocated in it."""

    def build(starts: list[torch.Tensor]) -> Case:
        dtype = torch.float32 if master_weights == "none" else torch.bfloat16
        params = [torch.nn.Parameter(start.to(dtype)) for start in starts]
        optimizer = Lion(
            params,
            betas=BETAS,
            master_weights=master_weights,
            momentum=momentum,
            implementation=implementation,
            **HYPER,
        )
        optimizer.init_state()
        grads = [torch.zeros(start.shape, dtype=grad_dtype, device=start.device) for start in starts]
        for param, grad in zip(params, grads, strict=True):
            param.decoupled_grad = grad

        def masters() -> list[torch.Tensor]:
            if master_weights == "none":
                return [param.detach() for param in params]
            return [optimizer.get_unscaled_state(param, "master_param") for param in params]

        return Case(optimizer.step, params, grads, masters, optimizer)

    return build


def _lion_pytorch(**settings):
    from lion_pytorch import Lion as LionPytorch

    return lambda params: LionPytorch(params, betas=BETAS, **HYPER, **settings)


def _emerging(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    from emerging_optimizers.scalar_optimizers import Lion as EmergingLion

    return EmergingLion(params, betas=BETAS, **HYPER)


def _lion_pytorch_foreach(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    from lion_pytorch.foreach import Lion as LionForeach

    return LionForeach(params, betas=BETAS, **HYPER)


def _bitsandbytes(bits: int):
    def make(params: list[torch.Tensor]) -> torch.optim.Optimizer:
        import bitsandbytes

        return bitsandbytes.optim.Lion(params, betas=BETAS, optim_bits=bits, min_8bit_size=0, **HYPER)

    return make


def _deepspeed(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    from deepspeed.ops.lion import FusedLion

    return FusedLion(params, betas=BETAS, **HYPER)


def _deepspeed_cpu(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    from deepspeed.ops.lion import DeepSpeedCPULion

    return DeepSpeedCPULion(params, betas=BETAS, **HYPER)


def _transformer_engine(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    from transformer_engine.pytorch.optimizers import FusedAdam

    return FusedAdam(params, betas=BETAS, adam_w_mode=True, **HYPER)


def _flash(bits: int):
    def build(starts: list[torch.Tensor]) -> Case:
        from flashoptim import FlashLion

        params = [torch.nn.Parameter(start.to(torch.bfloat16)) for start in starts]
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer = FlashLion(params, betas=BETAS, master_weight_bits=bits, **HYPER)
        grads = [param.grad for param in params]
        return Case(optimizer.step, params, grads, lambda: [p.detach().float() for p in params], optimizer)

    return build


def _adamw(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, betas=BETAS, fused=True, **HYPER)


def _sgd(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=HYPER["lr"], momentum=0.9, fused=True)


def _wrap(make, wrapper=_plain):
    return lambda starts: wrapper(starts, make)


CUDA = ("cuda",)
fp32, bf16 = torch.float32, torch.bfloat16
CONTENDERS = (
    Contender("ours", FLOAT32, "lion", ours("none", "fp32", fp32), 20),
    Contender("ours, foreach", FLOAT32, "lion", ours("none", "fp32", fp32, "foreach"), None),
    Contender("ours, reference", FLOAT32, "lion", ours("none", "fp32", fp32, "reference"), None),
    Contender("lion-pytorch", FLOAT32, "lion", lambda s: _plain(s, _lion_pytorch()), 76, "lion_pytorch"),
    Contender("lion-pytorch foreach", FLOAT32, "lion", _wrap(_lion_pytorch_foreach), 60, "lion_pytorch"),
    Contender(
        "lion-pytorch Triton",
        FLOAT32,
        "lion",
        lambda s: _plain(s, _lion_pytorch(use_triton=True)),
        20,
        "lion_pytorch",
        CUDA,
    ),
    Contender("emerging-optimizers Lion", FLOAT32, "lion", _wrap(_emerging), 36, "emerging_optimizers"),
    Contender("bitsandbytes Lion 32-bit", FLOAT32, "lion", _wrap(_bitsandbytes(32)), 20, "bitsandbytes"),
    Contender("DeepSpeed CPULion", FLOAT32, "lion", _wrap(_deepspeed_cpu), 20, "deepspeed", ("cpu",)),
    Contender("DeepSpeed FusedLion", FLOAT32, "lion", _wrap(_deepspeed), 20, "deepspeed", CUDA),
    Contender("torch AdamW fused", FLOAT32, "adamw", _wrap(_adamw), 28),
    Contender("torch SGD fused", FLOAT32, "sgd", _wrap(_sgd), 20),
    Contender("TE FusedAdam", FLOAT32, "adamw", _wrap(_transformer_engine), 28, "transformer_engine", CUDA),
    Contender("ours split32", MASTER, "lion", ours("split32", "fp32", fp32), 20),
    Contender("ours split32, bf16 gradients", MASTER, "lion", ours("split32", "fp32", bf16), 18),
    Contender("ours split32, foreach", MASTER, "lion", ours("split32", "fp32", fp32, "foreach"), None),
    Contender("ours fp32 master", MASTER, "lion", ours("fp32", "fp32", fp32), 22),
    Contender(
        "emerging-optimizers Lion + copy", MASTER, "lion", _wrap(_emerging, _with_copy), 42, "emerging_optimizers"
    ),
    Contender("torch AdamW fused + copy", MASTER, "adamw", _wrap(_adamw, _with_copy), 34),
    Contender("ours split24, int8 momentum", REDUCED, "lion", ours("split24", "int8", fp32), 12.125, exact=False),
    Contender("ours split32, int8 momentum", REDUCED, "lion", ours("split32", "int8", fp32), 14.125, exact=False),
    Contender("ours split32, bf16 momentum", REDUCED, "lion", ours("split32", "bf16", fp32), 16, exact=False),
    Contender(
        "ours split32, int8 momentum, foreach",
        REDUCED,
        "lion",
        ours("split32", "int8", fp32, "foreach"),
        None,
        exact=False,
    ),
    Contender("FlashLion 24-bit", REDUCED, "lion", _flash(24), 10.1, "flashoptim", CUDA, exact=False),
    Contender("FlashLion 32-bit", REDUCED, "lion", _flash(32), 12.1, "flashoptim", CUDA, exact=False),
    Contender("bitsandbytes Lion 8-bit", REDUCED, "lion", _wrap(_bitsandbytes(8)), 14.03, "bitsandbytes", exact=False),
)
