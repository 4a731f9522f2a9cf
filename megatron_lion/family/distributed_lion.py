"""Distributed LION: data-parallel workers vote on each coordinate's sign, one bit each, and exchange no gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from ..optim.update import Forms, Slot, check_choice, compute_dtype
from .plain_rule import PlainRule, check_betas, move
from .sign_bits import pack_bits, pack_codes, unpack_bits, unpack_codes

AGGREGATIONS = ("majority", "mean")


class DistributedLion(PlainRule):
    """Updates equal parameters on every worker by the workers' votes; each worker keeps its own momentum.

    Worker i of N, with its own gradient g and momentum m:

        c_i     = β1 m_i + (1-β1) g_i
        vote_i  = +1 if c_i > 0, -1 if c_i < 0                  one bit
        Δ       = sign(Σ vote_i)      "majority", 0 at a tie, which needs an even N
                = Σ vote_i / N        "mean"
        θ       = θ - η (Δ + λ θ)                               the same on all workers, bit for bit
        m_i     = β2 m_i + (1-β2) g_i

    **Zeros.** One bit has no third value. A worker with c = ±0 votes +1 and -1 in turn: +1 if i + k is even, k the number
    of steps before this one. Zeros of two neighbouring workers cancel, and a coordinate that is zero everywhere does not
    drift: for an even N it only decays, for an odd N it steps forth and back by η ("majority") or η/N. A parameter
    without a gradient takes part with g = 0, so that all workers send the same number of bits.

    **Communication.** All votes of a step are one array of bits. Its N chunks are exchanged (all-to-all), each worker
    counts the votes of one chunk, and the results are gathered (all-gather) with as few bits as they need: 1 for a
    majority of an odd N, 2 for an even N, ⌈log2(N+1)⌉ for a mean. See `sent_bytes`. A ring all-reduce of float32
    gradients sends 8 (N-1)/N bytes a coordinate; a majority of 8 workers sends (1/8 + 2/8) · 7/8 = 0.33.

    **Gradients must be the worker's own.** Use a module without a wrapper, or DDP inside `no_sync()` for every backward
    pass: averaged gradients would make all votes equal. Start from equal parameters (DDP sends them when it wraps a
    module), and give every worker the same groups in the same order. Every worker must take every step: a GradScaler, which
    lets a worker skip a step on its own, would leave the others waiting.

    **State.** `exp_avg` differs between workers, so each must save its own `state_dict`. `step` counts steps.

    Args:
        params: tensors, or dicts with `params` and their own `lr`, `betas`, `weight_decay`; all on one device.
        lr: η ≥ 0, the same on all workers.
        betas: (β1, β2), each in [0, 1).
        weight_decay: λ ≥ 0, decoupled.
        aggregation: "majority" or "mean".
        group: the data-parallel process group, of gloo or nccl; None is the default group.

    Raises:
        ValueError: a setting is out of range, also in one of the groups or in a loaded state; parameters are on several
            devices.
        RuntimeError: torch.distributed has not been initialised.
        FloatingPointError: at a step, c of a worker is NaN or ±inf. Every worker raises it, and nothing has changed.

    Source: Liu, Wu, Chen, Liang, Zhu, Liang, Krishnamoorthi and Liu, *Communication Efficient Distributed Training with
    Distributed Lion*, NeurIPS 2024, arXiv 2404.00438. The zeros, the ties and the two collectives in place of a server
    are this package's.
    """

    WHOLE: ClassVar[tuple[str, ...]] = ("aggregation",)
    COUNTS_STEPS: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        aggregation: str = "majority",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if not dist.is_initialized():
            raise RuntimeError(
                "DistributedLion needs torch.distributed: call torch.distributed.init_process_group first"
            )
        self.group = group
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "aggregation": aggregation})

    def __getstate__(self) -> dict[str, Any]:
        """Refuses copying and pickling: a process group cannot be copied."""
        raise TypeError("a DistributedLion cannot be copied, because of its process group: use state_dict")

    def check_own(self, group: dict[str, Any]) -> None:
        """Raises ValueError if betas or the aggregation are out of range."""
        check_betas(group)
        check_choice("aggregation", group["aggregation"], AGGREGATIONS)

    def forms(self, param: torch.Tensor) -> Forms:
        """One momentum of the parameter's shape."""
        return {"exp_avg": (compute_dtype(param), param.shape)}

    def is_request(self, slots: Sequence[Slot]) -> bool:
        """Returns False: whether a first step counts must not depend on one worker's gradients."""
        return False

    def slots(self) -> list[Slot]:
        """Returns all parameters that are trained, with a gradient of zeros in place of a missing one."""
        return [
            self.slot(param, torch.zeros_like(param) if param.grad is None else param.grad, group, (number, index))
            for number, group in enumerate(self.param_groups)
            for index, param in enumerate(group["params"])
            if param.requires_grad and param.numel()
        ]

    def take(self, slots: Sequence[Slot]) -> None:
        """Takes one step; two collectives."""
        if not slots:
            return
        if len(devices := {slot.param.device for slot in slots}) > 1:
            raise ValueError(f"parameters on {', '.join(sorted(map(str, devices)))}: needs one device")
        rank = dist.get_rank(self.group)
        bits, finite = [], torch.ones((), dtype=torch.bool, device=slots[0].param.device)
        for slot in slots:
            beta1 = slot.group["betas"][0]
            mixed_N = slot.state["exp_avg"] * beta1 + slot.grad * (1 - beta1)
            finite &= mixed_N.isfinite().all()
            of_zero = (rank + int(slot.state["step"])) % 2 == 0
            bits.append(((mixed_N > 0) | ((mixed_N == 0) & of_zero)).reshape(-1))
        sums = vote(torch.cat(bits), finite, self.defaults["aggregation"], self.group).split([len(own) for own in bits])
        workers = dist.get_world_size(self.group) if self.defaults["aggregation"] == "mean" else 1
        for slot, sum_N in zip(slots, sums, strict=True):
            move(slot, sum_N.view(slot.grad.shape).to(slot.grad.dtype) / workers)
            beta2 = slot.group["betas"][1]
            slot.state["exp_avg"].copy_(slot.state["exp_avg"] * beta2 + slot.grad * (1 - beta2))
            slot.state["step"].add_(1)


