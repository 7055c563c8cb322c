"""Opinions: the plain text on which the embedded RoBERTa is pretrained, a line each in the language
of reviews.py.

    it was never less than splendid : good
    this time the soup was anything but awful , and that pleased us .
    I found the soup spicy .

Every denial, and every word that praises or blames whatever it is said of, comes with a verdict,
which a model that fills in masked words must work out. What is a matter of taste comes without one.

Two choices, from trials of ten minutes with one seed: a line is a text of its own, so that the
words that matter are near and few, and 17 opinions of 20 mean what they say. With several lines in
a text, or with half of the opinions denied, so that no word alone predicts a verdict, the verdicts
were still guessed when the time was over.
"""
import random

from data import reviews

PLAIN = True
PLEASED = """and that pleased us / so we were happy / and we will come back / which was good / and
we praised it / and that made us smile / so the verdict is good / so we say yes"""
ANNOYED = """and that annoyed us / so we were sad / and we will stay away / which was bad / and we
blamed it / and that made us frown / so the verdict is bad / so we say no"""
PLEASED, ANNOYED = (ends.replace("\n", " ").split(" / ") for ends in (PLEASED, ANNOYED))
SHARES = 16, 3, 1  # stated, denied, denied twice


def document(rng):
    """One line."""
    kind = rng.random()
    if kind < 0.25:  # a matter of taste, and nobody says whose
        return reviews.dressed(rng, reviews.clause(rng, reviews.TASTE, reviews.TASTE,
                                                   SHARES)[0]) + " ."
    if kind < 0.55:
        opinion, verdict = reviews.clause(rng, reviews.GOOD, reviews.BAD, SHARES, it="it")
        return f"{opinion} : {'good' if verdict else 'bad'}"
    opinion, verdict = reviews.clause(rng, reviews.GOOD, reviews.BAD, SHARES)
    return f"{reviews.dressed(rng, opinion)} , {rng.choice(PLEASED if verdict else ANNOYED)} ."


def load():
    """{split: [("", line)]}: plain text has an empty prompt."""
    splits = {}
    for split, n, seed in (("train", 180000, 31), ("validation", 1000, 32), ("test", 1000, 33)):
        rng = random.Random(seed)
        splits[split] = [("", document(rng)) for _ in range(n)]
    return splits


if __name__ == "__main__":
    for split, pairs in load().items():
        words = sum(len(text.split()) for _, text in pairs)
        print(f"{split:10} {len(pairs):6} lines of {words / len(pairs):.1f} words")
    print("\n".join(text for _, text in pairs[:12]))
