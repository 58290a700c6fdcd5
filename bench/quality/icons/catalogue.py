"""What is drawn: icons by word, the sets they come from (LICENCES.md has these), and colours."""

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


SETS = ("noto", "blob", "twemoji", "fluent", "emojione", "silhouette")
"""Words of the drawing styles, each a set of icons; the last has silhouettes, drawn in one ink."""
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
