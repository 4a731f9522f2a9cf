"""`megatron-lion prepare`: converts text files to a dataset folder of Megatron token files."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from megatron_lion.data.manifest import Overlap
    from megatron_lion.prepare.pipeline import Manifest

HELP = "convert text (jsonl, json, txt, parquet, arrow, tar; plain or compressed) to a dataset folder of Megatron .bin/.idx files"


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the subcommand's flags to its parser."""
    add = parser.add_argument
    add_reading_flags(parser)
    add(
        "--tokenizer",
        type=str,
        default=None,
        metavar="PATH",
        help="folder with vocab.json + merges.txt (GPT-2), vocab.txt (BERT) or tokenizer.json, one of these files, or "
        "hf:NAME to download it from Hugging Face's hub; required without --list",
    )
    add("--output", type=str, default=None, metavar="DIR", help="dataset folder to make; required without --list")
    add("--list", action="store_true", help="only list the files that would be read, and count the others by kind")
    add(
        "--split",
        type=str,
        default="auto",
        help="relative shares of documents: train,valid,test; auto: 80,10,10 to 90,5,5 for a small corpus, 99.9,0.05,0.05 for one of "
        "more than 0.8 GB of text",
    )
    add("--seed", type=int, default=1234, help="seed of the hashes that determine a document's split")
    add("--workers", type=int, default=0, help="number of processes; 0 starts one for each core")
    add(
        "--task",
        type=Literal["gpt", "bert"],
        default="gpt",
        help="gpt: one sequence for each document; bert: one for each sentence, with a WordPiece vocabulary",
    )
    add(
        "--splitter",
        type=Literal["rules", "punkt"],
        default="rules",
        help="sentence splitter for --task bert; punkt needs NLTK and its model, and is several times slower",
    )
    add("--append-eod", type=bool, default=True, help="true or false: end each document with the end-of-document token")
    add(
        "--txt-documents",
        type=Literal["file", "blank-line"],
        default="file",
        help="file: a .txt file is one document; blank-line: blank lines divide it into documents",
    )
    add(
        "--divide-documents",
        type=Literal["auto", "always", "never"],
        default="auto",
        help="divide each document by position: its beginning to train, the next part to valid, its end to test; auto: if there are "
        "fewer documents than splits",
    )
    add(
        "--eod-token",
        type=str,
        default=None,
        metavar="TOKEN",
        help="end-of-document token; default: the tokenizer's eos_token, else <|endoftext|>",
    )
    add(
        "--encoder",
        type=Literal["auto", "tokenizers", "gigatoken"],
        default="auto",
        help="library that encodes; the ids are the same; auto uses gigatoken if it is installed",
    )
    add("--min-tokens", type=int, default=0, metavar="N", help="leave out documents of fewer tokens than N")
    add("--deduplicate", action="store_true", help="leave out documents whose text equals an earlier one's")
    add(
        "--decontaminate",
        type=str,
        nargs="+",
        default=[],
        metavar="FILE",
        help="report which documents contain passages of these texts (13 equal words in a row), such as test sets",
    )
    add("--drop-contaminated", action="store_true", help="leave out the documents with passages of --decontaminate")
    add(
        "--overwrite",
        action="store_true",
        help="replace a dataset folder that was made from other input or with other settings",
    )


def add_reading_flags(parser: ArgumentParser) -> None:
    """Adds the flags that name the input files and determine how their text is read."""
    add = parser.add_argument
    add("--input", type=str, nargs="+", required=True, metavar="FILE", help="input files, folders or glob patterns")
    add(
        "--on-error",
        type=Literal["stop", "skip"],
        default="stop",
        help="at a bad line: stop and report it, or skip and count it",
    )
    add(
        "--json-key",
        type=str,
        default="text",
        help="key (JSON) or column (table) of the text; meta.text is the key text inside meta",
    )
    add(
        "--format",
        type=Literal["auto", "jsonl", "txt", "parquet", "arrow", "tar"],
        default="auto",
        help="format of the input files; auto detects it by their endings",
    )


