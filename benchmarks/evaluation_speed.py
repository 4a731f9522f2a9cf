"""Measures the speed and memory of `evaluate` against a plain transformers loop over the same windows.

    python benchmarks/evaluation_speed.py [--output benchmarks/results/evaluation_cpu] [--quick]

Both score the same windows of random tokens with one GPT2LMHeadModel with random weights, in batches of 16 that do not
overlap, in turn in one process: the ratio is the result. The peak memory is that of a process that does one alone. The
two losses must agree to 1e-5 nats. MB are 10^6 bytes.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from measuring import heading, surroundings, write_results

from megatron_lion.compare.table import markdown_grid
from megatron_lion.evaluate.perplexity import plan_windows, stream_segments
from megatron_lion.evaluate.token_scores import LogitsScorer, score_segments

BATCH = 16
OURS, PLAIN = "ours", "transformers loop"


def build(args: argparse.Namespace) -> tuple[Any, torch.Tensor]:
    """Returns the model and the token stream."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=args.vocab, n_positions=args.seq_length, n_embd=args.hidden, n_layer=args.layers, n_head=4
    )
    tokens = torch.randint(args.vocab, (args.windows * args.seq_length + 1,))
    return GPT2LMHeadModel(config).eval(), tokens


def contenders(model: Any, tokens: torch.Tensor, seq_length: int) -> dict[str, Callable[[], float]]:
    """Functions that return the loss of the stream, nats a token."""
    segments = stream_segments(tokens, plan_windows(len(tokens), seq_length, seq_length))

    def hidden(tokens_BS: torch.Tensor, last: int) -> torch.Tensor:
        states: torch.Tensor = model.transformer(tokens_BS, use_cache=False).last_hidden_state[:, -last:]
        return states

    def ours() -> float:
        scorer = LogitsScorer(hidden, "cpu", model.lm_head)
        return score_segments(segments, scorer, seq_length=seq_length, batch_size=BATCH).loss

    @torch.no_grad()
    def plain() -> float:
        total = 0.0
        inputs, targets = tokens[:-1].view(-1, seq_length), tokens[1:].view(-1, seq_length)
        for ids, labels in zip(inputs.split(BATCH), targets.split(BATCH), strict=True):
            logits = model(ids, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits.view(-1, logits.shape[-1]), labels.flatten(), reduction="sum"
            )
            total += float(loss)
        return total / (len(tokens) - 1)

    return {OURS: ours, PLAIN: plain}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Returns times, peaks and ratios."""
    peaks = {name: peak_of(name, args) for name in (OURS, PLAIN)}  # first: a child's peak begins with its parent's size
    runs = contenders(*build(args), args.seq_length)
    losses = {name: run() for name, run in runs.items()}  # also the warm-up
    if abs(losses[OURS] - losses[PLAIN]) > 1e-5:
        sys.exit(f"the losses differ: {losses}")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    count = args.windows * args.seq_length
    ratios = [plain / ours for ours, plain in zip(times[OURS], times[PLAIN], strict=True)]
    return {
        "tokens": count, "losses": losses, "speed_ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)],
        "tokens_per_s": {name: count / statistics.median(values) for name, values in times.items()},
        "peak_mb": peaks,
    }  # fmt: skip


def peak_of(name: str, args: argparse.Namespace) -> float:
    """Returns the peak memory of a process that runs one contender once, MB."""
    flags = [
        f"--{key.replace('_', '-')}={getattr(args, key)}"
        for key in ("vocab", "seq_length", "hidden", "layers", "windows")
    ]
    done = subprocess.run(
        [sys.executable, __file__, "--only", name, *flags], stdout=subprocess.PIPE, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--only", choices=[OURS, PLAIN], help="run one contender once and print its process's peak, MB")
    parser.add_argument("--output", help="write OUTPUT.md and OUTPUT.json")
    args = parser.parse_args()
    if args.quick:
        args.vocab, args.seq_length, args.hidden, args.layers, args.windows, args.rounds = 300, 32, 32, 1, 17, 1
    if args.only:
        contenders(*build(args), args.seq_length)[args.only]()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)
        return
    facts = surroundings("cpu")
    found = measure(args)
    shape = f"{args.layers} layers of width {args.hidden}, {args.vocab:,} ids, {args.windows} windows of {args.seq_length} tokens"
    body = [[name, f"{found['tokens_per_s'][name]:,.0f}", f"{found['peak_mb'][name]:,.0f}"] for name in (OURS, PLAIN)]
    lines = [heading(facts), "", shape, "", markdown_grid(["", "tokens/s", "peak MB"], body, "lrr").rstrip()]
    low, high = found["ratio_range"]
    lines += ["", f"Speed of ours over the loop: {found['speed_ratio']:.2f} (rounds {low:.2f} to {high:.2f})."]
    text = "\n".join(lines) + "\n"
    print(text)
    write_results(args.output, "Evaluation against a plain transformers loop", text, {**facts, "shape": shape, **found})
    if not args.output:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
