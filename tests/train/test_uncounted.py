"""A step whose loss counts nothing changes nothing and is reported; a measurement that counts nothing is an error."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import tiny_bert
import torch
from distributed import run_distributed

from megatron_lion.errors import DataError

BF16 = {"train__precision": "bf16"}
OVERLAP = {"parallel__overlap_grad_reduce": True, "parallel__overlap_param_gather": True}
FUSED = {**BF16, "optimizer__master_weights": "split32", "optimizer__momentum_dtype": "int8"}
CASES: dict[str, dict[str, Any]] = {
    "lion": {},
    "lion, fused": {**FUSED, **OVERLAP},
    "lion, unsharded": {**BF16, "parallel__use_distributed_optimizer": False},
    "lion, TP2": {"parallel__tensor_model_parallel_size": 2},
    "lion, PP2": {"parallel__pipeline_model_parallel_size": 2},
    "sgd": {"optimizer__name": "sgd"},
    "adamw": {"optimizer__name": "adamw"},
    "bert": {},
}


class Blank:
    """A dataset whose samples first..last-1 count no token, as with a damaged index of samples."""

    def __init__(self, inner: Any, first: int, last: int) -> None:
        self.inner, self.first, self.last = inner, first, last

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, number: int) -> dict[str, Any]:
        item = dict(self.inner[number])
        if self.first <= number < self.last:
            item["loss_mask"] = item["loss_mask"] * 0
        return item


def everything(run: Any) -> dict[str, Any]:
    """Copies of every tensor and number that a step may change, on this rank."""
    from megatron_lion.train.run import sync_parameters

    sync_parameters(run.model)  # with overlap, the weights of the last step are gathered in the next forward pass only
    kept = {f"weight {name}": p.detach().clone() for name, p in run.model[0].named_parameters()}
    for number, (parameter, state) in enumerate(run.optimizer.inner.state.items()):
        kept[f"main {number}"] = parameter.detach().clone()
        kept.update({f"{key} {number}": value.clone() for key, value in state.items()})
    return kept


def uncounted_steps(rank: int, configs: dict[str, Any]) -> dict[str, Any]:
    """For each config three steps: a good one, one that counts nothing, and one in which only the last sample counts."""
    found = {}
    for name, config in configs.items():
        with tiny.opened_run(config) as run:
            run.datasets[0] = Blank(run.datasets[0], 8, 23)
            batches = run.train_batches()
            results, states = [tiny.step_once(run, batches)], [everything(run)]
            for _ in range(2):
                results.append(tiny.step_once(run, batches))
                states.append(everything(run))
            same = [
                all(
                    torch.equal(one[key].view(-1).view(torch.uint8), other[key].view(-1).view(torch.uint8))
                    for key in one
                )
                for one, other in itertools.pairwise(states)
            ]
            found[name] = {
                "skipped": [result.skipped for result in results],
                "uncounted": [result.uncounted for result in results],
                "losses": [result.loss for result in results],
                "same": same,
                "counters": run.optimizer.extra_state(),
            }
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uncounted")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> str:
    return tiny.write_corpus(folder / "corpus")


@pytest.fixture(scope="module")
def stepped(folder: Path, corpus: str) -> list[dict[str, Any]]:
    """Results of both ranks."""
    configs = {name: tiny.tiny_config(folder / name, corpus, **case) for name, case in CASES.items() if name != "bert"}
    configs["bert"] = tiny_bert.tiny_bert(folder / "bert", tiny_bert.write_bert_corpus(folder / "text"))
    return run_distributed(uncounted_steps, 2, configs)


@pytest.mark.parametrize("name", CASES)
def test_a_step_that_counts_nothing_changes_no_bit_on_any_rank(stepped: list[dict[str, Any]], name: str) -> None:
    # BERT counts its samples as well; without a masked token the first half of its loss is undefined.
    count = "num_masked" if name == "bert" else "num_tokens"
    for rank, results in enumerate(stepped):
        found = results[name]
        assert found["skipped"] == [False, True, False], rank
        assert found["uncounted"] == [None, count, None], rank
        assert found["same"] == [True, False], "the second step changes nothing, the third does"
        first, second, third = found["losses"]
        assert 0 < first < 10
        assert math.isnan(second), "not 0.0"
        assert 0 < third < 10, "one sample of one rank is enough"
        assert found["counters"] == {"num_steps": 2, "num_skipped": 1}


def run_with_blanks(rank: int, jobs: dict[str, tuple[Any, int, int, int]]) -> dict[str, tuple[str, str]]:
    """The error of `pretrain` for each (config, dataset, first, last): samples first..last-1 of a dataset count nothing."""
    from megatron_lion.train import loop

    build = loop.build_run
    found = {}
    for name, (config, which, first, last) in jobs.items():

        def build_blank(*args: Any, which: int = which, first: int = first, last: int = last, **kwargs: Any) -> Any:
            run = build(*args, **kwargs)
            if which == 3:
                assert run.probe_samples is not None
                blank = Blank(run.probe_samples.dataset, first, last)
                run.probe_samples = dataclasses.replace(run.probe_samples, dataset=blank)
            else:
                run.datasets[which] = Blank(run.datasets[which], first, last)
            return run

        loop.build_run = build_blank
        try:
            found[name] = tiny.error_of(tiny.train, config)
        finally:
            loop.build_run = build
    return found


@pytest.fixture(scope="module")
def jobs(folder: Path, corpus: str) -> dict[str, tuple[Any, int, int, int]]:
    def config(name: str, **changes: Any) -> Any:
        return tiny.tiny_config(folder / name, corpus, train__steps=6, checkpoint__every=2, **changes)

    return {
        "two": (config("two"), 0, 16, 32),
        "three": (config("three"), 0, 16, 40),
        "the last": (config("last"), 0, 40, 48),
        "valid": (config("valid", train__test_every=2), 1, 0, 99),
        "test": (config("test", train__test_every=2), 2, 0, 99),
        "probe": (config("probe", probe__every=2, probe__num_batches=2), 3, 0, 9999),
    }


@pytest.fixture(scope="module")
def errors(jobs: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Errors of both ranks by job."""
    first, second = run_distributed(run_with_blanks, 2, jobs)
    return {name: [first[name], second[name]] for name in first}


