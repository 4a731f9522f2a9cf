"""The artefacts `batches` and `scaling`: verdicts from measured errors, sample lengths, and damaged results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_lion.cli import main
from megatron_lion.errors import CheckpointError, ConfigError, DataError
from megatron_lion.reproduce.artefacts import Plan, build_plan, sample_length
from megatron_lion.reproduce.batch_claims import batch_claims
from megatron_lion.reproduce.claims import claims_of
from megatron_lion.reproduce.scaling_claims import scaling_claims
from megatron_lion.reproduce.sources import Sources
from megatron_lion.runs.paths import step_folder
from megatron_lion.runs.probes import probe_file
from megatron_lion.runs.sealed_json import write_sealed

STEP = 800
D = 1_000_000


def sources(**given: Any) -> Sources:
    return Sources(
        **{"text": (), "tokenizer": None, "vocab": None, "wikitext103": None, "output": Path("out"), **given}
    )


def write_probe(folder: Path, batches: int, ratio: float, error: float | None, name: str = "") -> None:
    """A result whose r/√d and standard error are given."""
    root = math.sqrt(D)
    made = {
        "format": 1, "step": STEP, "mode": "frozen", "data": "fixed", "dropout": False, "num_batches": batches,
        "num_samples": 8 * batches, "population_samples": 47_000, "global_batch_size": 8, "seq_length": 64,
        "all": {"norm_ratio": ratio * root, "num_parameters": D},
        "ladder": [{"norm_ratio_standard_error": None if error is None else error * root, "num_groups": 16}],
        "noise": {"noise_share": 0.5 / batches, "norm_ratio_low": None},
    }  # fmt: skip
    path = probe_file(folder, STEP)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(path.with_name(f"{path.stem}{name}.json"), made)


def batch_plan(tmp_path: Path, ratios: dict[int, float], error: float | None = 0.001) -> Plan:
    runs = {f"gpt2/{name}": tmp_path / name for name in ("lion", "sgd")}
    for folder in runs.values():
        step_folder(folder, STEP).mkdir(parents=True)
        (step_folder(folder, STEP) / "manifest.json").write_text("{}")
        for place, (batches, ratio) in enumerate(ratios.items()):
            write_probe(folder, batches, ratio, error, "" if place == 0 else f"-{batches}-fixed")
    return Plan("batches", "tiny", "gpt2", (), tuned_runs=runs)


@pytest.mark.parametrize(
    ("ratios", "error", "verdicts"),
    [
        ({100: 0.20, 1000: 0.199, 5000: 0.201}, 0.001, ["holds", "holds"]),
        ({100: 0.30, 1000: 0.29, 5000: 0.20}, 0.001, ["holds", "does not hold here"]),
        ({100: 0.20, 1000: 0.20, 5000: 0.20}, 0.02, ["not resolved", "not resolved"]),
        ({100: 0.20, 1000: 0.17, 5000: 0.10}, 0.02, ["not resolved", "does not hold here"]),
        ({100: 0.20, 1000: 0.20, 5000: 0.20}, None, ["not resolved", "not resolved"]),
    ],
)
def test_more_batches_are_judged_by_the_measured_errors(
    tmp_path: Path, ratios: dict[int, float], error: float | None, verdicts: list[str]
) -> None:
    claims = claims_of(batch_plan(tmp_path, ratios, error))
    assert [claim.verdict for claim in claims] == verdicts * 2
    assert claims[0].what == "r of 1,000 batches is that of 100 (GPT-2, LION, step 800)"
    assert "0.017 and 0.170 passes over the training data" in claims[0].convention


def test_the_interval_of_the_factor_is_students(tmp_path: Path) -> None:
    """Errors of 2 % and 1 % of two r, 16 groups: t = 2.131 for 15 degrees of freedom."""
    plan = batch_plan(tmp_path, {100: 0.10, 1000: 0.20}, error=0.002)
    half = 2.1314 * math.hypot(0.02, 0.01)
    low, high = 2 * math.exp(-half), 2 * math.exp(half)
    assert f"a factor 2.000 [{low:.3f}, {high:.3f}]" in batch_claims(plan)[0].ours


def test_probes_of_one_number_of_batches_are_not_compared(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="lacks probes of several numbers"):
        batch_claims(batch_plan(tmp_path, {100: 0.2}))


def test_samples_are_as_long_as_the_text_allows(tmp_path: Path) -> None:
    """5000 batches of 8 different samples, from 94 % of the text at 3.3 bytes a token."""
    text = tmp_path / "text.jsonl"
    for size, length in ((9_400_000, 64), (20_000_000, 128), (6_000_000, 32), (2_500_000, 16)):
        with text.open("wb") as stream:
            stream.truncate(size)
        assert sample_length(sources(text=(str(text),))) == length
        assert 40_000 * length <= 0.94 * size / 3.3
    with text.open("wb") as stream:
        stream.truncate(2_000_000)
    with pytest.raises(
        ConfigError, match=r"needs 40,000 different samples, about 2\.2 MB of text, and --text has 2\.0 MB"
    ):
        sample_length(sources(text=(str(text),)))
    assert sample_length(sources()) == 32


def test_runs_of_shorter_samples_read_as_many_tokens() -> None:
    plan = build_plan("batches", "tiny", sources())
    words = next(step.words for step in plan.steps if step.verb == "pretrain")
    flags = dict(zip(words[::2], words[1::2], strict=True))
    assert int(flags["--train.steps"]) * int(flags["--model.seq_length"]) == 400 * 128
    probes = [step.words[-1] for step in plan.steps if step.verb == "probe"]
    assert probes == ["100", "1000", "5000"] * 2


def scaling_plan(tmp_path: Path, **changes: Any) -> Plan:
    fit = {
        "optimizer": "lion", "part": "all", "step": 400, "sizes": [{"d": 10_000}, {"d": 90_000}], "verdict": "holds",
        "exponent": {"low": 0.45, "high": 0.55, "set_low": 0.48, "set_high": 0.52, "reason": ""},
        "measured": {"slope": 0.51}, "noise_shares": [0.01, 0.05],
    }  # fmt: skip
    content = {"format": 1, "settings": {"seeds": [1, 2], "steps": 400}, "fits": [{**fit, **changes}]}
    plan = build_plan("scaling", "tiny", sources(output=tmp_path))
    (tmp_path / "scaling").mkdir()
    (tmp_path / "scaling" / "scaling.json").write_text(json.dumps(content))
    return plan


@pytest.mark.parametrize("verdict", ["holds", "does not hold here", "not resolved"])
def test_the_claim_of_an_exponent_has_its_verdict(tmp_path: Path, verdict: str) -> None:
    claim = claims_of(scaling_plan(tmp_path, verdict=verdict))[0]
    assert claim.verdict == verdict
    assert "b inside 0.45 to 0.55" in claim.ours
    assert "2 models of d = 10,000 to 90,000, 2 seeds" in claim.convention


def test_an_exponent_without_bounds_states_that_noise_is_in_it(tmp_path: Path) -> None:
    exponent = {"low": None, "high": None, "set_low": None, "set_high": None, "reason": "2 of 2 sizes without bounds"}
    claim = claims_of(scaling_plan(tmp_path, exponent=exponent, verdict="not resolved"))[0]
    assert claim.ours == "measured r: b = 0.51, noise not removed (2 of 2 sizes without bounds); noise share 1%–5%"


def test_a_missing_or_damaged_result_is_named(tmp_path: Path) -> None:
    plan = scaling_plan(tmp_path)
    path = tmp_path / "scaling" / "scaling.json"
    for text in ("{", "[]", '{"format": 1}', '{"format": 2, "fits": []}'):
        path.write_text(text)
        with pytest.raises(DataError, match=r"scaling\.json: "):
            scaling_claims(plan)
    path.unlink()
    with pytest.raises(CheckpointError, match="does not exist; give the same command again"):
        scaling_claims(plan)


def test_the_full_scale_of_the_family_needs_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "scaling", "--scale", "full", "--print"]) == 2
    assert "reproduce scaling --scale full: needs --text and --tokenizer" in capsys.readouterr().err
