"""LION's precision modes train GPT-2 inside DistributedOptimizer, and each mode loads the checkpoints of all others.

Exact modes must equal an fp32 master bit for bit. A split master rounds its bf16 copy half up, Megatron's shards and the
fp32 master round to nearest even. So the reference for split masters is an fp32 master whose copy is rounded half up.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from distributed import run_distributed
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lion.config import CheckpointConfig

OVERLAP = {"parallel__overlap_grad_reduce": True, "parallel__overlap_param_gather": True}
LAYOUTS = {**tiny.LAYOUTS, "DP2 overlap": (2, OVERLAP)}
# The rate is a power of two: many norms and biases, which do not decay, are then half-way between two bf16 numbers. The
# matrices, which decay, need all their bits.
TIES = {
    "optimizer__lr": 2.0**-10, "optimizer__weight_decay": 0.1, "schedule__kind": "constant", "schedule__warmup_steps": 0,
    "train__precision": "bf16",
}  # fmt: skip
PADDED = {"model__hidden_size": 36, "model__vocab_size": 100, "model__make_vocab_size_divisible_by": 4}
EXACT = ("shards/fp32", "fp32/fp32", "split32/fp32")
REDUCED = ("split24/fp32", "split32/bf16", "split24/int8")
MODES = (*EXACT, *REDUCED)

FIRST, LATER = ("DP2", "TP2", "DP2 overlap"), ("DP4", "PP2")
"""Layouts of the fast and of the slow tests."""

Runs = Callable[[str], dict[str, Any]]


def mode(name: str) -> dict[str, Any]:
    master_weights, momentum = name.split("/")
    return {"optimizer__master_weights": master_weights, "optimizer__momentum_dtype": momentum}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("modes")


def train_with_copies_rounded_half_up(rank: int, configs: dict[str, Any]) -> dict[str, Any]:
    """Runs `tiny.train_each` in a process whose fp32 masters round their bf16 copies as split masters do."""
    from megatron_lion.optim import cpp
    from megatron_lion.optim.layouts import PackedLayout
    from megatron_lion.optim.precision import split_master

    encode = PackedLayout.encode
    cpp.library.is_built = lambda: (
        False
    )  # the C++ step, which auto takes if it is compiled already, does not call `encode`

    def half_up(layout: Any, param: Any, state: Any, name: str, value: Any) -> None:
        encode(layout, param, state, name, value)
        if name == "master_param" and layout.master_weights == "fp32" and param.dtype == torch.bfloat16:
            param.copy_(split_master(state[name], "split32")[0])

    PackedLayout.encode = half_up
    return tiny.train_each(rank, configs)


@pytest.fixture(scope="module")
def runs(folder: Path) -> Runs:
    """ "LAYOUT MODE": outcome of five steps; mode "half up" is the fp32 master with copies rounded half up.

    The argument is the layout; those that the fast tests need run together, as those of the slow tests do.
    """
    corpus = tiny.write_corpus(folder / "corpus")

    @functools.cache
    def of(group: tuple[str, ...]) -> dict[str, Any]:
        jobs: dict[str, tuple[int, Any]] = {}
        half_up: dict[str, tuple[int, Any]] = {}
        for layout in group:
            size, changes = LAYOUTS[layout]
            reduced = REDUCED if layout in ("DP2", "DP4") else REDUCED[-1:]
            for name in (*EXACT, *reduced, "half up"):
                settings = {**TIES, **mode("fp32/fp32" if name == "half up" else name), **changes}
                config = tiny.tiny_config(folder / f"{layout} {name.replace('/', '-')}", corpus, **settings)
                (half_up if name == "half up" else jobs)[f"{layout} {name}"] = size, config
        return {**tiny.run_all(jobs), **tiny.run_all(half_up, train_with_copies_rounded_half_up)}

    return lambda layout: of(LATER if layout in LATER else FIRST)


LAYOUTS_THAT_RUN = [*FIRST, *(pytest.param(layout, marks=pytest.mark.slow) for layout in LATER)]


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for key in ("losses", "norms"):
        assert one[key] == other[key], key
    for key in ("state_fingerprint", "weights_fingerprint"):
        assert one["manifest"][key] == other["manifest"][key], key


@pytest.mark.parametrize("layout", LAYOUTS_THAT_RUN)
def test_exact_modes_are_the_fp32_master_bit_for_bit(runs: Runs, layout: str) -> None:
    found = runs(layout)
    assert_same(found[f"{layout} fp32/fp32"], found[f"{layout} shards/fp32"])
    assert_same(found[f"{layout} split32/fp32"], found[f"{layout} half up"])
    apart = found[f"{layout} split32/fp32"]["losses"][-1] - found[f"{layout} fp32/fp32"]["losses"][-1]
    assert apart != 0, "the test needs ties"
    assert abs(apart) < 5e-3


@pytest.mark.parametrize("layout", LAYOUTS_THAT_RUN)
def test_reduced_modes_keep_near(runs: Runs, layout: str) -> None:
    reference = runs(layout)[f"{layout} half up"]
    for name in REDUCED if layout in ("DP2", "DP4") else REDUCED[-1:]:
        losses = runs(layout)[f"{layout} {name}"]["losses"]
        assert losses[0] == reference["losses"][0]
        assert losses != reference["losses"], "something was rounded"
        # A sign that flips moves a weight by 2η = 2^-9, as a tie does; a wrong step would change the loss by tenths.
        assert max(abs(a - b) for a, b in zip(losses, reference["losses"], strict=True)) < 5e-3


def test_overlapped_communication_changes_nothing(runs: Runs) -> None:
    for name in (*EXACT, "split24/int8"):
        assert_same(runs("DP2 overlap")[f"DP2 overlap {name}"], runs("DP2")[f"DP2 {name}"])


class ReadOnTheHost(TorchDispatchMode):
    """Counts values that the host reads from the device; on CUDA each would make it wait."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def read_by_the_norm(rank: int, config: Any) -> tuple[int, bool]:
    """Returns (number of values that the gradient's norm reads on the host, whether it equals upstream's norm)."""
    with tiny.opened_run(config) as run:
        tiny.step_once(run, run.train_batches())
        megatron = run.optimizer.megatron
        megatron.prepare_grads()
        with ReadOnTheHost() as reads:
            norm = megatron.step_scalars(1.0).norm
        return reads.count, float(norm) == megatron.get_grad_norm()


