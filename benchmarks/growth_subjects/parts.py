"""What growth.py measures from inside of a process: python parts.py PART FOLDER ARGUMENTS; writes FOLDER/figures.json."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the other benchmarks

Figures = dict[str, float]


@contextmanager
def timed(figures: Figures, name: str) -> Iterator[None]:
    """Writes the wall and CPU seconds of the block into `figures`."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    figures[f"{name}_s"] = round(time.perf_counter() - wall, 5)
    figures[f"{name}_cpu_s"] = round(time.process_time() - cpu, 5)


def training(folder: Path, layers: str, hidden: str, vocabulary: str) -> Figures:
    """Builds a GPT-2, takes steps, saves and restores; on every rank of the job, with the figures of the first."""
    from train_step import CONFIGS, random_data, take_step, time_sections

    from megatron_lion.configfile import load_config
    from megatron_lion.device import select_device
    from megatron_lion.jobs import world_size_from_env
    from megatron_lion.parallel import agree, process_groups
    from megatron_lion.train.checkpoint import verify_checkpoint
    from megatron_lion.train.restore import restore_run
    from megatron_lion.train.run import build_run, save_run

    figures: Figures = {}
    device = select_device("cpu")
    with timed(figures, "groups"):
        joined = process_groups(device)
        ranks = joined.__enter__()
    prefix = folder / "random"
    with agree("writing the data"):
        data = random_data(prefix, "gpt2", 64, int(vocabulary)) if ranks.is_main else ""
    settings = {
        "run_dir": folder / "run", "device": "cpu", "data.path": f"[{data or prefix}]", "data.split": "100,0,0", "data.num_workers": 0,
        "model.num_layers": layers, "model.hidden_size": hidden, "model.num_attention_heads": max(1, int(hidden) // 64),
        "model.vocab_size": vocabulary, "model.seq_length": 64, "train.steps": 3, "train.micro_batch_size": 1,
        "train.global_batch_size": world_size_from_env(), "train.test_every": 0, "probe.every": 0, "checkpoint.every": 0,
        "checkpoint.at_steps": "[]", "schedule.warmup_steps": 0,
    }  # fmt: skip
    words = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    with timed(figures, "build"):
        run = build_run(load_config(CONFIGS / "gpt2_tiny.yaml", words), device, ranks)
    sections, batches = time_sections(run), run.train_batches()
    for _ in range(3):
        take_step(run, batches)
    figures["section_s"] = round(min(float(section()) for section in sections), 5)
    with timed(figures, "save"):
        saved = save_run(run)
    with timed(figures, "verify"):
        verify_checkpoint(saved, ranks)
    with timed(figures, "restore"):
        restore_run(run, saved)
    figures["checkpoint_mb"] = round(sum(path.stat().st_size for path in saved.folder.rglob("*")) / 1e6, 2)
    joined.__exit__(None, None, None)
    return figures


def corpus(folder: Path, documents: str) -> Figures:
    """Writes token files, opens them and builds the index of their samples."""
    import numpy as np

    from megatron_lion.config import DataConfig, ModelConfig
    from megatron_lion.data.corpora import open_corpora
    from megatron_lion.data.datasets import build_datasets
    from megatron_lion.data.indexed_writer import IndexedWriter
    from megatron_lion.device import select_device
    from megatron_lion.parallel import process_groups

    figures: Figures = {}
    model = ModelConfig(seq_length=64, vocab_size=1000)
    with timed(figures, "write"), IndexedWriter(folder / "corpus", 1000) as writer:
        tokens = np.arange(40) % 1000
        for _ in range(int(documents)):
            writer.add_document(tokens)
        writer.finalize()
    with process_groups(select_device("cpu")):
        with timed(figures, "open"):
            corpora = open_corpora(DataConfig(path=[str(folder / "corpus")], split="98,1,1"), model)
        wanted = int(documents) // 4
        with timed(figures, "index"):
            datasets = build_datasets(corpora, model, [wanted, 1, 1], seed=1, cache=folder / "cache")
        with timed(figures, "samples"):
            for number in range(0, wanted, max(1, wanted // 200)):
                datasets[0][number]
    return figures


def checkpoints(folder: Path, run_dir: str) -> Figures:
    """Lists, opens, verifies and chooses the checkpoints of a run."""
    from megatron_lion.runs.steps import choose_steps, find_latest, list_steps, open_checkpoint, step_folder
    from megatron_lion.train.checkpoint import verify_checkpoint

    figures: Figures = {}
    run = Path(run_dir)
    with timed(figures, "list"):
        steps = list_steps(run)
    with timed(figures, "latest"):
        find_latest(run)
    with timed(figures, "choose"):
        chosen = choose_steps("all", steps)
    with timed(figures, "open_all"):
        found = [open_checkpoint(step_folder(run, step)) for step in chosen]
    with timed(figures, "verify_all"):
        for checkpoint in found:
            verify_checkpoint(checkpoint)
    return figures


def multiply(folder: Path, run_dir: str) -> Figures:
    """Gives a run of one sample a step a checkpoint at each step before its last one, with links to the last one's files."""
    from megatron_lion.runs.checkpoint_manifest import MANIFEST, manifest_bytes, read_manifest
    from megatron_lion.runs.steps import list_steps, step_folder

    run = Path(run_dir)
    (last,) = list_steps(run)
    source = step_folder(run, last)
    manifest = read_manifest(source)
    for step in range(1, last):
        target = step_folder(run, step)
        shutil.copytree(source, target, copy_function=os.link)
        (target / MANIFEST).unlink()
        (target / MANIFEST).write_bytes(manifest_bytes({**manifest, "step": step, "consumed_samples": step}))
    return {}


PARTS: dict[str, Callable[..., Figures]] = {
    "training": training, "corpus": corpus, "checkpoints": checkpoints, "multiply": multiply,
}  # fmt: skip


if __name__ == "__main__":
    where = Path(sys.argv[2])
    result = PARTS[sys.argv[1]](where, *sys.argv[3:])
    if int(os.environ.get("RANK", "0")) == 0:
        (where / "figures.json").write_text(json.dumps(result))
