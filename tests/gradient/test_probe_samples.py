"""The samples of a probe: fixed, fresh or of the test split, and enough of them."""

from __future__ import annotations

import pytest
from distributed import run_distributed
from probe_cases import probe_config
from tiny import error_of, opened_run, write_corpus

from megatron_lion.data.probe_samples import ProbeSamples


def sample_ids_of(rank, configs):
    """Work of one process: tokens of the samples that probes at steps 0, 1 and 0 read, or the error."""
    found = {}
    for name, config in configs.items():
        name_of_error, message = error_of(open_and_close, config)
        if name_of_error:
            found[name] = (name_of_error, message)
            continue
        with opened_run(config) as run:
            reads = []
            for step in (0, 1, 0):
                run.step = step
                reads.append([tuple(row.tolist()) for batch in run.probe_batches() for row in batch["tokens"]])
            found[name] = reads
    return found


def open_and_close(config):
    with opened_run(config):
        pass


@pytest.fixture(scope="module")
def samples(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("samples")
    second = write_corpus(folder / "second", seed=1, documents=100)
    cases = {
        "fixed": {},
        "fresh": {"probe__data": "fresh"},
        "test": {"probe__data": "test", "probe__num_batches": 2},
        "too many": {"probe__num_batches": 1000},
        "too many of the test split": {"probe__data": "test", "probe__num_batches": 1000},
        "fresh blend": {"probe__data": "fresh", "data__path": [corpus, second], "data__weights": [0.5, 0.5]},
        "too many of a blend": {"probe__num_batches": 60, "data__path": [corpus, second], "data__weights": [0.5, 0.5]},
    }
    return run_distributed(sample_ids_of, 1, {n: probe_config(folder / n, corpus, **c) for n, c in cases.items()})[0]


def test_fixed_samples_are_the_same_every_time(samples):
    first, second, again = samples["fixed"]
    assert first == second == again
    assert len(set(first)) == 24, "no sample comes twice"


@pytest.mark.parametrize("case", ["fresh", "fresh blend"])
def test_fresh_samples_differ_from_step_to_step_and_repeat_for_a_step(samples, case):
    first, second, again = samples[case]
    assert first == again != second
    assert len(set(first)) == len(set(second)) == 24


def test_test_split_is_not_the_training_data(samples):
    assert len(samples["test"][0]) == 16
    assert not set(samples["test"][0]) & set(samples["fixed"][0])


@pytest.mark.parametrize("case", ["too many", "too many of the test split", "too many of a blend"])
def test_probe_larger_than_the_data_says_how_many_batches_there_are(samples, case):
    kind, message = samples[case]
    assert kind == "ConfigError"
    assert "probe.num_batches" in message
    most = int(message.split("at most ")[1].split(" ")[0].replace(",", ""))
    tokens = {"too many": 0.8 * 7000, "too many of the test split": 0.1 * 7000, "too many of a blend": 0.8 * 2 * 3500}[
        case
    ]
    assert 0.8 * tokens / 16 / 8 - 1 <= most <= 1.2 * tokens / 16 / 8, message


def test_one_batch_less_than_refused_is_accepted(tmp_path, corpus, samples):
    most = int(samples["too many"][1].split("at most ")[1].split(" ")[0])
    configs = {str(n): probe_config(tmp_path / str(n), corpus, probe__num_batches=n) for n in (most, most + 1)}
    found = run_distributed(sample_ids_of, 1, configs)[0]
    assert len(set(found[str(most)][0])) == len(found[str(most)][0]) == 8 * most
    assert found[str(most + 1)][0] == "ConfigError"


def test_fresh_samples_are_one_pass_that_begins_elsewhere():
    """Sample k of the probe is sample start + k of the shuffled data, and the pass continues at the first sample after the last."""
    samples = ProbeSamples(list("abcdefg"), 7, seed=5, num_batches=1, num_samples=3, population=7)
    starts = set()
    for step in range(30):
        view = samples.at(step)
        read = [view[index] for index in range(len(view))]
        start = read[0]
        at = "abcdefg".index(start)
        assert "".join(read) == "abcdefgabcdefg"[at : at + 7]
        starts.add(start)
    assert len(starts) > 3