@pytest.mark.parametrize("layout", ["DP2", "TP2"])
def test_nothing_waits_for_the_norm(folder: Path, layout: str) -> None:
    corpus = tiny.write_corpus(folder / "corpus-norm")
    size, changes = LAYOUTS[layout]
    config = tiny.tiny_config(folder / "norm", corpus, **TIES, **mode("split32/fp32"), **changes)
    assert run_distributed(read_by_the_norm, size, config) == [(0, True)] * size


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_five_hundred_steps(folder: Path) -> None:
    """Exact modes: every loss bit for bit. Reduced: the mean of the last 100 steps within 0.2 % of the loss decrease."""
    corpus = tiny.write_corpus(folder / "corpus-500", documents=400)
    small = {
        "model__num_layers": 1, "model__hidden_size": 16, "model__num_attention_heads": 2, "train__steps": 500,
        "train__precision": "bf16", "optimizer__weight_decay": 0.1,
    }  # fmt: skip
    configs = {
        name: tiny.tiny_config(
            folder / f"500-{name.replace('/', '-')}", corpus, train__global_batch_size=2, **small, **mode(name)
        )
        for name in ("fp32/fp32", "split32/fp32", "split24/int8", "split32/bf16")
    }
    found = run_distributed(train_with_copies_rounded_half_up, 2, configs, timeout_s=800)[0]
    losses = {name: torch.tensor(outcome["losses"], dtype=torch.float64) for name, outcome in found.items()}
    exact = losses.pop("fp32/fp32")
    assert len(exact) == 500
    gained = exact[:10].mean() - exact[-100:].mean()
    assert gained > 0.5
    for name, series in losses.items():
        if name == "split32/fp32":
            assert torch.equal(series, exact)
            assert_same(found[name], found["fp32/fp32"])
        else:
            assert not torch.equal(series, exact)
            assert abs(series[-100:].mean() - exact[-100:].mean()) < 2e-3 * gained, name


def replicas_agree(run: Any) -> bool:
    """Returns whether all data-parallel ranks hold the same weights."""
    mine = torch.cat([param.detach().view(-1).view(torch.int16) for param in run.model[0].parameters()]).to(torch.int32)
    largest, smallest = mine.clone(), mine.clone()
    group = run.model[0].dp_group
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
    torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN, group=group)
    return torch.equal(largest, smallest)


def save_after_two_steps(rank: int, jobs: dict[str, Any]) -> dict[str, int]:
    """Takes two steps and saves a checkpoint in each layout; returns the padding of this rank's buckets, in elements."""
    from megatron_lion.train.run import save_run

    padding = {}
    for name, config in jobs.items():
        with tiny.opened_run(config) as run:
            batches = run.train_batches()
            for _ in range(2):
                assert not tiny.step_once(run, batches).skipped
            for layout in ("fully_reshardable", "dp_reshardable"):
                run.config = dataclasses.replace(
                    config, run_dir=f"{config.run_dir}-{layout}", checkpoint=CheckpointConfig(every=0, layout=layout)
                )
                save_run(run)
            buckets = [bucket for buffer in run.optimizer.megatron.buffers for bucket in buffer.buckets]
            padding[name] = sum(bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buckets)
    return padding


