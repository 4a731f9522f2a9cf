"""The hash of a tokenizer changes with everything that decides the ids of a text, and with nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from megatron_lion.data.tokenizer_files import definition_sha256

Change = Callable[[dict[str, Any]], Any]

DEFINITION: dict[str, Any] = {
    "added_tokens": [
        {"id": 3, "content": "<end>", "special": True, "lstrip": False},
        {"id": 4, "content": "@@", "special": False, "lstrip": False},
    ],
    "normalizer": {"type": "BertNormalizer", "lowercase": True, "strip_accents": None},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "model": {
        "type": "BPE", "dropout": None, "unk_token": None, "byte_fallback": False, "ignore_merges": False,
        "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"],
    },
}  # fmt: skip


def changed(change: Change) -> dict[str, Any]:
    definition = copy.deepcopy(DEFINITION)
    change(definition)
    return definition


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["model"].update(unk_token="a"),
        lambda d: d["model"].update(byte_fallback=True),
        lambda d: d["model"].update(type="WordPiece"),
        lambda d: d["model"]["vocab"].update(c=5),
        lambda d: d["model"]["vocab"].update(a=1, b=0),
        lambda d: d["model"].update(merges=[]),
        lambda d: d["normalizer"].update(lowercase=False),
        lambda d: d.pop("normalizer"),
        lambda d: d["pre_tokenizer"].update(add_prefix_space=True),
        lambda d: d["pre_tokenizer"].update(use_regex=False),
        lambda d: d["added_tokens"].pop(),
        lambda d: d["added_tokens"][0].update(id=9),
        lambda d: d["added_tokens"][1].update(lstrip=True),
        lambda d: d["added_tokens"][1].update(special=True),
        lambda d: d.update(added_tokens=[]),
    ],
)
def test_what_decides_the_ids_changes_the_hash(change: Change) -> None:
    assert definition_sha256(changed(change)) != definition_sha256(DEFINITION)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["model"].update(merges=[["a", "b"]]),  # the other form of the same pair
        lambda d: d["model"].update(dropout=0.1),  # switched off when a tokenizer is loaded
        lambda d: d["model"].pop("ignore_merges"),
        lambda d: d["model"].pop("unk_token"),
        lambda d: d["normalizer"].pop("strip_accents"),
        lambda d: d["pre_tokenizer"].update(trim_offsets=False),
        lambda d: d["pre_tokenizer"].pop("use_regex"),
        lambda d: d.update(post_processor={"type": "BertProcessing"}, decoder={"type": "ByteLevel"}),
        lambda d: d["added_tokens"][0].update(lstrip=True),  # a special token in a text is ordinary text
    ],
)
def test_what_does_not_decide_them_leaves_it(change: Change) -> None:
    assert definition_sha256(changed(change)) == definition_sha256(DEFINITION)


def test_a_missing_list_of_added_tokens_is_an_empty_one() -> None:
    without = changed(lambda definition: definition.pop("added_tokens"))
    assert definition_sha256(without) == definition_sha256(
        changed(lambda definition: definition.update(added_tokens=[]))
    )
    assert definition_sha256({**without, "added_tokens": None}) == definition_sha256(without)
