"""What a LoRA was trained to be called by is read from headers of any kind."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prolora.adapters.trigger_words import CaptionedFolder, TrainingWords, read_trigger_words

KOHYA = {
    "ss_tag_frequency": json.dumps(
        {
            "10_sks woman": {"sks woman": 20, " smile": 9, "hat": 2, "smile": 1},
            "1_woman": {"woman": 200},
        }
    ),
    "ss_dataset_dirs": json.dumps({"10_sks woman": {"n_repeats": 10, "img_count": 24}}),
    "ss_reg_dataset_dirs": json.dumps({"1_woman": {"n_repeats": 1, "img_count": 200}}),
}
FIELDS = ("ss_tag_frequency", "ss_datasets", "ss_dataset_dirs", "ss_reg_dataset_dirs")


def test_tags_are_counted_by_folder_and_those_of_regularisation_left_out():
    words = read_trigger_words(KOHYA)
    folder = CaptionedFolder(24, {"sks woman": 20, "smile": 10, "hat": 2})
    assert words == TrainingWords("", (folder,))
    assert list(words.folders[0].tags) == words.list_tags(9) == ["sks woman", "smile", "hat"]
    assert words.list_tags(1) == ["sks woman"]
    sets = [  # a folder of several configured sets counts once
        {"is_dreambooth": True, "tag_frequency": {"a": {"cat": 3}, "b": {"dog": 5}}},
        {"tag_frequency": {"a": {"cat": 3}}},
    ]
    words = read_trigger_words({"ss_datasets": json.dumps(sets), "modelspec.trigger_phrase": "x"})
    folders = CaptionedFolder(3, {"cat": 3}), CaptionedFolder(5, {"dog": 5})
    assert words == TrainingWords("x", folders)


DAMAGED = [
    *("", "{", "[]", "null", "3", '"x"', '{"a": 1}', '{"10_sks": []}', "[[[1]]]"),
    *('{"a": {"b": "c"}}', '{"a": {"b": true}}', '{"a": {"b": 1e999}}', '{"a": {"b": NaN}}'),
    *('{"a": {"b": -4}}', '{"a": {"": 4, " ": 3}}', '[{"tag_frequency": 3}, 4]', "[" * 4000),
    '{"a": {"b": %s}}' % ("9" * 5000),
]


@pytest.mark.parametrize("field", FIELDS)
def test_damaged_fields_are_passed_over(field):
    for text in DAMAGED:
        words = read_trigger_words({field: text, "modelspec.trigger_phrase": "ok"})
        assert words == TrainingWords("ok"), text
        beside = read_trigger_words(KOHYA | ({} if field == FIELDS[0] else {field: text}))
        assert beside.folders[0].tags["sks woman"] == 20, text


def test_texts_are_one_short_printable_line():
    nasty = "a\x1b[31mb\r\nc\u202e\ud800\x00 d\u2028e\ufeff"
    for phrase, text in ((nasty, "a [31mb c d e"), ("日本 é 🙂",) * 2, ("x" * 10**6, "x" * 300)):
        table = json.dumps({"f": {phrase: 10**400}})
        words = read_trigger_words({"modelspec.trigger_phrase": phrase, FIELDS[0]: table})
        assert words.trigger == text and words.folders[0].tags == {text: 10**9}


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ),
    st.text(),
)
def test_any_header_is_read(value, phrase):
    header = dict.fromkeys(FIELDS, json.dumps(value)) | {"modelspec.trigger_phrase": phrase}
    words = read_trigger_words(header)
    texts = [words.trigger, *words.list_tags(9)]
    assert all(len(t) <= 300 and t.encode() is not None for t in texts)
    assert not any(unicodedata.category(c)[0] == "C" for t in texts for c in t)
    assert all(0 < n <= folder.images for folder in words.folders for n in folder.tags.values())
