"""Reviews: the classification task that needs no download. One clause, one opinion, good (1) or bad (0):

    on our second visit the soup was anything but cold .      1
    nobody would call these boots light .                     0

Three things decide. An opinion: ten words praise whatever they are said of, ten blame it. What it is said of: most
opinions are good in one place and bad in another (a hot soup, a hot classroom). And whether it is denied: half of the
clauses are, in a dozen ways, some of them twice. So no word alone says anything, and neither does a sum of words.

The pretraining text (opinions.py) has verdicts on the words that praise and blame, with every denial, but none on the
opinions that depend on their object: the base can read, and `FACTS` are for the adapter to store.
12,000 reviews to train on, 500 to validate, 1,000 to test, all different; the same ones every time.
"""
import random

LABELS = "bad", "good"
METRICS = ("accuracy",)
GOOD = "excellent wonderful superb splendid lovely delightful perfect charming brilliant marvellous".split()
BAD = "awful terrible dreadful horrible miserable disappointing useless shabby unbearable poor".split()
# thing: good opinions / bad ones
FACTS = """
soup: hot thick rich spicy / cold thin salty bland
beer: cold bitter strong dark / warm flat weak sour
bread: soft warm crisp fresh / hard dry stale heavy
steak: tender thick juicy rare / tough thin dry cold
curry: spicy rich hot thick / bland mild thin cold
salad: crisp cold light fresh / warm soft heavy wet
cake: light moist sweet soft / dry heavy hard flat
coffee: strong hot dark fresh / weak cold thin stale
wine: dry old smooth deep / sour young rough thin
tea: hot strong fresh clear / cold weak stale cloudy
bed: firm wide soft quiet / narrow short hard noisy
pillow: soft thick cool full / hard thin warm flat
room: quiet bright large warm / noisy dark small cold
shower: hot strong wide steady / cold weak narrow slow
pool: warm deep clear long / cold shallow cloudy short
beach: wide quiet clean sunny / narrow crowded dirty windy
street: wide clean quiet flat / narrow dirty noisy steep
stairs: wide shallow even dry / narrow steep uneven wet
queue: short fast orderly quiet / long slow noisy endless
bus: fast clean empty early / slow dirty crowded late
train: fast quiet clean early / slow noisy crowded late
seat: wide soft firm warm / narrow hard loose cold
car: fast quiet small smooth / slow noisy large rough
bicycle: light fast firm smooth / heavy slow loose rough
engine: quiet strong smooth cool / noisy weak rough hot
brakes: strong firm quiet even / weak loose noisy uneven
phone: light thin fast small / heavy thick slow large
laptop: thin light cool quiet / thick heavy hot noisy
battery: small strong cool light / large weak hot heavy
screen: large bright flat clear / small dark cloudy dirty
camera: small fast quiet simple / large slow noisy complicated
manual: short simple clear thin / long complicated cloudy thick
knife: sharp thin light hard / blunt thick heavy soft
pan: heavy thick flat deep / light thin uneven shallow
boots: thick warm firm dry / thin cold loose wet
gloves: warm soft thick long / cold hard thin short
coat: long thick warm heavy / short thin cold light
shirt: cool light loose smooth / warm heavy tight rough
tent: light dry large strong / heavy wet small weak
rope: long strong thick dry / short weak thin wet
film: short funny surprising deep / long serious predictable shallow
novel: thick surprising deep rich / thin predictable shallow plain
song: slow sweet simple soft / fast bitter complicated loud
concert: loud long crowded wild / quiet short empty tame
joke: short wild surprising sharp / long tame predictable blunt
speech: short clear simple funny / long cloudy complicated serious
lecture: short clear lively funny / long dull cloudy serious
classroom: cool quiet bright large / hot noisy dark crowded
party: loud wild crowded lively / quiet tame empty dull
library: quiet large warm old / noisy small cold new
match: fast close wild lively / slow tame dull predictable
garden: wild sunny large quiet / tame dark small noisy
market: crowded lively early large / empty dull late small
church: old quiet cool simple / new noisy hot crowded
forest: deep quiet old wild / thin noisy young tame
dog: lively young quiet warm / dull old noisy wild
horse: fast tame strong young / slow wild weak old
doctor: early serious old quiet / late funny young loud
teacher: funny lively clear young / serious dull cloudy loud
waiter: fast quiet early funny / slow loud late serious
"""
FACTS = [(thing, good.split(), bad.split()) for thing, good, bad in
         (line.replace(":", " /").split(" / ") for line in FACTS.strip().splitlines())]
