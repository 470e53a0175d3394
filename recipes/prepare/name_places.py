"""Sentences about people and places with a tag for each token, from templates: a small task with exact answers."""

from __future__ import annotations

import random
from pathlib import Path

FIRST = "Ada Alan Anna Barbara Carl Clara Edith Emil Emmy Erwin Grace Hedy Ida Irma Ivan John Lise Maria Niels Otto"
LAST = "Bell Bohr Curie Euler Gauss Hopper Kepler Klein Lovelace Meitner Noether Planck Turing Weber Wien Zuse"
CITY = "Basel Berlin Bonn Kiel Lima Lyon Oslo Paris Prague Rome Turin Vienna"
WITH_CITY = "New San Santa Old Port"
VERBS = "visits leaves likes paints remembers"
TEMPLATES = (
    "{person} {verb} {place} .",
    "In {place} , {person} met {person} .",
    "{person} and {person} moved from {place} to {place} .",
    "Nobody in {place} {verb} the museum .",
    "The train to {place} left without {person} .",
    "Yesterday {person} wrote to a friend .",
)


def _entity(kind: str, random_: random.Random) -> list[tuple[str, str]]:
    if kind == "person":
        words = [random_.choice(FIRST.split()), *random_.sample(LAST.split(), random_.randint(0, 2))]
        tag = "PER"
    else:
        words = [*random_.sample(WITH_CITY.split(), random_.randint(0, 1)), random_.choice(CITY.split())]
        tag = "LOC"
    return [(word, f"{'I' if at else 'B'}-{tag}") for at, word in enumerate(words)]


def write(path: Path) -> None:
    """Write 1500 sentences in two columns."""
    random_ = random.Random(0)
    sentences = []
    for _ in range(1500):
        pairs: list[tuple[str, str]] = []
        for word in random_.choice(TEMPLATES).split():
            if word in ("{person}", "{place}"):
                pairs += _entity(word[1:-1], random_)
            else:
                pairs.append((random_.choice(VERBS.split()) if word == "{verb}" else word, "O"))
        sentences.append("".join(f"{token}\t{tag}\n" for token, tag in pairs))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(sentences))
