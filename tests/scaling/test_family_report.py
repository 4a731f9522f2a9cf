"""From probe results of known exponents to scaling.json, tables, figure and verdicts; and one small family from its text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from probe_contents import content, write_checkpoint, write_probe

from megatron_lion.cli import main
from megatron_lion.configfile import load_config
from megatron_lion.model.sizes import model_size
from megatron_lion.reproduce import artefacts
from megatron_lion.scaling.family import Family, family_of
from megatron_lion.scaling.family_figure import draw_family
from megatron_lion.scaling.family_results import as_content, fits_of, read_family, write_results
from megatron_lion.scaling.family_steps import config_path, run_folder
from megatron_lion.scaling.family_tables import as_markdown, fit_table, run_table

WIDTHS = "32,48,64,96,128,192,256"


def write_family(
    family: Family, output: Path, exponent: float, **bounds: Callable[[float], float | None]
) -> dict[str, Any]:
    """Probes whose r of the whole model is 0.3 d^exponent times a factor of each seed, with bounds from r; returns the result."""
    base = load_config(config_path(family)).model
    for run in family.runs():
        folder = run_folder(run, output)
        d = model_size(family.model(run.shape, base), 2048).num_parameters
        ratio = 0.3 * d**exponent * 1.01 ** (run.seed + run.shape.width % 3)
        for step in family.measure_at:
            ends = {name: of(ratio) for name, of in bounds.items()}
            write_probe(folder, content(step, d=d, ratio=ratio, share=0.04, **ends))
            if step:
                write_checkpoint(folder, step)
    measured = read_family(family, output)
    return as_content(family, measured, fits_of(measured))


def whole(result: dict[str, Any]) -> dict[str, Any]:
    return next(fit for fit in result["fits"] if fit["part"] == "all")


def family(**given: Any) -> Family:
    return family_of(
        {"noise_share": 0.05, "widths": WIDTHS, "optimizers": "lion", "seeds": "1,2", "measure_at": "0", **given},
        "tiny",
    )


@pytest.mark.parametrize(
    ("exponent", "verdict"), [(0.5, "holds"), (0.3, "does not hold here"), (0.0, "does not hold here")]
)
def test_a_known_exponent_gets_its_verdict(tmp_path: Path, exponent: float, verdict: str) -> None:
    result = write_family(family(), tmp_path, exponent, low=lambda r: 0.97 * r, high=lambda r: 1.01 * r)
    fit = whole(result)
    assert fit["verdict"] == verdict
    assert fit["exponent"]["low"] <= exponent <= fit["exponent"]["high"]
    assert fit["measured"]["slope"] == pytest.approx(exponent, abs=0.01)
    assert len(fit["sizes"]) == 7, "two seeds are one size"
    inner = next(fit for fit in result["fits"] if fit["part"] == "without_embeddings")
    assert (inner["verdict"], inner["exponent"]["low"]) == ("not resolved", None), "its bounds are not known"


def test_wide_or_missing_bounds_decide_nothing(tmp_path: Path) -> None:
    wide = write_family(family(), tmp_path / "wide", 0.5, low=lambda r: 0.5 * r, high=lambda r: 1.02 * r)
    assert whole(wide)["verdict"] == "not resolved"
    none = write_family(family(), tmp_path / "none", 0.5)
    assert whole(none)["verdict"] == "not resolved"
    assert whole(none)["measured"]["slope"] == pytest.approx(0.5, abs=0.01), "which noise alone would give too"
    few = write_family(
        family(widths="32,64,128"), tmp_path / "few", 0.5, low=lambda r: 0.99 * r, high=lambda r: 1.01 * r
    )
    assert whole(few)["verdict"] == "not resolved"


def test_results_are_written_as_json_tables_and_a_figure(tmp_path: Path) -> None:
    made = family(optimizers="lion,sgd", measure_at="0,400")
    result = write_family(made, tmp_path, 0.4, low=lambda r: 0.9 * r, high=lambda r: 1.02 * r)
    stored = json.loads(write_results(tmp_path, result).read_text())
    assert stored["settings"]["noise_share"] == 0.05
    assert len(stored["runs"]) == 7 * 2 * 2 * 2
    row = stored["runs"][0]
    assert (row["optimizer"], row["width"], row["seed"], row["lr"], row["step"]) == ("lion", 32, 1, 0.0012, 0)
    assert (row["num_batches"], row["noise_share"], row["passes"]) == (32, 0.04, 32 / 1000)
    assert row["parts"]["all"]["low"] == pytest.approx(0.9 * row["parts"]["all"]["ratio"])
    measured = read_family(made, tmp_path)
    fits = fits_of(measured)
    text = as_markdown(made, measured, fits, "scaling.png")
    assert max(len(line) for line in text.splitlines() if line.startswith("|")) <= 120
    assert "0 of 56 probes are above it" in text
    assert len(fit_table(fits).rows) == 2 * 2 * 3
    assert len(run_table(measured, "sgd").rows) == 7 * 2 * 2
    first = draw_family(fits, tmp_path / "scaling.png").read_bytes()
    assert int.from_bytes(first[20:24]) > int.from_bytes(first[16:20]) / 2, "a row for each step"


def test_the_noise_itself_is_fitted_if_the_probes_give_it(tmp_path: Path) -> None:
    made = family(seeds="1", measure_at="0")
    write_family(made, tmp_path, 0.3)
    for run in made.runs():
        folder = run_folder(run, tmp_path)
        d = read_family(made, tmp_path)[made.runs().index(run)].found.parts["all"].d
        write_probe(folder, content(0, d=d, ratio=d**0.3, noise_ratio=0.798 * math.sqrt(d)))
    fit = fits_of(read_family(made, tmp_path))[0]
    assert fit.noise is not None
    assert fit.noise.slope == pytest.approx(0.5)
    assert fit.exponent.verdict == "not resolved"


@pytest.mark.slow
def test_from_text_to_the_exponent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two models train as processes for a few steps; the same command then starts nothing but the check of the text."""
    from tiny_gpt2 import prose

    monkeypatch.setattr(artefacts, "VOCAB_SIZE", 300)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in prose(1500)))
    output = tmp_path / "out"
    words = ["scaling", "--text", str(text), "--output", str(output), "--widths", "16,32", "--seeds", "1", "--steps", "10",
             "--optimizers", "lion", "--first-batches", "8", "--max-batches", "all", "--noise-share", "1e-7",
             "--measure-at", "0,10", "--processes", "1"]  # fmt: skip
    assert main(words) == 0
    first = capsys.readouterr()
    assert "LION" in first.out
    assert "2 sizes; a verdict needs at least 4" in first.out
    result = json.loads((output / "scaling.json").read_text())
    last = [run for run in result["runs"] if run["step"] == 10]
    assert [run["passes"] for run in last] == [1.0, 1.0]
    assert {part["source"] for run in last for part in run["parts"].values()} == {"exact"}
    assert [run["num_batches"] for run in result["runs"] if run["step"] == 0] == [8, 8]
    assert (output / "scaling.png").read_bytes()[:4] == b"\x89PNG"
    assert (output / "scaling.md").is_file()
    assert main(words) == 0
    assert "pretrain" not in capsys.readouterr().err


def test_a_seed_without_bounds_leaves_its_size_without_bounds(tmp_path: Path) -> None:
    made = family()
    write_family(made, tmp_path, 0.5, low=lambda r: 0.99 * r, high=lambda r: 1.01 * r)
    run = made.runs()[0]
    d = read_family(made, tmp_path)[0].found.parts["all"].d
    write_probe(run_folder(run, tmp_path), content(0, d=d, ratio=0.3 * d**0.5))
    fit = fits_of(read_family(made, tmp_path))[0]
    assert [mean.low is None for mean in fit.sizes] == [True] + [False] * 6
    assert fit.exponent.verdict == "not resolved"
