"""Measures time, bytes, launches and state of one optimizer step: ours and all others that are installed.

    python benchmarks/optimizer_step.py                                  # every size that suits this machine
    python benchmarks/optimizer_step.py --sizes gpt2-124m-dp16 --output benchmarks/results/optimizer_step

Prints one table, ratios first, and with --output writes OUTPUT.md and OUTPUT.json. Before a contender is timed, three of
its steps are compared with float64.

On CUDA, times are medians between CUDA events (`device`) and of the wall clock with a final synchronisation (`wall`).
Launches come from the profiler, waits from torch's synchronisation debug mode, temporaries from the allocator. On a CPU,
`device` is the wall clock, launches are torch operations, and the Triton kernel is not timed, since it would run in an
interpreter. Each round times all contenders in turn, so another job on the machine slows them equally.

`of copy` is bytes / time divided by the bandwidth of a copy in the same process: 1.00 is the speed of memory if caches
are small. A CPU also reads the memory that a copy overwrites, which is not counted. An update in place has read it
anyway, so its bound is the bandwidth in place, which is printed too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contenders import BETAS, CONTENDERS, FLOAT32, HYPER, MASTER, REDUCED, Case, Contender
from measuring import heading, shown, surroundings, write_results
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lion.compare.table import markdown_grid

Shapes = list[tuple[int, ...]]
BASELINES = {FLOAT32: "ours", MASTER: "ours split32", REDUCED: "ours split24, int8 momentum"}


def gpt2_shapes(layers: int, hidden: int, vocabulary: int = 50304, seq_length: int = 1024) -> Shapes:
    """The shape of every tensor of a GPT-2 in the order of its layers; 148 tensors at 12 layers."""
    block: Shapes = [(hidden,), (hidden,), (3 * hidden, hidden), (3 * hidden,), (hidden, hidden), (hidden,)]
    block += [(hidden,), (hidden,), (4 * hidden, hidden), (4 * hidden,), (hidden, 4 * hidden), (hidden,)]
    return [(vocabulary, hidden), (seq_length, hidden), *block * layers, (hidden,), (hidden,)]


def shard_shapes(shapes: Shapes, ranks: int, rank: int) -> Shapes:
    """Flat shapes of the tensor pieces in one rank's contiguous share of all elements (ZeRO-1)."""
    sizes = [int(torch.Size(shape).numel()) for shape in shapes]
    share = -(-sum(sizes) // ranks)
    first, pieces = 0, []
    for size in sizes:
        low, high = max(first, rank * share), min(first + size, (rank + 1) * share)
        if high > low:
            pieces.append((high - low,))
        first += size
    return pieces


SIZES: dict[str, Shapes] = {
    "gpt2-124m": gpt2_shapes(12, 768),
    "gpt2-355m": gpt2_shapes(24, 1024),
    "gpt2-124m-dp16": shard_shapes(gpt2_shapes(12, 768), 16, 7),
    "flat-1b": [(10**9,)],
}
AT_ONCE = 2 * 10**7  # largest number of parameters with which all contenders are in memory at once
CHECK_SHAPES: Shapes = [(300, 7), (1000,), (33,), (1,)]


def float64_result(rule: str, starts: list[torch.Tensor], gradients: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The parameters after the steps of the rule from the start values, in float64."""
    params = [torch.nn.Parameter(start.double()) for start in starts]
    momenta = [torch.zeros_like(param) for param in params]
    plain: torch.optim.Optimizer | None = None
    if rule == "adamw":
        plain = torch.optim.AdamW(params, betas=BETAS, foreach=False, **HYPER)
    elif rule == "sgd":
        plain = torch.optim.SGD(params, lr=HYPER["lr"], momentum=0.9, foreach=False)
    for grads in gradients:
        for param, momentum, grad in zip(params, momenta, grads, strict=True):
            param.grad = grad.double()
            if plain is None:
                direction = (BETAS[0] * momentum + (1 - BETAS[0]) * param.grad).sign()
                param.data -= HYPER["lr"] * (direction + HYPER["weight_decay"] * param.data)
                momentum.mul_(BETAS[1]).add_(param.grad, alpha=1 - BETAS[1])
        if plain is not None:
            plain.step()
    return [param.detach() for param in params]


def check(contender: Contender, device: str) -> None:
    """Compares three steps of a contender with its rule in float64.

    Raises:
        RuntimeError: the result is wrong.
    """
    # Start values and gradients are exact in bfloat16, so that every contender begins from the same numbers.
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator).bfloat16().float().to(device) for shape in CHECK_SHAPES]
    gradients = [
        [torch.randn(shape, generator=generator).bfloat16().float().to(device) for shape in CHECK_SHAPES]
        for _ in range(3)
    ]
    case = contender.build([start.clone() for start in starts])
    for grads in gradients:
        for target, grad in zip(case.grads, grads, strict=True):
            target.copy_(grad)
        case.step()
    for got, expected in zip(case.masters(), float64_result(contender.rule, starts, gradients), strict=True):
        error = (got.double() - expected).abs()
        # Exact: 1e-5 allows float32 rounding of values of a few units. Else: bfloat16 rounds values
        # (2^-8 relative), and a reduced momentum flips some signs of directions near 0 (2 lr each).
        wrong = (
            error.max() > 1e-5 if contender.exact else error.mean() > 0.1 * HYPER["lr"] + 2**-8 * expected.abs().mean()
        )
        if wrong:
            raise RuntimeError(f"{contender.name}: off by {float(error.max()):.2e} after three steps; not timed")


class CountOperations(TorchDispatchMode):
    """Counts torch operations that compute something, that is all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += not func.is_view
        return result


def count_launches(step: Callable[[], object], device: str) -> int:
    """Number of kernels and copies that one step launches, or of torch operations on a CPU."""
    if device == "cpu":
        with CountOperations() as counted:
            step()
        return counted.count
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def host_waits(step: Callable[[], object]) -> dict[str, int]:
    """Returns the number of host waits of a step, by source line; CUDA only."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = (warning for warning in caught if "synchroniz" in str(warning.message))
    return dict(Counter(f"{Path(warning.filename).name}:{warning.lineno}" for warning in found))


def temporaries(step: Callable[[], object]) -> int:
    """Peak bytes that a step allocates beyond those allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def time_once(step: Callable[[], object], device: str) -> tuple[float, float]:
    """(device seconds, wall seconds) of one step."""
    if device == "cpu":
        started = time.perf_counter()
        step()
        wall = time.perf_counter() - started
        return wall, wall
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    started = time.perf_counter()
    first.record()
    step()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3, time.perf_counter() - started


def bandwidths(device: str, numel: int | None = None) -> dict[str, float]:
    """Bytes read and written per second by a copy of `numel` float32 (default 2 GiB, or 128 MiB on a CPU), and in place."""
    source = torch.ones(numel or (2**29 if device == "cuda" else 2**25), device=device)
    target = torch.zeros_like(source)
    works = {"copy": lambda: target.copy_(source), "in_place": lambda: target.mul_(1.0)}
    times = {name: [time_once(work, device)[0] for _ in range(12)][2:] for name, work in works.items()}
    return {name: 2 * source.nbytes / statistics.median(taken) for name, taken in times.items()}


def measure(size: str, contenders: list[Contender], device: str, rounds: int, bandwidth: float) -> list[dict[str, Any]]:
    """One row for each contender on one size; all are in memory together and timed in turn."""
    numel = sum(int(torch.Size(shape).numel()) for shape in SIZES[size])
    cases = [(contender, build(contender, SIZES[size], device)) for contender in contenders]
    facts = {contender.name: describe(case, device) for contender, case in cases}
    times: dict[str, list[tuple[float, float]]] = {contender.name: [] for contender in contenders}
    for round_ in range(rounds + 3):
        for contender, case in cases:
            taken = time_once(case.step, device)
            if round_ >= 3:  # the first three rounds compile and warm up
                times[contender.name].append(taken)
    rows = []
    for contender, case in cases:
        seconds, wall = (statistics.median(column) for column in zip(*times[contender.name], strict=True))
        moved = contender.bytes_per_parameter
        rows.append({
            "size": size, "parameters": numel, "tensors": len(SIZES[size]), "class": contender.kind,
            "name": contender.name, "device_ms": seconds * 1e3, "wall_ms": wall * 1e3, "bytes_per_parameter": moved,
            "of_copy": moved and moved * numel / seconds / bandwidth,
            "state_bytes_per_parameter": case.state_bytes() / numel, **facts[contender.name],
        })  # fmt: skip
    return rows


def compare_with_ours(rows: list[dict[str, Any]]) -> None:
    """Adds to each row its wall time divided by that of our contender of the same size and class, if measured."""
    for row in rows:
        same = (r for r in rows if (r["size"], r["name"]) == (row["size"], BASELINES[str(row["class"])]))
        base = next(same, None)
        row["ratio"] = base and row["wall_ms"] / base["wall_ms"]


def build(contender: Contender, shapes: Shapes, device: str) -> Case:
    """The contender on tensors of these shapes after one step, which allocates its state and compiles its kernels."""
    starts = [torch.full(shape, 0.5, device=device) for shape in shapes]
    case = contender.build(starts)
    for grad in case.grads:
        grad.normal_()
    case.step()
    return case


def describe(case: Case, device: str) -> dict[str, int | None]:
    """Counts of a step that need no clock: launches, host waits and temporary bytes (None on a CPU)."""
    if device == "cpu":
        return {"launches": count_launches(case.step, device), "waits": None, "temporaries_bytes": None}
    return {
        "launches": count_launches(case.step, device),
        "waits": sum(host_waits(case.step).values()),
        "temporaries_bytes": temporaries(case.step),
    }


def table(rows: list[dict[str, Any]], device: str) -> str:
    """The measurements as Markdown, one block for each size and class."""
    work = "operations" if device == "cpu" else "launches"
    lines = []
    for size in dict.fromkeys(row["size"] for row in rows):
        mine = [row for row in rows if row["size"] == size]
        lines += [f"\n### {size}: {mine[0]['parameters']:,} parameters in {mine[0]['tensors']} tensors\n"]
        head = ["wall / ours", "contender", "wall ms", "device ms", "of copy", "bytes/param moved", work, "waits",
                "temporaries MiB", "state bytes/param"]  # fmt: skip
        body: list[list[str]] = []
        for kind in dict.fromkeys(row["class"] for row in mine):
            body.append(["", f"**{kind}**", *[""] * 8])
            for row in sorted((r for r in mine if r["class"] == kind), key=lambda r: r["wall_ms"]):
                mib = None if row["temporaries_bytes"] is None else row["temporaries_bytes"] / 2**20
                cells = [
                    shown(row["ratio"], ".2f"),
                    row["name"],
                    shown(row["wall_ms"], ".3f"),
                    shown(row["device_ms"], ".3f"),
                ]
                cells += [
                    shown(row["of_copy"], ".2f"),
                    shown(row["bytes_per_parameter"], "g"),
                    shown(row["launches"], "d"),
                ]
                cells += [shown(row["waits"], "d"), shown(mib, ".1f"), shown(row["state_bytes_per_parameter"], ".2f")]
                body.append(cells)
        lines.append(markdown_grid(head, body, "rl" + "r" * 8))
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--sizes", help=f"of {', '.join(SIZES)}; default: all on CUDA, gpt2-124m-dp16 on a CPU")
    parser.add_argument(
        "--skip", default="", help="words separated by commas; contenders with one of them in the name are omitted"
    )
    parser.add_argument("--rounds", type=int, help="timed rounds; default: 50 on CUDA, 21 on a CPU")
    parser.add_argument("--threads", type=int, help="torch threads on a CPU")
    parser.add_argument("--output", help="write OUTPUT.md and OUTPUT.json")
    args = parser.parse_args()
    args.device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    args.sizes = (args.sizes or (",".join(SIZES) if args.device == "cuda" else "gpt2-124m-dp16")).split(",")
    args.rounds = args.rounds or (50 if args.device == "cuda" else 21)
    if unknown := [size for size in args.sizes if size not in SIZES]:
        parser.error(f"--sizes: {', '.join(unknown)}: expected some of {', '.join(SIZES)}")
    return args


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    usable: list[Contender] = []
    left_out: list[str] = []
    for contender in CONTENDERS:
        skipped = any(word.strip() in contender.name for word in args.skip.split(",") if word)
        if skipped or not contender.runs_on(args.device):
            continue
        try:
            check(contender, args.device)
            usable.append(contender)
        except Exception as error:  # a peer that does not work on this machine is omitted, and reported
            if contender.name.startswith("ours"):
                raise
            left_out.append(f"{contender.name} ({type(error).__name__}: {str(error).splitlines()[0]})")
            sys.stderr.write(f"left out: {left_out[-1]}\n")
    bandwidth = bandwidths(args.device)
    per_s = {f"{name}_gb_per_s": value / 1e9 for name, value in bandwidth.items()}
    facts = {**surroundings(args.device), **per_s, "rounds": args.rounds}
    rows: list[dict[str, Any]] = []
    text = ""
    for size in args.sizes:
        numel = sum(int(torch.Size(shape).numel()) for shape in SIZES[size])
        # If all contenders fit in memory they are timed in turn; else each runs alone, so a failure affects no other.
        together = args.device != "cuda" and numel <= AT_ONCE
        for group in [usable] if together else [[contender] for contender in usable]:
            try:
                rows += measure(size, group, args.device, args.rounds, bandwidth["copy"])
            except RuntimeError as error:  # includes out of memory
                names = ", ".join(contender.name for contender in group)
                left_out.append(f"{names} at {size} ({type(error).__name__}: {str(error).splitlines()[0]})")
                sys.stderr.write(f"left out: {left_out[-1]}\n")
            compare_with_ours(rows)
            text = report(facts, args, rows, left_out)
            # After every row, so that a later error or time limit loses none.
            write_results(args.output, "One optimizer step", text, {**facts, "left_out": left_out, "rows": rows})
    sys.stdout.write(text)


def report(facts: dict[str, Any], args: argparse.Namespace, rows: list[dict[str, Any]], left_out: list[str]) -> str:
    """Heading and table, as Markdown."""
    head = f"{heading(facts)}; copy {facts['copy_gb_per_s']:.1f} GB/s, in place "
    head += f"{facts['in_place_gb_per_s']:.1f} GB/s; medians of {args.rounds} rounds.\n"
    if left_out:
        head += "\nOmitted because they do not work on this machine: " + "; ".join(left_out) + ".\n"
    return head + table(rows, args.device)


if __name__ == "__main__":
    main()
