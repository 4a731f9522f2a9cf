"""Reproductions: valid commands, claims that can fail, and one small reproduction from text to verdict."""

from __future__ import annotations

import json
import math
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import write_run

from megatron_lion.cli import build_parser, main, parse, verb_module
from megatron_lion.errors import MegatronLionError, PeerError, StoppedOnRequest
from megatron_lion.reproduce import artefacts as plans
from megatron_lion.reproduce import node_marks
from megatron_lion.reproduce.artefacts import ARTEFACTS, Plan, build_plan
from megatron_lion.reproduce.claim import Claim
from megatron_lion.reproduce.claims import as_markdown, as_text, claims_of
from megatron_lion.reproduce.recipes import Recipe
from megatron_lion.reproduce.run_verbs import run_plan
from megatron_lion.reproduce.sources import Sources
from megatron_lion.reproduce.toy_claims import toy_claims

FULL = {"text": ("a.jsonl",), "tokenizer": "gpt2", "vocab": "vocab.txt", "wikitext103": "wiki.test.tokens"}
NOTHING: dict[str, Any] = {"text": (), "tokenizer": None, "vocab": None, "wikitext103": None}


@pytest.mark.parametrize("scale", ["tiny", "full"])
@pytest.mark.parametrize("artefact", sorted(ARTEFACTS))
def test_every_step_is_a_command_that_its_verb_accepts(artefact: str, scale: Any, tmp_path: Path) -> None:
    """The printed arguments are those that run."""
    sources = Sources(**(FULL if scale == "full" else NOTHING), output=tmp_path, quick=scale == "tiny")
    plan = build_plan(artefact, scale, sources)
    for step in plan.steps:
        namespace = parse(build_parser(step.verb, verb_module(step.verb)), list(step.words))
        if step.verb == "pretrain":
            assert Path(namespace.run_dir) in [
                *plan.paper_runs.values(),
                *plan.tuned_runs.values(),
                *(folder for folders in plan.seeds.values() for folder in folders),
            ]
        if step.launched:
            shell, script, config, *_ = step.launch_words()
            assert (shell, Path(script).name) == ("bash", "torchrun.sh")
            assert Path(script).is_file()
            assert Path(config).is_file()


def test_full_scale_needs_the_real_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "table-b1", "--scale", "full", "--text", "a.jsonl"]) == 2
    assert "needs --tokenizer, --wikitext103" in capsys.readouterr().err


def test_full_scale_needs_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    real = [word for key, value in FULL.items() for word in (f"--{key}", value if isinstance(value, str) else value[0])]
    for name in ("gpt2", "vocab.txt", "wiki.test.tokens"):
        (tmp_path / name).write_text("")
    words = [str(tmp_path / word) if (tmp_path / word).exists() else word for word in real]
    assert main(["reproduce", "figure-3", "--scale", "full", "--output", str(tmp_path / "out"), *words]) == 9
    assert "--print shows the plan" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_files_are_named_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["reproduce", "table-b1", "--wikitext103", str(tmp_path / "no"), "--output", str(tmp_path / "out")]) == 3
    )
    assert "--wikitext103" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Recorder:
    """Jobs that record the commands instead of running them."""

    def __init__(self, codes: dict[int, int] | None = None, *, stop_at: int | None = None) -> None:
        self.ran: list[str] = []
        self.codes, self.stop_at, self.asked = codes or {}, stop_at, False

    def run(self, verb: str, words: list[str], processes: int = 1) -> int:
        self.ran.append(verb)
        if self.stop_at == len(self.ran):
            self.asked = True
            return 75
        return self.codes.get(len(self.ran), 0)

    def run_command(self, command: list[str]) -> int:
        return self.run("launched", command)


def test_steps_run_in_order_and_a_failure_ends_them(tmp_path: Path) -> None:
    given = {**FULL, "wikitext103": None}  # the other files need not exist here
    plan = build_plan("table-b1", "tiny", Sources(**given, output=tmp_path))
    jobs: Any = Recorder()
    run_plan(plan, 2, jobs)
    assert jobs.ran == ["demo", "prepare", *["pretrain"] * 5, *["evaluate"] * 5, "compare"]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "held_out.txt").write_text("made by the step before")
    jobs = Recorder()
    run_plan(plan, 2, jobs)
    assert jobs.ran[0] == "prepare"
    jobs = Recorder({3: 6})
    with pytest.raises(MegatronLionError, match=r"SGD at 0\.0001") as caught:
        run_plan(plan, 2, jobs)
    assert caught.value.exit_code == 6
    assert jobs.ran == ["prepare", "pretrain", "pretrain"]
    killed: Any = Recorder({1: -9})
    with pytest.raises(PeerError, match="ended with SIGKILL"):
        run_plan(plan, 2, killed)
    jobs = Recorder(stop_at=2)
    with pytest.raises(StoppedOnRequest, match="continues there"):
        run_plan(plan, 2, jobs)


