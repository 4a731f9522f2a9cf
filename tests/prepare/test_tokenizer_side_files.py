"""Files beside a vocabulary change ids as in transformers, are part of the hash, and are saved with the tokenizer."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_lion.data.tokenizer_files import build_definition, byte_letters, definition_sha256, read_files
from megatron_lion.data.tokenizers import load_tokenizer, load_tokenizer_of
from megatron_lion.errors import DataError

WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<unk>", "the", "see", "here", "is", "a", "n", "u", "r", "l", "c", "e", "f", "cafe",
    "naive", "hacia", "##a", "##b", "##c", "##e", "##f", "##i", "##n", "##r", "##l", "##s", "##v",
    "中", "文", "##文", "字", "chinese", "[", "]",
    "<", ">", "url", "café", "Cafe", "The", "É", "é", "##é", "一",
]  # fmt: skip
TEXTS = [
    "", "the cafe", "The café is here", "hacía naïve CAFÉ cafe\u0301", "中文字 is chinese", "see [URL] here", "a[URL]b  [url] <x> here",
    "see<x>here", " the", "the  the\n", "[MASK] the [SEP]",
    "the <|endoftext|><|im_end|> the", "xyz ☃ \u00a0e", "<url>a    b\t<url>", "É é E\u0301",
]  # fmt: skip
URL = {
    "content": "[URL]",
    "lstrip": False,
    "rstrip": False,
    "single_word": False,
    "normalized": False,
    "special": False,
}
BERT: dict[str, dict[str, Any]] = {
    "plain": {"tokenizer_config.json": {"do_lower_case": True}},
    "cased": {"tokenizer_config.json": {"do_lower_case": False}},
    "accents kept": {"tokenizer_config.json": {"do_lower_case": True, "strip_accents": False}},
    "accents stripped": {"tokenizer_config.json": {"do_lower_case": False, "strip_accents": True}},
    "chinese words": {"tokenizer_config.json": {"do_lower_case": True, "tokenize_chinese_chars": False}},
    "added": {"tokenizer_config.json": {"do_lower_case": True}, "added_tokens.json": {"[URL]": len(WORDS), "<x>": len(WORDS) + 1}},
    "added special": {
        "tokenizer_config.json": {"do_lower_case": True, "extra_special_tokens": ["<x>"]},
        "added_tokens.json": {"[URL]": len(WORDS), "<x>": len(WORDS) + 1},
    },
    "decoder": {"tokenizer_config.json": {"do_lower_case": True, "added_tokens_decoder": {str(len(WORDS)): URL}}},
    "decoder, lstrip": {
        "tokenizer_config.json": {"do_lower_case": True, "added_tokens_decoder": {str(len(WORDS)): {**URL, "lstrip": True, "rstrip": True}}}
    },
    "decoder hides files": {
        "tokenizer_config.json": {"do_lower_case": True, "added_tokens_decoder": {str(len(WORDS)): URL}},
        "added_tokens.json": {"<x>": len(WORDS)},
    },
    "other unknown": {"tokenizer_config.json": {"do_lower_case": True, "unk_token": "<unk>"}},
    "roles in added_tokens": {
        "tokenizer_config.json": {"do_lower_case": True},
        "added_tokens.json": {token: index for index, token in enumerate(WORDS[:5])},
    },
    "roles in the decoder": {
        "tokenizer_config.json": {"do_lower_case": True, "added_tokens_decoder": {"4": {**URL, "content": "[MASK]", "normalized": True}}}
    },
    "extra with a role": {
        "tokenizer_config.json": {"do_lower_case": True, "extra_special_tokens": {"url_token": "<x>"}},
        "added_tokens.json": {"<x>": len(WORDS)},
    },
    "of a subclass": {"tokenizer_config.json": {"do_lower_case": True, "tokenizer_class": "DistilBertTokenizer"}},
    "unknown in the map": {"tokenizer_config.json": {"do_lower_case": True}, "special_tokens_map.json": {"unk_token": "<unk>"}},
}  # fmt: skip
PIECES = [*byte_letters(), "th", "the", "Ġthe", "<|endoftext|>"]
BLANKS = {
    "content": "    ",
    "lstrip": False,
    "rstrip": False,
    "single_word": False,
    "normalized": True,
    "special": False,
}
GPT2: dict[str, dict[str, Any]] = {
    "plain": {},
    "end in added_tokens": {"added_tokens.json": {"<|endoftext|>": len(PIECES) - 1}},
    "end is not special": {
        "tokenizer_config.json": {"added_tokens_decoder": {str(len(PIECES) - 1): {**URL, "content": "<|endoftext|>"}}}
    },
    "other end, both added": {
        "special_tokens_map.json": {"eos_token": {"content": "<|im_end|>", "lstrip": True, "normalized": False}},
        "added_tokens.json": {"<|endoftext|>": len(PIECES) - 1, "<|im_end|>": len(PIECES)},
    },
    "prefix": {"tokenizer_config.json": {"add_prefix_space": True}},
    "added": {"added_tokens.json": {"<url>": len(PIECES), "    ": len(PIECES) + 1}},
    "decoder": {"tokenizer_config.json": {"added_tokens_decoder": {str(len(PIECES)): BLANKS}}},
    "prefix and added": {"tokenizer_config.json": {"add_prefix_space": True}, "added_tokens.json": {"<url>": len(PIECES)}},
    "other end": {
        "special_tokens_map.json": {"eos_token": "<|im_end|>"},
        "added_tokens.json": {"<|im_end|>": len(PIECES)},
    },
}  # fmt: skip
FOLDERS = [*(("bert", name) for name in BERT), *(("gpt2", name) for name in GPT2)]


def write(folder: Path, kind: str, files: dict[str, dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    if kind == "bert":
        (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    else:
        (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(PIECES)}), "utf-8")
        (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\nĠ the\n", "utf-8")
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), "utf-8")
    return folder


def oracle(folder: Path, kind: str) -> Any:
    from transformers import BertTokenizerFast, GPT2TokenizerFast

    made = BertTokenizerFast if kind == "bert" else GPT2TokenizerFast
    # A special token inside a document is text here, see test_marker_inside_a_document_is_text.
    return made.from_pretrained(folder, split_special_tokens=True, local_files_only=True)


@pytest.mark.parametrize(("kind", "name"), FOLDERS)
def test_ids_are_those_of_transformers(tmp_path: Path, kind: str, name: str) -> None:
    folder = write(tmp_path / "a", kind, (BERT if kind == "bert" else GPT2)[name])
    theirs, ours = oracle(folder, kind), load_tokenizer(folder)
    assert ours.vocab_size == len(theirs)
    assert kind == "bert" or ours.eod_token == theirs.eos_token
    expected = theirs(TEXTS, add_special_tokens=False)["input_ids"]
    assert ours.encode_batch(TEXTS) == expected
    ours.save(tmp_path / "b")
    again = load_tokenizer(tmp_path / "b")
    assert (again.sha256, again.eod_token, again.vocab_size) == (ours.sha256, ours.eod_token, ours.vocab_size)
    assert again.encode_batch(TEXTS) == expected
    assert oracle(tmp_path / "b", kind)(TEXTS, add_special_tokens=False)["input_ids"] == expected
    # tokenizer.json alone gives the same tokenizer: it is complete, and the files beside it change nothing.
    for path in (tmp_path / "b").iterdir():
        if path.name != "tokenizer.json":
            path.unlink()
    alone = load_tokenizer(tmp_path / "b")
    assert (alone.sha256, alone.encode_batch(TEXTS)) == (ours.sha256, expected)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_tokenizers_with_other_ids_have_other_hashes(tmp_path: Path, kind: str) -> None:
    table = BERT if kind == "bert" else GPT2
    loaded = {name: load_tokenizer(write(tmp_path / name, kind, files)) for name, files in table.items()}
    for one, other in itertools.combinations(loaded, 2):
        same = loaded[one].encode_batch(TEXTS) == loaded[other].encode_batch(TEXTS)
        if not same or loaded[one].vocab_size != loaded[other].vocab_size:
            assert loaded[one].sha256 != loaded[other].sha256, (one, other)


def test_end_of_document_from_the_map_of_special_tokens(tmp_path: Path) -> None:
    PIECES_WITHOUT = PIECES[:-1]
    folder = write(tmp_path / "a", "gpt2", {"special_tokens_map.json": {"eos_token": {"content": "<|im_end|>"}},
                                            "added_tokens.json": {"<|im_end|>": len(PIECES_WITHOUT)}})  # fmt: skip
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(PIECES_WITHOUT)}))
    assert load_tokenizer(folder).eod_token == "<|im_end|>"
    assert load_tokenizer(folder).eod_id == len(PIECES_WITHOUT)


@pytest.mark.parametrize(
    ("kind", "files", "said"),
    [
        ("bert", {"tokenizer_config.json": {"strip_accents": "no"}}, "tokenizer_config.json: strip_accents must be true or false"),
        ("bert", {"tokenizer_config.json": {"do_lower_case": "false"}}, "do_lower_case must be true or false, got 'false'"),
        ("bert", {"added_tokens.json": {"[URL]": len(WORDS) + 5}}, "would get 49"),
        ("bert", {"added_tokens.json": {"the": 3}}, "added_tokens.json gives 'the' the id 3, but the vocabulary gives it 6"),
        ("bert", {"added_tokens.json": {"[URL]": "x"}}, "added_tokens.json: token '[URL]' with id 'x'"),
        ("bert", {"tokenizer_config.json": {"unk_token": "<none>"}}, "name '<none>' (unk_token), which has no id; list it in added_tokens"),
        ("bert", {"tokenizer_config.json": {"unk_token": "<none>"}, "added_tokens.json": {"<none>": len(WORDS)}},
         "vocab.txt: <none> is missing"),
        ("gpt2", {"special_tokens_map.json": {"eos_token": "<|im_end|>"}}, "'<|im_end|>' (eos_token), which has no id"),
        ("gpt2", {"tokenizer_config.json": {"additional_special_tokens": ["<x>"]}}, "'<x>' (an extra special token), which has no id"),
        ("bert", {"special_tokens_map.json": {"additional_special_tokens": ["<x>"]}, "added_tokens.json": {"<x>": len(WORDS)}},
         "special_tokens_map.json has additional_special_tokens, which transformers 4 and 5 read differently"),
        ("bert", {"tokenizer_config.json": {"tokenizer_class": "BertJapaneseTokenizer"}}, "JapaneseTokenizer, but from vocab.txt"),
        ("gpt2", {"tokenizer_config.json": {"tokenizer_class": "Qwen2TokenizerFast"}}, "class Qwen2Tokenizer, but from vocab.json and"),
        ("bert", {"tokenizer_config.json": {"clean_text": False}}, "clean_text False is not supported"),
        ("gpt2", {"tokenizer_config.json": {"added_tokens_decoder": [1]}}, "added_tokens_decoder must be an object"),
        ("gpt2", {"tokenizer_config.json": {"added_tokens_decoder": {"-1": BLANKS}}}, "'-1' must be an id"),
        ("gpt2", {"tokenizer_config.json": {"eos_token": 7}}, "eos_token must be a text"),
        ("gpt2", {"tokenizer_config.json": {"add_prefix_space": 1}}, "add_prefix_space must be true or false"),
    ],
)  # fmt: skip
def test_wrong_side_files_are_named(tmp_path: Path, kind: str, files: dict[str, Any], said: str) -> None:
    folder = write(tmp_path / "a", kind, files)
    with pytest.raises(DataError) as caught:
        load_tokenizer(folder)
    assert said in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        (
            "bert",
            {"strip_accents": False},
            "tokenizer_config.json has strip_accents false, but tokenizer.json has true",
        ),
        ("bert", {"do_lower_case": False}, "do_lower_case false"),
        ("bert", {"tokenize_chinese_chars": False}, "tokenize_chinese_chars false"),
        ("gpt2", {"add_prefix_space": True}, "add_prefix_space true"),
        (
            "gpt2",
            {"added_tokens_decoder": {str(len(PIECES)): BLANKS}},
            "with id 260, but tokenizer.json has no such token",
        ),
    ],
)
def test_a_tokenizer_json_is_not_contradicted(tmp_path: Path, kind: str, changes: dict[str, Any], said: str) -> None:
    load_tokenizer(write(tmp_path / "a", kind, BERT["plain"] if kind == "bert" else {})).save(tmp_path / "b")
    path = tmp_path / "b" / "tokenizer_config.json"
    before = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**before, **changes}), "utf-8")
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path / "b")
    assert said in str(caught.value)
    if "added_tokens_decoder" not in changes:
        path.write_text(json.dumps({**before, **changes, "tokenizer_class": "PreTrainedTokenizerFast"}), "utf-8")
        load_tokenizer(tmp_path / "b")  # this class uses tokenizer.json unchanged


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
STEPS: dict[str, tuple[dict[str, Any], str]] = {
    "digits": ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]}}, "a 1212"),
    "nfc": ({"normalizer": {"type": "NFC"}}, "cafe\u0301"),
    "prefix": ({"pre_tokenizer": {**BYTES, "add_prefix_space": True}}, "the"),
}  # fmt: skip


def single(folder: Path, changes: dict[str, Any], config: dict[str, Any]) -> Path:
    """Writes a folder with a tokenizer.json of GPT-2's kind with other steps before the model."""
    folder.mkdir()
    vocab = {token: index for index, token in enumerate([*PIECES, "12"])}
    content = {
        "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": BYTES, "post_processor": None, "decoder": BYTES,
        "model": {"type": "BPE", "vocab": vocab, "merges": [["t", "h"], ["th", "e"], ["Ġ", "the"], ["1", "2"]]}, **changes,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    "name", ["GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer", "PreTrainedTokenizerFast", None]
)
def test_the_class_beside_a_tokenizer_json_gives_its_ids_or_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: str, name: str | None
) -> None:
    """transformers 5 builds GPT2Tokenizer from the vocabulary and ignores the steps of tokenizer.json."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    changes, text = STEPS[steps]
    folder = single(tmp_path / "a", changes, {} if name is None else {"tokenizer_class": name})
    if name is not None and name.startswith("GPT2"):
        differing = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
        assert differing != PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))(text)["input_ids"]
        with pytest.raises(DataError, match=f"names the class {name}, which sets .* set tokenizer_class to PreTrained"):
            load_tokenizer(folder)
        return
    expected = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))(text)["input_ids"]
    loaded = load_tokenizer(folder)
    shown = capsys.readouterr().err
    assert shown.count("for its class Qwen2Tokenizer, some versions of transformers") == int(name == "Qwen2Tokenizer")
    assert loaded.encode(text) == expected
    loaded.save(tmp_path / "b")
    assert AutoTokenizer.from_pretrained(tmp_path / "b")(text)["input_ids"] == expected
    assert load_tokenizer(tmp_path / "b").sha256 == loaded.sha256


def test_a_cased_tokenizer_json_needs_its_setting(tmp_path: Path) -> None:
    """Without do_lower_case, transformers 5 builds an uncased BertTokenizer."""
    from transformers import AutoTokenizer

    load_tokenizer(write(tmp_path / "a", "bert", BERT["cased"])).save(tmp_path / "b")
    (tmp_path / "b/vocab.txt").unlink()
    path = tmp_path / "b/tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    expected = load_tokenizer(tmp_path / "b").encode("The the")
    assert AutoTokenizer.from_pretrained(tmp_path / "b")("The the", add_special_tokens=False)["input_ids"] == expected
    del config["do_lower_case"]
    path.write_text(json.dumps(config), "utf-8")
    assert AutoTokenizer.from_pretrained(tmp_path / "b")("The the", add_special_tokens=False)["input_ids"] != expected
    with pytest.raises(DataError, match="names the class BertTokenizer, which sets normalizer"):
        load_tokenizer(tmp_path / "b")


def test_flags_of_added_tokens_are_not_contradicted(tmp_path: Path) -> None:
    load_tokenizer(write(tmp_path / "a", "bert", BERT["decoder"])).save(tmp_path / "b")
    path = tmp_path / "b/tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    config["added_tokens_decoder"][str(len(WORDS))]["lstrip"] = True
    path.write_text(json.dumps(config), "utf-8")
    with pytest.raises(DataError, match=r"has lstrip true for '\[URL\]', but tokenizer.json has false"):
        load_tokenizer(tmp_path / "b")


def test_a_panic_of_the_library_is_an_error_of_the_tokenizer(tmp_path: Path) -> None:
    folder = single(tmp_path / "a", {"normalizer": {"type": "Prepend", "prepend": ""}}, {})
    with pytest.raises(DataError, match="cannot be encoded"):
        load_tokenizer(folder).encode_batch(["the", ""])


def saved_before(folder: Path, target: Path) -> str:
    """Writes the files that versions up to 0.1.0 stored with their data, and returns the hash in their manifests."""
    shutil.copytree(folder, target)
    definition = build_definition(read_files(target), str(target), as_before=True)
    return definition_sha256(definition, as_before=True)


def test_data_of_an_earlier_version_keeps_its_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "a", "bert", BERT["accents kept"])
    old = saved_before(folder, tmp_path / "old")
    assert load_tokenizer(folder).sha256 != old
    assert capsys.readouterr().err == ""
    found = load_tokenizer_of(old, tmp_path / "old")
    assert found.sha256 == old
    assert found.encode("cafe\u0301 café") == [WORDS.index("cafe")] * 2, "the ids of the data, with accents stripped"
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "ignored settings of tokenizer_config.json" in shown
    # The saved copy causes no note, because its settings are those that gave the ids.
    found.save(tmp_path / "again")
    assert load_tokenizer_of(old, tmp_path / "again").encode("café") == [WORDS.index("cafe")]
    assert capsys.readouterr().err == ""
    assert load_tokenizer_of("0" * 64, tmp_path / "old").sha256 != old, "the caller rejects another tokenizer"
    plain = load_tokenizer(write(tmp_path / "plain", "bert", {}))
    assert load_tokenizer_of(plain.sha256, tmp_path / "plain").sha256 == plain.sha256


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}, "unknown token '[UNK]' is not in its vocabulary"),
        ({"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9},
         "unknown token '[UNK]' is not in its vocabulary"),
        ({"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]], "unk_id": None}, "has no unk_id"),
        ({"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}, "neither an unknown token nor all 256 bytes"),
        ({"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "<unk>"}, "unknown token '<unk>'"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_cannot_encode_every_text_is_refused(tmp_path: Path, model: dict[str, Any], said: str) -> None:
    content = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "model": model,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path)
    assert said in str(caught.value)


def test_tokenizers_that_encode_every_text_are_not_refused(tmp_path: Path) -> None:
    fallback = {f"<0x{byte:02X}>": byte for byte in range(256)}
    models: dict[str, dict[str, Any]] = {
        "bytes": {"type": "BPE", "vocab": {**fallback, "a": 256}, "merges": [], "byte_fallback": True},
        "unknown": {"type": "BPE", "vocab": {"a": 0, "<unk>": 1}, "merges": [], "unk_token": "<unk>"},
        "unigram": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.0]], "unk_id": 0},
    }
    for name, model in models.items():
        (tmp_path / name).mkdir()
        content = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "model": model}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(content), "utf-8")
        assert len(load_tokenizer(tmp_path / name).encode("a中")) > 1, name