def vote(
    bits_N: torch.Tensor, finite: torch.Tensor, aggregation: str, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Counts the workers' votes of each coordinate; a collective call.

    Args:
        bits_N: bool, whether this worker votes +1; the same N on all workers.
        finite: bool, 0-d, whether this worker's numbers are finite.
        aggregation: "majority" or "mean".
        group: the workers.

    Returns:
        int32 [N], the same on all workers: the sign of the sum of votes ("majority"), or the sum ("mean").

    Raises:
        FloatingPointError: the numbers of a worker are not finite.
    """
    workers = dist.get_world_size(group)
    chunk = chunk_bytes(len(bits_N), workers)
    padded_N = torch.nn.functional.pad(bits_N.to(torch.uint8), (0, 8 * chunk * workers - len(bits_N)))
    flag_W1 = (~finite).to(torch.uint8).expand(workers, 1)  # one byte more in each message: no collective for it alone
    sent = torch.cat([pack_bits(padded_N).view(workers, chunk), flag_W1], dim=1).flatten()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    votes_WB = received.view(workers, chunk + 1)
    sums_N = 2 * unpack_bits(votes_WB[:, :chunk]).sum(0, dtype=torch.int32) - workers
    codes_N = sums_N.sign() + 1 if aggregation == "majority" else (sums_N + workers) // 2
    bits = result_bits(workers, aggregation)
    if aggregation == "majority" and bits == 1:
        codes_N = codes_N // 2  # -1 and +1 as 0 and 1
    own = torch.cat([pack_codes(codes_N, bits), votes_WB[:, chunk].amax().view(1)])
    results = torch.empty(workers * len(own), dtype=torch.uint8, device=own.device)
    dist.all_gather_into_tensor(results, own, group=group)
    results_WB = results.view(workers, -1)
    if bool(results_WB[:, -1].any()):
        whose = "another worker's" if bool(finite) else "this worker's"
        raise FloatingPointError(f"{whose} gradient or momentum is NaN or infinite: no worker has taken the step")
    codes_N = unpack_codes(results_WB[:, :-1], bits).flatten()[: len(bits_N)]
    if aggregation == "mean":
        return 2 * codes_N - workers
    return 2 * codes_N - 1 if bits == 1 else codes_N - 1


def result_bits(workers: int, aggregation: str) -> int:
    """Returns the bits of one coordinate's result: of -1 and 1, of -1, 0 and 1, or of a count up to `workers`."""
    if aggregation == "majority":
        return 2 - workers % 2
    return workers.bit_length()


def chunk_bytes(numel: int, workers: int) -> int:
    """Returns the bytes of the votes that one worker counts, of `numel` coordinates."""
    return -(-numel // (8 * workers))


def sent_bytes(numel: int, workers: int, aggregation: str) -> int:
    """Returns the bytes that a worker sends to the others in a step, as many as it receives.

    Args:
        numel: coordinates of all parameters together.
        workers: N.
        aggregation: "majority" or "mean".

    Example:
        >>> sent_bytes(1_000_000, workers=8, aggregation="majority"), 8 * 1_000_000 * 7 // 8  # and float32 gradients
        (328139, 7000000)
    """
    chunk = chunk_bytes(numel, workers)
    return (workers - 1) * (chunk + 1 + result_bits(workers, aggregation) * chunk + 1)
