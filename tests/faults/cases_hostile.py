"""Hostile files: nothing in them runs, and no file outside of the run's folder is opened for writing or removed.

sys.addaudithook reports what the interpreter does; what is not on the allow-list is an event. A file that a payload would
make is the second proof.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny_gpt2

from faults.cases_checkpoints import HALF, RUN, stated_again, step
from faults.lab import Lab, digest
from faults.rows import Tally, case
from faults.warm import Stuck
from megatron_lion.config import RunConfig

FAMILY = "hostile files"
STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn")
REACHES = ("socket.connect", "socket.sendto", "socket.bind", "urllib.Request", "ftplib.connect", "smtplib.connect")
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link", "os.symlink", "os.truncate",
           "shutil.rmtree", "shutil.move", "shutil.unpack_archive")  # fmt: skip
AT = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.rename": 2, "os.link": 2}
"""Place of the descriptor of a folder in an event's arguments."""
PROGRAMS = ("git", "uname", "g++", "c++", "cc", "gcc", "clang++")
"""Programs that a run starts itself: the commit for environment.json, the processor's name, the compiler of lion.cpp."""
CLASSES = ("torch", "collections", "megatron_lion", "megatron.core", "numpy", "builtins.set", "_codecs.encode")
"""Modules whose classes may be unpickled: torch's checkpoint metadata, and what ranks send each other."""


def audited(result: str, roots: list[str], words: list[str]) -> int:
    """Work of a process: runs a command line; every event that is not allowed is a line of the file `result`."""
    from faults.work import command

    tempfile.tempdir = None  # the server may have asked for it before TMPDIR was set
    handle = os.open(result, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    inside = tuple(os.path.realpath(root) for root in roots)

    def outside(path: Any) -> bool:
        if not isinstance(path, str | bytes):
            return False
        name = os.path.realpath(os.fsdecode(path))
        return not name.startswith((*inside, "/dev/", "/proc/self")) and "__pycache__" not in name

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        wrong = event in STARTS or event in REACHES
        if event == "subprocess.Popen":
            wrong = os.path.basename(os.fsdecode(arguments[0] or arguments[1][0])) not in PROGRAMS
        elif event == "open":
            mode, flags = arguments[1], arguments[2] or 0
            writes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & 3)
            wrong = writes and outside(arguments[0])
        elif event in CHANGES:
            given = arguments[AT[event]] if event in AT else None  # shutil.rmtree names files relative to a folder
            base = os.readlink(f"/proc/self/fd/{given}") if isinstance(given, int) and given >= 0 else ""
            names = [os.fsdecode(argument) for argument in arguments if isinstance(argument, str | bytes)]
            wrong = any(outside(os.path.join(base, name)) for name in names)
        elif event == "pickle.find_class":
            wrong = not f"{arguments[0]}.{arguments[1]}".startswith(CLASSES)
        if wrong:
            os.write(handle, f"{event} {arguments!r}\n"[:300].encode())

    sys.addaudithook(hook)
    return command(words)


