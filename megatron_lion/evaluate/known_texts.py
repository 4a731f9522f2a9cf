"""Published evaluation texts by the SHA-256 of their files.

    python -m megatron_lion.evaluate.known_texts wikitext103|lambada FILE

prints the name of the file's text. If it is none of them, the exit code is that of a DataError.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_lion.errors import DataError
from megatron_lion.files import sha256_file
from megatron_lion.streams import say

# WikiText-2 and WikiText-103 have the same raw test file. Their tokenised files differ in the words that are `<unk>`,
# and so in perplexity.
WIKITEXT: dict[str, str] = {
    "56db52eb157b1ab5c89646eef70510c1eca6e12a3bfdb99f0d6b05b4eacb75b9": "WikiText-103 tokens test",
    "9aee9f52d6e77de6c7751fc5e7c44287db3ec0eaf15477098acc6b93c1c4250b": "WikiText-103 tokens valid",
    "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08": "WikiText raw test",
    "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0": "WikiText-2 tokens test",
    "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8": "WikiText-2 tokens valid",
}
LAMBADA: dict[str, str] = {
    "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226": "LAMBADA test, as processed for GPT-2"
}
UNKNOWN = "unknown"
# What a published zero-shot result is measured on; the files of WikiText-2 and of the validation split have similar names.
EXPECTED = {"wikitext103": ("WikiText-103 tokens test", "WikiText raw test"), "lambada": tuple(LAMBADA.values())}


def identify(path: str | Path, kind: str) -> str:
    """Name of a published text.

    Args:
        path: the file.
        kind: "wikitext103" or "lambada": what it must be.

    Raises:
        DataError: the file cannot be read, or is not such a text.
    """
    try:
        found = sha256_file(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give the path of the downloaded file") from None
    name = (WIKITEXT | LAMBADA).get(found, f"not a published text (SHA-256 {found[:12]})")
    if name not in EXPECTED[kind]:
        raise DataError(f"{path}: is {name}; needed is {' or '.join(EXPECTED[kind])}, exactly as published")
    return name


def main(words: list[str]) -> int:
    """Prints the name of a file's text; returns the exit code."""
    if len(words) != 2 or words[0] not in EXPECTED:
        say("usage: python -m megatron_lion.evaluate.known_texts wikitext103|lambada FILE")
        return 2
    kind, path = words
    try:
        sys.stdout.write(f"{path}: {identify(path, kind)}\n")
    except DataError as error:
        say(f"megatron-lion: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
