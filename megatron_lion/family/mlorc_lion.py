"""MLorc-Lion: LION whose momentum of a matrix is kept as a product of low rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch

from ..optim.update import Forms, Slot, compute_dtype
from .plain_rule import PlainRule, check_betas, check_count, generator_of, move, nan_if_not_finite


class MLorcLion(PlainRule):
    """LION with r(rows + columns + 1) numbers of state for a matrix in place of rows · columns.

        M       = U_{k-1} diag(s_{k-1}) V_{k-1}                    all 0 at first
        C       = β1 M + (1-β1) G_k
        W_{k+1} = W_k - η (sign(C) + λ W_k)                        sign(0) = 0
        U_k, s_k, V_k = RSVD_r(β2 M + (1-β2) G_k)

    RSVD_r(A) is the randomized singular value decomposition: Q from the QR decomposition of AΩ, with Ω normal noise of
    r + p columns, then the r largest singular values of QᵀA. It is exact, up to rounding, if A has rank r or less; else
    the momentum loses what lies outside. A parameter with another number of dimensions than two has the full momentum of
    LION.

    **Noise.** Ω depends on `seed`, the parameter's number and the step alone: a resumed run draws the same values, and
    workers with the same seed and equal averaged gradients (DDP) draw the same.

    Args:
        params: tensors, or dicts with `params` and their own `lr`, `betas`, `weight_decay`.
        lr: η ≥ 0.
        betas: (β1, β2), each in [0, 1); the default is that of the authors' code.
        weight_decay: λ ≥ 0, decoupled.
        rank: r, at least 1. A matrix with fewer rows or columns has as many as it has.
        oversampling: p, at least 0.
        seed: of the noise, a whole number, at least 0.

    Raises:
        ValueError: a setting is out of range, also in one of the groups or in a loaded state.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(300, 200))
        >>> optimizer = MLorcLion([weight], lr=1e-4, rank=4)
        >>> weight.grad = torch.ones(300, 200)
        >>> optimizer.step()
        >>> {name: tuple(value.shape) for name, value in optimizer.state[weight].items() if name != "step"}
        {'left': (300, 4), 'singular': (4,), 'right': (4, 200)}

    Source: Shen, Zhang, Huang, Xu, Zhang and Shen, *MLorc: Momentum Low-rank Compression for Memory Efficient Large Language
    Model Adaptation*, AISTATS 2026, arXiv 2506.01897, algorithm 2, and the defaults rank 4, p = 0 of the authors' code.
    That code leaves parameters that are no matrices as they are, and decays after the step instead of in it.
    """

    WHOLE: ClassVar[tuple[str, ...]] = ("rank", "oversampling", "seed")
    COUNTS_STEPS: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.95, 0.98),
        weight_decay: float = 0.0,
        *,
        rank: int = 4,
        oversampling: int = 0,
        seed: int = 0,
    ) -> None:
        own = {"rank": rank, "oversampling": oversampling, "seed": seed}
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, **own})

    def check_own(self, group: dict[str, Any]) -> None:
        """Raises ValueError if betas, rank, oversampling or seed are out of range."""
        check_betas(group)
        for name, least in (("rank", 1), ("oversampling", 0), ("seed", 0)):
            check_count(name, group[name], least)

    def forms(self, param: torch.Tensor) -> Forms:
        """Three factors of a matrix's momentum, or one momentum of the parameter's shape."""
        dtype = compute_dtype(param)
        if param.dim() != 2:
            return {"exp_avg": (dtype, param.shape)}
        rows, columns = param.shape
        rank = min(self.defaults["rank"], rows, columns)
        return {"left": (dtype, (rows, rank)), "singular": (dtype, (rank,)), "right": (dtype, (rank, columns))}

    def take(self, slots: Sequence[Slot]) -> None:
        """Takes one step; see the class."""
        numbers = self.numbers()
        for slot in slots:
            beta1, beta2 = slot.group["betas"]
            state = slot.state
            is_matrix = slot.param.dim() == 2
            exp_avg = (state["left"] * state["singular"]) @ state["right"] if is_matrix else state["exp_avg"]
            mixed = exp_avg * beta1 + slot.grad * (1 - beta1)
            move(slot, mixed.sign() + nan_if_not_finite(mixed))
            exp_avg = exp_avg * beta2 + slot.grad * (1 - beta2)
            if is_matrix:
                step, device = int(state["step"]), slot.param.device
                generator = generator_of(self.defaults["seed"], numbers[id(slot.param)], step, device)
                rank = len(state["singular"])
                factors = randomized_svd(exp_avg, rank, self.defaults["oversampling"], generator)
                for name, value in zip(("left", "singular", "right"), factors, strict=True):
                    state[name].copy_(value)
            else:
                state["exp_avg"].copy_(exp_avg)
            state["step"].add_(1)


def randomized_svd(
    matrix_MN: torch.Tensor, rank: int, oversampling: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns an approximation of rank `rank`: U [M, r], s [r] and V [r, N] with U diag(s) V ≈ the matrix.

    Args:
        matrix_MN: float32 or float64.
        rank: r, at most the smaller of M and N.
        oversampling: further columns of noise, as far as the matrix has them.
        generator: of the noise, on the matrix's device.

    Returns:
        The factors; all NaN if the matrix has NaN or infinities, which no decomposition takes.

    Source: Halko, Martinsson and Tropp, *Finding Structure with Randomness*, SIAM Review 2011.
    """
    rows, columns = matrix_MN.shape
    if not bool(matrix_MN.isfinite().all()):
        nan = float("nan")
        shapes = ((rows, rank), (rank,), (rank, columns))
        left, singular, right = (matrix_MN.new_full(shape, nan) for shape in shapes)
        return left, singular, right
    width = min(rank + oversampling, rows, columns)
    noise_NK = torch.randn((columns, width), generator=generator, dtype=matrix_MN.dtype, device=matrix_MN.device)
    basis_MK = torch.linalg.qr(matrix_MN @ noise_NK).Q
    left_KK, singular_K, right_KN = torch.linalg.svd(basis_MK.T @ matrix_MN, full_matrices=False)
    return basis_MK @ left_KK[:, :rank], singular_K[:rank], right_KN[:rank]
