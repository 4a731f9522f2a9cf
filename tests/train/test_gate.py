"""A step with a non-finite gradient is skipped on every rank and reported; a long series ends the run."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
from distributed import run_distributed

TP2 = {"parallel__tensor_model_parallel_size": 2}
PP2 = {"parallel__pipeline_model_parallel_size": 2}
UNSHARDED = {"parallel__use_distributed_optimizer": False}
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2 fp32": {},
    "DP2 bf16": {"train__precision": "bf16"},
    "DP2 unsharded bf16": {"train__precision": "bf16", **UNSHARDED},
    "TP2 fp32": TP2,
    "PP2 bf16": {"train__precision": "bf16", **PP2},
}
VALUES = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}
CASES = [(layout, value) for layout in LAYOUTS for value in VALUES if value == "nan" or "fp32" in layout]
CULPRIT = {True: "decoder.layers.1.mlp.linear_fc1.weight", False: "decoder.layers.1.self_attention.linear_proj.bias"}


class Poison:
    """An objective that writes a value into one gradient element of the last rank, after its last micro-batch.

    It acts in a hook on the gradient, like a fault in a backward kernel.
    """

    def __init__(self, inner: Any, value: float, name: str, rank: int) -> None:
        self.inner, self.value, self.name, self.rank = inner, value, name, rank
        self.armed = False

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.inner, attribute)

    def forward_step(self, batches: Any, model: Any) -> Any:
        return self.inner.forward_step(batches, model)

    def install(self, run: Any) -> None:
        from megatron_lion.optim.parameter_shards import named_global_parameters

        def poison(grad: Any) -> Any:
            if self.armed:
                grad = grad.clone()
                grad.view(-1)[5] = self.value
            return grad

        for chunk in run.model:
            for name, parameter in named_global_parameters(chunk):
                if name == self.name and run.ranks.rank == self.rank:
                    parameter.register_hook(poison)


def everything(run: Any) -> dict[str, Any]:
    """Copies of every tensor that a step may change, on this rank."""
    tensors = {f"weight {name}": p.detach().clone() for name, p in run.model[0].named_parameters()}
    for number, group in enumerate(run.optimizer.inner.param_groups):
        for place, parameter in enumerate(group["params"]):
            tensors[f"main {number} {place}"] = parameter.detach().clone()
            for key, value in run.optimizer.inner.state[parameter].items():
                tensors[f"{key} {number} {place}"] = value.detach().clone()
    return tensors


def poisoned_steps(rank: int, jobs: dict[str, Any]) -> dict[str, Any]:
    """For each job: one good step, one with a poisoned gradient, one good step again."""
    found = {}
    for key, (config, value, name) in jobs.items():
        with tiny.opened_run(config) as run:
            poison = Poison(run.objective, value, name, run.ranks.world_size - 1)
            poison.install(run)
            run.objective = poison
            batches = run.train_batches()
            good = tiny.step_once(run, batches)
            before = everything(run)
            poison.armed = True
            bad = tiny.step_once(run, batches)
            poison.armed = False
            after = everything(run)
            from megatron_lion.optim.nonfinite import nonfinite_gradients

            named = nonfinite_gradients(run.model)
            again = tiny.step_once(run, batches)
            moved = [name for name, tensor in everything(run).items() if not tensor.equal(after[name])]
            found[key] = {
                "skipped": [good.skipped, bad.skipped, again.skipped],
                "changed": [name for name in before if not tiny.same_bits(before[name], after[name])],
                "norms": [good.grad_l2, bad.grad_l2, again.grad_l2],
                "counted": run.optimizer.extra_state(),
                "named": named,
                "moved": len(moved),
            }
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gate")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> str:
    return tiny.write_corpus(folder / "corpus")


@pytest.fixture(scope="module")
def poisoned(folder: Path, corpus: str) -> list[dict[str, Any]]:
    """Results of both ranks."""
    jobs = {}
    for layout, value in CASES:
        number = list(VALUES).index(value)
        optimizer = ("lion", "sgd", "adamw")[number] if layout == "DP2 fp32" else "lion"
        config = tiny.tiny_config(folder / "run", corpus, optimizer__name=optimizer, **LAYOUTS[layout])
        jobs[f"{layout}/{value}"] = config, VALUES[value], CULPRIT[number % 2 == 0]
    return run_distributed(poisoned_steps, 2, jobs)


@pytest.mark.parametrize(("layout", "value"), CASES)
def test_step_is_skipped_on_all_ranks_and_changes_no_bit(
    poisoned: list[dict[str, Any]], layout: str, value: str
) -> None:
    for rank, results in enumerate(poisoned):
        found = results[f"{layout}/{value}"]
        assert found["skipped"] == [False, True, False], rank
        assert found["changed"] == [], rank
        assert found["moved"] > 0, "the next step must update"
        good, bad, again = found["norms"]
        assert 0 < good < 100
        assert not (abs(bad) < float("inf"))
        assert 0 < again < 100
        assert found["counted"]["num_skipped"] == 1
        assert found["counted"]["num_steps"] == 2


@pytest.mark.parametrize(("layout", "value"), CASES)
def test_culprit_is_named(poisoned: list[dict[str, Any]], layout: str, value: str) -> None:
    name = CULPRIT[list(VALUES).index(value) % 2 == 0]
    named = [item for results in poisoned for item in results[f"{layout}/{value}"]["named"]]
    assert f"{name}[5]" in named
    assert all(item.startswith(name) for item in named)


def poisoned_run(rank: int, config: Any, first_bad: int, count: int, stop_at: int = 0) -> tuple[str, str]:
    """Runs `pretrain` with NaN gradients at `count` steps, starting with step `first_bad`.

    The last rank gets SIGTERM in step `stop_at`.
    """
    from megatron_lion.train import loop

    build, take_step = loop.build_run, loop.train_step
    poison = Poison(None, float("nan"), CULPRIT[True], 1)

    def build_poisoned(*args: Any, **kwargs: Any) -> Any:
        run = build(*args, **kwargs)
        poison.install(run)
        poison.run = run
        return run

    def step(*args: Any, **kwargs: Any) -> Any:
        poison.armed = first_bad <= poison.run.step + 1 < first_bad + count
        if poison.run.step + 1 == stop_at and rank == poison.run.ranks.world_size - 1:
            signal.raise_signal(signal.SIGTERM)
        try:
            return take_step(*args, **kwargs)
        finally:
            poison.armed = False  # a probe or a trial of the state is no training step

    loop.build_run, loop.train_step = build_poisoned, step
    try:
        return tiny.error_of(tiny.train, config)
    finally:
        loop.build_run, loop.train_step = build, take_step


def test_a_few_bad_steps_are_counted_and_the_run_goes_on(folder: Path, corpus: str) -> None:
    config = tiny.tiny_config(folder / "few", corpus, train__steps=6)
    assert run_distributed(poisoned_run, 2, config, 3, 2) == [("", ""), ("", "")]
    lines = tiny.read_metrics(config.run_dir)
    bad = [line for line in lines if "optim/nonfinite_gradient" in line]
    assert [line["step"] for line in bad] == [3, 4]
    assert [line["optim/skipped_steps"] for line in bad] == [1, 2]
    assert f"first in {CULPRIT[True]}[5], seen on ranks [0, 1]" in bad[0]["optim/nonfinite_gradient"]
    assert [line["optim/grad_l2"] is None for line in lines if "train/loss" in line] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]
    manifest = tiny.outcome(config.run_dir)["manifest"]
    assert manifest["step"] == 6
    assert manifest["consumed_samples"] == 48, "the samples of a skipped step are not read again"
    assert manifest["optimizer_state"]["num_skipped"] == 2


def test_three_bad_steps_in_a_row_end_the_run(folder: Path, corpus: str) -> None:
    config = tiny.tiny_config(folder / "many", corpus, train__steps=20, checkpoint__every=2)
    for kind, message in run_distributed(poisoned_run, 2, config, 4, 99):
        assert kind == "NumericsError", message
        assert "step 6: gradients were NaN or infinite 3 times in a row" in message
        assert f"first in {CULPRIT[True]}[5], seen on ranks [0, 1]" in message
        assert message.endswith("The newest checkpoint is that of step 2: the same command resumes there")
    assert saved(config) == [2], "a skipped step is not saved"


def saved(config: Any) -> list[int]:
    """Steps of the checkpoints in a run's folder."""
    return sorted(
        int(path.parent.name[5:]) for path in Path(config.run_dir, "checkpoints").glob("step_*/manifest.json")
    )


