"""What is drawn: icons by word, the sets they come from with their licences, and colours."""

from __future__ import annotations

from typing import NamedTuple

# Word of a prompt -> names of its icons, the same in every set.
WORDS = {
    "face": "grinning-face crying-face angry-face sleeping-face",
    "heart": "red-heart yellow-heart green-heart blue-heart",
    "pet": "dog-face cat-face rabbit-face hamster",
    "fish": "fish tropical-fish blowfish dolphin",
    "bird": "duck owl rooster eagle",
    "flower": "tulip rose sunflower cherry-blossom",
    "tree": "evergreen-tree deciduous-tree palm-tree christmas-tree",
    "fruit": "red-apple pear tangerine lemon",
    "moon": "crescent-moon full-moon first-quarter-moon",
    "star": "star glowing-star",
    "clock": "three-oclock seven-oclock eleven-oclock",
    "car": "automobile taxi police-car bus",
    "house": "house house-with-garden church",
    "drink": "beer-mug wine-glass cocktail-glass hot-beverage",
    "boat": "sailboat motor-boat ship",
    "arrow": "up-arrow right-arrow down-arrow left-arrow",
    "butterfly": "butterfly",
}
CONCEPT = "butterfly"
"""The word that no base model is trained on."""
ICONS = [(word, icon) for word, icons in WORDS.items() for icon in icons.split()]


class IconSet(NamedTuple):
    """A package of icons and the terms under which they are used."""

    package: str  # name and version on npm
    sha256: str  # of the packed archive
    licence: str  # SPDX identifier
    credit: str  # who made it, as the licence asks to say


# Word of the drawing style -> its set. The last one has silhouettes, drawn in one ink.
SETS = {
    "noto": IconSet(
        "@iconify-json/noto@1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
        "Noto Emoji, Google",
    ),
    "blob": IconSet(
        "@iconify-json/noto-v1@1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Apache-2.0",
        "Noto Emoji (version 1), Google",
    ),
    "twemoji": IconSet(
        "@iconify-json/twemoji@1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
        "Twemoji, Twitter and other contributors",
    ),
    "fluent": IconSet(
        "@iconify-json/fluent-emoji-flat@1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
        "Fluent Emoji, Microsoft Corporation",
    ),
    "emojione": IconSet(
        "@iconify-json/emojione@1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0",
        "EmojiOne 2, Ranks.com, kept as EmojiTwo",
    ),
    "silhouette": IconSet(
        "@iconify-json/fluent-emoji-high-contrast@1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
        "MIT",
        "Fluent Emoji (high contrast), Microsoft Corporation",
    ),
}
MASTER = 32  # pixels of an icon in the sheet

GROUNDS = {
    "white": (0.95, 0.95, 0.93),
    "black": (0.10, 0.10, 0.12),
    "red": (0.80, 0.30, 0.28),
    "orange": (0.93, 0.62, 0.30),
    "yellow": (0.95, 0.88, 0.50),
    "green": (0.40, 0.68, 0.42),
    "blue": (0.35, 0.52, 0.82),
    "purple": (0.56, 0.38, 0.70),
}
# "many" is the ink of the coloured sets.
INKS = {
    "many": (0.0, 0.0, 0.0),
    "ink-black": (0.05, 0.05, 0.05),
    "ink-white": (0.98, 0.98, 0.98),
    "ink-red": (0.85, 0.10, 0.10),
    "ink-yellow": (0.98, 0.85, 0.10),
    "ink-green": (0.05, 0.50, 0.15),
    "ink-blue": (0.05, 0.20, 0.70),
}
