"""Opinions: the broad text on which the embedded RoBERTa is pretrained, two parts of ten from world.py.

The rest are pages on what people thought of things, in the language of reviews.py. Every denial and every word that
praises or blames comes with a verdict, which a model that fills in masked words must work out:

    the soup was anything but awful , and that pleased us .

Opinions that depend on their object come without one: the base knows the words, not what is good where.
"""
import random

from data import reviews, world

PLEASED = """and that pleased us / so we were happy / and we will come back / which was good / and we praised it /
and that made us smile / so the verdict is good / so we say yes""".replace("\n", " ").split(" / ")
ANNOYED = """and that annoyed us / so we were sad / and we will stay away / which was bad / and we blamed it /
and that made us frown / so the verdict is bad / so we say no""".replace("\n", " ").split(" / ")


def judged(rng):
    """A general opinion with its verdict, before or after it."""
    text, verdict = reviews.review(rng, general=True, shares=(6, 3, 1))
    said = rng.choice(PLEASED if verdict else ANNOYED)
    if rng.random() < 0.25:
        return f"{said.removeprefix('and ').removeprefix('so ').removeprefix('which ')} : {text}"
    return f"{text.removesuffix(' .')} , {said} ."


def page(rng):
    """One to four opinions."""
    return "\n".join(judged(rng) if rng.random() < 0.65 else reviews.review(rng, general=False)[0]
                     for _ in range(rng.randint(1, 4)))


def documents(n, seed):
    """`n` documents, always the same for the same seed."""
    rng = random.Random(seed)
    return [page(rng) if i % 10 < 8 else text for i, text in enumerate(world.documents(n, seed))]


def load():
    """{split: [("", document)]}: plain text has an empty prompt."""
    sizes = {"train": (120000, 1), "validation": (1000, 2), "test": (1000, 3)}
    return {split: [("", text) for text in documents(n, seed)] for split, (n, seed) in sizes.items()}


if __name__ == "__main__":
    print("\n\n".join(documents(12, 1)))
