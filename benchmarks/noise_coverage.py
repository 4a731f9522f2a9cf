"""Monte Carlo of the probe's noise figures on the gradients of a GPT-2 in training, for which the exact values are known.

Two questions, each answered with draws:

- *Sketch*: on the same gradients of a model of 7 million parameters, 40 draws of the sketch's random signs and places
  against the figures from every coordinate. The model has run six steps at a high rate, so that few rows of the
  embedding have most of the gradient's energy, which is where a sample of coordinates fails.
- *Batches*: after 100 steps of a small model, 200 batches are the whole data set. Their mean is ∇f, and σ², the noise
  scale and r are known exactly. Probes of n of them, drawn without repeats, give intervals; the share that holds the
  exact value is the coverage.

    python benchmarks/noise_coverage.py --output benchmarks/results/noise_coverage
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import heading, shown, surroundings, write_results

from megatron_lion.compare.table import markdown_grid
from megatron_lion.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ProbeConfig,
    RunConfig,
    TrainConfig,
)
from megatron_lion.data.indexed_writer import IndexedWriter
from megatron_lion.device import select_device
from megatron_lion.gradient import sketch as sketches
from megatron_lion.gradient.accumulate import FullGradient
from megatron_lion.gradient.batch_groups import GroupedBatches
from megatron_lion.gradient.noise import NoiseEstimate, Rung, estimate_noise, make_rung, rungs_of
from megatron_lion.gradient.norms import GradientNorms
from megatron_lion.gradient.sketch import GradientSketch
from megatron_lion.intervals import t_quantile
from megatron_lion.parallel import process_groups
from megatron_lion.runs.steps import open_checkpoint, step_folder
from megatron_lion.train.loop import pretrain
from megatron_lion.train.restore import restore_run
from megatron_lion.train.run import build_run

POPULATION = 200
SKETCHED = (("noise_variance", "σ²"), ("noise_scale_samples", "noise scale"))
COVERED = (
    ("noise_variance", "noise_variance_standard_error", "σ²"),
    ("signal_l2_squared", "signal_standard_error", "‖∇f‖²"),
    ("noise_scale_samples", "noise_scale_standard_error", "noise scale"),
)


def config_of(folder: Path, *, hidden: int, vocab: int, steps: int, lr: float, batches: int) -> RunConfig:
    """A GPT-2 of four layers on Zipf-distributed tokens; batches of four samples."""
    return RunConfig(
        run_dir=str(folder / "run"),
        device="cpu",
        model=ModelConfig(
            num_layers=4, hidden_size=hidden, num_attention_heads=4, seq_length=64, vocab_size=vocab,
            hidden_dropout=0.0, attention_dropout=0.0,
        ),
        data=DataConfig(path=[str(folder / "corpus")], split="98,1,1"),
        optimizer=OptimizerConfig(lr=lr),
        train=TrainConfig(steps=steps, global_batch_size=4, micro_batch_size=4, precision="fp32", test_every=0),
        checkpoint=CheckpointConfig(every=steps),
        probe=ProbeConfig(num_batches=batches, every=steps),
        log=LogConfig(progress=False),
    )  # fmt: skip


def write_corpus(folder: Path, vocab: int, samples: int) -> None:
    random = np.random.default_rng(0)
    chances = 1.0 / np.arange(1, vocab + 1)
    with IndexedWriter(folder / "corpus", vocab) as writer:
        for _ in range(2 * samples):
            writer.add_document(random.choice(vocab, 65, p=chances / chances.sum()))
        writer.finalize()


class Many:
    """Several sketches that follow one accumulation."""

    def __init__(self, parts: Sequence[GroupedBatches]) -> None:
        self.parts = parts

    def rebase(self) -> None:
        for part in self.parts:
            part.rebase()

    def add_batch(self, count: int, loss_scale: float) -> None:
        for part in self.parts:
            part.add_batch(count, loss_scale)


class Recorder:
    """Keeps the gradient sum of every batch, whole."""

    def __init__(self, sketch: GradientSketch) -> None:
        self.sketch = sketch
        self.vectors: list[torch.Tensor] = []
        self.counts: list[int] = []

    def rebase(self) -> None:
        self.before = self.sketch.local()

    def add_batch(self, count: int, loss_scale: float) -> None:
        now = self.sketch.local()
        self.vectors.append(now - self.before)
        self.counts.append(count)
        self.before = now


@contextlib.contextmanager
def drawn(number: int) -> Iterator[None]:
    """Sketches made in this block have other signs and places."""
    pieces, spread = sketches._hashed_pieces, sketches._spread
    sketches._hashed_pieces = lambda name, *rest: pieces(f"{number}:{name}", *rest)
    sketches._spread = lambda numel, count, key: spread(numel, count, f"{number}:{key}")
    try:
        yield
    finally:
        sketches._hashed_pieces, sketches._spread = pieces, spread


def accumulated(config: RunConfig, make: Any) -> tuple[Any, list[tuple[int, GradientNorms]]]:
    """Trains, restores the last checkpoint and accumulates; returns what `make(run)` followed, and the exact norms by rung."""
    with contextlib.redirect_stderr(io.StringIO()):
        pretrain(config)
    device = select_device("cpu")
    with process_groups(device) as ranks:
        run = build_run(config, device, ranks, for_training=False, for_probing=True)
        restore_run(run, open_checkpoint(step_folder(run.run_dir, config.train.steps)))
        follower, read = make(run), []
        batches, rungs = run.probe_batches(), rungs_of(run.probe_samples.num_batches)
        with FullGradient(
            run.model, run.optimizer, run.forward_step, run.ranks, num_microbatches=config.num_microbatches(1),
            micro_batch_size=config.train.micro_batch_size, seq_length=config.model.seq_length,
            vocab_size=run.corpora.vocab_size, groups=follower,
        ) as full:  # fmt: skip
            while full.num_batches < rungs[-1]:
                full.add(batches)
                if full.num_batches in rungs:
                    read.append((full.num_batches, full.read().norms()))
        return follower, read


def sketch_draws(draws: int) -> dict[str, Any]:
    """Figures of `draws` sketches over those from every coordinate, on the same 8 batches of 4 samples."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(Path(folder), hidden=128, vocab=50257, steps=6, lr=2e-3, batches=8)
        write_corpus(Path(folder), 50257, 300)

        def make(run: Any) -> Many:
            found = [GroupedBatches(GradientSketch(run.model, 1 << 40, 1 << 40), 8)]
            for number in range(draws):
                with drawn(number):
                    found.append(GroupedBatches(GradientSketch(run.model), 8))
            return Many(found)

        many, read = accumulated(config, make)
    results: list[tuple[NoiseEstimate, list[Rung]]] = []
    for part in many.parts:
        groups = part.finish([k for k, _ in read])
        estimate = estimate_noise(groups, read[-1][1], batch_samples=4)
        assert estimate is not None
        results.append((estimate, [make_rung(k, norms, groups) for k, norms in read]))
    (exact, exact_rungs), sampled = results[0], results[1:]
    rows = []
    for value, name in SKETCHED:
        ratios = [getattr(estimate, value) / getattr(exact, value) for estimate, _ in sampled]
        errors = [getattr(estimate, f"{value.removesuffix('_samples')}_standard_error") for estimate, _ in sampled]
        within = [
            abs(getattr(estimate, value) - getattr(exact, value)) <= 2 * error
            for (estimate, _), error in zip(sampled, errors, strict=True)
        ]
        rows.append({"what": name, **spread(ratios), "within_2_errors": sum(within) / draws})
        exact_error = getattr(exact, f"{value.removesuffix('_samples')}_standard_error")
        rows.append({"what": f"its standard error ({name})", **spread([error / exact_error for error in errors])})
    for place, rung in enumerate(exact_rungs):
        if rung.norm_ratio_standard_error:
            errors = [rungs[place].norm_ratio_standard_error for _, rungs in sampled]
            ratios = [error / rung.norm_ratio_standard_error for error in errors if error is not None]
            rows.append({"what": f"standard error of r({rung.num_batches})", **spread(ratios)})
    top = max(read[-1][1].grad_linf / read[-1][1].grad_l2, 0.0)
    return {
        "num_parameters": read[-1][1].num_parameters,
        "draws": draws,
        "largest_coordinate_share": top**2,
        "rows": rows,
    }


