"""Distributed LION on four processes, started once: against numpy, equal parameters, ties, zeros, bytes, and failures."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed

from megatron_lion.family.distributed_lion import AGGREGATIONS, DistributedLion, sent_bytes
from megatron_lion.optim.lion import Lion

SHAPES = [(7, 5), (3,), ()]
STEPS = 6
SETTINGS: dict[str, Any] = {"lr": 0.03, "betas": (0.8, 0.95), "weight_decay": 0.2}
SIZES = (1, 2, 3, 4)


def gradients(worker: int, step: int) -> list[np.ndarray]:
    """Of one worker: small whole numbers, so that zeros and ties occur; the last row is 0 everywhere at every step."""
    rng = np.random.default_rng(100 * worker + step)
    grads = [rng.integers(-1, 2, shape).astype(np.float32) for shape in SHAPES]
    grads[0][-1] = 0
    return grads


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


@contextlib.contextmanager
def counted(workers: int):
    """Counts the bytes that go to other workers, and refuses every other collective."""
    sent: list[int] = []
    exchange, gather = dist.all_to_all_single, dist.all_gather_into_tensor

    def all_to_all(output, given, *args, **options):
        sent.append(given.nbytes // workers * (workers - 1))
        return exchange(output, given, *args, **options)

    def all_gather(output, given, *args, **options):
        sent.append(given.nbytes * (workers - 1))
        return gather(output, given, *args, **options)

    def refuse(*args, **options):
        raise AssertionError("another collective")

    others = ("all_reduce", "broadcast", "all_gather", "reduce_scatter_tensor", "all_gather_object", "send", "recv")
    with pytest.MonkeyPatch.context() as patch:
        for name in others:
            patch.setattr(dist, name, refuse)
        patch.setattr(dist, "all_to_all_single", all_to_all)
        patch.setattr(dist, "all_gather_into_tensor", all_gather)
        yield sent


def steps(rank: int, workers: int, aggregation: str, group: Any) -> dict[str, Any]:
    """Trains on this worker's gradients; halfway the state goes through a file into a new optimizer."""
    params = parameters()
    optimizer = DistributedLion(params, **SETTINGS, aggregation=aggregation, group=group)
    history, sent = [], []
    for step in range(STEPS):
        if step == STEPS // 2:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = DistributedLion(params, aggregation=aggregation, group=group)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        for param, grad in zip(params, gradients(rank, step), strict=True):
            param.grad = torch.from_numpy(grad)
        if rank == 0 and step == 1:
            params[2].grad = None  # as zero
        with counted(workers) as counts:
            optimizer.step()
        sent.append(counts)
        history.append([param.detach().clone() for param in params])
    return {"history": history, "sent": sent, "momenta": [optimizer.state[param]["exp_avg"] for param in params]}


def refused_step(rank: int, bad: float) -> dict[str, Any]:
    """A step with one number that is not finite on worker 1, and what changed."""
    params = parameters()
    optimizer = DistributedLion(params, **SETTINGS)
    for step in range(2):
        for param, grad in zip(params, gradients(rank, step), strict=True):
            param.grad = torch.from_numpy(grad)
        if step == 1:
            kept = [param.detach().clone() for param in params], [optimizer.state[p]["exp_avg"].clone() for p in params]
            if rank == 1:
                params[0].grad[2, 3] = bad
            with pytest.raises(FloatingPointError) as error:
                optimizer.step()
            now = [param.detach() for param in params], [optimizer.state[p]["exp_avg"] for p in params]
            same = all(
                torch.equal(a, b) for old, new in zip(kept, now, strict=True) for a, b in zip(old, new, strict=True)
            )
            return {"message": str(error.value), "same": same}
        optimizer.step()
    raise AssertionError


