"""Tokenizers: same ids as transformers, content hashes, markers encoded as text, errors that name the file."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lion.data.tokenizer_files import byte_letters
from megatron_lion.data.tokenizers import Tokenizer, load_tokenizer, looks_like_hub_name
from megatron_lion.errors import DataError, EnvironmentFault


@pytest.fixture(scope="module")
def gpt2(shared_data: Path) -> Tokenizer:
    return load_tokenizer(shared_data / "gpt2")


def small_files(folder: Path, *, eod: str | None = "<|endoftext|>", merges: tuple[str, ...] = ("t h", "th e")) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [*byte_letters(), "th", "the", *([eod] if eod else [])]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return folder


def test_gpt2_is_token_identical_to_transformers(shared_data: Path, gpt2: Tokenizer) -> None:
    from transformers import GPT2TokenizerFast

    oracle = GPT2TokenizerFast(
        vocab=str(shared_data / "gpt2/vocab.json"),
        merges=str(shared_data / "gpt2/merges.txt"),
        clean_up_tokenization_spaces=False,
    )
    assert len(oracle) == gpt2.vocab_size == 50257
    lines = (shared_data / "corpus/sample.jsonl").read_bytes().split(b"\n")
    texts = [json.loads(line)["text"] for line in (*lines[:120], *lines[1000:1010])]
    texts += [
        "",
        " ",
        "\n\n",
        "a\r\nb",
        "naïve café — 東京 👩‍👩‍👧 \u00a0x\u2028y",
        "1,234.56 don't WE'LL",
        "\x00\x01",
        "x" * 5000,
    ]
    ours = gpt2.encode_batch(texts)
    assert ours == oracle(texts, add_special_tokens=False)["input_ids"]
    assert [gpt2.decode(ids) for ids in ours] == texts
    assert sum(map(len, ours)) > 100_000


def test_marker_inside_a_document_is_text(gpt2: Tokenizer, tmp_path: Path) -> None:
    assert gpt2.eod_id == 50256
    marker = "<|endoftext|>"
    assert gpt2.encode(marker) == [27, 91, 437, 1659, 5239, 91, 29]
    gpt2.backend.save(str(tmp_path / "tokenizer.json"))
    definition = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    definition["added_tokens"] = [
        {
            "id": 50256,
            "content": marker,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": True,
            "special": True,
        }
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition), "utf-8")
    from_json = load_tokenizer(tmp_path)
    assert from_json.encode(f"a{marker}b") == gpt2.encode(f"a{marker}b")
    assert 50256 not in from_json.encode(f"a{marker}b")
    assert from_json.decode([50256]) == marker
    assert from_json.sha256 == gpt2.sha256, "the same vocabulary and merges in the other form"
    copies = pickle.loads(pickle.dumps(from_json)), Tokenizer.from_json(from_json.to_json())  # noqa: S301
    for copy in copies:
        assert copy.encode(marker) == gpt2.encode(marker)
        assert (copy.sha256, copy.vocab_size, copy.eod_id) == (gpt2.sha256, gpt2.vocab_size, gpt2.eod_id)
        copy.save(tmp_path / "saved")
        assert load_tokenizer(tmp_path / "saved").sha256 == gpt2.sha256


def test_sha256_follows_content_not_path(tmp_path: Path) -> None:
    first = load_tokenizer(small_files(tmp_path / "a"))
    again = load_tokenizer(small_files(tmp_path / "deep/er/b") / "vocab.json")
    assert first.sha256 == again.sha256
    (tmp_path / "a/gpt2-vocab.json").write_bytes((tmp_path / "a/vocab.json").read_bytes())
    (tmp_path / "a/gpt2-merges.txt").write_bytes((tmp_path / "a/merges.txt").read_bytes())
    assert load_tokenizer(tmp_path / "a/gpt2-merges.txt").sha256 == first.sha256
    other_merges = load_tokenizer(small_files(tmp_path / "c", merges=("t h",)))
    other_vocab = load_tokenizer(small_files(tmp_path / "d", eod="<|end|>"))
    assert len({first.sha256, other_merges.sha256, other_vocab.sha256}) == 3


def test_save_and_load_again(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import AutoTokenizer

    first = load_tokenizer(small_files(tmp_path / "a", eod="<|stop|>"), eod_token="<|stop|>")
    assert {path.name for path in first.save(tmp_path / "b")} == {
        "vocab.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    again = load_tokenizer(tmp_path / "b")
    assert (again.sha256, again.eod_id, again.vocab_size) == (first.sha256, 258, 259)
    assert again.encode("the other") == first.encode("the other") == [257, *again.encode(" other")]
    assert AutoTokenizer.from_pretrained(tmp_path / "b").encode("the other") == first.encode("the other")
    assert not list((tmp_path / "b").glob(".*")), "temporary files left behind"


def test_tokenizer_json_extras_do_not_change_encoding(tmp_path: Path) -> None:
    plain = load_tokenizer(small_files(tmp_path / "a"))
    definition = plain.definition
    definition["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    definition["model"]["dropout"] = 0.5
    (tmp_path / "b").mkdir()
    (tmp_path / "b/tokenizer.json").write_text(json.dumps(definition), "utf-8")
    loaded = load_tokenizer(tmp_path / "b")
    assert loaded.encode("the the the the") == plain.encode("the the the the")
    assert loaded.sha256 == plain.sha256
    definition["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "b/tokenizer.json").write_text(json.dumps(definition), "utf-8")
    assert load_tokenizer(tmp_path / "b").sha256 != plain.sha256


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("vocab.json", b"{\n  'a': 1}", "vocab.json: line 2"),
        ("vocab.json", b"[1, 2]", "a JSON object is needed"),
        ("vocab.json", b'{"a": 0}', "of the 256 byte letters are missing"),
        ("vocab.json", b"\xff\xfe", "not UTF-8"),
        ("merges.txt", b"#version: 0.2\nt h\nth\n", "merges.txt: line 3"),
        ("merges.txt", b"t h\nz q\n", "line 2: 'zq' is not in vocab.json"),
        ("merges.txt", b"#version: 0.2\n", "contains no merges"),
        ("tokenizer.json", b"{}", "no model with a vocabulary"),
        ("tokenizer.json", b'{"model": {"type": "Odd", "vocab": {}}}', "rejects these files"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    small_files(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path)
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_and_tokens(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder; needed"):
        load_tokenizer(tmp_path / "none.json")
    with pytest.raises(DataError, match="contains no tokenizer"):
        load_tokenizer(tmp_path)
    small_files(tmp_path, eod=None)
    with pytest.raises(DataError, match="--eod-token"):
        _ = load_tokenizer(tmp_path).eod_id
    with pytest.raises(DataError, match=r"'<\|x\|>' is not in the vocabulary of 258"):
        load_tokenizer(tmp_path, eod_token="<|x|>")
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(DataError, match=r"merges\.txt is missing"):
        load_tokenizer(tmp_path)


def test_lone_surrogate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="surrogate"):
        load_tokenizer(small_files(tmp_path)).encode("\ud83d")


def test_hub_is_used_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls = []

    def no_network(name: str, filename: str, *, local_files_only: bool) -> str:
        calls.append((name, local_files_only))
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    monkeypatch.setattr("megatron_lion.data.hub_files.unreachable", lambda name: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"hf:some/name"):
        load_tokenizer("some/name")
    assert {local for _, local in calls} == {True}, "a bare name must not use the network"
    calls.clear()
    with pytest.raises(EnvironmentFault, match="give its folder"):
        load_tokenizer("hf:some/name")
    assert calls[0] == ("some/name", False)
    assert not looks_like_hub_name("../gpt2")


def test_hub_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder = small_files(tmp_path)

    def download(name: str, filename: str, *, local_files_only: bool) -> str:
        if not (folder / filename).exists():
            raise huggingface_hub.errors.EntryNotFoundError(filename)
        return str(folder / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr("megatron_lion.data.hub_files.unreachable", lambda name: None)
    assert load_tokenizer("hf:some/name").sha256 == load_tokenizer(folder).sha256


def test_no_torch_and_no_transformers_are_imported() -> None:
    heavy = "{'torch', 'transformers', 'tokenizers'}"
    code = f"import sys, megatron_lion.data.tokenizers; sys.exit(bool({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[UNK]\n\xff\n##a\n", "vocab.txt: byte 6 is not UTF-8"),
        (b"[UNK]\na\n##a\na\n", "vocab.txt: line 4: 'a' is also line 2"),
        (b"[UNK]\na\n", "vocab.txt: no line begins with ##"),
        (b"a\n##a\n", "vocab.txt: [UNK] is missing"),
    ],
)
def test_damaged_wordpiece_vocabularies_are_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path / "vocab.txt")
    assert said in str(caught.value)
