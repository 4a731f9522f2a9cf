"""Stage `run`: a user's pretraining run: stopped, resumed, moved to a CPU and back, probed, evaluated.

Parts that are not timed run in parallel: an undisturbed run, a run that is stopped and resumed, the CPU process, and
this process. The probe of GPT-2 Small, which is timed, runs after they have finished.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

from megatron_lion.config import RunConfig
from megatron_lion.configfile import dump_config

from .children import Child, newest_manifest, wait_for_step
from .settings import CONFIGS, tiny_config, tiny_settings, words
from .stage import Stage, describe

# (steps, step after which SIGTERM is sent); 100 steps remain, so that the signal is in time on a loaded machine too.
LENGTHS = {"cuda": (200, 100), "cpu": (130, 30)}
EVALUATED_TOKENS = 30_000


def run(stage: Stage) -> None:
    if stage.data is None:
        raise RuntimeError("no dataset: give --data")
    wait_for_data(stage, stage.data)
    settings = run_settings(stage)
    twin, cut = stage.folder / "twin", stage.folder / "cut"
    undisturbed = Child(stage, "twin", pretrain_words(twin, settings))
    interrupted: dict[str, Any] = {}
    stopper = threading.Thread(target=stop_and_resume, args=(stage, cut, settings, interrupted))
    stopper.start()
    tiny = parity_config(stage)
    answer = stage.folder / "answer.json"
    (stage.folder / "tiny.yaml").write_text(dump_config(tiny))
    request = {
        "tiny_config": str(stage.folder / "tiny.yaml"),
        "run_dir": str(twin),
        "target": str(stage.folder / "from-cpu"),
    }
    (stage.folder / "request.json").write_text(json.dumps(request))
    cpu = Child(
        stage, "on_cpu", ["-m", "gpu_stages.on_cpu", str(stage.folder / "request.json"), str(answer)], hide_gpu=True
    )
    # megatron-core is imported here, not at the top: the seven seconds overlap with its import in the processes above.
    from .in_process import Beside, checks

    checks(stage, Beside(twin, undisturbed, cpu, answer, stopper, interrupted), tiny)
    for child in (undisturbed, cpu):
        child.kill()


def wait_for_data(stage: Stage, data: Path) -> None:
    """Waits for the dataset, which another process makes during the first stages."""
    while not data.is_dir():
        if stage.remaining() < 5:
            raise TimeoutError(f"{data.name}: the dataset was not made in time; see data.log")
        time.sleep(0.1)


def run_settings(stage: Stage) -> dict[str, Any]:
    """Settings of a bitwise reproducible run on real text."""
    return tiny_settings(stage.rehearse) | {
        "device": stage.device, "data.path": f"[{stage.data}]", "data.num_workers": 2, "train.steps": LENGTHS[stage.device][0],
        "train.precision": "bf16", "train.deterministic": True, "train.log_every": 1 if stage.rehearse else 5,
        "optimizer.master_weights": "split32", "model.hidden_dropout": 0.1, "model.attention_dropout": 0.1,
    }  # fmt: skip


def pretrain_words(run_dir: Path, settings: dict[str, Any]) -> list[str]:
    flags = words({**settings, "run_dir": run_dir})
    return ["-m", "megatron_lion", "pretrain", "--config", str(CONFIGS / "gpt2_tiny.yaml"), *flags]


def stop_and_resume(stage: Stage, run_dir: Path, settings: dict[str, Any], found: dict[str, Any]) -> None:
    """Thread body: starts a run, sends SIGTERM to its process group in the middle, and runs the command again."""
    try:
        first = Child(stage, "cut", pretrain_words(run_dir, settings))
        found["signalled"] = wait_for_step(first, run_dir, LENGTHS[stage.device][1], stage.remaining())
        first.signal_group(signal.SIGTERM)
        found["code"] = first.wait(stage.remaining())
        found["last_line"] = first.last_line()
        found["stopped_at"] = newest_manifest(run_dir)["step"]
        second = Child(stage, "resumed", pretrain_words(run_dir, settings))
        second.check(stage.remaining())
        found["manifest"] = newest_manifest(run_dir)
    except Exception as error:
        found["error"] = describe(error)


def finished(stage: Stage, run_dir: Path, child: Child) -> None:
    child.check(stage.remaining())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    stage.row("200 steps on real text", passed=losses[-1] < losses[0], first_loss=losses[0], last_loss=losses[-1])


def same_as_undisturbed(stage: Stage, twin: Path, found: dict[str, Any]) -> None:
    """Checks exit code 75, a checkpoint of that step, and the same final state as the undisturbed run bit for bit."""
    expected = newest_manifest(twin)
    keys = ("step", "state_fingerprint", "weights_fingerprint", "consumed_samples")
    same = "manifest" in found and all(found["manifest"][key] == expected[key] for key in keys)
    stage.row(
        "SIGTERM, 2 workers, resume", passed=bool(found.get("signalled") and found.get("code") == 75 and same),
        exit_code=found.get("code"), stopped_at=found.get("stopped_at"), same_end=same, last_line=found.get("last_line"),
        reason=found.get("error"),
    )  # fmt: skip


def parity_config(stage: Stage) -> RunConfig:
    """Settings with fp32 and no dropout, with which two devices differ only in the order of their sums."""
    settings = tiny_settings(stage.rehearse) | {
        "device": stage.device, "train.precision": "fp32", "train.steps": 1, "probe.every": 1, "probe.num_batches": 4,
    }  # fmt: skip
    assert stage.data is not None
    return tiny_config(stage.folder / "parity", stage.data, settings)


def evaluate(stage: Stage, run_dir: Path) -> None:
    """Evaluates the perplexity of the first 30,000 tokens of the given text in windows without overlap."""
    if stage.text is None:
        stage.row("evaluate", skipped="no text: give --text FILE")
        return
    flags = [
        "--text",
        str(stage.text),
        "--max-tokens",
        str(EVALUATED_TOKENS),
        "--stride",
        "full",
        "--device",
        stage.device,
    ]
    Child(stage, "evaluate", ["-m", "megatron_lion", "evaluate", str(run_dir), *flags]).check(stage.remaining())
    (path,) = (run_dir / "eval").glob("text-*.json")
    result = json.loads(path.read_text())
    stage.row("evaluate", passed=True, text=stage.text.name, text_sha256=result["text_sha256"],
              **{key: result[key] for key in ("n_tok", "max_tokens", "num_targets", "log_token_ppl", "seconds")})  # fmt: skip