def test_a_save_that_falls_on_a_skipped_step_is_made_after_the_next_step_that_is_taken(
    folder: Path, corpus: str
) -> None:
    settings = {"train__steps": 9, "checkpoint__every": 2, "checkpoint__keep": 1, "checkpoint__at_steps": [3]}
    config = tiny.tiny_config(folder / "late", corpus, **settings)
    assert run_distributed(poisoned_run, 2, config, 3, 2) == [("", ""), ("", "")]
    # 3 and 4 are skipped; 5 stands for both and is kept like the chosen step 3; 9 is the last; 8 is the newest periodic.
    assert saved(config) == [5, 8, 9]


def test_a_stop_within_skipped_steps_is_saved_after_the_next_step_that_is_taken(folder: Path, corpus: str) -> None:
    config = tiny.tiny_config(folder / "stopped", corpus, train__steps=9)
    for kind, message in run_distributed(poisoned_run, 2, config, 3, 2, 3):
        assert kind == "StoppedOnRequest"
        assert message.startswith("stopped after step 5 of 9, checkpoint saved")
    assert saved(config) == [5]
    config = tiny.tiny_config(folder / "stop_after", corpus, train__steps=9, train__stop_after=3)
    assert run_distributed(poisoned_run, 2, config, 3, 2) == [("", ""), ("", "")]
    assert saved(config) == [5]


