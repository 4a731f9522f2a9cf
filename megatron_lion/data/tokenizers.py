"""Text to token ids and back: GPT-2's byte-level BPE, BERT's WordPiece or any tokenizer.json, from local files.

Built on the `tokenizers` library alone. Document text is only ever text: the end-of-document marker and
other special tokens written inside it are encoded letter by letter and never become the special id.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lion.data.bert_vocab import SPECIAL_TOKENS
from megatron_lion.data.tokenizer_files import (
    CONFIG,
    SINGLE,
    WANTED,
    WORDPIECES,
    build_definition,
    definition_sha256,
    parse_json,
    read_bytes,
    read_files,
)
from megatron_lion.errors import DataError, EnvironmentFault, StorageError

if TYPE_CHECKING:
    import tokenizers

DEFAULT_EOD = "<|endoftext|>"


class Tokenizer:
    """A loaded tokenizer.

    Pickles by its files, so that worker processes rebuild exactly this one.

    Attributes:
        kind: the model's type as `tokenizers` names it: "BPE", "WordPiece", "Unigram", "WordLevel".
        vocab_size: number of token ids, special ones included: the largest id + 1 (GPT-2: 50257).
        sha256: hash of what decides the ids (see `tokenizer_files.definition_sha256`): the same for the same
            vocabulary and merges wherever they lie and in whichever of the two forms.
        eod_token: the end-of-document token's text, or None when the tokenizer has none.
        source: how the tokenizer was named when it was loaded, for messages.
    """

    def __init__(self, files: dict[str, bytes], *, source: str, eod_token: str | None = None) -> None:
        """Builds the tokenizer from file contents; use `load_tokenizer` for paths.

        Args:
            files: contents by canonical name: "tokenizer.json", "vocab.txt", or "vocab.json" and
                "merges.txt"; optionally "tokenizer_config.json".
            source: how to call it in messages.
            eod_token: end-of-document token; None takes <|endoftext|> if the vocabulary has it, else the
                eos_token of tokenizer_config.json.
        """
        import tokenizers

        definition = build_definition(files, source)
        self._definition = text = json.dumps(definition)
        try:
            self._backend: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception for a definition it does not take
            raise DataError(f"{source}: the tokenizers library refuses these files: {error}") from None
        self._backend.encode_special_tokens = True  # a marker inside a document is text
        self._files = dict(files)
        self.source = source
        self.kind = str(definition["model"].get("type") or "BPE")
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.sha256 = definition_sha256(definition)
        self.eod_token = self._find_eod(eod_token)

    def _find_eod(self, wanted: str | None) -> str | None:
        if wanted is not None:
            if self._backend.token_to_id(wanted) is None:
                raise DataError(
                    f"{self.source}: end-of-document token {wanted!r} is not in the vocabulary of "
                    f"{self.vocab_size} tokens; give one that is (--eod-token)"
                )
            return wanted
        eos = (
            parse_json(self._files[CONFIG], f"{self.source}: {CONFIG}").get("eos_token")
            if CONFIG in self._files
            else None
        )
        eos = eos.get("content") if isinstance(eos, dict) else eos
        for token in (DEFAULT_EOD, eos):
            if isinstance(token, str) and self._backend.token_to_id(token) is not None:
                return token
        return None

    @property
    def eod_id(self) -> int:
        """Id of the end-of-document token (GPT-2: 50256).

        Raises:
            DataError: the tokenizer has no such token and none was named.
        """
        if self.eod_token is None:
            raise DataError(
                f"{self.source}: the vocabulary has no {DEFAULT_EOD} and tokenizer_config.json names no "
                "eos_token; name the token that ends a document (--eod-token)"
            )
        index = self._backend.token_to_id(self.eod_token)
        assert index is not None, "eod_token was found in the vocabulary when the tokenizer was built"
        return index

    def bert_special_ids(self) -> dict[str, int]:
        """Ids of [PAD], [UNK], [CLS], [SEP] and [MASK], all of which BERT needs.

        Raises:
            DataError: the tokenizer is no WordPiece, or lacks some of them; names them.
        """
        if self.kind != "WordPiece":
            raise DataError(
                f"{self.source}: a {self.kind} tokenizer; BERT needs a WordPiece vocabulary (vocab.txt, one token a line)"
            )
        ids = {token: self._backend.token_to_id(token) for token in SPECIAL_TOKENS}
        absent = [token for token, index in ids.items() if index is None]
        if absent:
            raise DataError(
                f"{self.source}: {' and '.join(absent)} {'are' if len(absent) > 1 else 'is'} not in the vocabulary of "
                f"{self.vocab_size} tokens; BERT needs {', '.join(SPECIAL_TOKENS)}"
            )
        return {token: int(index) for token, index in ids.items() if index is not None}

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The `tokenizers.Tokenizer` inside, for what this class does not offer."""
        return self._backend

    @property
    def definition(self) -> dict[str, Any]:
        """The tokenizer as one tokenizer.json document, parsed."""
        parsed: dict[str, Any] = json.loads(self._definition)
        return parsed

    def encode(self, text: str) -> list[int]:
        """Token ids of one text; nothing is added before or after it.

        Raises:
            DataError: the text holds half of a surrogate pair, which no encoding of characters has.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts, on all cores unless TOKENIZERS_PARALLELISM is false."""
        try:
            return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError:
            raise DataError(
                f"{self.source}: a text to encode is not a str of valid Unicode (a lone surrogate?)"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens are written out, ids beyond the vocabulary are left out."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def save(self, folder: str | Path) -> list[Path]:
        """Writes the tokenizer's files into `folder`; `load_tokenizer(folder)` gives the same `sha256`.

        A tokenizer_config.json is written as well, so that the end-of-document token stays known and Hugging
        Face's AutoTokenizer loads the folder.

        Returns:
            The written paths.

        Raises:
            StorageError: the folder or a file cannot be written.
        """
        folder = Path(folder)
        files = dict(self._files)
        config = parse_json(files[CONFIG], CONFIG) if CONFIG in files else {}
        kinds = {SINGLE: "PreTrainedTokenizerFast", WORDPIECES: "BertTokenizer"}
        config.setdefault("tokenizer_class", next((kinds[name] for name in kinds if name in files), "GPT2Tokenizer"))
        if WORDPIECES in files:
            config["do_lower_case"] = self.definition["normalizer"]["lowercase"]
        if self.eod_token is not None:
            config["eos_token"] = self.eod_token
        files[CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode("utf-8")
        written = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                temporary = folder / f".{name}.tmp"
                temporary.write_bytes(content)
                os.replace(temporary, folder / name)
                written.append(folder / name)
        except OSError as error:
            raise StorageError(f"{folder}: the tokenizer cannot be saved: {error.strerror}") from None
        return written

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._files, self.source, self.eod_token)

    def __repr__(self) -> str:
        what = f"kind={self.kind}, vocab_size={self.vocab_size}, sha256={self.sha256[:12]}…"
        return f"Tokenizer({self.source!r}, {what})"


def _rebuild(files: dict[str, bytes], source: str, eod_token: str | None) -> Tokenizer:
    return Tokenizer(files, source=source, eod_token=eod_token)


def load_tokenizer(source: str | Path, *, eod_token: str | None = None) -> Tokenizer:
    """Loads a tokenizer from local files, or from Hugging Face's hub when that is asked for.

    Args:
        source: a folder with vocab.json + merges.txt (GPT-2), vocab.txt (BERT) or tokenizer.json; one of these
            files; or `hf:NAME`, which may download. A bare NAME that is no path is looked for among the files
            that were downloaded earlier, without using the network.
        eod_token: end-of-document token, where it is not <|endoftext|> or the eos_token of the folder.

    Raises:
        DataError: nothing usable there; the message names the file and what is needed.
        EnvironmentFault: hf:NAME was asked for and the hub could not be reached.
    """
    name = str(source)
    if name.startswith("hf:"):
        return Tokenizer(_hub_files(name[3:], download=True), source=name, eod_token=eod_token)
    path = Path(source).expanduser()
    if path.exists():
        return Tokenizer(read_files(path), source=name, eod_token=eod_token)
    if looks_like_hub_name(name):
        files = _hub_files(name, download=False)
        if files:
            return Tokenizer(files, source=name, eod_token=eod_token)
        raise DataError(
            f"{name}: no such file or folder, and no tokenizer of that name was downloaded before; "
            f"give a path, or hf:{name} to fetch it from Hugging Face's hub"
        )
    raise DataError(f"{name}: no such file or folder; needed: {WANTED}")


def looks_like_hub_name(name: str) -> bool:
    """Whether a string could be a repository name on the hub: NAME or OWNER/NAME, no file ending.

    >>> looks_like_hub_name("gpt2"), looks_like_hub_name("./gpt2"), looks_like_hub_name("a/b/c")
    (True, False, False)
    """
    parts = name.split("/")
    plain = all(
        part and part[0].isalnum() and part.replace("-", "").replace("_", "").replace(".", "").isalnum()
        for part in parts
    )
    return plain and len(parts) <= 2 and not name.endswith((".json", ".txt", ".bpe", ".model"))


def _hub_files(name: str, *, download: bool) -> dict[str, bytes]:
    """The tokenizer's files of a hub repository; {} when not downloaded before and not to be now."""
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

    try:
        single, config = fetch(SINGLE), fetch(CONFIG)
        pair = {} if single else {part: fetch(part) for part in ("vocab.json", "merges.txt")}
    except Exception as error:  # the client's errors have many unrelated classes; none is ours to mend
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise EnvironmentFault(
            f"hf:{name}: not among the downloaded files and the hub cannot be used ({reason}); "
            "download it where there is a network and give its folder"
        ) from None
    found = {SINGLE: single, **pair, CONFIG: config}
    files = {part: content for part, content in found.items() if content is not None}
    if SINGLE not in files and not {"vocab.json", "merges.txt"} <= files.keys():
        if download:
            raise DataError(f"hf:{name}: that repository has no tokenizer.json and no vocab.json + merges.txt")
        return {}
    return files