def test_several_nodes_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All nodes train; only the first runs the other steps, and the others wait for its marks."""
    plan = build_plan("figure-3", "full", Sources(**FULL, output=tmp_path))
    monkeypatch.setenv("NNODES", "2")
    first: Any = Recorder()
    run_plan(plan, 8, first)
    assert first.ran == ["prepare", *["launched"] * 4, "compare"]
    monkeypatch.setenv("NODE_RANK", "1")
    second: Any = Recorder()
    run_plan(plan, 8, second)
    assert second.ran == ["launched"] * 4


def test_a_node_waits_for_the_first_one_only_as_long_as_it_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failure there ends the others with its code; marks of another job do not count, and silence ends the wait."""
    plan = build_plan("figure-3", "full", Sources(**FULL, output=tmp_path))
    monkeypatch.setenv("NNODES", "2")
    monkeypatch.setenv("JOB_ID", "one")
    run_plan(plan, 8, Recorder())
    with pytest.raises(MegatronLionError):
        run_plan(plan, 8, Recorder({1: 3}))  # removes the marks of the start before
    monkeypatch.setenv("NODE_RANK", "1")
    monkeypatch.setattr(node_marks, "RESTART_S", 0.0)
    with pytest.raises(MegatronLionError, match="ended there with code 3") as failed:
        run_plan(plan, 8, Recorder())
    assert failed.value.exit_code == 3
    monkeypatch.setenv("JOB_ID", "another")
    for name, seconds in (("SILENCE_S", 0.2), ("NOTICE_S", 0.0), ("POLL_S", 0.05)):
        monkeypatch.setattr(node_marks, name, seconds)
    with pytest.raises(PeerError, match="no sign of life"):
        run_plan(plan, 8, Recorder())
    assert capsys.readouterr().err.count("waiting for the first node") == 1