class Attack:
    """Calls a function when it is unpickled."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def payloads(proof: Path) -> dict[str, bytes]:
    """Pickles that make the file `proof`."""
    code = f"open({str(proof)!r}, 'w')"
    return {
        "os.system": pickle.dumps(Attack(os.system, f"touch {proof}")),
        "exec": pickle.dumps(Attack(exec, code)),
        "eval": pickle.dumps(Attack(eval, code)),
        "Path.touch": pickle.dumps(Attack(Path.touch, proof)),
        "getattr": pickle.dumps(Attack(getattr, Attack(__import__, "os"), "system")),
        "protocol 0": f"cos\nsystem\n(S'touch {proof}'\ntR.".encode(),
    }


def harms(proof: Path) -> dict[str, tuple[Callable[[RunConfig], Any], tuple[int, ...]]]:
    """What is put into a run's folder, and the codes that are right."""
    found: dict[str, tuple[Callable[[RunConfig], Any], tuple[int, ...]]] = {}

    def put(name: str, content: bytes) -> Callable[[RunConfig], Any]:
        def write(config: RunConfig) -> None:
            (step(config, 4) / name).write_bytes(content)
            stated_again(step(config, 4))

        return write

    def array(config: RunConfig) -> None:
        for path in Path(config.run_dir, "cache").rglob("*.npy"):
            np.save(path, np.array([Attack(os.system, f"touch {proof}")], dtype=object), allow_pickle=True)

    def yaml(text: str) -> Callable[[RunConfig], Any]:
        return lambda config: Path(config.run_dir, "config.yaml").write_text(text)

    import io

    import torch

    zipped = io.BytesIO()
    torch.save({"a": Attack(os.system, f"touch {proof}")}, zipped)
    for name, payload in payloads(proof).items():
        found[f".metadata: {name}"] = (put(".metadata", payload), (4,))
    for name, content in {
        "a pickle": payloads(proof)["os.system"],
        "torch.save with an object": zipped.getvalue(),
    }.items():
        found[f"shard: {name}"] = (put("__0_0.distcp", content), (4,))
        found[f"random states: {name}"] = (put("rng_00000.safetensors", content), (4,))
    found["index cache: object arrays"] = (array, (0, 3))
    for tag in (
        "python/object/apply:os.system",
        "python/object/new:os.system",
        "python/name:os.system",
        "python/module:os",
    ):
        found[f"config.yaml: !!{tag}"] = (yaml(f"name: !!{tag} ['touch {proof}']\n"), (2, 4))
    found["config.yaml: class_path"] = (
        yaml(f"model:\n  class_path: os.system\n  init_args:\n    command: touch {proof}\n"), (2, 4),
    )  # fmt: skip
    return found


def attack(
    lab: Lab, tally: Tally, what: str, proof: Path, words: list[str], roots: list[str], codes: tuple[int, ...]
) -> int:
    """Runs a command under the hook and counts: recovered if nothing happened, silent if something ran."""
    tally.injected += 1
    result = lab.folder / f"events-{tally.injected}"
    temporary = lab.folder / "tmp"
    temporary.mkdir(exist_ok=True)
    environment = {"TMPDIR": str(temporary)}
    arguments = (str(result), [*roots, str(temporary)], words)
    process = lab.server.start("faults.cases_hostile:audited", *arguments, environment=environment)
    try:
        code = process.wait()
    except Stuck as error:
        tally.verdict(what, "stuck", str(error))
        return -1
    tally.code(what, code, codes, process.errors)
    events = result.read_text(errors="replace").splitlines()
    if events or proof.exists():
        tally.verdict(what, "silent", f"{len(events)} events, proof {proof.exists()}: {events[:2]}")
        proof.unlink(missing_ok=True)
    else:
        tally.verdict(what, "recovered")
    return code


@case(
    "hostile-run",
    FAMILY,
    "pickles, tags and class paths in a run's folder; resumed under an audit hook",
    "4, 2 or 3; 0 events",
)
def run_folder(lab: Lab, tally: Tally) -> None:
    half = lab.config("half", **RUN)
    assert [rank.code for rank in lab.run(half, words=HALF).ranks] == [0]
    proof, twin = lab.folder / "proof", lab.twin(lab.config("twin", **RUN))
    from megatron_lion.configfile import dump_config

    for what, (harm, codes) in lab.some([("nothing", (lambda config: None, (0,))), *harms(proof).items()]):
        config = lab.copy(half)
        path = Path(f"{config.run_dir}.yaml")
        path.write_text(dump_config(config))
        harm(config)
        code = attack(lab, tally, what, proof, ["pretrain", "--config", str(path)], [config.run_dir], codes)
        if code == 0 and digest(config.run_dir, twin.step) != twin.digest:
            tally.verdict(what, "silent", "exit 0 with other tensors")
        shutil.rmtree(config.run_dir)


