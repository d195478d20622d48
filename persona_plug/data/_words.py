"""Vocabulary of the generated sentences: no word in two topics, none an answer, an opening or a closing."""

from typing import NamedTuple


class Topic(NamedTuple):
    """The words of one topic; a sentence has one adjective, two nouns and one verb of it."""

    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    verbs: tuple[str, ...]


def _topic(adjectives: str, nouns: str, verbs: str) -> Topic:
    return Topic(tuple(adjectives.split()), tuple(nouns.split()), tuple(verbs.split()))


TOPICS = {
    "weather": _topic(
        "stormy cloudy windy frosty humid misty",
        "rain thunder snow breeze fog hail",
        "drizzles gusts freezes thaws",
    ),
    "kitchen": _topic(
        "spicy salty crispy sweet sour buttery",
        "soup bread pepper cheese noodle onion",
        "simmers bakes boils melts",
    ),
    "music": _topic(
        "melodic loud acoustic rhythmic jazzy choral",
        "guitar drum violin chorus piano flute",
        "plays hums echoes strums",
    ),
    "sport": _topic(
        "athletic sweaty tactical fast muscular unbeaten",
        "goalkeeper ball racket referee sprinter team",
        "scores tackles dribbles serves",
    ),
    "garden": _topic(
        "leafy thorny blooming grassy mossy fragrant",
        "rose tulip hedge seedling weed orchard",
        "grows sprouts wilts blossoms",
    ),
    "travel": _topic(
        "foreign delayed coastal scenic remote crowded",
        "airport suitcase passport ferry hostel train",
        "departs arrives boards tours",
    ),
}
TOPIC_OF = {word: name for name, topic in TOPICS.items() for words in topic for word in words}
"""The topic of every word that has one."""
LINKS = ("near", "behind", "beside", "without", "before", "after")
SENTENCE_WORDS = 7
"""Words of every sentence: "the <adjective> <noun> <verb> <link> the <noun>"."""
ANSWERS = ("red", "blue", "green", "gold", "white", "black", "pink", "grey")
HABITS: dict[str, dict[str, float]] = {
    "opening": {"": 0.4, "hello,": 0.25, "well,": 0.2, "listen,": 0.15},
    "case": {"lower": 0.55, "upper": 0.45},
    "length": {"full": 0.6, "brief": 0.4},
    "punctuation": {".": 0.4, "!": 0.35, "": 0.25},
    "closing": {"": 0.4, "cheers": 0.25, "thanks": 0.2, "bye": 0.15},
}
"""Values of each habit of style, with their shares among the users."""
