"""Tunes each optimizer's learning rate on a small grid, so that a comparison is between tuned optimizers.

    python benchmarks/rate_grid.py --config configs/gpt2_tiny.yaml --steps 120 --output benchmarks/results/rates_tiny \
        --lion 3e-4,1e-3,3e-3 --sgd 0.1,0.3,1 --adamw 1e-3,3e-3,1e-2 -- --data.path '[FOLDER]'

Everything after `--` goes to every run. Writes OUTPUT.json and OUTPUT.md: the validation loss of each run at the last step;
a best rate at the edge of its grid is marked, since the true optimum may lie beyond. Runs that OUTPUT.json already has are not
repeated, so a grid can be widened and an interrupted one goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

OPTIMIZERS = ("lion", "sgd", "adamw")


def last_losses(run_dir: Path) -> dict[str, float | None]:
    """Validation and training loss at the end of a run; None where it diverged."""
    found: dict[str, float | None] = {"valid/loss": None, "train/loss": None}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        found.update({key: values[key] for key in found if key in values})
    return found


def train(args: argparse.Namespace, name: str, lr: str, run_dir: Path) -> dict[str, object]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(args.processes), "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", "-m", "megatron_lion", "pretrain", "--config", args.config,
        "--run_dir", str(run_dir), "--optimizer.name", name, "--optimizer.lr", lr,
        "--optimizer.weight_decay", str(getattr(args, f"{name}_decay")),
        "--train.steps", str(args.steps),
        "--train.test_every", str(args.steps), "--checkpoint.every", "0", "--checkpoint.at_steps", "[]", "--probe.every", "0",
        "--log.progress", "false", *args.rest,
    ]  # fmt: skip
    started = time.monotonic()
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    if outcome.returncode:
        sys.stderr.write(outcome.stderr[-2000:])
    losses = last_losses(run_dir) if (run_dir / "metrics.jsonl").is_file() else {"valid/loss": None, "train/loss": None}
    return {"optimizer": name, "lr": float(lr), "weight_decay": getattr(args, f"{name}_decay"),
            "valid_loss": losses["valid/loss"], "train_loss": losses["train/loss"],
            "seconds": round(time.monotonic() - started, 1), "exit_code": outcome.returncode}  # fmt: skip


def table(rows: list[dict[str, object]]) -> str:
    lines = ["| optimizer | lr | weight decay | validation loss | training loss | |", "|---|---|---|---|---|---|"]
    for name in OPTIMIZERS:
        group = [row for row in rows if row["optimizer"] == name]
        finite = [row for row in group if row["valid_loss"] is not None]
        best = min(finite, key=lambda row: float(str(row["valid_loss"])), default=None)
        for row in group:
            mark = ""
            if row is best:
                mark = "best, at the edge of the grid" if row in (group[0], group[-1]) and len(group) > 1 else "best"
            loss = f"{row['valid_loss']:.4f}" if row["valid_loss"] is not None else "did not end"
            last = f"{row['train_loss']:.4f}" if row["train_loss"] is not None else ""
            lines.append(f"| {name} | {row['lr']:g} | {row['weight_decay']:g} | {loss} | {last} | {mark} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--output", required=True, help="path without ending")
    parser.add_argument("--processes", type=int, default=2)
    for name in OPTIMIZERS:
        parser.add_argument(f"--{name}", default="", help=f"rates for {name}, comma-separated")
        # SGD's rates are hundreds of times larger, and lr x weight_decay is what shrinks the weights each step.
        decay = 0.0 if name == "sgd" else 0.1
        parser.add_argument(f"--{name}-decay", type=float, default=decay, help=f"weight decay of {name}")
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:cut])
    args.rest = words[cut + 1 :]
    output = Path(args.output)
    earlier = output.with_suffix(".json")
    rows = json.loads(earlier.read_text())["runs"] if earlier.is_file() else []
    known = {(row["optimizer"], row["lr"]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        for name in OPTIMIZERS:
            for lr in filter(None, getattr(args, name).split(",")):
                if (name, float(lr)) in known:
                    continue
                rows.append(train(args, name, lr, Path(folder) / f"{name}-{lr}"))
                print(rows[-1], file=sys.stderr, flush=True)
                write(output, args, rows)
    print(write(output, args, rows))


def write(output: Path, args: argparse.Namespace, rows: list[dict[str, object]]) -> str:
    """Writes both files, sorted, and returns the table."""
    rows.sort(key=lambda row: (OPTIMIZERS.index(str(row["optimizer"])), float(str(row["lr"]))))
    facts = {"date": date.today().isoformat(), "config": args.config, "steps": args.steps, "processes": args.processes,
             "machine": f"{platform.machine()}, CPU", "arguments": args.rest, "runs": rows}  # fmt: skip
    output.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    head = f"{args.config}, {args.steps} steps, {args.processes} processes, {facts['date']}, CPU\n\n"
    output.with_suffix(".md").write_text(head + table(rows) + "\n")
    return table(rows)


if __name__ == "__main__":
    main()
