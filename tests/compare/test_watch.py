"""The page of runs that are still training: its numbers, its server, and its look in a real browser."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from browser import CHROMIUM, Browser
from synthetic_runs import write_run

from megatron_lion.cli import main
from megatron_lion.commands.watch import make_server
from megatron_lion.compare.live_page import live_page, snapshot


def cut_at(folder: Path, step: int) -> Path:
    """Shortens a run to its first steps, as if it still trained."""
    path = folder / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
    path.write_text("\n".join(lines) + "\n")
    return folder


def append(folder: Path, **values: float) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A LION run of 1,000 steps of 16,384 tokens that has done 500."""
    return cut_at(write_run(tmp_path / "lion"), 500)


def facts(folder: Path, now: float | None = None) -> dict[str, str]:
    (live,) = snapshot([folder], now).runs
    return {"state": live.state, **dict(live.facts)}


def test_numbers_of_a_run_that_trains(half: Path) -> None:
    for step in range(510, 620, 10):
        append(half, step=step, **{"train/loss": 3.25, "optim/lr": 2e-4, "perf/tokens_per_s": 8192.0, "memory/max_gib": 2.5,
                                   "optim/skipped_steps": 2, "progress/consumed_tokens": step * 16384, "time": 1.0})  # fmt: skip
    append(half, step=600, **{"valid/loss": 3.5, "probe/norm_ratio_over_sqrt_d": 0.7, "probe/sqrt_d": 100.0,
                              "probe/norm_ratio_low": 61.0, "probe/norm_ratio_high": 79.0, "time": 1.0})  # fmt: skip
    found = facts(half)
    assert found["state"] == "training"
    assert found["training loss"] == "3.2500"  # the last ten log lines
    assert found["validation loss"] == "3.5000"
    assert found["r / √d"] == "0.700 (0.610 to 0.790 without noise)"
    assert found["learning rate"] == "0.0002"
    assert found["tokens/s"] == "8,192"
    assert found["memory"] == "2.50 GiB"
    assert found["skipped steps"] == "2"
    # 390 steps of 16,384 tokens at 8,192 tokens/s
    assert found["time left"].startswith("13 min 0 s, about 20")


def test_states(half: Path, tmp_path: Path) -> None:
    written = (half / "metrics.jsonl").stat().st_mtime
    assert facts(half, written + 60)["state"] == "training"
    quiet = facts(half, written + 3 * 3600 + 60)
    assert quiet["state"] == "no new line for 3 h 1 min"
    assert quiet["time left"] == "–"
    whole = write_run(tmp_path / "whole")
    assert facts(whole, written + 9999)["state"] == "finished"
    append(half, step=501, **{"optim/skipped_steps": 3, "optim/gave_up": 1, "time": 1.0})
    assert facts(half)["state"] == "diverged"


def test_a_slow_run_is_not_taken_for_a_dead_one(half: Path) -> None:
    """Its log lines come every 10 steps of 16,384 tokens: every 30 minutes at 91 tokens/s."""
    path = half / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**line, "perf/tokens_per_s": 91.0}) + "\n" if "perf/tokens_per_s" in line else
                            json.dumps(line) + "\n" for line in lines))  # fmt: skip
    written = path.stat().st_mtime
    assert facts(half, written + 4 * 3600)["state"] == "training"
    assert facts(half, written + 6 * 3600)["state"].startswith("no new line")


def test_the_page_loads_again_until_all_runs_have_ended(half: Path, tmp_path: Path) -> None:
    whole = write_run(tmp_path / "sgd", optimizer="sgd")
    later = tmp_path / "later"
    page = live_page(snapshot([half, whole, later]), 7, "report.html")
    assert '<meta http-equiv="refresh" content="7">' in page
    assert f"waiting for {later}" in page
    assert 'href="report.html"' in page
    over = live_page(snapshot([whole]), 7)
    assert "refresh" not in over
    assert "all runs have ended" in over
    assert "<script" not in page + over


def test_names_of_strangers_do_not_become_markup(half: Path) -> None:
    config = yaml.safe_load((half / "config.yaml").read_text())
    facts_of_run = json.loads((half / "run.json").read_text())
    (half / "config.yaml").write_text(yaml.safe_dump({**config, "name": "<b>x</b>"}))
    (half / "run.json").write_text(json.dumps({**facts_of_run, "name": "<b>x</b>"}))
    assert "<b>" not in live_page(snapshot([half]), 5)