def alias_bomb() -> str:
    """A YAML text of 500 bytes whose value has 9^8 elements."""
    lines = [f"{other}: &{other} [{','.join([f'*{one}'] * 9)}]" for one, other in itertools.pairwise("abcdefgh")]
    return "\n".join(["a: &a [x,x,x,x,x,x,x,x,x]", *lines, "name: *h", ""])


@case("hostile-settings", FAMILY, "tags and class paths in a file of settings and on the command line", "2; 0 events")
def settings(lab: Lab, tally: Tally) -> None:
    proof, corpus = lab.folder / "proof", lab.corpus
    texts = {
        "tag": f"name: !!python/object/apply:os.system ['touch {proof}']\n",
        "class_path": f"optimizer:\n  class_path: os.system\n  init_args: {{command: touch {proof}}}\n",
        "alias bomb": alias_bomb(),
    }  # fmt: skip
    words = {name: ["pretrain", "--config", str(lab.folder / f"{name}.yaml")] for name in texts}
    for name, text in texts.items():
        (lab.folder / f"{name}.yaml").write_text(text)
    words["flag with a tag"] = [
        "pretrain",
        "--name",
        f"!!python/object/apply:os.system ['touch {proof}']",
        "--data.path",
        f"[{corpus}]",
        "--run_dir",
        str(lab.folder / "named"),
    ]
    tag = f"!!python/object/apply:os.system ['touch {proof}']"
    words["number with a tag"] = ["pretrain", "--optimizer.lr", tag, "--data.path", f"[{corpus}]"]
    words["flag class_path"] = ["pretrain", "--optimizer.class_path", "os.system", "--data.path", f"[{corpus}]"]
    for name in lab.some(list(words)):
        attack(lab, tally, name, proof, words[name], [str(lab.folder)], (2,))


@case(
    "hostile-hub",
    FAMILY,
    "Hugging Face folders with code, pickles, links and paths out of the folder; import",
    "2, 3 or 4; 0 events",
)
def hub_folder(lab: Lab, tally: Tally) -> None:
    corpus = tiny_gpt2.write_text_corpus(lab.folder / "text")
    config = tiny_gpt2.tiny_gpt2(lab.folder / "run", corpus, train__steps=1)
    assert [rank.code for rank in lab.run(config).ranks] == [0]
    export = lab.folder / "export"
    made = lab.server.start(
        "faults.work:command", ["export", config.run_dir, "--device", "cpu", "--output", str(export)]
    )
    assert made.wait() == 0, made.errors
    proof = lab.folder / "proof"

    def pickled(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(payloads(proof)["os.system"])

    def code(folder: Path) -> None:
        (folder / "modeling_evil.py").write_text(f"open({str(proof)!r}, 'w')\n")
        facts = json.loads((folder / "config.json").read_text())
        facts["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}
        (folder / "config.json").write_text(json.dumps(facts))

    def index(folder: Path, name: str) -> None:
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"transformer.wte.weight": name}})
        )

    plans: dict[str, tuple[Callable[[Path], Any], tuple[int, ...]]] = {
        "a pickle in place of the weights": (pickled, (2, 3, 4)),
        "weights that are a pickle": (lambda folder: (folder / "model.safetensors").write_bytes(payloads(proof)["exec"]), (2, 3, 4)),
        "code in the folder (auto_map)": (code, (0, 2, 3, 4)),
        "a shard out of the folder": (lambda folder: index(folder, "../outside.safetensors"), (2, 3, 4)),
        "a shard by its absolute path": (lambda folder: index(folder, str(folder.parent / "outside.safetensors")), (2, 3, 4)),
    }  # fmt: skip
    for number, (what, (harm, codes)) in enumerate(lab.some(list(plans.items()))):
        place = lab.folder / f"hub-{number}"
        shutil.copytree(export, place / "folder")
        harm(place / "folder")
        words = ["import", str(place / "folder"), "--run_dir", str(place / "run"), "--device", "cpu"]
        attack(lab, tally, what, proof, words, [str(place / "run"), str(place)], codes)
