"""Standard streams that end no job: a closed, full or abandoned stdout or stderr loses text, but no work and no exit code."""

from __future__ import annotations

import atexit
import importlib
import io
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TextIO

NO_HINTS = "MEGATRON_LION_NO_HINTS"
"""Variable of a verb that another verb started, such as those of the demo: what follows is up to the other verb."""


class Tolerant(io.TextIOWrapper):
    """A text stream that continues without an exception after its reader ended or its disk is full.

    Megatron-Core, torch and rich write to the same streams. Therefore the stream tolerates errors, not each caller.

    Attributes:
        lost: the first error that lost text, or None.
        given: the stream that it takes the place of. It is kept because it would close the common buffer with itself.
    """

    lost: OSError | None = None
    given: TextIO | None = None

    def write(self, text: str, /) -> int:
        """Writes text, or loses it."""
        try:
            return super().write(text)
        except OSError as error:
            self.lost = self.lost or error
            return len(text)

    def flush(self) -> None:
        """Writes the buffer, or leaves it there."""
        if self.closed:  # the interpreter's last flush may come after the buffer's end
            return
        try:
            super().flush()
        except OSError as error:
            self.lost = self.lost or error


def guard_streams() -> None:
    """Makes stdin, stdout and stderr exist, and stdout and stderr tolerant; a process calls it before it opens any file.

    A file that is opened while descriptor 0, 1 or 2 is free gets that number, and then holds what libraries print.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # Lower ones exist by now, so this is the lowest free number.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - for the process's life
    sys.stdout = _tolerant(sys.stdout, 1)
    sys.stderr = _tolerant(sys.stderr, 2)
    atexit.register(_end_quietly)


def _tolerant(stream: TextIO | None, descriptor: int) -> Tolerant:
    is_error = descriptor == 2
    if stream is None:
        raw = open(descriptor, "wb", closefd=False)  # noqa: SIM115 - for the process's life
        return Tolerant(raw, "utf-8", "backslashreplace", line_buffering=True)
    tolerant = Tolerant(
        stream.buffer, stream.encoding, stream.errors, line_buffering=is_error or bool(stream.line_buffering)
    )
    tolerant.given = stream
    return tolerant


def lost_output() -> OSError | None:
    """Flushes stdout and returns the error that lost text written to it, or None."""
    stream = sys.stdout
    if not isinstance(stream, Tolerant):
        return None
    stream.flush()
    return stream.lost


def _end_quietly() -> None:
    """Gives text that cannot be written to /dev/null: the interpreter would complain about it and end with 120."""
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        if isinstance(stream, Tolerant):
            stream.flush()
            if stream.lost is not None:
                with suppress(OSError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def say(text: str) -> None:
    """Writes a line to stderr at once; a missing, full or abandoned stderr loses it."""
    stream = sys.stderr
    if stream is not None:
        with suppress(OSError, ValueError):  # ValueError: it is closed
            stream.write(f"{text}\n")
            stream.flush()


def stderr_is_terminal() -> bool:
    """Whether stderr is a terminal, on which a progress bar can be drawn over itself.

    rich's `Console.is_terminal` also obeys FORCE_COLOR, which asks for colours in a file or pipe. Jupyter sets it for its
    cells, and a bar would then leave a line of control characters for each of its states.
    """
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


@contextmanager
def busy(text: str, *, shown: bool = True) -> Iterator[Callable[[str], None]]:
    """Shows a text with a spinner on stderr while the block runs, if `shown` and if stderr is a terminal.

    It is for work of several seconds whose length is not known, such as the imports of torch and a model's load. Results
    are written after the block.

    Yields:
        A function that replaces the text.
    """
    if not (shown and stderr_is_terminal()):
        yield lambda text: None
        return
    from rich.console import Console
    from rich.live import Live
    from rich.spinner import Spinner
    from rich.text import Text

    spinner = Spinner("dots", Text(text))
    # Without rich would move what is written to stdout to stderr, also if stdout is a file.
    with Live(spinner, console=Console(stderr=True), transient=True, redirect_stdout=False, refresh_per_second=8):
        yield lambda text: spinner.update(text=Text(text))


def load(*modules: str, shown: bool = True) -> None:
    """Imports modules, with a line that names the wait: torch and megatron-core take seconds, on a busy machine half a minute."""
    with busy("loading torch and megatron-core", shown=shown):
        for module in modules:
            importlib.import_module(module)


def next_steps(*commands: Sequence[str] | str) -> None:
    """Writes the commands that usually follow this one to stderr, one a line, ready to paste.

    The rule for all verbs: stdout holds results alone, so that a script can read it, and the hint is for a person, so
    it is written only if stderr is a terminal. Rank 0 calls it, after the verb's last line.

    Args:
        commands: the words of each command, which are quoted for a shell; or a finished line, such as a line of Python.
    """
    if not stderr_is_terminal() or os.environ.get(NO_HINTS):
        return
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()  # both may be one terminal, and the hint comes last
    for number, command in enumerate(commands):
        line = command if isinstance(command, str) else shlex.join(command)
        say(f"{'next:' if number == 0 else ' or: '} {line}")
