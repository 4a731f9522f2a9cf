"""Encodes and decodes text: GPT-2's byte-level BPE, BERT's WordPiece or any tokenizer.json, from local files.

It needs the `tokenizers` library only. A special token inside a document, such as the end-of-document marker, is
ordinary text: it is encoded letter by letter and never becomes the special id.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from megatron_lion.data.bert_vocab import SPECIAL_TOKENS
from megatron_lion.data.hub_files import hub_files
from megatron_lion.data.tokenizer_files import (
    SINGLE,
    WANTED,
    build_definition,
    check_complete,
    definition_sha256,
    read_files,
    saved_files,
)
from megatron_lion.data.tokenizer_settings import KNOWN_CLASSES, SIDE_FILES, side_settings
from megatron_lion.errors import DataError, MegatronLionError
from megatron_lion.files import storage_errors, write_whole
from megatron_lion.jobs import rank_from_env
from megatron_lion.streams import say

if TYPE_CHECKING:
    import tokenizers

DEFAULT_EOD = "<|endoftext|>"


class Tokenizer:
    """A loaded tokenizer.

    It is pickled, and written by `to_json`, without the library's object, which another process builds at the first use.

    Attributes:
        kind: type of the model in `tokenizers`: "BPE", "WordPiece", "Unigram" or "WordLevel".
        vocab_size: number of token ids with special tokens, the largest id + 1 (GPT-2: 50257).
        sha256: hash of everything that determines the ids (`tokenizer_files.definition_sha256`); independent of the
            files' form and path.
        eod_token: text of the end-of-document token, or None if the tokenizer has none.
        source: name under which the tokenizer was loaded, for messages.
    """

    def __init__(
        self, files: dict[str, bytes], *, source: str, eod_token: str | None = None, as_before: bool = False
    ) -> None:
        """Builds the tokenizer from file contents; use `load_tokenizer` for paths.

        Args:
            files: contents by canonical name: "tokenizer.json", "vocab.txt", or "vocab.json" and
                "merges.txt"; optionally those of `tokenizer_settings.SIDE_FILES`.
            source: name of the tokenizer in messages.
            eod_token: end-of-document token; None takes the eos_token of tokenizer_config.json or
                special_tokens_map.json if one is named, else <|endoftext|> if the vocabulary has it.
            as_before: whether to build and hash the tokenizer as earlier versions did, which ignored most settings
                in the files beside a vocabulary.

        Raises:
            DataError: the files are damaged or contradict each other, the vocabulary lacks `eod_token`, or the
                tokenizer cannot encode every text.
        """
        definition = build_definition(files, source, as_before=as_before)
        self._definition = json.dumps(definition)
        try:
            backend = self.backend
        except ImportError:
            raise
        except Exception as error:  # for a rejected definition, the library raises a plain Exception
            raise DataError(f"{source}: the tokenizers library rejects these files: {error}") from None
        if not as_before:
            check_complete(definition, source)
        for token in definition.get("added_tokens") or []:
            # The library numbers added tokens itself, after the vocabulary.
            if backend.token_to_id(token["content"]) != token["id"]:
                raise DataError(
                    f"{source}: added token {token['content']!r} has id {token['id']}, but the ids of added tokens follow those of the "
                    f"vocabulary without a gap, so it would get {backend.token_to_id(token['content'])}; correct its id"
                )
        self._files, self._as_before = dict(files), as_before
        self.source = source
        self.kind = str(definition["model"].get("type") or "BPE")
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.sha256 = definition_sha256(definition, as_before=as_before)
        self.eod_token = self._find_eod(eod_token)

    def _find_eod(self, wanted: str | None) -> str | None:
        if wanted is not None:
            if self.backend.token_to_id(wanted) is None:
                raise DataError(
                    f"{self.source}: end-of-document token {wanted!r} is not in the vocabulary of "
                    f"{self.vocab_size} tokens; give one that is (--eod-token)"
                )
            return wanted
        eos = side_settings(self._files, self.source).named.get("eos_token")
        # Earlier versions preferred <|endoftext|>, and it ends the documents of their datasets.
        for token in (DEFAULT_EOD, eos) if self._as_before else (eos, DEFAULT_EOD):
            if token is not None and self.backend.token_to_id(token) is not None:
                return token
        return None

    @property
    def eod_id(self) -> int:
        """Id of the end-of-document token (GPT-2: 50256).

        Raises:
            DataError: the tokenizer has no such token.
        """
        if self.eod_token is None:
            raise DataError(
                f"{self.source}: the vocabulary has no {DEFAULT_EOD}, and no eos_token is named beside it (tokenizer_config.json, "
                "special_tokens_map.json); name the token that ends a document (--eod-token)"
            )
        index = self.backend.token_to_id(self.eod_token)
        assert index is not None, "eod_token was found in the vocabulary when the tokenizer was built"
        return index

    def bert_special_ids(self) -> dict[str, int]:
        """Returns the ids of [PAD], [UNK], [CLS], [SEP] and [MASK], all of which BERT needs.

        Raises:
            DataError: the tokenizer is no WordPiece, or lacks some of these tokens; the message names them.
        """
        if self.kind != "WordPiece":
            raise DataError(
                f"{self.source}: is a {self.kind} tokenizer; BERT needs a WordPiece vocabulary (vocab.txt, one token a line)"
            )
        ids = {token: self.backend.token_to_id(token) for token in SPECIAL_TOKENS}
        absent = [token for token, index in ids.items() if index is None]
        if absent:
            raise DataError(
                f"{self.source}: {' and '.join(absent)} {'are' if len(absent) > 1 else 'is'} not in the vocabulary of "
                f"{self.vocab_size} tokens; BERT needs {', '.join(SPECIAL_TOKENS)}"
            )
        return {token: int(index) for token, index in ids.items() if index is not None}

    @cached_property
    def backend(self) -> tokenizers.Tokenizer:
        """The wrapped `tokenizers.Tokenizer`."""
        import tokenizers

        backend: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(self._definition)
        backend.encode_special_tokens = True  # encodes a marker inside a document as text
        return backend

    @property
    def definition(self) -> dict[str, Any]:
        """The tokenizer as a parsed tokenizer.json document; a new copy at each access."""
        parsed: dict[str, Any] = orjson.loads(self._definition)
        return parsed

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of one text, without special tokens around it.

        Raises:
            DataError: the text has half of a surrogate pair, which is not valid Unicode.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each text, using all cores unless TOKENIZERS_PARALLELISM is false.

        Raises:
            DataError: a text has half of a surrogate pair, which is not valid Unicode.
        """
        try:
            return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError:
            raise DataError(
                f"{self.source}: a text to encode is not a str of valid Unicode (a lone surrogate?)"
            ) from None
        except MegatronLionError:  # a stop signal
            raise
        except BaseException as error:
            # For a text that the model cannot represent, the library raises a plain Exception, or its PanicException, which is
            # no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise DataError(f"{self.source}: a text cannot be encoded: {error}") from None

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids; includes special tokens and skips ids beyond the vocabulary."""
        return str(self.backend.decode(list(ids), skip_special_tokens=False))

    def save(self, folder: str | Path) -> list[Path]:
        """Writes the tokenizer's files into `folder`; `load_tokenizer(folder)` has the same `sha256`.

        The files are a complete tokenizer.json, the vocabulary files of GPT-2 or BERT, and tokenizer_config.json. The
        last one stores the end-of-document token and lets Hugging Face's AutoTokenizer load the folder.

        Returns:
            The written paths.

        Raises:
            StorageError: the folder or a file cannot be written.
        """
        folder = Path(folder)
        files = saved_files(self._files, self.definition, self.eod_token, self.source)
        written = []
        with storage_errors(folder, "made"):
            folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            # Flushed to disk: a dataset's manifest, written last, promises that the files beside it are complete.
            write_whole(folder / name, content)
            written.append(folder / name)
        return written

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "backend"}

    def to_json(self) -> str:
        """Returns the tokenizer as JSON, for `from_json` in another process of the same command."""
        files = {name: content.decode("latin-1") for name, content in self._files.items()}
        return json.dumps(self.__getstate__() | {"_files": files})

    @classmethod
    def from_json(cls, text: str | bytes) -> Tokenizer:
        """Returns the tokenizer of `to_json`."""
        state = json.loads(text)
        loaded = cls.__new__(cls)
        files = {name: content.encode("latin-1") for name, content in state["_files"].items()}
        loaded.__dict__.update(state | {"_files": files})
        return loaded

    def __repr__(self) -> str:
        what = f"kind={self.kind}, vocab_size={self.vocab_size}, sha256={self.sha256[:12]}…"
        return f"Tokenizer({self.source!r}, {what})"


def load_tokenizer_of(sha256: str | None, source: str | Path) -> Tokenizer:
    """Loads the tokenizer of a dataset or checkpoint, even if an earlier version made it.

    Earlier versions ignored settings such as `strip_accents` in the files beside a vocabulary. If `sha256` is the
    hash of the tokenizer without these settings, that tokenizer is returned, because it made the ids in the data.
    Rank 0 reports this in one line.

    Args:
        sha256: the hash in the manifest of the dataset or checkpoint; None accepts any tokenizer.
        source: as for `load_tokenizer`.

    Returns:
        The tokenizer. If neither hash is `sha256`, this is the one with all settings; the caller compares the hash.

    Raises:
        DataError, EnvironmentFault: as `load_tokenizer`.
    """
    error: DataError | None = None
    try:
        loaded = load_tokenizer(source)
        if sha256 in (None, loaded.sha256):
            return loaded
    except DataError as found:
        error = found
    path = Path(source).expanduser()
    if sha256 is not None and path.exists():
        with suppress(DataError):
            before = Tokenizer(read_files(path), source=str(source), as_before=True)
            if before.sha256 == sha256:
                if rank_from_env() == 0:
                    say(
                        f"note: {source}: an earlier version made this tokenizer and ignored {_ignored(path)}; its ids stay valid; to use "
                        "the settings, prepare the data again in a new folder"
                    )
                return before
    if error is not None:
        raise error
    return loaded


def _ignored(path: Path) -> str:
    names = [name for name in SIDE_FILES if name in read_files(path)]
    return "settings of " + " and ".join(names or [SINGLE])


def load_tokenizer(source: str | Path, *, eod_token: str | None = None) -> Tokenizer:
    """Loads a tokenizer from local files, or from Hugging Face's hub for `hf:NAME`.

    Args:
        source: a folder with vocab.json + merges.txt (GPT-2), vocab.txt (BERT) or tokenizer.json; one of these
            files; or `hf:NAME`, which may download. A bare NAME that is no path is searched among earlier downloads,
            without network.
        eod_token: end-of-document token, if it is neither the eos_token of the folder nor <|endoftext|>.

    Raises:
        DataError: there is no usable tokenizer; the message names the file and what is needed.
        EnvironmentFault: `hf:NAME` was given and the hub cannot be reached.
    """
    name = str(source)
    if name.startswith("hf:"):
        return Tokenizer(hub_files(name[3:], download=True), source=name, eod_token=eod_token)
    path = Path(source).expanduser()
    if path.exists():
        files = read_files(path)
        loaded = Tokenizer(files, source=name, eod_token=eod_token)
        named = side_settings(files, name).class_name
        if SINGLE in files and named not in KNOWN_CLASSES and rank_from_env() == 0:
            say(
                f"note: {name}: the ids are those of tokenizer.json; for its class {named}, some versions of transformers change its steps"
            )
        return loaded
    if looks_like_hub_name(name):
        files = hub_files(name, download=False)
        if files:
            return Tokenizer(files, source=name, eod_token=eod_token)
        raise DataError(
            f"{name}: no such file or folder, and no downloaded tokenizer has that name; "
            f"give a path, or hf:{name} to download it from Hugging Face's hub"
        )
    raise DataError(f"{name}: no such file or folder; needed: {WANTED}")


def looks_like_hub_name(name: str) -> bool:
    """Whether a string has the form of a repository name on the hub: NAME or OWNER/NAME, without a file ending.

    >>> looks_like_hub_name("gpt2"), looks_like_hub_name("./gpt2"), looks_like_hub_name("a/b/c")
    (True, False, False)
    """
    parts = name.split("/")
    plain = all(
        part and part[0].isalnum() and part.replace("-", "").replace("_", "").replace(".", "").isalnum()
        for part in parts
    )
    return plain and len(parts) <= 2 and not name.endswith((".json", ".txt", ".bpe", ".model"))