def in_ddp(rank: int) -> dict[str, Any]:
    """A model in DDP, of which each worker starts with other weights: DDP makes them equal, no_sync keeps gradients apart."""
    torch.manual_seed(rank)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(6, 3))
    optimizer = DistributedLion(model.parameters(), lr=0.01)
    losses = []
    with model.no_sync():
        for _ in range(30):
            inputs = torch.randn(16, 6)
            loss = (model(inputs) - inputs[:, :3]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
    own = next(model.parameters()).grad.clone()
    return {"weights": [param.detach() for param in model.parameters()], "losses": losses, "gradient": own}


def refusals(rank: int) -> list[str]:
    params = parameters()
    found = []
    for settings in ({"aggregation": "median"}, {"betas": (0.9, 1.0)}, {"lr": -1.0}):
        with pytest.raises(ValueError) as error:
            DistributedLion(params, **settings)
        found.append(str(error.value))
    optimizer = DistributedLion(params)
    with pytest.raises(TypeError) as wrong:
        optimizer.__getstate__()
    found.append(str(wrong.value))
    entry = {"exp_avg": torch.zeros(7, 5), "step": torch.tensor(3.0)}
    for name, value in (("step", "x"), ("step", -5.5), ("exp_avg", torch.zeros(7, 5, dtype=torch.int64))):
        with pytest.raises(ValueError) as error:
            optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: {**entry, name: value}}})
        found.append(str(error.value))
    return found


def work(rank: int) -> dict[str, Any]:
    """Everything that this file checks, in one process of four."""
    groups = {size: dist.new_group(range(size)) for size in SIZES}
    found: dict[str, Any] = {"steps": {}}
    for size in SIZES:
        for aggregation in AGGREGATIONS:
            if rank < size:
                found["steps"][size, aggregation] = steps(rank, size, aggregation, groups[size])
    found["refused"] = {str(bad): refused_step(rank, bad) for bad in (float("nan"), float("inf"))}
    return {**found, "ddp": in_ddp(rank), "refusals": refusals(rank)}


@pytest.fixture(scope="module")
def workers() -> list[dict[str, Any]]:
    return run_distributed(work, 4, device="cpu")