def test_two_such_steps_are_counted_and_the_run_goes_on(jobs: dict[str, Any], errors: dict[str, Any]) -> None:
    config = jobs["two"][0]
    assert errors["two"] == [("", ""), ("", "")]
    lines = tiny.read_metrics(config.run_dir)
    bad = [line for line in lines if "optim/uncounted" in line]
    assert [(line["step"], line["optim/uncounted"], line["optim/skipped_steps"]) for line in bad] == [
        (3, "num_tokens", 1),
        (4, "num_tokens", 2),
    ]
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    assert [step for step, loss in losses.items() if loss is None] == [3, 4]
    names = sorted(path.parent.name for path in Path(config.run_dir, "checkpoints").glob("*/manifest.json"))
    assert names == ["step_0000002", "step_0000005", "step_0000006"], "step 4 was skipped, 5 stands for it"


def test_three_in_a_row_end_the_run(jobs: dict[str, Any], errors: dict[str, Any]) -> None:
    from megatron_lion.runs.record import read_run

    for kind, message in errors["three"]:
        assert kind == "DataError", message
        assert message.startswith(
            "step 5: the loss counted nothing (num_tokens is 0 over the global batch) 3 times in a row"
        )
        assert message.endswith("The newest checkpoint is that of step 2: the same command resumes there")
    for kind, message in errors["the last"]:
        assert kind == "DataError"
        assert message.startswith("step 6: the loss counted nothing (num_tokens is 0 over the global batch) in 1 step")
        assert "checkpoint is that of step 4" in message
    for name in ("three", "the last"):
        record = read_run(jobs[name][0].run_dir)
        assert not record.finished
        assert not record.diverged, "the data is to blame"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("valid", "the valid split"),
        ("test", "the test split"),
        ("probe", "probe: the loss counts nothing in batch 1 of the training"),
    ],
)
def test_a_measurement_that_counts_nothing_names_its_split(errors: dict[str, Any], name: str, what: str) -> None:
    for kind, message in errors[name]:
        assert kind == "DataError", message
        assert what in message
        assert "num_tokens is 0" in message


def test_an_evaluation_without_a_token_names_the_text() -> None:
    from megatron_lion.evaluate.tasks import Task

    with pytest.raises(DataError, match=r"empty\.txt: the text has no token to score"):
        Task(conditions={"kind": "text", "text_path": "empty.txt"}, suffix="", segments=[], summarize=lambda _: {})


def test_a_gradient_of_exactly_zero_is_reported_once_in_a_row(caplog: pytest.LogCaptureFixture) -> None:
    from megatron_lion.train.health import Health
    from megatron_lion.train.step import TrainStep

    written: list[tuple[int, dict[str, Any]]] = []
    run = SimpleNamespace(step=0)
    metrics = SimpleNamespace(write=lambda step, values: written.append((step, values)))
    health = Health(run, metrics)
    for step, norm in enumerate([1.0, 0.0, 0.0, 2.0, 0.0], start=1):
        run.step = step
        health.judge(TrainStep(loss=0.0, grad_l2=norm, num_tokens=8, skipped=False))
    assert [step for step, _ in written] == [2, 5]
    assert "step 2: the gradient is exactly zero (loss 0)" in caplog.text
