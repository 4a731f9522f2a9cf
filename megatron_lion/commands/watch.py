"""`megatron-lion watch`: a page of runs while they train, served on this machine or written to a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from megatron_lion.streams import say

HELP = (
    "Show runs while they train, in a browser: losses, norm ratio, learning rate, throughput, memory, skipped steps, time left. "
    "The page is served at http://127.0.0.1:PORT until Ctrl-C, or with --output written to a folder again and again"
)
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def add_arguments(parser: Any) -> None:
    """Declares the verb's flags."""
    add = parser.add_argument
    add(
        "runs",
        type=str,
        nargs="+",
        metavar="RUN",
        help="run folders, also of runs that start later; a sweep folder means all its runs",
    )
    add("--port", type=int, default=8000, help="port of the page; 0 takes a free one")
    add(
        "--host",
        type=str,
        default="127.0.0.1",
        help="address to listen on; every other machine that reaches it can read the runs' metrics and settings",
    )
    add("--every", type=int, default=5, help="seconds between two updates of the page")
    add(
        "--output",
        type=str,
        default=None,
        metavar="DIR",
        help="write DIR/watch.html and DIR/report.html every --every seconds until all runs have ended, instead of serving them",
    )


def run(args: Any) -> None:
    """Serves or writes the page until the runs have ended (--output) or the command is interrupted."""
    from megatron_lion.errors import ConfigError

    if args.every < 1:
        raise ConfigError(f"--every {args.every}: must be at least 1 second")
    if not 0 <= args.port <= 65535:
        raise ConfigError(f"--port {args.port}: must be between 0 and 65535")
    if args.output is not None:
        _write(args.runs, Path(args.output), args.every)
        return
    server = make_server(args.runs, args.host, args.port, args.every)
    port = server.server_address[1]
    for run in args.runs:
        if not Path(run).exists():
            say(f"note: {run} does not exist yet; the page waits for it")
    say(f"watching {', '.join(args.runs)}; end with Ctrl-C")
    sys.stdout.write(f"http://{'127.0.0.1' if args.host in LOOPBACK else args.host}:{port}/\n")
    sys.stdout.flush()
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        say("stopped")
    finally:
        server.server_close()


def pages(runs: list[str], every: int) -> dict[str, Callable[[], str]]:
    """Returns what makes each page, by its file name; each call reads the run folders again."""
    from megatron_lion.compare.best import run_folders
    from megatron_lion.compare.html_report import render_report
    from megatron_lion.compare.live_page import live_page, snapshot
    from megatron_lion.compare.run_tables import build_tables
    from megatron_lion.compare.selection import read_runs
    from megatron_lion.runs.paths import has_begun

    def report() -> str:
        found = read_runs([folder for folder in run_folders(runs) if has_begun(folder)])
        return render_report(found, build_tables(found))

    return {"watch.html": lambda: live_page(snapshot(runs), every, "report.html"), "report.html": report}


def make_server(runs: list[str], host: str, port: int, every: int) -> ThreadingHTTPServer:
    """Returns the server of the two pages; it answers nothing but GET of `/`, `/watch.html` and `/report.html`.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    from megatron_lion.errors import ConfigError, MegatronLionError

    made = pages(runs, every)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.partition("?")[0].removeprefix("/") or "watch.html"
            asked = self.headers.get("Host", "").rsplit(":", 1)[0]
            if host in LOOPBACK and asked not in (*LOOPBACK, "[::1]"):
                # A page of another site whose name was pointed at this machine (DNS rebinding) must not read the runs.
                self._answer(HTTPStatus.FORBIDDEN, "text/plain", f"unknown host; open http://127.0.0.1:{port}/\n")
            elif name not in made:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", "no such page; there are / and /report.html\n")
            else:
                try:
                    self._answer(HTTPStatus.OK, "text/html", made[name]())
                except MegatronLionError as error:
                    self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", f"{error}\n")

        def _answer(self, status: HTTPStatus, kind: str, text: str) -> None:
            body = text.encode("utf-8", errors="replace")
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *values: object) -> None:
            """Prints nothing: a page that loads every few seconds would fill the terminal."""

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--host {host} --port {port}: {reason}; give another --port, or 0 for a free one") from error
    server.daemon_threads = True
    return server


def _write(runs: list[str], folder: Path, every: int) -> None:
    """Writes both pages until all runs have ended or Ctrl-C; a reader never sees half a page."""
    from megatron_lion.compare.live_page import live_page, snapshot
    from megatron_lion.errors import MegatronLionError
    from megatron_lion.files import make_folder, write_whole

    make_folder(folder)
    report = pages(runs, every)["report.html"]
    say(f"writing {folder}/watch.html every {every} s; end with Ctrl-C")
    try:
        while True:
            found = snapshot(runs)
            write_whole(folder / "watch.html", live_page(found, every, "report.html").encode())
            if found.runs:
                try:
                    write_whole(folder / "report.html", report().encode())
                except MegatronLionError as error:
                    say(f"report.html was not written: {error}")
            if found.over:
                break
            time.sleep(every)
    except KeyboardInterrupt:
        say("stopped")
    sys.stdout.write(f"{folder}/watch.html\n")