def test_a_stop_within_skipped_steps_that_do_not_end_saves_nothing(folder: Path, corpus: str) -> None:
    config = tiny.tiny_config(folder / "never", corpus, train__steps=9)
    for kind, message in run_distributed(poisoned_run, 2, config, 3, 99, 3):
        assert kind == "NumericsError"
        assert message.startswith("step 5: gradients were NaN or infinite 3 times in a row")
        assert message.endswith("There is no checkpoint: the same command starts at step 0")
    assert saved(config) == []


def test_a_run_whose_last_step_is_skipped_is_not_saved_and_not_finished(folder: Path, corpus: str) -> None:
    from megatron_lion.runs.record import read_run

    config = tiny.tiny_config(folder / "last", corpus, train__steps=5, checkpoint__every=3)
    for kind, message in run_distributed(poisoned_run, 2, config, 5, 1):
        assert kind == "NumericsError"
        assert message.startswith("step 5: gradients were NaN or infinite in 1 step (first in")
        assert message.endswith("The newest checkpoint is that of step 3: the same command resumes there")
    assert saved(config) == [3]
    record = read_run(config.run_dir)
    assert record.diverged
    assert not record.finished
    assert run_distributed(poisoned_run, 2, config, 99, 0) == [("", ""), ("", "")], "without the fault it ends"
    assert saved(config) == [3, 5]
    record = read_run(config.run_dir)
    assert record.finished
    assert not record.diverged


def fp16_run(rank: int, config: Any) -> tuple[str, str]:
    """Runs `pretrain` in fp16 with an overflow in its last step, from a loss scale at which no other step overflows."""
    from megatron_lion.train import loop

    build = loop.build_run

    def build_scaled(*args: Any, **kwargs: Any) -> Any:
        run = build(*args, **kwargs)
        scaler = {"scale": 256.0, "growth_tracker": 0, "hysteresis_tracker": 2}
        run.optimizer.load_extra_state({**run.optimizer.extra_state(), "grad_scaler": scaler})
        return run

    loop.build_run = build_scaled
    try:
        return poisoned_run(rank, config, config.train.steps, 1)
    finally:
        loop.build_run = build


