"""Trains small vocabularies on a corpus: byte-level BPE for GPT-2 and WordPiece for BERT, with `tokenizers`.

The same files give the same vocabulary, byte for byte, at any number of threads.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from megatron_lion.data.bert_vocab import SPECIAL_TOKENS
from megatron_lion.data.tokenizers import DEFAULT_EOD, Tokenizer, load_tokenizer
from megatron_lion.errors import ConfigError, DataError
from megatron_lion.files import storage_errors, write_whole
from megatron_lion.prepare.pieces import read_documents

Kind = Literal["bpe", "wordpiece"]
MIN_SIZE = {"bpe": 258, "wordpiece": 200}
ALPHABET = 60
"""Number of single characters in a WordPiece vocabulary, the most common ones; training drops all others."""

_NO_WORD = "holds no word of two letters, so no vocabulary can be trained; is this the right file, and --json-key the right key?"
_CONTINUING = 0xF0000  # private-use plane: one code point for each "##c"


def train_bpe(files: Sequence[str | Path], vocab_size: int, folder: str | Path) -> Tokenizer:
    """Trains a byte-level BPE vocabulary on a corpus and saves it as vocab.json + merges.txt.

    <|endoftext|> is the last id, as in GPT-2. The same files give the same vocabulary.

    Args:
        files: inputs as for `find_inputs`.
        vocab_size: number of ids, at least 258 (the bytes, the end marker and one merge). The vocabulary is smaller if the
            corpus has too few pairs to merge.
        folder: output folder.

    Returns:
        The tokenizer, loaded from `folder`.

    Raises:
        ConfigError: vocab_size is below 258.
        DataError: an input has a bad line, is damaged, or there is no text.
        StorageError: the folder cannot be written.
    """
    return write_vocabulary(bpe_files(read_documents(files), vocab_size), folder)


def train_wordpiece(files: Sequence[str | Path], vocab_size: int, folder: str | Path) -> Tokenizer:
    """Trains an uncased WordPiece vocabulary with BERT's special tokens on a corpus and saves it as vocab.txt.

    Args:
        files: inputs as for `find_inputs`.
        vocab_size: number of ids with special tokens and single characters, at least 200.
        folder: output folder.

    Returns:
        The tokenizer, loaded from `folder`.

    Raises:
        ConfigError: vocab_size is below 200, which leaves no room for pieces of several characters.
        DataError: an input has a bad line, is damaged, or there is no text.
        StorageError: the folder cannot be written.
    """
    return write_vocabulary(wordpiece_files(read_documents(files), vocab_size), folder)


def write_vocabulary(files: Mapping[str, bytes], folder: str | Path) -> Tokenizer:
    """Writes the files of `bpe_files` or `wordpiece_files` into a folder, in order, and loads the tokenizer.

    Raises:
        StorageError: the folder cannot be written.
    """
    folder = Path(folder)
    with storage_errors(folder, "made"):
        folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_whole(folder / name, content)
    return load_tokenizer(folder)


def bpe_files(texts: Iterable[str], vocab_size: int, where: str = "the input") -> dict[str, bytes]:
    """Trains a byte-level BPE vocabulary; returns the contents of vocab.json and merges.txt.

    Args:
        texts: documents, or parts of documents that end at the end of a word (`long_texts.cut_text`).
        vocab_size: number of ids, at least 258; the result has fewer if the texts have too few pairs to merge.
        where: name of the texts, for the message.

    Raises:
        ConfigError: vocab_size is below 258.
        DataError: there is no pair to merge, so no text.
    """
    check_size("bpe", vocab_size)
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = byte_level
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(texts, trainer=trainer)
    model = json.loads(backend.to_str())["model"]
    vocab = {**model["vocab"], DEFAULT_EOD: len(model["vocab"])}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if not merges:
        raise DataError(f"{where}: {_NO_WORD}")
    return {
        "vocab.json": json.dumps(vocab, ensure_ascii=False).encode("utf-8"),
        "merges.txt": ("#version: 0.2\n" + "\n".join(merges) + "\n").encode("utf-8"),
    }


def wordpiece_files(texts: Iterable[str], vocab_size: int, where: str = "the input") -> dict[str, bytes]:
    """Trains an uncased WordPiece vocabulary with BERT's special tokens; returns the content of vocab.txt.

    Special tokens come first, then the pieces in alphabetical order. As in `tokenizers`' WordPieceTrainer, each step
    merges the most common pair. Among equally common pairs that trainer follows the order of a hash table; here the
    first in alphabetical order is merged.

    Args:
        texts: documents, or parts of documents that end at the end of a word.
        vocab_size: number of ids with special tokens and single characters, at least 200; the result has fewer if the
            texts have too few pairs to merge.
        where: name of the texts, for the message.

    Raises:
        ConfigError: vocab_size is below 200.
        DataError: there is no word of two letters, so no text.
    """
    check_size("wordpiece", vocab_size)
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    words = _count_words(texts)
    alphabet = _commonest_characters(words)
    spelled: Counter[str] = Counter()
    for word, count in words.items():
        spelled[_spell(word, alphabet)] += count
    letters = sorted({letter for word in spelled for letter in word} | set(alphabet))
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    backend.train_from_iterator(_repeated(spelled), trainer=trainer)
    pieces = sorted(_read_back(piece, alphabet) for piece in backend.get_vocab())
    if not any(piece.startswith("##") for piece in pieces):
        raise DataError(f"{where}: {_NO_WORD}")
    return {"vocab.txt": ("\n".join([*SPECIAL_TOKENS, *pieces]) + "\n").encode("utf-8")}


def check_size(kind: Kind, vocab_size: int) -> None:
    """Rejects a vocabulary without room for a piece of several letters.

    Raises:
        ConfigError: vocab_size is too small.
    """
    if kind == "bpe" and vocab_size < MIN_SIZE[kind]:
        raise ConfigError(
            f"vocab_size {vocab_size}: at least {MIN_SIZE[kind]} are needed, for the 256 bytes, {DEFAULT_EOD} and one pair of letters"
        )
    if kind == "wordpiece" and vocab_size < MIN_SIZE[kind]:
        raise ConfigError(
            f"vocab_size {vocab_size}: at least {MIN_SIZE[kind]} are needed, for special tokens and characters with and without ##"
        )


def _count_words(documents: Iterable[str]) -> Counter[str]:
    """Counts the words of BERT's basic tokenizer, in lower case without accents."""
    from tokenizers import normalizers, pre_tokenizers

    normalizer = normalizers.BertNormalizer(lowercase=True)
    split = pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for document in documents:
        words.update(word for word, _ in split.pre_tokenize_str(normalizer.normalize_str(document)))
    return words