def reference(size: int, aggregation: str) -> tuple[list[list[np.ndarray]], list[list[np.ndarray]]]:
    """(parameters after each step, momenta of each worker at the end), in float32 with each operation rounded once."""
    f32 = np.float32
    (beta1, beta2), lr, decay = SETTINGS["betas"], SETTINGS["lr"], SETTINGS["weight_decay"]
    thetas = [param.detach().numpy().copy() for param in parameters()]
    momenta = [[np.zeros(shape, f32) for shape in SHAPES] for _ in range(size)]
    history = []
    for step in range(STEPS):
        for number in range(len(SHAPES)):
            total = np.zeros(SHAPES[number], int)
            for worker in range(size):
                g, m = gradients(worker, step)[number], momenta[worker][number]
                if (worker, step, number) == (0, 1, 2):
                    g = np.zeros_like(g)
                c = m * f32(beta1) + g * f32(1 - beta1)
                total += np.where(c > 0, 1, np.where(c < 0, -1, 1 if (worker + step) % 2 == 0 else -1))
                momenta[worker][number] = m * f32(beta2) + g * f32(1 - beta2)
            delta = np.sign(total).astype(f32) if aggregation == "majority" else total.astype(f32) / f32(size)
            thetas[number] = thetas[number] - (delta + thetas[number] * f32(decay)) * f32(lr)
        history.append([theta.copy() for theta in thetas])
    return history, momenta


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("size", SIZES)
def test_every_worker_computes_the_equations_bit_for_bit(workers, size, aggregation):
    """Parameters on every worker, and each worker's own momentum, through a save and a load."""
    history, momenta = reference(size, aggregation)
    for worker in range(size):
        found = workers[worker]["steps"][size, aggregation]
        for ours, wanted in zip(found["history"], history, strict=True):
            for param, theta in zip(ours, wanted, strict=True):
                np.testing.assert_array_equal(param.numpy(), theta)
        for ours, wanted in zip(found["momenta"], momenta[worker], strict=True):
            np.testing.assert_array_equal(ours.numpy(), wanted)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_zero_everywhere_does_not_drift(workers, size):
    """An even number of workers only decays it; an odd one adds +η and -η in turn."""
    theta = parameters()[0].detach().numpy()[-1].astype(float)
    for step, after in enumerate(workers[0]["steps"][size, "majority"]["history"]):
        delta = 0 if size % 2 == 0 else (1 if step % 2 == 0 else -1)
        theta = theta - SETTINGS["lr"] * (delta + SETTINGS["weight_decay"] * theta)
        np.testing.assert_allclose(after[0].numpy()[-1], theta, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "aggregation", "bits"),
    [(2, "majority", 2), (3, "majority", 1), (4, "majority", 2), (2, "mean", 2), (3, "mean", 2), (4, "mean", 3)],
)
def test_bytes_that_are_sent(workers, size, aggregation, bits):
    """39 coordinates: each worker counts ⌈39/8N⌉ bytes of votes; a byte more in each message reports what is not finite."""
    chunk = {2: 3, 3: 2, 4: 2}[size]
    first, second = (size - 1) * (chunk + 1), (size - 1) * (bits * chunk + 1)
    for worker in range(size):
        assert workers[worker]["steps"][size, aggregation]["sent"] == [[first, second]] * STEPS
    assert sent_bytes(39, size, aggregation) == first + second


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_one_worker_is_lion_where_it_does_not_vote_on_zeros(workers, aggregation):
    """Bit for bit, on the coordinates whose c is never 0 in this path."""
    params = parameters()
    lion = Lion(params, **SETTINGS, implementation="reference")
    moved = [torch.ones(shape, dtype=torch.bool) for shape in SHAPES]
    for step in range(STEPS):
        for number, (param, grad) in enumerate(zip(params, gradients(0, step), strict=True)):
            param.grad = torch.from_numpy(grad if (step, number) != (1, 2) else np.zeros_like(grad))
            m = lion.state[param].get("exp_avg", torch.zeros(())) if step else torch.zeros(())
            moved[number] &= (m * 0.8 + param.grad * (1 - 0.8)) != 0
        lion.step()
    assert sum(int(mask.sum()) for mask in moved) > 5
    for param, ours, mask in zip(params, workers[0]["steps"][1, aggregation]["history"][-1], moved, strict=True):
        assert torch.equal(param.detach()[mask], ours[mask])


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_no_worker_steps_on_what_is_not_finite(workers, bad):
    found = [worker["refused"][bad] for worker in workers]
    assert all(one["same"] for one in found)
    assert [one["message"].split(" gradient")[0] for one in found] == [
        "this worker's" if rank == 1 else "another worker's" for rank in range(4)
    ]


def test_ddp_inside_no_sync(workers):
    found = [worker["ddp"] for worker in workers]
    assert all(torch.equal(a, b) for one in found for a, b in zip(one["weights"], found[0]["weights"], strict=True))
    assert not torch.equal(found[0]["gradient"], found[1]["gradient"])
    assert all(np.mean(one["losses"][-5:]) < 0.7 * np.mean(one["losses"][:5]) for one in found)


def test_wrong_arguments_are_refused(workers):
    median, betas, lr, copied, text, negative, whole = workers[2]["refusals"]
    assert "aggregation = 'median': needs one of majority, mean" in median
    assert "betas = (0.9, 1.0)" in betas
    assert "lr = -1.0" in lr
    assert "cannot be copied" in copied
    assert "step of parameter 0 is 'x'" in text
    assert "step of parameter 0 is -5.5" in negative
    assert "exp_avg of parameter 0 is torch.int64" in whole


def test_without_a_process_group_it_is_refused():
    with pytest.raises(RuntimeError, match="init_process_group"):
        DistributedLion(parameters())


def test_a_majority_sends_a_twentieth_of_an_all_reduce():
    """8 (N-1)/N bytes a coordinate for a ring all-reduce of float32."""
    for size in (8, 16, 64):
        assert sent_bytes(10**8, size, "majority") < 8 * 10**8 * (size - 1) / size / 21
