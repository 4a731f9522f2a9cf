"""Downloads a tokenizer's files from Hugging Face's hub, or finds an earlier download of them."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_lion.data.tokenizer_files import PAIRS, SINGLE, WORDPIECES, read_bytes
from megatron_lion.data.tokenizer_settings import SIDE_FILES
from megatron_lion.errors import DataError, EnvironmentFault
from megatron_lion.jobs import rank_from_env
from megatron_lion.streams import say

WAIT_S = 3.0
"""Seconds to wait for the hub's first answer, unless HF_HUB_ETAG_TIMEOUT sets another number."""


def hub_files(name: str, *, download: bool) -> dict[str, bytes]:
    """Returns the tokenizer's files of a hub repository, under their canonical names.

    If the hub does not answer, an earlier download is used, and one line reports it.

    Args:
        name: the repository, NAME or OWNER/NAME.
        download: whether the network may be used. If false, only an earlier download is searched.

    Returns:
        Contents by name, as `tokenizer_files.read_files`; {} if there is no earlier download and `download` is false.

    Raises:
        DataError: there is no such repository, or it has no tokenizer.
        EnvironmentFault: the hub does not answer and there is no earlier download, or it refuses the repository.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    with _quiet():
        reason = unreachable(name) if download else None
        try:
            files = _fetch(name, download=download and reason is None)
        except RepositoryNotFoundError:
            raise DataError(
                f"hf:{name}: the hub has no such repository, or it needs a login; check the name, or set HF_TOKEN"
            ) from None
        except Exception as error:  # the client raises many unrelated classes; all mean that the hub is not usable
            raise _fault(name, _first_line(error)) from None
    if set(PAIRS[0]) <= files.keys():
        files.pop(WORDPIECES, None)
    elif not {SINGLE, WORDPIECES} & files.keys():
        if reason is not None:
            raise _fault(name, reason)
        if download:
            raise DataError(f"hf:{name}: the repository has no tokenizer.json, vocab.json + merges.txt or vocab.txt")
        return {}
    if reason is not None and rank_from_env() == 0:
        say(f"note: hf:{name}: the hub cannot be used ({reason}); an earlier download is used: {', '.join(files)}")
    return files


def _fetch(name: str, *, download: bool) -> dict[str, bytes]:
    """Returns the files that exist, downloaded or, without `download`, from earlier downloads alone."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch(filename: str) -> bytes | None:
        try:
            return read_bytes(Path(huggingface_hub.hf_hub_download(name, filename, local_files_only=not download)))
        except LocalEntryNotFoundError:
            if not download:
                return None
            raise
        except EntryNotFoundError:
            return None

    single = fetch(SINGLE)
    side = {part: fetch(part) for part in SIDE_FILES}
    others = {} if single else {part: fetch(part) for part in (*PAIRS[0], WORDPIECES)}
    return {part: content for part, content in {SINGLE: single, **others, **side}.items() if content is not None}


def unreachable(name: str) -> str | None:
    """Returns the reason why the hub does not answer a question about a repository, or None if it answers.

    The client's downloads repeat a failed question five times, which takes 24 s without a network, and longer where
    packets are dropped. This is one question. It runs in a thread, because a search for the host's address has no time limit.
    """
    found: list[str | None] = []
    asking = threading.Thread(target=lambda: found.append(_ask(name, _wait_s())), daemon=True)
    asking.start()
    asking.join(_wait_s() + 0.5)  # the client's own limit comes first and names the cause
    return found[0] if found else f"no answer in {_wait_s():g} s; HF_HUB_ETAG_TIMEOUT=30 waits longer"


def _wait_s() -> float:
    given = os.environ.get("HF_HUB_ETAG_TIMEOUT", "")
    return float(given) if given.isdecimal() and int(given) > 0 else WAIT_S


def _ask(name: str, wait_s: float) -> str | None:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(name, SINGLE), timeout=wait_s)
    except HfHubHTTPError:
        pass  # an answer, such as 404: the download names its meaning
    except Exception as error:  # the network's, of the client's HTTP library, which differs between its versions
        return _first_line(error)
    return None


def _fault(name: str, reason: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"hf:{name}: not downloaded, and the hub cannot be used ({reason}); download it on a machine with network access and "
        "give its folder"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Mutes the log lines of the client and of its HTTP library; their errors are raised and become one line."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "httpx", "httpx2")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
