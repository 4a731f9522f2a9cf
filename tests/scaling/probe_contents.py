"""Contents of probe results as `gradient/probe_result.py` writes them, with norm ratios of a known power of d."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_lion.runs.paths import step_folder
from megatron_lion.runs.probes import probe_file
from megatron_lion.runs.sealed_json import write_sealed


def norms(d: int, ratio: float) -> dict[str, Any]:
    return {"grad_l1": ratio, "grad_l2": 1.0, "norm_ratio": ratio, "num_parameters": d}


def content(
    step: int = 0,
    *,
    d: int = 10_000,
    ratio: float = 50.0,
    low: float | None = None,
    high: float | None = None,
    num_batches: int = 32,
    population: int = 8000,
    share: float = 0.04,
    signal: float = 1.0,
    variance: float = 1.0,
    noise_ratio: float | None = None,
    by_part: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A probe of batches of 8 samples; of the parameters a half are embeddings."""
    noise = {"norm_ratio_noise": noise_ratio, "noise_share": share, "signal_l2_squared": signal, "noise_variance": variance,
             "norm_ratio_low": low, "norm_ratio_low_standard_error": None if low is None else 0.01 * low,
             "norm_ratio_high": high, "norm_ratio_high_standard_error": None if high is None else 0.01 * high}  # fmt: skip
    rung = {"num_batches": num_batches, "norm_ratio_standard_error": 0.02 * ratio, "num_groups": 8}
    found = {
        "format": 1, "step": step, "mode": "frozen", "data": "fixed", "dropout": False, "loss": 5.0, "global_batch_size": 8,
        "seq_length": 128, "num_batches": num_batches, "num_samples": min(8 * num_batches, population),
        "population_samples": population, "all": norms(d, ratio), "without_embeddings": norms(d // 2, ratio / 2),
        "kinds": {"embedding": norms(d - d // 2, ratio / 3)}, "ladder": [rung], "noise": noise,
    }  # fmt: skip
    return found if by_part is None else {**found, "noise_by_part": by_part}


def write_probe(run_dir: Path, made: dict[str, Any], *, name: str = "") -> None:
    """Writes a result as the run's own, or under the name of its settings."""
    path = probe_file(run_dir, made["step"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(path.with_name(f"{path.stem}{name}.json"), made)


def write_checkpoint(run_dir: Path, step: int) -> None:
    folder = step_folder(run_dir, step)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text("{}")
