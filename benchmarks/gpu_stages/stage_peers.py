"""Stage `peers`: times a step of ours and of other optimizers, as far as they are installed."""

from __future__ import annotations

from contenders import CONTENDERS, Contender
from optimizer_step import SIZES, check, measure

from .stage import Stage

# By precision class; ours is the first of each, by which the others are divided.
NAMES = (
    "ours split32",
    "torch AdamW fused + copy",
    "ours",
    "torch SGD fused",
    "torch AdamW fused",
    "lion-pytorch foreach",
    "lion-pytorch Triton",
    "lion-pytorch",
    "bitsandbytes Lion 32-bit",
    "ours split24, int8 momentum",
    "FlashLion 24-bit",
    "FlashLion 32-bit",
    "bitsandbytes Lion 8-bit",
    "emerging-optimizers Lion + copy",
)
# It compiles its update for each shape, which takes longer than all others together: last on a GPU, skipped on a CPU.
COMPILED = "emerging-optimizers Lion + copy"
ORDER = ("gpt2-124m-dp16", "gpt2-124m")
REHEARSAL_SHAPES = [(50, 8), (33,)]
ROUNDS = 50


def run(stage: Stage) -> None:
    by_name = {contender.name: contender for contender in CONTENDERS}
    if stage.rehearse:
        SIZES.update(dict.fromkeys(ORDER, REHEARSAL_SHAPES))
    usable: list[Contender] = []
    for name in NAMES:
        contender = by_name[name]
        if stage.device not in contender.devices:
            stage.row(name, skipped="needs CUDA")
        elif not contender.runs_on(stage.device):
            stage.row(name, skipped=f"{contender.needs} is not installed")
        elif name == COMPILED and stage.rehearse:
            stage.row(name, skipped="compiles for a minute on a CPU")
        elif name == COMPILED or stage.attempt(name, 1, lambda c=contender: check(c, stage.device)):
            usable.append(contender)
    pairs = [(size, contender) for size in ORDER for contender in usable]
    base: dict[tuple[str, str], float] = {}
    for size, contender in sorted(pairs, key=lambda pair: pair[1].name == COMPILED):
        # One at a time: a peer that fails or runs out of memory costs no other peer's row.
        stage.attempt(f"{size} {contender.name}", 2, lambda s=size, c=contender: time_step(stage, s, c, base))


def time_step(stage: Stage, size: str, contender: Contender, base: dict[tuple[str, str], float]) -> None:
    """Measures one contender on one size, relative to the first of its class, which is ours."""
    if contender.name == COMPILED:
        check(contender, stage.device)
    (row,) = measure(size, [contender], stage.device, 3 if stage.rehearse else ROUNDS, 1.0)
    kind, wall = row["class"], row["wall_ms"]
    if contender.name.startswith("ours"):
        base.setdefault((size, kind), wall)
    keep = ("parameters", "tensors", "wall_ms", "device_ms", "bytes_per_parameter", "state_bytes_per_parameter",
            "launches", "waits", "temporaries_bytes")  # fmt: skip
    stage.row(
        f"{size} {contender.name}",
        size=size,
        name=contender.name,
        kind=kind,
        over_ours=wall / base[size, kind] if (size, kind) in base else None,
        **{key: row[key] for key in keep},
    )
