"""Predictions of a BERT run for `megatron-lion evaluate --fill-mask` and `--sentence-order`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from megatron_lion.jobs import rank_from_env
from megatron_lion.streams import load


def spot_checks(folder: Path, steps: str, args: Any) -> None:
    """Prints the predictions of --fill-mask and --sentence-order at each chosen step.

    Args:
        folder: run folder.
        steps: steps to choose, as the verb's --steps.
        args: the verb's flags.

    Raises:
        ConfigError: the run is no BERT run.
    """
    from megatron_lion.errors import ConfigError
    from megatron_lion.runs.folder import read_config
    from megatron_lion.runs.steps import choose_steps

    kind = read_config(folder).model.kind
    if kind != "bert":
        raise ConfigError(f"--fill-mask and --sentence-order: {folder} is a {kind} run; give a BERT run")
    load("megatron_lion.evaluate.bert_cloze", "megatron_lion.evaluate.open_run", shown=rank_from_env() == 0)
    from megatron_lion.evaluate.bert_cloze import fill_mask, order_probability
    from megatron_lion.evaluate.open_run import open_run

    with open_run(folder, device=args.device, precision=args.precision, tokenizer=args.tokenizer) as model:
        for step in choose_steps(steps, model.steps):
            model.load(step)
            lines = [f"step {step}"]
            for text in args.fill_mask:
                lines.append(f"  {text}")
                for place, guesses in enumerate(fill_mask(model, text), 1):
                    shown = "  ".join(f"{guess.token} {guess.probability:.2g}" for guess in guesses)
                    lines.append(f"    [MASK] {place}: {shown}")
            if args.sentence_order:
                first, second = args.sentence_order
                lines.append(f"  {first!r} before {second!r}: {order_probability(model, first, second):.3f}")
            if model.rank == 0:
                sys.stdout.write("\n".join(lines) + "\n")