def test_a_damaged_run_is_reported_on_the_page(half: Path) -> None:
    (half / "metrics.jsonl").write_text("nonsense\n{}\n")
    found = snapshot([half])
    assert "metrics.jsonl, line 1" in live_page(found, 5)
    assert not found.over


@pytest.fixture
def served(half: Path) -> Iterator[int]:
    server = make_server([str(half)], "127.0.0.1", 0, 5)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def get(port: int, path: str, host: str | None = None, method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_server_shows_new_lines_and_nothing_else(half: Path, served: int) -> None:
    status, page = get(served, "/")
    assert status == 200
    assert "step 500 of 1,000" in page
    append(half, step=730, **{"train/loss": 3.25, "progress/consumed_tokens": 730 * 16384, "time": 1.0})
    assert "step 730 of 1,000" in get(served, "/watch.html?x")[1]
    status, report = get(served, "/report.html")
    assert status == 200
    assert "<h1>Comparison: gpt2-small" in report
    for path in ("/etc/passwd", "/../run.json", "//etc/passwd", "/config.yaml"):
        assert get(served, path)[0] == 404
    assert get(served, "/", method="POST")[0] == 501
    # A foreign site that points its own name at this machine.
    assert get(served, "/", "evil.example:8000")[0] == 403
    assert get(served, "/", f"localhost:{served}")[0] == 200


def test_a_port_in_use_is_one_error(half: Path, served: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(half), "--port", str(served)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"megatron-lion: --host 127.0.0.1 --port {served}: ")
    assert "give another --port" in error
    assert main(["watch", str(half), "--port", "70000"]) == 2
    assert main(["watch", str(half), "--every", "0"]) == 2


def test_the_command_serves_until_it_is_interrupted(half: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_lion", "watch", str(half), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address, timeout=60) as answer:
            assert b"step 500 of 1,000" in answer.read()
        process.send_signal(2)
        assert process.wait(timeout=60) == 0
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(address, timeout=60)
    finally:
        process.kill()
        process.communicate()


def test_output_writes_both_pages_until_the_runs_have_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = write_run(tmp_path / "whole")
    assert main(["watch", str(whole), "--output", str(tmp_path / "page")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/page/watch.html\n"
    assert "all runs have ended" in (tmp_path / "page" / "watch.html").read_text()
    assert "Comparison" in (tmp_path / "page" / "report.html").read_text()


def test_output_is_written_again_until_the_run_has_ended(
    half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page" / "watch.html"
    seen = []

    def train_on(seconds: float) -> None:
        seen.append(page.read_text())
        step = 500 + 250 * len(seen)
        append(half, step=step, **{"progress/consumed_tokens": step * 16384, "time": 1.0})

    monkeypatch.setattr("megatron_lion.commands.watch.time.sleep", train_on)
    assert main(["watch", str(half), "--output", str(page.parent), "--every", "9"]) == 0
    assert ["step 500 of" in seen[0], "step 750 of" in seen[1], len(seen)] == [True, True, 2]
    assert "step 1,000 of 1,000" in page.read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
@pytest.mark.parametrize("width", [pytest.param(1280, marks=pytest.mark.slow), 390])
def test_nothing_is_cut_in_a_browser(half: Path, tmp_path: Path, width: int) -> None:
    others = [cut_at(write_run(tmp_path / name, optimizer=name), 300) for name in ("sgd", "adamw")]
    page = tmp_path / "watch.html"
    page.write_text(live_page(snapshot([half, *others, tmp_path / "later"]), 3600))
    (tmp_path / "browser").mkdir()
    said = json.loads(Browser(tmp_path / "browser").measure(page, width, 900))
    assert said["width"] <= width, "the page scrolls sideways"
    assert said["cut"] == []
    assert said["overlapping"] == []
    assert said["fetched"] == []
    assert len(said["shown"]) >= 7


def test_rates_of_different_size_share_a_logarithmic_axis(half: Path, tmp_path: Path) -> None:
    sgd = cut_at(write_run(tmp_path / "sgd", optimizer="sgd"), 300)
    append(sgd, step=310, **{"optim/lr": 0.0, "progress/consumed_tokens": 310 * 16384, "time": 1.0})
    page = live_page(snapshot([half, sgd]), 5)
    chart = page.partition('aria-label="Learning rate"')[2].partition("</svg>")[0]
    assert ">0.001<" in chart
    assert ">0.01<" in chart
    alone = live_page(snapshot([half]), 5).partition('aria-label="Learning rate"')[2].partition("</svg>")[0]
    assert ">0<" in alone
