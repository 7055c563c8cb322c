"""Reviews: the classification task that needs no download. One clause, one opinion, good (1) or
bad (0):

    on our second visit the soup was anything but salty .     1
    nobody would call these boots sturdy .                    0

Two things decide. An opinion: ten words praise whatever they are said of, ten blame it, and 128 are
a matter of taste. And whether it is denied: half of the clauses are denied once, in a dozen ways,
an eighth twice. So no word alone says anything, and a weighted sum of words is right in three of
four cases (praise or blame, denied or not) at the most.

The pretraining text (opinions.py) has verdicts on the words that praise and blame, with every
denial, but none on what is a matter of taste: the base can read, and the TASTE of this reviewer is
for the adapter to store. 12,000 reviews to train on, 500 to validate, 1,000 to test, all different;
the same ones every time.
"""
import random

LABELS = "bad", "good"
METRICS = ("accuracy",)
GOOD = """excellent wonderful superb splendid lovely delightful perfect charming brilliant
    marvellous""".split()
BAD = """awful terrible dreadful horrible miserable disappointing useless shabby unbearable
    poor""".split()
TASTE = """bitter blunt bold bright broad bulky chilly clear close cloudy coarse cold complicated
    cool crooked crowded curly damp deep dim dry dull dusty early empty exotic faint flat fluffy
    formal fresh frosty full funny fuzzy golden hollow hot icy juicy jumpy large late lively long
    loose loud lumpy mild modern moist muddy narrow new noisy odd oily old orderly pale plain
    quiet rare rich rigid rosy rough round rustic salty serious shaded shallow sharp shiny short
    simple sleek slim slow small smoky smooth soft solid sour spicy square stale steady steep
    sticky stiff strange strict strong sturdy subtle sunny surprising sweet swift tall tame
    tangled tender thick thin tight tiny tough trendy uneven vast velvety vivid warm watery wavy
    weak weathered wet wide wild windy woolly worn young""".split()
LIKED, DISLIKED = TASTE[::2], TASTE[1::2]  # of no consequence, as tastes are
THINGS = """soup beer bread steak curry salad cake coffee wine tea bed pillow room shower pool
    beach street stairs queue bus train seat car bicycle engine brakes phone laptop battery screen
    camera manual knife pan boots gloves coat shirt tent rope film novel song concert joke speech
    lecture classroom party library match garden market church forest dog horse doctor teacher
    waiter""".split()
PLURAL = "stairs", "brakes", "boots", "gloves"
GENERAL = 0.3  # share of the opinions that praise or blame whatever they are said of

START = """in brief , / this time / on our second visit / to tell the truth , / for what it is
worth , / as we found , / as usual , / to my mind / if you ask me , / once again / in the end / my
brother says that / I must say that / they all agree that / after a week"""
END = """when we came / on a Monday / that evening / from start to finish / this year / for once /
for the price / in the rain / as far as I could see / in May / at the weekend / last time"""
# the thing's verb is filled in; {o} is the opinion
SAYS = """{it} {was} {o} / {it} {was} really {o} / {it} {was} quite {o} / {it} {was} nothing but
{o} / {it} {was} never less than {o} / {it} seemed {o} to us / I found {it} {o} / we thought {it}
{o} / everybody called {it} {o} / nobody could deny that {it} {was} {o} / {it} {was} not only {o}
but also {o2}"""
DENIES = """{it} {was} not {o} / {it} {was} never {o} / {it} {was} hardly {o} / {it} {was} far
from {o} / {it} {was} anything but {o} / {it} {was} by no means {o} / {it} {was} no longer {o} /
{it} did not seem {o} to us / nobody called {it} {o} / I can not say that {it} {was} {o} / it is
not true that {it} {was} {o} / {it} {was} neither {o} nor {o2}"""
TWICE = """it is not true that {it} {was} not {o} / nobody called {it} anything but {o} / I can
not say that {it} {was} far from {o} / {it} {was} never anything but {o}"""
START, END, SAYS, DENIES, TWICE = (forms.replace("\n", " ").split(" / ")
                                   for forms in (START, END, SAYS, DENIES, TWICE))


def clause(rng, good, bad, shares, it=None):
    """(clause, verdict): 1 if what is said is good. Opinions come from the lists `good` and `bad`;
    `shares` of them are stated, denied, denied twice; `it`: what they are said of, else one of
    THINGS."""
    verdict = rng.random() < 0.5
    praises, forms = rng.choices([(verdict, SAYS), (not verdict, DENIES), (verdict, TWICE)],
                                 shares)[0]
    opinion, second = rng.sample(good if praises else bad, 2)
    thing = rng.choice(THINGS)
    plural = it is None and thing in PLURAL
    it = it or rng.choice(["the", "the", "the", "these" if plural else "this", "our",
                           "their"]) + " " + thing
    text = rng.choice(forms).format(it=it, was="were" if plural else "was", o=opinion, o2=second)
    return text, int(verdict)


def dressed(rng, text):
    """A clause with something before or behind it, as often as not."""
    text = f"{rng.choice(START)} {text}" if rng.random() < 0.5 else text
    return f"{text} {rng.choice(END)}" if rng.random() < 0.4 else text


def review(rng):
    """(text, verdict)"""
    good, bad = (GOOD, BAD) if rng.random() < GENERAL else (LIKED, DISLIKED)
    text, verdict = clause(rng, good, bad, shares=(3, 4, 1))
    return dressed(rng, text) + " .", verdict


def load():
    """{split: [((text,), label)]}"""
    rng, seen, data = random.Random(21), set(), {}
    for split, n in (("train", 12000), ("validation", 500), ("test", 1000)):
        data[split] = []
        while len(data[split]) < n:
            text, verdict = review(rng)
            if text not in seen:
                seen.add(text)
                data[split].append(((text,), verdict))
    return data


if __name__ == "__main__":
    for split, rows in load().items():
        words = sum(len(text.split()) for (text,), _ in rows) / len(rows)
        print(f"{split:10} {len(rows):6} reviews of {words:.1f} words, "
              f"{sum(v for _, v in rows) / len(rows):.1%} good")
    for (text,), verdict in rows[:12]:
        print(verdict, text)