def load_and_save(rank: int, jobs: dict[str, Any]) -> dict[str, tuple[bool, float]]:
    """Loads a checkpoint in another mode and layout, saves it again, takes a step; returns (replicas agree, loss)."""
    from megatron_lion.runs.steps import open_checkpoint, step_folder
    from megatron_lion.train.restore import restore_run
    from megatron_lion.train.run import save_run

    found = {}
    for name, (source, config) in jobs.items():
        with tiny.opened_run(config) as run:
            restore_run(run, open_checkpoint(step_folder(Path(source), 2)))
            agree = replicas_agree(run)
            save_run(run)
            found[name] = agree, tiny.step_once(run, run.train_batches()).loss
    return found


def near(kept: torch.Tensor, saved: torch.Tensor, form: str, layout: str) -> bool:
    """Returns whether `kept` is `saved` rounded to a form. The bounds are those of tests/optim/test_precision.py.

    `form` is "" if nothing is rounded; `layout` is that of `kept`.
    """
    kept, saved = kept.double().view(-1), saved.double().view(-1)
    apart = (kept - saved).abs()
    if form == "split24":
        return bool((apart <= 2.0**-16 * saved.abs().clamp(min=2.0**-126)).all())
    if form == "bf16":
        return bool((apart <= 2.0**-8 * saved.abs()).all())
    if form == "int8":  # half a step of the block's maximum, for any block that holds the element
        reach = torch.nn.functional.max_pool1d(saved.abs()[None, None], 63, stride=1, padding=31)[0, 0]
        if layout == "TP2":  # other elements are neighbours there
            reach = saved.abs().max()
        return bool((apart <= reach * 0.502 / 127).all())
    return torch.equal(kept, saved)


@pytest.fixture(scope="module")
def saved(folder: Path) -> tuple[str, dict[str, Any]]:
    """A corpus, and the settings with which every mode saved folder/MODE-LAYOUT/checkpoints at step 2, at DP2."""
    corpus = tiny.write_corpus(folder / "corpus-100", vocab_size=100)
    settings = {**TIES, **PADDED, "train__steps": 3}
    jobs = {name: (2, tiny.tiny_config(folder / file_name(name), corpus, **settings, **mode(name))) for name in MODES}
    assert min(tiny.run_all(jobs, save_after_two_steps).values()) > 0, "the test needs padded buckets"
    return corpus, settings


def file_name(text: str) -> str:
    return text.replace("/", "-")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("layout", "quarters"),
    [
        ("fully_reshardable", (0,)),
        pytest.param("fully_reshardable", (1, 2, 3), marks=pytest.mark.slow),
        pytest.param("dp_reshardable", (0, 2), marks=pytest.mark.slow),
    ],
    ids=["fully_reshardable-quarter", "fully_reshardable-others", "dp_reshardable"],
)
def test_checkpoints_cross_modes_and_layouts(
    folder: Path, saved: tuple[str, dict[str, Any]], layout: str, quarters: tuple[int, ...]
) -> None:
    """Element by element, with padded buckets: a mode keeps the bits that it can hold and rounds the rest as documented."""
    corpus, settings = saved
    pairs = [*itertools.product(MODES, MODES)]
    places = ("TP2", "DP4", "PP2", "DP2 overlap", "DP1", "DP2")
    if layout == "dp_reshardable":  # loads at other data-parallel sizes only
        places = ("DP2", "DP4", "DP1")
    unchanged = MODES[0], MODES[0]
    pairs = [pair for pair in pairs if sum(map(MODES.index, pair)) % 4 in quarters or pair == unchanged]
    jobs, layouts = {}, {}
    for (source, target), place in zip(pairs, itertools.cycle(places), strict=False):
        key = f"{source} to {target}"
        size, changes = LAYOUTS[place]
        config = tiny.tiny_config(
            folder / file_name(f"{layout} {len(quarters)} {key}"), corpus, **settings, **mode(target), **changes
        )
        jobs[key], layouts[key] = (size, (folder / f"{file_name(source)}-{layout}", config)), place
    results = tiny.run_all(jobs, load_and_save)
    for source, target in pairs:
        key = f"{source} to {target}"
        before = tiny.read_weights(folder / f"{file_name(source)}-fully_reshardable", 2, prefix="")
        after = tiny.read_weights(folder / file_name(f"{layout} {len(quarters)} {key}"), 2, prefix="")
        assert before.keys() == after.keys()
        master, momentum = target.split("/")
        for name, expected in before.items():
            if name.startswith("model."):
                continue
            form = momentum if "exp_avg" in name else master
            if form in source.split("/") and (form != "int8" or layouts[key] == "DP2"):
                form = ""
            assert near(after[name], expected, form, layouts[key]), (key, layouts[key], name)
        agree, loss = results[key]
        assert agree, f"{key}: data-parallel ranks start with different weights"
        assert loss == pytest.approx(results[f"{MODES[0]} to {MODES[0]}"][1], abs=5e-3)
