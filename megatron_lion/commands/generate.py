"""`megatron-lion generate`: prints a few lines of text from a GPT-2 checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lion.streams import busy, next_steps, say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

HELP = "Continue a prompt with a checkpoint of a GPT-2 run or with a Hugging Face GPT-2 folder, for a quick check of the model"


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the verb's flags."""
    add = parser.add_argument
    add("target", type=str, help="run folder, one checkpoint of it, or Hugging Face GPT-2 folder")
    add(
        "--prompt",
        type=str,
        default=None,
        metavar="TEXT",
        help="text to continue; default: the end-of-document token, so that the model begins a document",
    )
    add("--step", type=str, default="latest", help="latest, or the step of a complete checkpoint")
    add("--count", type=int, default=3, help="number of continuations")
    add("--max-new-tokens", type=int, default=40, help="largest number of added tokens")
    add(
        "--temperature",
        type=float,
        default=0.8,
        help="0 takes the likeliest token; 1 draws with the model's probabilities; below 1, likelier tokens more often",
    )
    add("--top-k", type=int, default=50, help="draw from this many likeliest tokens; 0 means all")
    add(
        "--top-p",
        type=float,
        default=1.0,
        help="draw from the smallest set of likeliest tokens with this total probability",
    )
    add("--seed", type=int, default=0, help="random seed; the same seed gives the same text")
    add("--precision", type=str, default="fp32", choices=["fp32", "bf16"], help="precision of the forward pass")
    add(
        "--device",
        type=str,
        default="auto",
        choices=["auto", "cuda", "cpu"],
        help="auto takes CUDA if a device is visible",
    )
    add(
        "--tokenizer",
        type=str,
        default=None,
        metavar="FOLDER",
        help="tokenizer to use instead of the one in the target folder",
    )


def run(args: Any) -> None:
    """Prints each continuation with its prompt as a paragraph."""
    from megatron_lion.errors import ConfigError
    from megatron_lion.evaluate.open_target import split_target
    from megatron_lion.jobs import rank_from_env
    from megatron_lion.runs.paths import has_config

    rules = (
        ("--count", args.count, args.count >= 1, "at least 1"),
        ("--max-new-tokens", args.max_new_tokens, args.max_new_tokens >= 1, "at least 1"),
        ("--temperature", args.temperature, 0 <= args.temperature < float("inf"), "a finite number of at least 0"),
        ("--top-k", args.top_k, args.top_k >= 0, "at least 0"),
        ("--seed", args.seed, 0 <= args.seed < 2**63, "at least 0 and below 2^63"),
        ("--top-p", args.top_p, 0 < args.top_p <= 1, "a number in (0, 1]"),
    )
    for flag, given, ok, expected in rules:
        if not ok:
            raise ConfigError(f"{flag} {given}: must be {expected}")
    folder, step = split_target(Path(args.target), args.step)
    with busy(f"opening {folder}", shown=rank_from_env() == 0) as report:
        texts = _continuations(args, folder, step, report)
    if rank_from_env() == 0:
        for text in texts:
            sys.stdout.write(f"{args.prompt or ''}{text}".rstrip() + "\n\n")
        evaluation = ["megatron-lion", "evaluate", args.target, "--text", "FILE"]
        export = ["megatron-lion", "export", args.target, "--output", "FOLDER"]
        next_steps(evaluation, *([export] if has_config(folder) else []))


def _continuations(args: Any, folder: Path, step: str, report: Callable[[str], None]) -> list[str]:
    """Returns the text of each continuation without its prompt; `report` is called with the progress."""
    from megatron_lion.evaluate.open_target import open_model
    from megatron_lion.evaluate.text_sampling import SamplingSettings, sample, token_ids
    from megatron_lion.runs.steps import choose_step

    with open_model(folder, device=args.device, precision=args.precision, tokenizer=args.tokenizer) as model:
        model.load(choose_step(step, model.steps))
        tokenizer = model.tokenizer
        end_id = tokenizer.eod_id if tokenizer.eod_token is not None else None
        prompt = tokenizer.encode(args.prompt) if args.prompt else [tokenizer.eod_id]
        settings = SamplingSettings(
            max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed
        )  # fmt: skip
        if len(prompt) > model.seq_length and model.rank == 0:
            say(f"note: the prompt has {len(prompt)} tokens; the model reads only the last {model.seq_length}")
        scorer = model.scorer()
        lines = sample(
            model.logits,
            prompt,
            args.count,
            settings,
            seq_length=model.seq_length,
            end_id=end_id,
            allowed=token_ids(tokenizer),
            device=scorer.device,
            on_token=lambda number: report(f"{number} of {args.max_new_tokens} tokens"),
        )
        return [tokenizer.decode(line) for line in lines]