def spread(ratios: Sequence[float]) -> dict[str, float]:
    return {
        "mean": statistics.fmean(ratios), "sd": statistics.stdev(ratios), "lowest": min(ratios), "highest": max(ratios),
    }  # fmt: skip


def batch_draws(draws: int) -> dict[str, Any]:
    """Coverage of the intervals over probes of n of 200 batches of 4 samples."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(Path(folder), hidden=32, vocab=1000, steps=100, lr=2e-3, batches=POPULATION)
        write_corpus(Path(folder), 1000, 4 * POPULATION + 100)
        recorder, _ = accumulated(config, lambda run: Recorder(GradientSketch(run.model, 1 << 40, 1 << 40)))
    sketch, count = recorder.sketch, recorder.counts[0]
    data = torch.stack(recorder.vectors)[:, : sketch.num_buckets].double() / count
    mean = data.mean(0)
    variance, signal = float((data - mean).square().sum() / (POPULATION - 1)), float(mean.square().sum())
    truth = {"σ²": variance, "‖∇f‖²": signal, "noise scale": 4 * variance / signal}
    ratio = float(mean.abs().sum() / mean.norm())
    random = np.random.default_rng(1)
    rows = []
    for n in (4, 8, 16, 32, 100):
        held: dict[str, list[bool]] = {}
        twice: dict[str, list[bool]] = {}
        shares, r_values, r_errors = [], [], []
        for _ in range(draws):
            chosen = random.choice(POPULATION, n, replace=False)
            estimate, rung = probed(sketch, recorder.vectors, chosen, count)
            quantile = t_quantile(estimate.num_groups - 1)
            for value, error, name in COVERED:
                if name == "noise scale" and not estimate.is_resolved:
                    continue  # σ²/‖∇f‖² has no meaning then, and may be negative
                miss = abs(getattr(estimate, value) - truth[name]) / getattr(estimate, error)
                held.setdefault(name, []).append(miss <= quantile)
                twice.setdefault(name, []).append(miss <= 2)
            if estimate.is_resolved:
                low = estimate.norm_ratio_low - quantile * estimate.norm_ratio_low_standard_error
                high = estimate.norm_ratio_high + quantile * estimate.norm_ratio_high_standard_error
                held.setdefault("bounds on r", []).append(low <= ratio <= high)
            shares.append(estimate.noise_share)
            r_values.append(rung.norm_ratio)
            r_errors.append(rung.norm_ratio_standard_error)
        rows.append({
            "batches": n, "groups": estimate.num_groups, "noise_share": statistics.fmean(shares),
            "coverage": {name: sum(found) / len(found) for name, found in held.items()},
            "within_2_errors": {name: sum(found) / len(found) for name, found in twice.items()},
            "resolved": len(held.get("bounds on r", [])) / draws,
            "r_stated_over_scatter": statistics.fmean(r_errors) / statistics.stdev(r_values),
        })  # fmt: skip
    return {"num_parameters": data.shape[1], "population": POPULATION, "draws": draws, "true": truth,
            "true_r_over_sqrt_d": ratio / math.sqrt(data.shape[1]), "rows": rows}  # fmt: skip


def probed(sketch: GradientSketch, vectors: list[torch.Tensor], chosen: Any, count: int) -> tuple[NoiseEstimate, Rung]:
    n = len(chosen)
    grouped = GroupedBatches(sketch, n)
    total = torch.zeros(sketch.num_buckets, dtype=torch.float64)
    for place in chosen:
        grouped.add(vectors[place].clone(), count)
        total += vectors[place][: sketch.num_buckets].double()
    total /= n * count
    l1, l2 = float(total.abs().sum()), float(total.norm())
    norms = GradientNorms(l1, l2, float(total.abs().max()), 0.0, None, 0.0, None, total.numel())
    groups = grouped.finish(rungs_of(n))
    estimate = estimate_noise(groups, norms, batch_samples=4, population=POPULATION)
    assert estimate is not None
    return estimate, make_rung(n, norms, groups, POPULATION)


def described(sketch: dict[str, Any], batches: dict[str, Any], facts: dict[str, Any]) -> str:
    first = [
        [
            row["what"],
            *(f"{row[key]:.4f}" for key in ("mean", "sd", "lowest", "highest")),
            shown(row.get("within_2_errors"), ".1%"),
        ]
        for row in sketch["rows"]
    ]
    names = [name for _, _, name in COVERED]
    second = []
    for row in batches["rows"]:
        held, twice = row["coverage"], row["within_2_errors"]
        second.append([
            str(row["batches"]), str(row["groups"]), f"{row['noise_share']:.0%}",
            *(f"{shown(held.get(name), '.1%')} ({shown(twice.get(name), '.1%')})" for name in names),
            f"{shown(held.get('bounds on r'), '.1%')} ({row['resolved']:.0%})", f"{row['r_stated_over_scatter']:.2f}",
        ])  # fmt: skip
    return "\n\n".join([
        heading(facts),
        f"**Sketch**: d = {sketch['num_parameters']:,}; {sketch['draws']} draws on the same gradients; value over the value "
        f"from every coordinate. The largest coordinate has {sketch['largest_coordinate_share']:.1%} of ‖ḡ‖².",
        markdown_grid(["figure", "mean", "sd", "lowest", "highest", "within 2 stated errors of the exact value"], first),
        f"**Batches**: d = {batches['num_parameters']:,}; probes of n of {batches['population']} batches, {batches['draws']} draws of "
        "each; share of the 95 % intervals (Student's t) that hold the exact value, in brackets the share within 2 stated "
        "errors; the noise scale and the bounds of resolved probes only; and the stated error of r(n) over its scatter.",
        markdown_grid(
            ["n", "groups", "noise share", *names, "bounds on r (resolved)", "error of r: stated / scatter"], second
        ),
    ]) + "\n"  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=500, help="probes of each size")
    parser.add_argument("--sketches", type=int, default=40, help="draws of the sketch")
    parser.add_argument("--output", default=None, help="without ending: writes OUTPUT.md and OUTPUT.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    facts = surroundings("cpu")
    batches, sketch = batch_draws(args.draws), sketch_draws(args.sketches)
    text = described(sketch, batches, facts)
    print(text)
    write_results(
        args.output, "Noise figures of a probe: coverage", text, {**facts, "sketch": sketch, "batches": batches}
    )


if __name__ == "__main__":
    main()