def test_an_fp16_run_whose_last_step_overflows_is_saved_with_a_warning(folder: Path, corpus: str) -> None:
    config = tiny.tiny_config(folder / "fp16-last", corpus, train__precision="fp16", train__steps=3)
    assert run_distributed(fp16_run, 2, config) == [("", ""), ("", "")]
    assert saved(config) == [3]
    manifest = json.loads(Path(config.run_dir, "checkpoints", "step_0000003", "manifest.json").read_text())
    assert manifest["optimizer_state"]["num_steps"] == 2
    log = next(Path(config.run_dir, "log").iterdir()).read_text()
    assert "the last 1 step(s) overflowed the loss scale and changed nothing" in log
    assert all(bool(tensor.isfinite().all()) for tensor in tiny.read_weights(config.run_dir, 3, prefix="").values())


def fp16_steps(rank: int, config: Any) -> list[dict[str, Any]]:
    """A good step, two that overflow, a good one: the second overflow in a row halves the scale (hysteresis 2)."""
    with tiny.opened_run(config) as run:
        batches = run.train_batches()
        poison = Poison(run.objective, float("inf"), CULPRIT[True], 1)
        poison.install(run)
        run.objective = poison
        # The scale is loaded as in a resumed run.
        scaler = {"scale": 256.0, "growth_tracker": 0, "hysteresis_tracker": 2}
        run.optimizer.load_extra_state({**run.optimizer.extra_state(), "grad_scaler": scaler})
        found = []
        for armed in (False, True, True, False):
            before = everything(run)
            poison.armed = armed
            result = tiny.step_once(run, batches)
            changed = [name for name, tensor in everything(run).items() if not tiny.same_bits(before[name], tensor)]
            scale = run.optimizer.extra_state()["grad_scaler"]
            found.append(
                {
                    "skipped": result.skipped,
                    "changed": len(changed),
                    "loss": result.loss,
                    "norm": result.grad_l2,
                    **scale,
                }
            )
        return found


@pytest.mark.parametrize("sharded", [True, False])
def test_fp16_overflow_skips_and_lowers_the_loss_scale(folder: Path, corpus: str, sharded: bool) -> None:
    config = tiny.tiny_config(
        folder / "fp16", corpus, train__precision="fp16", parallel__use_distributed_optimizer=sharded
    )  # fmt: skip
    for steps in run_distributed(fp16_steps, 2, config):
        assert [step["skipped"] for step in steps] == [False, True, True, False]
        assert [step["changed"] > 0 for step in steps] == [True, False, False, True]
        assert [step["scale"] for step in steps] == [256, 256, 128, 128]
        assert all(4 < step["loss"] < 6 for step in steps), "the logged loss is not scaled"
        assert 0.1 < steps[0]["norm"] < 10, "the logged norm is not scaled"


def test_an_fp16_run_on_a_cpu_takes_its_first_steps(folder: Path, corpus: str) -> None:
    """The first loss scale fits a loss that is a sum over the tokens of a micro-batch, small or large."""
    configs = {
        (optimizer, size): tiny.tiny_config(
            folder / f"fp16 {optimizer} {size}", corpus, train__precision="fp16", train__micro_batch_size=size, train__steps=3,
            optimizer__name=optimizer,
        )
        for optimizer in ("lion", "sgd")
        for size in (1, 8)
    }  # fmt: skip
    for (_, size), outcome in run_distributed(tiny.train_each, 1, configs)[0].items():
        assert outcome["manifest"]["optimizer_state"]["num_skipped"] == 0
        assert outcome["manifest"]["optimizer_state"]["grad_scaler"]["scale"] == 2**8 / size
