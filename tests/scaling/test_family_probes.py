"""The batches that reach a noise share, what a probe result gives of a part, and which steps are made again."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from probe_contents import content, write_checkpoint, write_probe

from megatron_lion.errors import ConfigError, StoppedOnRequest
from megatron_lion.reproduce.sources import Sources
from megatron_lion.scaling.family import Family, family_of
from megatron_lion.scaling.family_steps import run_family, run_folder
from megatron_lion.scaling.measure import longest_probe, measurement, next_batches


def share(n: float, population: float, signal: float, variance: float) -> float:
    """Expected share of noise in the squared norm of the mean of n of N batches."""
    left = variance * (1 / n - 1 / population)
    return left / (signal + left)


@pytest.mark.parametrize("population", [1000, 100_000])
@pytest.mark.parametrize("variance", [10.0, 100.0])
def test_the_next_probe_reaches_the_share(population: int, variance: float) -> None:
    made = content(population=8 * population, share=0.5, variance=variance)
    n = next_batches(made, 0.05, "all")
    assert isinstance(n, int)
    assert share(n, population, 1.0, variance) <= 0.05
    assert n % 8 == 0
    assert n <= 48 or share(n / 1.25, population, 1.0, variance) > 0.05, "not many more than needed"


@pytest.mark.parametrize(
    ("changes", "most", "expected"),
    [
        ({"share": 0.05}, 256, None),  # reached
        ({"share": 0.5, "variance": 1e4}, 256, 256),  # too many
        ({"share": 0.5, "num_batches": 256}, 256, None),  # nothing more is allowed
        ({"share": 0.5, "variance": 1e9}, "all", "all"),
        ({"share": 0.5, "variance": 1e9}, 5000, "all"),  # the data set has 1000
        ({"share": 0.9, "signal": -1.0}, 512, 512),  # the signal is not resolved
        ({"share": 0.0, "num_batches": 1000}, "all", None),  # all were read
        ({"share": 0.06, "variance": 1.0}, 256, 48),  # half as many again at least
    ],
)
def test_limits_of_the_next_probe(changes: dict[str, Any], most: Any, expected: Any) -> None:
    assert next_batches(content(**changes), 0.05, most) == expected


def test_parts_have_their_own_d_and_bounds() -> None:
    plain = measurement(content(ratio=60.0, low=40.0, high=66.0))
    assert [plain.parts[name].d for name in ("all", "without_embeddings", "embeddings")] == [10_000, 5000, 5000]
    assert [plain.parts[name].ratio for name in ("all", "without_embeddings", "embeddings")] == [60.0, 30.0, 20.0]
    assert (plain.parts["all"].low, plain.parts["all"].high, plain.parts["all"].source) == (40.0, 66.0, "bounds")
    assert plain.parts["embeddings"].low is None
    assert plain.parts["embeddings"].ratio_error == pytest.approx(0.4), "the whole model's 2 %"
    part = {"num_parameters": 5000, "norm_ratio_low": 25.0, "norm_ratio_high": 31.0, "norm_ratio_noise": 56.0}
    unresolved = part | {"norm_ratio_low": None, "norm_ratio_high": None}
    by_part = {"without_embeddings": part, "kinds": {"embedding": unresolved}}
    found = measurement(content(ratio=60.0, low=40.0, high=66.0, noise_ratio=70.0, by_part=by_part)).parts
    assert (found["all"].low, found["all"].noise_ratio) == (40.0, 70.0)
    inner = found["without_embeddings"]
    assert (inner.low, inner.high, inner.noise_ratio, inner.source) == (25.0, 31.0, 56.0, "bounds")
    assert found["embeddings"].low is None


def test_all_samples_leave_no_noise_in_any_part() -> None:
    found = measurement(content(num_batches=1000, share=0.0, ratio=60.0))
    assert found.passes == 1.0
    for part in found.parts.values():
        assert (part.low, part.high, part.source) == (part.ratio, part.ratio, "exact")


def test_the_result_of_most_batches_counts(tmp_path: Path) -> None:
    write_probe(tmp_path, content(400, num_batches=32, ratio=50.0))
    write_probe(tmp_path, content(400, num_batches=96, ratio=45.0), name="-96-fixed")
    found = longest_probe(tmp_path, 400)
    assert found is not None
    assert (found["num_batches"], found["all"]["norm_ratio"]) == (96, 45.0)
    assert longest_probe(tmp_path, 200) is None


class FakeJobs:
    """Jobs that write the files of the subcommands instead of running them."""

    def __init__(self, shares: dict[int, float], stop_at: int | None = None) -> None:
        self.ran: list[tuple[str, list[str]]] = []
        self.shares, self.stop_at, self.asked = shares, stop_at, False

    def run(self, verb: str, words: list[str], processes: int = 1, stdout: Any = None) -> int:
        if self.stop_at == len(self.ran):
            self.asked = True
            return 75
        self.ran.append((verb, words))
        if verb == "tokenizer":
            folder = Path(words[words.index("--output") + 1])
            folder.mkdir(parents=True)
            (folder / "merges.txt").touch()
        elif verb == "pretrain":
            self._train(Path(words[words.index("--run_dir") + 1]), dict(itertools.pairwise(words)))
        elif verb == "probe":
            folder, number = Path(words[0]), int(words[words.index("--num-batches") + 1])
            for step in map(int, words[words.index("--steps") + 1].split(",")):
                made = content(step, num_batches=number, share=self.shares.get(number, 0.01), variance=100.0)
                write_probe(folder, made, name=f"-{number}-fixed")
        return 0

    def _train(self, folder: Path, flags: dict[str, str]) -> None:
        settings = {
            "optimizer": {"name": flags["--optimizer.name"], "lr": float(flags["--optimizer.lr"]),
                          "weight_decay": float(flags["--optimizer.weight_decay"])},
            "train": {"steps": int(flags["--train.steps"])},
            "model": {"hidden_size": int(flags["--model.hidden_size"]), "num_attention_heads":
                      int(flags["--model.num_attention_heads"])},
        }  # fmt: skip
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        for step in (0, 200, 400):
            write_probe(folder, content(step, share=self.shares[32] if step else 0.01, variance=100.0))
            if step:
                write_checkpoint(folder, step)


def small(**given: Any) -> Family:
    return family_of({"widths": "32,64", "seeds": "1", "optimizers": "lion", "noise_share": 0.05, **given}, "tiny")


def sources(tmp_path: Path) -> Sources:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "words"}\n')
    return Sources((str(text),), None, None, None, tmp_path / "out")


def test_what_exists_is_not_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, wanted = sources(tmp_path), small()
    first: Any = FakeJobs({32: 0.5})
    run_family(wanted, given, first)
    assert [verb for verb, _ in first.ran] == ["tokenizer", "prepare", "pretrain", "probe", "pretrain", "probe"]
    assert "[3/6] lion-w32-l4-seed1" in capsys.readouterr().err
    probes = [words for verb, words in first.ran if verb == "probe"]
    assert all("200,400" in words for words in probes), "steps of equal batches share a process"
    again: Any = FakeJobs({32: 0.5})
    run_family(wanted, given, again)
    assert [verb for verb, _ in again.ran] == ["prepare"], "which compares the text with its token files"
    more: Any = FakeJobs({32: 0.04})
    run_family(small(widths="32,48,64"), given, more)
    assert [verb for verb, _ in more.ran] == ["prepare", "pretrain"]


def test_a_probe_that_is_still_too_noisy_is_followed_by_a_longer_one(tmp_path: Path) -> None:
    jobs: Any = FakeJobs({32: 0.5, 256: 0.2})
    run_family(small(max_batches=256), sources(tmp_path), jobs)
    counts = [words[words.index("--num-batches") + 1] for verb, words in jobs.ran if verb == "probe"]
    assert counts == ["256", "256"], "one for each run, and no more than allowed"


def test_a_stop_ends_the_family_and_the_same_command_continues(tmp_path: Path) -> None:
    given = sources(tmp_path)
    jobs: Any = FakeJobs({32: 0.5}, stop_at=3)
    with pytest.raises(StoppedOnRequest, match="the same command continues there"):
        run_family(small(), given, jobs)
    rest: Any = FakeJobs({32: 0.5})
    run_family(small(), given, rest)
    assert [verb for verb, _ in rest.ran] == ["prepare", "probe", "pretrain", "probe"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lr": "lion=1e-3"}, "optimizer.lr 0.0012, now 0.004"),
        ({"steps": 800}, "train.steps 400, now 800"),
        ({"head_size": 32}, "model.num_attention_heads 2, now 1"),
        ({"measure_at": "0,100,400"}, "without probes and checkpoints at all of 0, 100, 400"),
    ],
)
def test_runs_of_other_settings_are_not_taken_for_these(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    given = sources(tmp_path)
    done: Any = FakeJobs({32: 0.04})
    run_family(small(), given, done)
    ran = len(done.ran)

    def run(verb: str, words: list[str], processes: int = 1, stdout: Any = None) -> int:
        return 0  # a finished run has nothing to do

    done.run = run
    with pytest.raises(ConfigError, match=reason):
        run_family(small(**changes), given, done)
    assert len(done.ran) == ran
    assert run_folder(small().runs()[0], given.output).is_dir()


def test_another_text_is_refused(tmp_path: Path) -> None:
    given = sources(tmp_path)
    jobs: Any = FakeJobs({32: 0.04})
    run_family(small(), given, jobs)
    Path(given.text[0]).write_text('{"text": "other words"}\n')
    with pytest.raises(ConfigError, match="from other text"):
        run_family(small(), given, jobs)
