"""Damaged token files, dataset manifests and index caches: refused by name or built again, and never other samples."""

from __future__ import annotations

import json
import random
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from faults.cases_checkpoints import HALF, RUN, resume
from faults.lab import Lab
from faults.rows import Tally, case
from faults.warm import Stuck

FAMILY = "data"
MUTATIONS = 20_000
SPECIAL = (0, 1, -1, 2, 7, 127, 255, 2**15, 2**31 - 1, -(2**31), 2**32, 2**62, -(2**63))


def parse(content: bytes, bin_bytes: int) -> list[tuple[int, int]] | None:
    """Reads an index by the format's description alone.

    Returns:
        (first token, length) of each sequence, or None if the bytes are no valid index of a .bin file of that size.
    """
    if len(content) < 34 or content[:9] != b"MMIDIDX\0\0":
        return None
    version, code, sequences, boundaries = struct.unpack_from("<QBQQ", content, 9)
    size = {8: 2, 4: 4}.get(code)
    if version != 1 or size is None or len(content) != 34 + 12 * sequences + 8 * boundaries or boundaries < 2:
        return None
    lengths = np.frombuffer(content, "<i4", sequences, 34).astype(object)
    pointers = np.frombuffer(content, "<i8", sequences, 34 + 4 * sequences)
    documents = np.frombuffer(content, "<i8", boundaries, 34 + 12 * sequences)
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + size * length)
    if any(length < 0 for length in lengths) or list(pointers) != starts[:-1] or starts[-1] != bin_bytes:
        return None
    if documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
        return None
    return [(start // size, int(length)) for start, length in zip(starts, lengths, strict=False)]


def mutated(content: bytes, chosen: random.Random) -> bytes:
    """One to three changes of a file: bits, bytes, fields with special values, cuts, additions, moved and zeroed parts."""
    data = bytearray(content)
    for _ in range(chosen.choice((1, 1, 1, 2, 3))):
        at = chosen.randrange(max(1, len(data)))
        kind = chosen.randrange(8)
        if kind == 0 and data:
            data[at] ^= 1 << chosen.randrange(8)
        elif kind == 1 and data:
            data[at] = chosen.randrange(256)
        elif kind in (2, 3):
            width = 4 if kind == 2 else 8
            at = 34 + (at - 34) // width * width if at > 34 else chosen.choice((9, 18, 26))
            value = chosen.choice((*SPECIAL, chosen.randrange(1000))) % 2 ** (8 * width)
            data[at : at + width] = value.to_bytes(width, "little")[: max(0, len(data) - at)]
        elif kind == 4:
            del data[at:]
        elif kind == 5:
            data += bytes(chosen.randrange(1, 40))
        elif kind == 6:
            other = chosen.randrange(max(1, len(data)))
            data[at : at + 8], data[other : other + 8] = data[other : other + 8], data[at : at + 8]
        else:
            data[at : at + chosen.randrange(1, 64)] = b""
    return bytes(data)


def read_mutations(prefix: str, seed: int, count: int, result: str) -> int:
    """Work of a process: opens mutations of PREFIX.idx and writes the counts of what came of them."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from megatron_lion.data.indexed_check import check_indexed
    from megatron_lion.errors import DataError

    chosen, counts, failures = random.Random(seed), Counter[str](), list[str]()
    path, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin").read_bytes()
    original = path.read_bytes()
    for number in range(count):
        content = mutated(original, chosen)
        if content == original:
            counts["same"] += 1
            continue
        path.write_bytes(content)
        expected = parse(content, len(tokens))
        try:
            check_indexed(prefix)
        except DataError:
            counts["refused"] += 1
            continue
        except Exception as error:
            counts["untyped"] += 1
            failures.append(f"seed {seed} number {number}: {error!r}")
            continue
        if expected is None:
            counts["accepted"] += 1
            failures.append(f"seed {seed} number {number}: accepted, and is no valid index")
            continue
        reader = IndexedDataset(prefix)
        stored = np.frombuffer(tokens, reader.index.dtype)
        right = len(reader) == len(expected) and all(
            np.array_equal(reader[at], stored[first : first + length]) for at, (first, length) in enumerate(expected)
        )
        counts["valid" if right else "misread"] += 1
        del reader
    Path(result).write_text(json.dumps({"counts": counts, "failures": failures[:20]}))
    path.write_bytes(original)
    return 0


@case(
    "index-mutations", FAMILY, "mutations of an .idx without manifest, opened and read", "3; valid ones counted as open"
)
def index_mutations(lab: Lab, tally: Tally) -> None:
    import tiny

    prefix = tiny.write_corpus(lab.folder / "mutated", documents=12)
    batch = 1000
    for seed in range((lab.limit * 100 or MUTATIONS) // batch or 1):
        result = lab.folder / f"counts-{seed}"
        words = (prefix, seed, min(batch, lab.limit * 100 or batch), str(result))
        process = lab.server.start("faults.cases_data:read_mutations", *words)
        try:
            code = process.wait()
        except Stuck as error:
            tally.verdict(f"seed {seed}", "stuck", str(error))
            continue
        if code != 0:
            tally.verdict(f"seed {seed}", "stuck", f"the reader's process ended with {code}: {process.last_line()}")
            continue
        found = json.loads(result.read_text())
        counts = Counter(found["counts"])
        tally.injected += counts.total() - counts["same"]
        tally.recovered += counts["refused"]
        tally.open += counts["valid"]
        tally.silent += counts["accepted"] + counts["misread"]
        tally.stuck += counts["untyped"]
        tally.codes["3"] += counts["refused"]
        tally.wrong += found["failures"]
    tally.notes.append("open: the mutation is itself a valid index, and only a manifest's digest could reject it")


def bit_flips(lab: Lab, tally: Tally, path: Path, read: Callable[[], Any], error: type[Exception], count: int) -> None:
    """Inverts bits of a file one at a time; reading must raise `error`, or return what it returned before."""
    content, chosen, before = path.read_bytes(), random.Random(3), read()
    for _ in range(count):
        bit = chosen.randrange(8 * len(content))
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        tally.injected += 1
        try:
            same = read() == before
            tally.verdict(f"{path.name} bit {bit}", "recovered" if same else "silent", "accepted with another meaning")
        except error:
            tally.verdict(f"{path.name} bit {bit}", "recovered")
        except Exception as other:
            tally.verdict(f"{path.name} bit {bit}", "stuck", f"untyped {other!r}")
    path.write_bytes(content)


@case("dataset-flips", FAMILY, "one bit of a dataset folder's manifest, .idx or tokenizer", "3")
def dataset_flips(lab: Lab, tally: Tally) -> None:
    import tiny_gpt2

    from megatron_lion.config import DataConfig, ModelConfig
    from megatron_lion.data.corpora import open_corpora
    from megatron_lion.errors import DataError

    folder = Path(tiny_gpt2.write_text_corpus(lab.folder / "text"))
    data, model = DataConfig(path=[str(folder)]), ModelConfig(seq_length=16, vocab_size=None)

    def read() -> Any:
        found = open_corpora(data, model)
        assert found.tokenizer is not None
        tokens = [
            found.tokenizer.encode(text) for text in ("the sign of a gradient never moves", " ".join(tiny_gpt2.WORDS))
        ]
        return found.vocab_size, found.digest, [list(part) for part in tokens]

    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".bin":
            bit_flips(lab, tally, path, read, DataError, lab.limit or 100)


@case("bin-flips", FAMILY, "one bit of a .bin file beside a manifest", "known gap: not compared at each start")
def bin_flips(lab: Lab, tally: Tally) -> None:
    import tiny_gpt2

    from megatron_lion.config import DataConfig, ModelConfig
    from megatron_lion.data.corpora import open_corpora
    from megatron_lion.errors import DataError

    folder = Path(tiny_gpt2.write_text_corpus(lab.folder / "text"))
    data, model, chosen = DataConfig(path=[str(folder)]), ModelConfig(seq_length=16, vocab_size=None), random.Random(4)
    for path in sorted(folder.rglob("*.bin")):
        content = path.read_bytes()
        for _ in range(lab.limit or 30):
            damaged = bytearray(content)
            damaged[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
            path.write_bytes(damaged)
            tally.injected += 1
            try:
                open_corpora(data, model)
                tally.verdict(path.name, "open")
            except DataError:
                tally.verdict(path.name, "recovered")
        path.write_bytes(content)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "zeros after the header": lambda content: content[:128] + bytes(max(0, len(content) - 128)),
    "one element changed": lambda content: content[:-8] + bytes([content[-8] ^ 1]) + content[-7:],
    "an object array": lambda content: content.replace(b"'<i4'", b"'|O' ").replace(b"'<i8'", b"'|O' "),
    "reversed": lambda content: content[:128] + content[128:][::-1],
}


@case("index-cache", FAMILY, "each file of the index cache cut, zeroed or changed", "built again: the twin's end")
def index_cache(lab: Lab, tally: Tally) -> None:
    half = lab.config("half", **RUN)
    assert [rank.code for rank in lab.run(half, words=HALF).ranks] == [0]
    names = sorted(
        str(path.relative_to(half.run_dir)) for path in Path(half.run_dir, "cache").rglob("*") if path.is_file()
    )
    plans = [(name, how) for name in names for how in DAMAGES if not (name.endswith(".txt") and how != "empty")]
    for name, how in lab.some(plans):
        config = lab.copy(half)
        path = Path(config.run_dir, name)
        content = path.read_bytes()
        damaged = DAMAGES[how](content)
        if damaged == content:
            lab.clean(config)
            continue
        path.write_bytes(damaged)
        resume(lab, tally, config, f"{path.name.split('-', 1)[-1]}: {how}", (0,))