def test_a_failure_of_the_start_before_is_not_taken_for_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is given again by hand, with the same JOB_ID, and this node is the first to start."""
    monkeypatch.setattr(node_marks, "POLL_S", 0.02)
    marks = node_marks.NodeMarks(tmp_path, "plan")
    with marks.alive():
        marks.set(2, 5)

    def start_first_node() -> None:
        with marks.alive():
            marks.set(2, 0)

    asked = iter([False, False, True])

    def look() -> bool:
        if next(asked, False):
            threading.Thread(target=start_first_node).start()
        return False

    marks.wait(2, "a step", look)


def full_plan(folder: Path, shift: float = 0.0) -> Plan:
    """Runs with the numbers of Table B.1, with LION's shifted."""
    plan = build_plan("table-b1", "full", Sources(**FULL, output=folder))
    from megatron_lion.evaluate.published_results import TABLE_B1

    for name, run_dir in plan.paper_runs.items():
        model, optimizer = name.split("/")
        write_run(run_dir, optimizer=optimizer, model=model, steps=50_000 // 100, eval_steps=())
        values = TABLE_B1["GPT-2 Small" if "small" in model else "GPT-2 Medium", optimizer.upper()]
        for place, value in enumerate(values, 1):
            loss = value + (shift if optimizer == "lion" else 0.0)
            record = {
                "kind": "wikitext103", "step": 10_000 * place, "text_sha256": "e", "text_path": "w", "stride": 32, "seq_length": 1024,
                "text_version": "WikiText-103 tokens test", "precision": "fp32", "max_tokens": None, "log_token_ppl": loss,
            }  # fmt: skip
            (run_dir / "eval" / f"{place}.json").write_text(json.dumps(record))
    return plan


def test_table_b1_at_full_scale_is_judged_by_its_tolerance(tmp_path: Path) -> None:
    exact = claims_of(full_plan(tmp_path / "exact"))
    assert len([claim for claim in exact if "step" in claim.what]) == 20
    assert all(claim.holds for claim in exact)
    shifted = claims_of(full_plan(tmp_path / "shifted", shift=0.11))
    assert [claim.holds for claim in shifted if "LION, step" in claim.what] == [False] * 10
    above = claims_of(full_plan(tmp_path / "above", shift=6.0))
    assert [claim.holds for claim in above if "below SGD" in claim.what] == [False, False]
    assert "does not hold here" in as_markdown("toy/tiny", above)
    one = [next(claim for claim in claims if claim.holds is holds) for claims, holds in ((exact, True), (above, False))]
    assert as_markdown("toy/tiny", one).endswith("\nOf 2 statements: 1 holds here, 1 does not hold here.\n")
    assert as_markdown("toy/tiny", [*one, *one]).endswith("\nOf 4 statements: 2 hold here, 2 do not hold here.\n")


def test_a_terminal_of_80_columns_shows_every_part_of_a_claim() -> None:
    first = Claim(what="LION below SGD " * 8, paper="3.1 3.2", ours="4 5 " * 30, tolerance="> 0.08", holds=True,
                  convention="windows of 128, " * 9)  # fmt: skip
    second = Claim(what="another", paper="no value", ours="7", convention=first.convention, source="–")
    third = Claim(what="a third", paper="8", ours="9", convention="per word", is_resolved=False)
    text = as_text("table-b1/tiny (quick)", [first, second, third])
    assert " ".join(text.split()).startswith("table-b1, tiny scale, quick: a few steps show that the path works, not")
    assert max(map(len, text.splitlines())) < 80
    words = " ".join(text.split())
    for claim in (first, second, third):
        assert f"{claim.verdict}: {claim.what.strip()} paper {claim.paper}" in words
        assert claim.ours.strip() in words
    assert "(tolerance: > 0.08) [1] not comparable: another paper no value ours 7 [1] not resolved: a third" in words
    assert words.count("windows of 128") == 9, "one convention is printed once"
    assert "paper 8 (arXiv 2411.07724) ours 9 [2]" in words
    assert words.endswith("statements: 1 holds here, 1 is not resolved by these measurements, 1 is not comparable.")


def add_bounds(folder: Path, low: float, high: float, error: float = 0.001, at: dict[int, float] | None = None) -> None:
    """Adds to each probe of a run the bounds on the noise-free r/√d; `at` moves both bounds of single steps."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "probe/norm_ratio" in line:
            root, factor = math.sqrt(line["probe/num_parameters"]), (at or {}).get(line["step"], 1.0)
            line |= {"probe/norm_ratio_low": low * root * factor, "probe/norm_ratio_low_standard_error": error * root,
                     "probe/norm_ratio_high": high * root * factor, "probe/norm_ratio_high_standard_error": error * root,
                     "probe/noise_groups": 8, "probe/sqrt_d": root, "probe/noise_share": 0.1}  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def ratio_claim(tmp_path: Path, name: str, **bounds: Any) -> Claim:
    """The statement on r/√d of one run of six probes, whose measured r/√d is 0.62 to 0.72 throughout."""
    plan = build_plan("figure-3", "tiny", Sources(**NOTHING, output=tmp_path / name))
    for run, run_dir in [*plan.paper_runs.items(), *plan.tuned_runs.items()]:
        write_run(run_dir, optimizer=run.split("/")[1], model="gpt2-demo", d=10_000)
        if bounds:
            add_bounds(run_dir, **bounds)
    claims = [claim for claim in claims_of(plan) if claim.what.startswith("r/√d")]
    assert len({claim.verdict for claim in claims}) == 1
    return claims[0]


def test_curves_are_judged(tmp_path: Path) -> None:
    plan = build_plan("figure-3", "tiny", Sources(**NOTHING, output=tmp_path))
    for name, run_dir in [*plan.paper_runs.items(), *plan.tuned_runs.items()]:
        write_run(run_dir, optimizer=name.split("/")[1], model="gpt2-demo", d=10_000)
    claims = {claim.what: claim for claim in claims_of(plan)}
    assert claims["training loss of LION below SGD's, both at the paper's rates"].holds
    assert claims["tuned LION below tuned SGD: test loss"].verdict == "holds", "the gap is 2 nats"
    assert "are not resolved by these measurements" in as_markdown("figure-3/tiny", list(claims.values()))


def test_the_verdict_on_the_ratio_reads_what_noise_leaves_of_it(tmp_path: Path) -> None:
    """The measured r/√d is the same in all cases; the bounds on the noise-free one decide, with their errors."""
    assert ratio_claim(tmp_path, "narrow", low=0.40, high=0.60).verdict == "holds"
    assert ratio_claim(tmp_path, "no bounds").verdict == "not resolved"
    assert ratio_claim(tmp_path, "wide", low=0.10, high=0.60).verdict == "not resolved"
    moved = ratio_claim(tmp_path, "moved", low=0.30, high=0.35, at={200: 2.5})
    assert moved.verdict == "does not hold here"
    assert moved.holds is False
    # 8 groups and 6 probes: Student's quantile for 1 - 0.05/6 is 3.6, so an error of 0.02 widens 0.40 … 0.60 to 0.33 … 0.67
    assert ratio_claim(tmp_path, "uncertain", low=0.40, high=0.60, error=0.02).verdict == "not resolved"


def test_rates_are_judged(tmp_path: Path) -> None:
    plan = build_plan("rates", "tiny", Sources(**NOTHING, output=tmp_path))
    for optimizer, folders in plan.seeds.items():
        for seed, folder in enumerate(folders):
            write_run(folder, optimizer=optimizer, seed=seed, d=10_000)
    claims = claims_of(plan)
    assert [claim.paper for claim in claims] == ["0.701", "yes", "1.365", "yes"]
    assert [claim.holds for claim in claims] == [None, True, None, True]
    assert "‖∇f‖₂ without noise at 0 of 18 probes; " in claims[2].convention


def test_the_rate_of_sgd_uses_the_norm_without_noise_and_the_interval_of_student(tmp_path: Path) -> None:
    """Three seeds whose corrected norms are a third of the measured ones, 2/(1 + step)."""
    plan = build_plan("rates", "tiny", Sources(**NOTHING, output=tmp_path))
    for optimizer, folders in plan.seeds.items():
        for seed, folder in enumerate(folders):
            write_run(folder, optimizer=optimizer, seed=seed, d=10_000)
    raw = claims_of(plan)[2].ours
    for number, folder in enumerate(plan.seeds["sgd"]):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            if "probe/grad_l2" in line:
                line["probe/grad_l2_corrected"] = line["probe/grad_l2"] / 3 * (1 + 0.1 * number)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    claim = claims_of(plan)[2]
    assert "without noise at 18 of 18 probes" in claim.convention
    value, low, high = (float(text) for text in re.findall(r"[\d.]+", claim.ours))
    assert value == pytest.approx(float(raw.split()[0]) / 3 * 1.1, rel=0.01)
    # The constant is proportional to the norms: Student's interval of factors 1.0, 1.1, 1.2 is 1.1 ± 4.303 · 0.1/√3.
    assert (low, high) == pytest.approx((value * (1 - 0.2484 / 1.1), value * (1 + 0.2484 / 1.1)), rel=0.01)


def test_toy_claims_hold() -> None:
    claims = toy_claims()
    assert [claim.holds for claim in claims] == [True, True, None, True, True, None, True]


@pytest.mark.slow
def test_from_text_to_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs the real subcommands as processes for a few steps."""
    from tiny_gpt2 import prose

    monkeypatch.setattr(plans, "PAPER", (Recipe("lion", 3e-3, 0.01), Recipe("sgd", 1e-4, 0.01)))
    monkeypatch.setattr(plans, "TUNED", {"gpt2": ()})
    monkeypatch.setattr(plans, "VOCAB_SIZE", 300)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in prose(400)))
    (tmp_path / "wiki").write_text(" \n = Title = \n \n " + prose(1, seed=3)[0] * 3)
    words = [
        "reproduce",
        "table-b1",
        "--quick",
        "--processes",
        "1",
        "--text",
        str(text),
        "--wikitext103",
        str(tmp_path / "wiki"),
    ]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "LION below SGD at every checkpoint" in shown
    folder = tmp_path / "out" / "quick"  # apart from the files of a real reproduction
    found = json.loads((folder / "reproduction.json").read_text())["table-b1/tiny (quick)"]
    judged = [claim["holds"] for claim in found if "below SGD" in claim["what"]]
    assert judged == [True], "at this rate LION learns the words' frequencies in twenty steps and SGD nothing"
    assert (folder / "comparison-table-b1" / "report.html").is_file()
    assert "table-b1, tiny scale, quick" in (folder / "reproduction.md").read_text()
    text.write_text(text.read_text()[:-200])
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    assert "from other text" in capsys.readouterr().err


def test_the_report_keeps_what_earlier_calls_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claims = [{"what": "said before", "paper": "1", "ours": "2"}]
    (tmp_path / "reproduction.json").write_text(json.dumps({"figure-2/tiny": claims}))
    assert main(["reproduce", "toy", "--output", str(tmp_path)]) == 0
    assert "said before" not in capsys.readouterr().out
    text = (tmp_path / "reproduction.md").read_text()
    assert "## figure-2, tiny scale" in text
    assert "## toy, tiny scale" in text
    assert set(json.loads((tmp_path / "reproduction.json").read_text())) == {"figure-2/tiny", "toy/tiny"}
    (tmp_path / "reproduction.json").write_text('{"figure-2/tiny": [')
    assert main(["reproduce", "toy", "--output", str(tmp_path)]) == 3
    assert "reproduction.json: damaged" in capsys.readouterr().err
