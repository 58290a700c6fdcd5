"""Messages and pages are plain English."""

import english
import pytest


def test_no_message_and_no_page_holds_what_readers_stumble_over():
    stumbles = english.list_stumbles()
    assert not stumbles, "\n".join(stumbles)


@pytest.mark.parametrize(
    "text",
    [
        "--target sdxl: there is none; choose another",
        "the weights have nothing to say",
        "2 blocks of the source feed none",
        "x.json is no plan of this version",
        "It is done. Of several LoRAs it has a line each",
        "Of a LoRA that changes no image nothing is learnt",
        "in which folder is nobody's business",
    ],
)
def test_the_known_patterns_are_found(text):
    assert len(english.find_patterns(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "there is no such file; there are no kernels",
        "it is no longer there, and is no better",
        "One of a hundred; a map of several models",
        "it is not a plan",
    ],
)
def test_plain_sentences_are_left_alone(text):
    assert english.find_patterns(text) == []


def test_messages_are_read_whole():
    places = dict(english.list_messages())
    assert len(places) > 2000 and any("X is not" in text for text in places.values())
    assert len({place for place, _ in english.list_paragraphs()}) > 8
