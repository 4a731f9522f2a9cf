"""File faults in other commands than pretrain: prepare and export, every call; the same command ends byte-identical."""

from __future__ import annotations

import errno
import hashlib
import json
import signal
from pathlib import Path
from typing import Any

import tiny_gpt2

from faults.cases_disk import distinct
from faults.lab import Lab
from faults.rows import Tally, case
from faults.shim import Fault, read_log
from faults.warm import Forked, Stuck


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder; of a safetensors file with its header sorted, whose order is random."""

    def parts(path: Path) -> bytes:
        content = path.read_bytes()
        if path.suffix != ".safetensors":
            return content
        end = 8 + int.from_bytes(content[:8], "little")
        return json.dumps(json.loads(content[8:end]), sort_keys=True).encode() + content[end:]

    return {
        str(path.relative_to(folder)): hashlib.sha256(parts(path)).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def drive_command(lab: Lab, tally: Tally, words: list[str], kind: str, number: int, wanted: tuple[int, ...]) -> None:
    """Injects a fault into each call below a command's --output folder; `words` ends with that flag.

    The counted root is the output's parent folder, since temporary files lie beside the output.
    """

    def start(place: Path, fault: Fault) -> Forked:
        place.mkdir(exist_ok=True)
        return lab.server.start("faults.work:command", [*words, str(place / "output")], fault=fault)

    whole, log = lab.folder / "whole", lab.folder / "calls"
    process = start(whole, Fault(str(whole), log=str(log)))
    assert process.wait() == 0, process.errors[-2000:]
    expected = contents(whole)
    calls = distinct(read_log(log)[0])
    for call in lab.some([call for call in calls if call.takes(kind, number)]):
        place = lab.folder / f"{kind}{number}-{call.number}"
        log = Path(f"{place}.log")
        what = f"{words[0]}: {kind} at call {call.number} ({call.op} {Path(call.path).name})"
        try:
            process = start(place, Fault(str(place), kind, call.number, number, log=str(log)))
            code = process.wait()
            if not read_log(log)[1]:
                continue
            tally.injected += 1
            if code == -signal.SIGKILL:
                tally.codes["-9"] += 1
            else:
                tally.code(what, code, wanted, process.errors)
            again = start(place, Fault(str(place)))
            code = again.wait()
        except Stuck as error:
            tally.verdict(what, "stuck", str(error))
            continue
        if code == 0 and contents(place) == expected:
            tally.verdict(what, "recovered")
        elif code == 0:
            found = contents(place)
            other = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            tally.verdict(what, "silent", f"other files: {other[:4]}")
        elif "already exists" in again.last_line() and contents(place) == expected:
            tally.verdict(what, "recovered")  # the disturbed command had put the whole output in place
        else:
            tally.verdict(what, "stuck", f"{code}: {again.last_line()}")


KINDS: dict[str, tuple[str, int, tuple[int, ...], str]] = {
    "kill": ("kill", 0, (), "kill -9"),
    "enospc": ("always", errno.ENOSPC, (5, 0), "ENOSPC from the call on"),
    "eio": ("once", errno.EIO, (5, 0), "EIO once"),
}


def prepare_words(lab: Lab) -> list[str]:
    texts = lab.folder / "text"
    tiny_gpt2.write_text_corpus(texts, documents=40)
    return [
        "prepare", "--input", str(texts / "text.txt"), "--txt-documents", "blank-line", "--tokenizer", str(texts / "tokenizer"),
        "--split", "8,1,1", "--encoder", "tokenizers", "--workers", "1", "--output",
    ]  # fmt: skip


def export_words(lab: Lab) -> list[str]:
    corpus = tiny_gpt2.write_text_corpus(lab.folder / "text")
    config = tiny_gpt2.tiny_gpt2(lab.folder / "run", corpus, train__steps=2)
    assert [rank.code for rank in lab.run(config).ranks] == [0]
    return ["export", config.run_dir, "--device", "cpu", "--check", "false", "--output"]


def _register() -> None:
    for verb, make in (("prepare", prepare_words), ("export", export_words)):
        for name, (kind, number, wanted, text) in KINDS.items():

            def work(lab: Lab, tally: Tally, make: Any = make, plan: Any = (kind, number, wanted)) -> None:
                drive_command(lab, tally, make(lab), *plan)

            case(f"{verb}-{name}", verb, f"{verb}: {text}, every call", "5 or 0; then the same bytes")(work)


_register()
