"""GPT-2 trained by a plain PyTorch loop and by transformers: contenders of benchmarks/train_step.py on one process.

Both have the network, batches, dropout and clipping of the run beside them, fp32 parameters with autocast to bf16, and
torch's fused AdamW, as nanoGPT trains. The network of the plain loop is written here in 60 lines: pre-LN layers, SDPA, tied
head, F.cross_entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from megatron_lion.config import RunConfig
from megatron_lion.model.sizes import model_size
from megatron_lion.train.run import Run
from megatron_lion.train.schedule import lr_at

PLAIN, TRANSFORMERS = "plain PyTorch loop, adamw", "transformers loop, adamw"
LOOPS = (PLAIN, TRANSFORMERS)


class Layer(nn.Module):
    """A pre-LN transformer layer."""

    def __init__(self, hidden: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, ffn), nn.Linear(ffn, hidden)

    def forward(self, x_BSH: torch.Tensor) -> torch.Tensor:
        batch, length, hidden = x_BSH.shape
        split = self.qkv(self.norm_1(x_BSH)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(*split, is_causal=True, dropout_p=dropout)
        attended = self.out(attended.transpose(1, 2).reshape(batch, length, hidden))
        x_BSH = x_BSH + F.dropout(attended, self.dropout, self.training)
        raised = self.down(F.gelu(self.up(self.norm_2(x_BSH)), approximate="tanh"))
        return x_BSH + F.dropout(raised, self.dropout, self.training)


class PlainGpt(nn.Module):
    """GPT-2; returns the summed loss of a batch, nats."""

    def __init__(self, config: RunConfig, rows: int) -> None:
        super().__init__()
        model = config.model
        self.dropout = model.hidden_dropout
        self.tokens, self.positions = (nn.Embedding(size, model.hidden_size) for size in (rows, model.seq_length))
        ffn = model.ffn_hidden_size or 4 * model.hidden_size
        layers = [
            Layer(model.hidden_size, model.num_attention_heads, ffn, self.dropout) for _ in range(model.num_layers)
        ]
        self.layers, self.norm = nn.ModuleList(layers), nn.LayerNorm(model.hidden_size)

    def forward(self, tokens_BS: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        places = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        x_BSH = F.dropout(self.tokens(tokens_BS) + self.positions(places), self.dropout, self.training)
        for layer in self.layers:
            x_BSH = layer(x_BSH)
        logits_BSV = F.linear(self.norm(x_BSH), self.tokens.weight)
        return F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), reduction="sum")


def build(name: str, config: RunConfig, rows: int) -> tuple[nn.Module, Callable[[Any, Any], torch.Tensor]]:
    """Returns a network and the function of (tokens, labels) that returns its summed loss."""
    if name == PLAIN:
        network = PlainGpt(config, rows)
        return network, network
    from transformers import GPT2Config, GPT2LMHeadModel

    model, dropout = config.model, config.model.hidden_dropout
    network = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=rows, n_positions=model.seq_length, n_embd=model.hidden_size, n_layer=model.num_layers,
            n_head=model.num_attention_heads, n_inner=model.ffn_hidden_size, resid_pdrop=dropout, embd_pdrop=dropout,
            attn_pdrop=model.attention_dropout, attn_implementation="sdpa",
        )
    )  # fmt: skip

    def loss(tokens_BS: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        logits_BSV = network(tokens_BS, use_cache=False).logits
        return F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), reduction="sum")

    return network, loss


class LoopOptimizer:
    """What train_step.time_run times of a run's optimizer: clipping and update."""

    def __init__(self, network: nn.Module, config: RunConfig) -> None:
        settings = config.optimizer
        self.parameters, self.clip_grad = list(network.parameters()), settings.clip_grad
        self.inner = torch.optim.AdamW(
            self.parameters,
            lr=settings.lr,
            betas=settings.resolved_betas(),
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def start_step(self) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_grad)

    def end_step(self) -> None:
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)


def loop_step(name: str, run: Run) -> Callable[[Iterator[Any]], bool]:
    """Replaces the run's model and optimizer by a loop's and returns a function that takes a step.

    Args:
        name: of LOOPS.
        run: a built run on one process; its data are used.

    Returns:
        A function of the micro-batches that returns whether the step was skipped (never).
    """
    config = run.config
    rows = run.model[0].module.module.shared_embedding_or_output_weight().shape[0]
    network, loss = build(name, config, rows)
    found, needed = (
        sum(p.numel() for p in network.parameters()),
        model_size(config.model, run.corpora.vocab_size).num_parameters,
    )
    if found != needed:
        raise RuntimeError(f"{name} has {found:,} parameters, the run {needed:,}: not the same network")
    network.to(run.device.torch_device).train()
    run.model = []
    optimizer: Any = LoopOptimizer(network, config)
    run.optimizer = optimizer
    tokens = config.train.global_batch_size * config.model.seq_length

    def step(batches: Iterator[Any]) -> bool:
        for group in optimizer.inner.param_groups:
            group["lr"] = lr_at(config, run.step + 1)
        total = torch.zeros((), device=run.device.torch_device)
        for _ in range(config.num_microbatches(1)):
            batch = next(batches)
            with torch.autocast(run.device.kind, torch.bfloat16, enabled=config.train.precision == "bf16"):
                found = loss(batch["tokens"], batch["labels"]) / tokens
            found.backward()
            total += found.detach()
        norm = run.optimizer.start_step()
        run.optimizer.end_step()
        float(total + norm)  # as ours, the host reads losses and norm once a step
        run.step += 1
        return False

    return step


def is_possible(model: str, world_size: int) -> bool:
    """Whether the loops can train a model of train_step.MODELS in this job."""
    return model.startswith("gpt2") and world_size == 1
