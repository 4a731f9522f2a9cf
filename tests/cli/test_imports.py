"""What a verb imports while it works: packages that take seconds to import are left to the verbs that compute with them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_runs import write_run

from megatron_lion.cli import VERBS

HEAVY = {
    "torch", "megatron", "transformers", "triton", "tensorboard", "wandb", "pandas", "datasets", "huggingface_hub", "safetensors",
    "tokenizers", "gigatoken", "sklearn", "scipy", "matplotlib", "PIL", "numpy", "IPython",
}  # fmt: skip
SCRIPT = """
import json, sys
from megatron_lion.cli import main
try:
    code = main(sys.argv[2:])
except SystemExit as end:
    code = end.code
with open(sys.argv[1], "w") as stream:
    json.dump([code, sorted(sys.modules)], stream)
"""
WORK = {
    "compare": (["RUN", "OTHER", "--output", "compared"], {"numpy", "scipy", "matplotlib", "PIL"}, 1082),
    "compare without figures": (["RUN", "OTHER", "--output", "compared", "--no-figures"], {"numpy", "scipy"}, 902),
    "watch": (["RUN", "--output", "watched", "--every", "1"], {"numpy", "scipy"}, 342),
    "theory": (["RUN", "OTHER"], {"numpy", "scipy"}, 626),
    "toy": (["--steps", "20", "--starts", "2", "--repeats", "2", "--output", "toy"], {"numpy", "matplotlib", "PIL"}, 630),
    "toy without figures": (
        ["--steps", "20", "--starts", "2", "--repeats", "2", "--output", "toy", "--no-figures"], {"numpy"}, 420
    ),
    "configs": (["list"], set(), 302),
    "completion": (["bash"], set(), 350),
    "sweep": (["--config", "gpt2-tiny", "--grid", "optimizer.lr=1e-3,2e-3", "--output", "sweep", "--print", "--data.path",
               "[text]", "--model.vocab_size", "400"], {"numpy"}, 346),
    "scaling": (["--widths", "32,64", "--dry-run"], set(), 397),
    "tokenizer": (["train", "--input", "text.txt", "--output", "vocabulary", "--vocab-size", "300"], {"tokenizers"}, 395),
    "prepare": (["--input", "text.txt", "--tokenizer", "trained", "--encoder", "tokenizers", "--output", "prepared"],
                {"numpy", "tokenizers"}, 526),
    "merge": (["text", "text2", "--output", "merged"], {"numpy", "tokenizers"}, 475),
    "inspect": (["text"], {"numpy", "tokenizers"}, 475),
    "pretrain": (["--config", "gpt2-tiny", "--data.path", "[text]", "--run_dir", "run", "--dry-run"],
                 {"numpy", "tokenizers"}, 425),
}  # fmt: skip
"""By name: the words after the verb, the heavy packages that it computes with, and the modules that it imported when this was
written (matplotlib 3.11, scipy 1.18, numpy 2.5)."""
ROOM = 1.25
"""How many times that number other versions may have. A package that is imported without need adds hundreds of modules."""


def imported(words: list[str], folder: Path) -> set[str]:
    """Runs a verb in a process of its own, which must succeed; returns the modules that it imported."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "modules.json", *words], capture_output=True, text=True, cwd=folder, check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    code, modules = json.loads((folder / "modules.json").read_text())
    assert code in (0, None), done.stderr[-2000:]
    return set(modules)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, a text, its vocabulary and its token files."""
    folder = tmp_path_factory.mktemp("work")
    write_run(folder / "RUN")
    write_run(folder / "OTHER", seed=2)
    letters = random.Random(1)
    words = ["".join(letters.choices("abcdefgh", k=letters.randint(2, 7))) for _ in range(300)]
    (folder / "text.txt").write_text("\n".join(" ".join(letters.choices(words, k=40)) for _ in range(400)))
    imported(["tokenizer", "train", "--input", "text.txt", "--output", "trained", "--vocab-size", "400"], folder)
    for name in ("text", "text2"):
        words = ["--input", "text.txt", "--tokenizer", "trained", "--seed", name[4:] or "1", "--output", name]
        imported(["prepare", *words], folder)
    return folder


@pytest.mark.parametrize("name", WORK)
def test_a_verb_imports_only_what_it_computes_with(name: str, folder: Path) -> None:
    words, needed, count = WORK[name]
    modules = imported([name.split()[0], *words], folder)
    heavy = {module.partition(".")[0] for module in modules} & HEAVY
    if name == "pretrain" and Path("/proc/driver/nvidia").exists():
        heavy -= {"torch", "triton", "megatron"}  # to name the card and to try LION's kernel
    assert heavy - needed == set()
    assert len(modules) <= ROOM * count or "torch" in modules


def test_the_list_has_every_verb_that_works_without_torch() -> None:
    with_torch = {"demo", "env", "evaluate", "export", "generate", "import", "probe", "reproduce"}
    assert {name.split()[0] for name in WORK} | with_torch == set(VERBS)
