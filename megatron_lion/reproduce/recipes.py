"""Sizes and learning rates of the small CPU runs of the demo and the reproductions."""

from __future__ import annotations

from dataclasses import dataclass

VOCAB_SIZE = 2048
SPLIT = "94,3,3"
QUICK_STEPS = 20


@dataclass(frozen=True)
class Recipe:
    """An optimizer with its learning rate and weight decay.

    Attributes:
        optimizer: "lion", "sgd" or "adamw".
        lr: peak learning rate.
        weight_decay: decoupled weight decay.
    """

    optimizer: str
    lr: float
    weight_decay: float

    def words(self) -> list[str]:
        """The flags of `pretrain` that set them."""
        return ["--optimizer.name", self.optimizer, "--optimizer.lr", f"{self.lr:g}",
                "--optimizer.weight_decay", f"{self.weight_decay:g}"]  # fmt: skip


# The best rates of the grids in benchmarks/results/rates_demo.md and rates_bert_demo.md.
TUNED = {
    "gpt2": (Recipe("lion", 3e-4, 0.1), Recipe("sgd", 0.3, 0.0), Recipe("adamw", 1e-3, 0.1)),
    "bert": (Recipe("lion", 3e-4, 0.1), Recipe("sgd", 0.1, 0.0), Recipe("adamw", 3e-4, 0.1)),
}
PAPER = (Recipe("lion", 1e-5, 0.01), Recipe("sgd", 1e-4, 0.01))
"""The rates of the paper, which does not state the weight decay; 0.01 is Megatron's default."""


def quick_words() -> list[str]:
    """Flags that shorten a small run to a few seconds, to show that all steps work; its losses mean nothing."""
    half = QUICK_STEPS // 2
    return ["--train.steps", str(QUICK_STEPS), "--checkpoint.at_steps", str([half, QUICK_STEPS]), "--train.test_every", str(half),
            "--probe.every", str(half), "--probe.num_batches", "2", "--train.test_batches", "1"]  # fmt: skip