def _commonest_characters(words: Counter[str]) -> str:
    """Returns the `ALPHABET` most common characters, sorted; ties go to the lower code point."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    return "".join(sorted(sorted(counts, key=lambda character: (-counts[character], character))[:ALPHABET]))


def _spell(word: str, alphabet: str) -> str:
    """Writes each character after a word's first as a private code point, so that the trainer needs no "##".

    With "##", the trainer numbers these characters in the order of a hash table and breaks ties by these numbers, so
    the vocabulary would differ between runs. Characters outside the alphabet are dropped, as in the trainer.
    """
    places = ((index, alphabet.find(character)) for index, character in enumerate(word))
    return "".join(chr(_CONTINUING + place) if index else alphabet[place] for index, place in places if place >= 0)


def _read_back(piece: str, alphabet: str) -> str:
    """Converts a piece of words written by `_spell` back to WordPiece's form.

    >>> _read_back(_spell("aba", "ab"), "ab"), _read_back(_spell("aba", "ab")[1:], "ab")
    ('aba', '##ba')
    """
    plain = "".join(alphabet[ord(letter) - _CONTINUING] if ord(letter) >= _CONTINUING else letter for letter in piece)
    return f"##{plain}" if ord(piece[0]) >= _CONTINUING else plain


def _repeated(words: Counter[str]) -> Iterator[str]:
    """Yields every word as often as it occurs, up to 1,000 in a text: the trainer takes texts, not counts."""
    for word, count in words.items():
        for start in range(0, count, 1000):
            yield f"{word} " * min(1000, count - start)
