"""`megatron-lion inspect`: prints what a dataset holds."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from megatron_lion.compare.table import Cell, Table
    from megatron_lion.data.indexed_check import IndexedInfo
    from megatron_lion.data.inspection import Lengths
    from megatron_lion.data.manifest import Manifest

HELP = "print what a dataset holds: counts, lengths of its documents, what was left out, samples, and digests"

_SHOWN_CHARACTERS = 300
_BAR = 30


def add_arguments(parser: ArgumentParser) -> None:
    """Declares the verb's flags."""
    add = parser.add_argument
    add("dataset", type=str, help="dataset folder that prepare made, or the prefix of a pair of .bin and .idx files")
    add("--samples", type=int, default=2, metavar="N", help="documents to print from each split, spread over it")
    add("--verify", action="store_true", help="read all tokens, compare every SHA-256, and check the range of the ids")
    add("--json", action="store_true", help="print one JSON object in the place of tables and samples")


def run(args: Any) -> None:
    """Prints the tables and samples, or the JSON object, to stdout."""
    from megatron_lion.errors import ConfigError
    from megatron_lion.streams import say

    if args.samples < 0:
        raise ConfigError(f"--samples {args.samples}: must be 0 or more")
    manifest, infos = _open(args.dataset)
    facts = _facts(args.dataset, manifest, infos)
    if args.verify:
        _verify(manifest, infos)
    if args.json:
        sys.stdout.write(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    else:
        _print(args.dataset, manifest, infos)
        _print_samples(Path(args.dataset), manifest, infos, args.samples)
    if args.verify:
        size = sum(info.bin_bytes + info.idx_bytes for info in infos.values())
        say(
            f"{args.dataset}: verified {2 * len(infos)} files, {size / 1e6:,.1f} MB: SHA-256 and range of the ids are right"
        )


def _open(dataset: str) -> tuple[Manifest | None, dict[str, IndexedInfo]]:
    """Returns the manifest, None for a plain pair, and the checked token files by split; "all" for a plain pair.

    Raises:
        DataError: there is no dataset, or it is damaged.
    """
    from megatron_lion.data.indexed_check import check_indexed
    from megatron_lion.data.inspection import prefix_of
    from megatron_lion.data.manifest import read_manifest
    from megatron_lion.errors import DataError

    path = Path(dataset)
    if path.is_file() and path.suffix not in (".bin", ".idx"):
        raise DataError(
            f"{path}: is a file of text or something else; give a dataset folder, or the prefix of a .bin/.idx pair"
        )
    if not path.is_dir():
        return None, {"all": check_indexed(prefix_of(path))}
    manifest = read_manifest(path)
    return manifest, {name: check_indexed(path / split.prefix) for name, split in manifest.splits.items()}


def _facts(dataset: str, manifest: Manifest | None, infos: dict[str, IndexedInfo]) -> dict[str, Any]:
    """Returns the content of --json."""
    from megatron_lion.data.inspection import lengths_of

    splits = {
        name: {
            "prefix": str(info.prefix), "documents": info.num_documents, "sequences": info.num_sequences,
            "tokens": info.num_tokens, "dtype": info.dtype.name, "lengths": dataclasses.asdict(lengths_of([info])),
        }
        for name, info in infos.items()
    }  # fmt: skip
    return {"dataset": dataset, "splits": splits, "manifest": manifest and dataclasses.asdict(manifest)}


def _verify(manifest: Manifest | None, infos: dict[str, IndexedInfo]) -> None:
    """Reads all token files and compares them with the manifest.

    Raises:
        DataError: a file differs, there is no manifest to compare with, or an id is beyond the vocabulary.
    """
    from megatron_lion.errors import DataError

    for info in infos.values():
        info.verify_content()
        low, high = info.token_range
        size = manifest.tokenizer.vocab_size if manifest else None
        if low < 0 or (size is not None and high >= size):
            raise DataError(f"{info.bin_path}: has token ids from {low} to {high}, but the vocabulary has {size}")


def _print(dataset: str, manifest: Manifest | None, infos: dict[str, IndexedInfo]) -> None:
    from megatron_lion.compare.print_tables import print_tables
    from megatron_lion.compare.table import Table
    from megatron_lion.data.inspection import lengths_of

    rows: list[list[Cell]] = []
    for name, info in infos.items():
        share = 100 * info.num_documents / sum(each.num_documents for each in infos.values())
        rows.append(
            [
                name,
                info.num_documents,
                share,
                info.num_tokens,
                info.num_tokens / info.num_documents,
                info.bin_bytes / 1e6,
            ]
        )
    columns = ["split", "documents", "% of documents", "tokens", "tokens a document", "MB of tokens"]
    notes = [] if manifest is None else _notes(manifest)
    tables = [
        Table(slug="splits", title=dataset, columns=columns, rows=rows, notes=notes,
              formats={"% of documents": ".2f", "tokens a document": ",.1f", "MB of tokens": ",.2f"}),
        _length_table(lengths_of(list(infos.values()))),
    ]  # fmt: skip
    if manifest is not None:
        tables += _manifest_tables(manifest)
    print_tables([table for table in tables if table.rows])


def _notes(manifest: Manifest) -> list[str]:
    """Returns lines about the settings of a dataset."""
    tokenizer = manifest.tokenizer
    end = f", end of document {tokenizer.eod_token!r}" if manifest.kind == "gpt" and tokenizer.eod_token else ""
    shares = ", ".join(f"{share:g}" for share in manifest.split)
    stored = sum(source.bytes for source in manifest.sources)
    return [
        f"{manifest.kind}, {tokenizer.kind} of {tokenizer.vocab_size:,} ids, stored as {manifest.dtype}{end}",
        f"{manifest.text_bytes / 1e6:,.2f} MB of text, {manifest.text_bytes / max(manifest.tokens, 1):.2f} bytes a token; split "
        f"{shares} % with seed {manifest.seed}",
        f"{len(manifest.sources):,} input file{'s' * (len(manifest.sources) != 1)} of {stored / 1e6:,.2f} MB as stored; made by "
        f"megatron-lion {manifest.version} with {manifest.encoder}",
    ]


def _length_table(lengths: Lengths) -> Table:
    from megatron_lion.compare.table import Table

    total, all_tokens = sum(lengths.documents), max(sum(lengths.tokens), 1)
    most = max(lengths.documents)
    rows: list[list[Cell]] = []
    for bits, (documents, tokens) in enumerate(zip(lengths.documents, lengths.tokens, strict=True)):
        if not rows and not documents:
            continue
        low, high = (1 << bits) // 2, max((1 << bits) - 1, 0)
        bar = "█" * max(round(_BAR * documents / most), bool(documents))
        rows.append(
            [
                f"{low:,} to {high:,}" if high > low else f"{low}",
                documents,
                100 * documents / total,
                100 * tokens / all_tokens,
                bar,
            ]
        )
    return Table(
        slug="lengths",
        title=f"Lengths of the documents: {lengths.shortest:,} to {lengths.longest:,} tokens",
        columns=["tokens", "documents", "% of documents", "% of tokens", "share of documents"],
        rows=rows,
        formats={"% of documents": ".2f", "% of tokens": ".2f"},
    )


def _manifest_tables(manifest: Manifest) -> list[Table]:
    from megatron_lion.compare.table import Table

    counts = [
        ("left out", manifest.dropped),
        ("skipped", manifest.skipped),
        ("rejected", manifest.rejected),
        ("file not read", manifest.unread_files),
        ("of the kept", {"repeats an earlier document": manifest.duplicate_documents}),
        ("of BERT's", manifest.sentences),
    ]
    digests: list[list[Cell]] = []
    for split in manifest.splits.values():
        digests += [
            [f"{split.prefix}.bin", split.bin_bytes, split.bin_sha256],
            [f"{split.prefix}.idx", split.idx_bytes, split.idx_sha256],
        ]
    digests.append(["tokenizer (definition)", None, manifest.tokenizer.sha256])
    return [
        Table(
            slug="counts", title="Counts of prepare", columns=["what", "reason", "count"], num_keys=2,
            rows=[[what, reason, count] for what, found in counts for reason, count in found.items() if count],
        ),
        Table(
            slug="overlaps", title="Passages of given texts (13 equal words in a row)",
            columns=["text", "13-grams", "read", "in train", "% in train", "train documents"],
            rows=[[one.path, one.ngrams, one.found_ngrams, one.train_ngrams, 100 * one.train_ngrams / one.ngrams, one.train_documents]
                  for one in manifest.overlaps],
            formats={"% in train": ".3f"},
        ),
        Table(slug="digests", title="SHA-256", columns=["file", "bytes", "SHA-256"], rows=digests),
    ]  # fmt: skip


def _print_samples(folder: Path, manifest: Manifest | None, infos: dict[str, IndexedInfo], count: int) -> None:
    """Prints the beginnings of some documents: as text if the folder has a tokenizer, else as ids."""
    from megatron_lion.compare.table import one_line
    from megatron_lion.data.inspection import spread_samples
    from megatron_lion.data.tokenizers import load_tokenizer_of
    from megatron_lion.files import storage_errors

    if not count:
        return
    tokenizer = None if manifest is None else load_tokenizer_of(manifest.tokenizer.sha256, folder / "tokenizer")
    for name, info in infos.items():
        with storage_errors(info.bin_path, "read"):
            samples = spread_samples(info, count)
        for sample in samples:
            ids = sample.ids[:_SHOWN_CHARACTERS].tolist()
            text = " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)
            cut = len(text) > _SHOWN_CHARACTERS or len(ids) < sample.ids.size
            shown = one_line(text[:_SHOWN_CHARACTERS]) + ("…" if cut else "")
            sys.stdout.write(
                f"{name}, document {sample.number:,} of {info.num_documents:,}, {sample.ids.size:,} tokens:\n  {shown}\n"
            )