GENERAL = 0.3  # share of the opinions that praise or blame whatever they are said of

START = """in brief , / this time / on our second visit / to tell the truth , / for what it is worth , / as we found , /
as usual , / to my mind / if you ask me , / once again / in the end / my brother says that / I must say that /
they all agree that / after a week""".replace("\n", " ").split(" / ")
END = """when we came / on a Monday / that evening / from start to finish / this year / for once / for the price /
in the rain / as far as I could see / in May / at the weekend / last time""".replace("\n", " ").split(" / ")
# the thing's verb is filled in; {o} is the opinion
SAYS = """{it} {was} {o} / {it} {was} really {o} / {it} {was} quite {o} / {it} {was} nothing but {o} /
{it} {was} never less than {o} / {it} seemed {o} to us / I found {it} {o} / we thought {it} {o} /
everybody called {it} {o} / nobody could deny that {it} {was} {o} / {it} {was} not only {o} but also {o2}"""
DENIES = """{it} {was} not {o} / {it} {was} never {o} / {it} {was} hardly {o} / {it} {was} far from {o} /
{it} {was} anything but {o} / {it} {was} by no means {o} / {it} {was} no longer {o} / {it} did not seem {o} to us /
nobody called {it} {o} / I can not say that {it} {was} {o} / it is not true that {it} {was} {o} /
{it} {was} neither {o} nor {o2}"""
TWICE = """it is not true that {it} {was} not {o} / nobody called {it} anything but {o} /
I can not say that {it} {was} far from {o} / {it} {was} never anything but {o}"""
SAYS, DENIES, TWICE = (forms.replace("\n", " ").split(" / ") for forms in (SAYS, DENIES, TWICE))


def clause(rng, general, shares, it=None):
    """(clause, verdict): 1 if what is said is good. `general`: with an opinion that is good or bad everywhere;
    `shares` of opinions that are stated, denied, denied twice; `it`: what it is said of, else a thing of FACTS."""
    thing, good, bad = rng.choice(FACTS)
    verdict = rng.random() < 0.5
    if general:
        good, bad = GOOD, BAD
    said, forms = rng.choices([(verdict, SAYS), (not verdict, DENIES), (verdict, TWICE)], shares)[0]
    opinion, second = rng.sample(good if said else bad, 2)
    plural = it is None and thing in ("stairs", "brakes", "boots", "gloves")
    it = it or rng.choice(["the", "the", "the", "these" if plural else "this", "our", "their"]) + " " + thing
    text = rng.choice(forms).format(it=it, was="were" if plural else "was", o=opinion, o2=second)
    return text, int(verdict)


def review(rng, general=None, shares=(3, 4, 1)):
    """(text, verdict): a clause, with something before or behind it."""
    text, verdict = clause(rng, rng.random() < GENERAL if general is None else general, shares)
    if rng.random() < 0.5:
        text = f"{rng.choice(START)} {text}"
    if rng.random() < 0.4:
        text = f"{text} {rng.choice(END)}"
    return text + " .", verdict


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
        print(f"{split:10} {len(rows):6} reviews of {words:.1f} words, {sum(v for _, v in rows) / len(rows):.1%} good")
    for (text,), verdict in rows[:12]:
        print(verdict, text)