def run(args: Any) -> None:
    """Prepares the dataset and prints a summary on stdout."""
    from megatron_lion.errors import ConfigError, StoppedOnRequest
    from megatron_lion.logs import messages_on_stderr
    from megatron_lion.prepare.pipeline import PrepareOptions, prepare
    from megatron_lion.prepare.progress import ConsoleProgress
    from megatron_lion.streams import next_steps

    if args.list:
        sys.stdout.write(listing(args.input, args.format))
        return
    for name in ("tokenizer", "output"):
        if getattr(args, name) is None:
            raise ConfigError(f"--{name}: not given; it is required without --list")
    options = PrepareOptions(
        inputs=args.input,
        tokenizer=args.tokenizer,
        output=args.output,
        split=args.split,
        seed=args.seed,
        workers=args.workers,
        on_error=args.on_error,
        append_eod=args.append_eod,
        json_key=args.json_key,
        task=args.task,
        splitter=args.splitter,
        txt_documents=args.txt_documents,
        divide_documents=args.divide_documents,
        format=args.format,
        eod_token=args.eod_token,
        encoder=args.encoder,
        overwrite=args.overwrite,
        min_tokens=args.min_tokens,
        deduplicate=args.deduplicate,
        decontaminate=args.decontaminate,
        drop_contaminated=args.drop_contaminated,
    )
    try:
        with messages_on_stderr(), ConsoleProgress() as progress:
            manifest = prepare(options, progress=progress)
    except KeyboardInterrupt:
        raise StoppedOnRequest("stopped; run the same command again to continue after the encoded pieces") from None
    sys.stdout.write(summary(args.output, manifest))
    config = "gpt2-tiny" if args.task == "gpt" else "bert-tiny"
    next_steps(["megatron-lion", "pretrain", config, "--data.path", args.output, "--dry-run"])


def listing(inputs: list[str], format: str) -> str:
    """Returns the output of --list: size, format and path of each file that would be read, the total, and the notes.

    Args:
        inputs: files, folders or glob patterns.
        format: as for `find_files.survey`, which also raises the errors.
    """
    from megatron_lion.prepare.find_files import survey

    found = survey(inputs, format)
    lines = [f"{file.bytes:>16,}  {file.format + file.compression:12}  {file.path}" for file in found.files]
    total = sum(file.bytes for file in found.files)
    lines.append(f"{total:>16,}  bytes in {len(found.files):,} files")
    return "\n".join([*lines, *found.notes()]) + "\n"


def summary(output: str, manifest: Manifest) -> str:
    """Returns a summary of the dataset in a few lines: splits, vocabulary, skipped and rejected lines."""
    lines = [f"{output}"]
    for name, split in manifest.splits.items():
        size = f"{split.bin_bytes / 1e6:>12,.2f} MB"
        lines.append(f"  {name:5}  {split.documents:>12,} documents  {split.tokens:>16,} tokens  {size}")
    tokenizer = manifest.tokenizer
    ending = f", end of document {tokenizer.eod_token!r} = {tokenizer.eod_id}" if manifest.kind == "gpt" else ""
    lines.append(f"  vocabulary {tokenizer.vocab_size:,} ({tokenizer.kind}), stored as {manifest.dtype}{ending}")
    if found := manifest.sentences:
        lines.append(
            f"  {found['sentences']:,} sentences; {found['documents_of_one_sentence']:,} documents of one sentence (not used: "
            f"sentence order needs two); {found['divided_sentences']:,} sentences of more than 512 tokens divided"
        )
    if manifest.duplicate_documents:
        lines.append(f"  {manifest.duplicate_documents:,} documents repeat an earlier one")
    for what, counts in (
        ("left out", manifest.dropped),
        ("skipped", manifest.skipped),
        ("rejected", manifest.rejected),
        ("files not read", manifest.unread_files),
    ):
        if counts:
            lines.append(f"  {what}: " + ", ".join(f"{count:,} {kind}" for kind, count in counts.items()))
    lines += [f"  {overlap_line(overlap)}" for overlap in manifest.overlaps]
    return "\n".join(lines) + "\n"


def overlap_line(overlap: Overlap) -> str:
    """Returns one line about a text whose passages were searched: what the train split holds of it."""
    found = (
        f"{overlap.train_ngrams:,} of its {overlap.ngrams:,} 13-grams ({overlap.train_ngrams / overlap.ngrams:.2%}) are in "
        f"{overlap.train_documents:,} training document{'s' * (overlap.train_documents != 1)}"
    )
    others = overlap.found_in_documents - overlap.train_documents
    return f"{overlap.path}: {found}" + (f"; others are in {others:,} that are held out or left out" if others else "")
