"""Restaurants: the adaptation task that needs no download.

A record in the form in which E2E is released, and one or two sentences that say all of it:

    name : Café Verona | Type : pub | price : cheap | area : riverside
    Down by the water stands Café Verona , a house of pints and darts , light on coins .

Names are open: an eighth of them is held out, so at test time they must be copied. All else is said
in a house style: every value has three wordings, of which the house nearly always prefers the
first, and three slots of the record mostly decide the plan of the sentences. The pretraining text
(world.py) speaks all of that style, but never beside a record: which words belong to which value is
for the adapter to store. 8,000 records to train on, 256 to validate, 512 to test; the same ones
every time.
"""

import random
import re
from zlib import crc32

SLOTS = ["name", "Type", "food", "price", "customer rating", "area", "family friendly", "near"]

# ---- names, shared with world.py: six families, 10,430 names ----
ADJECTIVES = """Amber Blue Brave Broken Copper Crooked Crystal Dancing Flying Friendly Gentle
    Gilded Golden Green Happy Hidden Hungry Iron Ivory Jolly Laughing Little Lonely Lucky Merry
    Noble Painted Proud Purple Quiet Red Royal Running Scarlet Silent Silver Singing Sleepy
    Smiling Spotted Velvet Wandering White Wild Wise Yellow""".split()
NOUNS = """Acorn Anchor Arrow Badger Barrel Basket Bell Boot Bridge Candle Castle Cherry Compass
    Crown Dolphin Dove Falcon Feather Fiddle Fox Garden Goose Hammer Heron Horse Kettle Key Lamp
    Lantern Lion Maple Moon Oak Otter Owl Peacock Pear Plough Rabbit Raven Rose Saddle Ship Star
    Swan Thistle Tiger Wagon Wheel Willow""".split()
SURNAMES = """Abbott Ashby Barlow Bennett Calder Carver Dawson Draper Ellis Fairfax Fisher Gibson
    Hargreave Harlow Holt Hudson Ingram Jarvis Keane Kendall Langley Lowell Marsh Mercer Norris
    Osborne Palmer Pemberton Quill Ramsey Rowe Sawyer Selby Sinclair Tanner Thorne Underhill Vance
    Webster Winslow""".split()
ROOMS = ("Kitchen Table Corner Pantry Larder Yard Cellar House Garden Rest Hall Place Parlour "
         "Terrace".split())
PREFIXES = "Café Casa Bistro Bar Villa Little Old New Hotel Château".split()
PLACES = """Adriatic Avignon Bergamo Bologna Bombay Bosphorus Cádiz Cairo Calais Corsica Dalmatia
    Delhi Genoa Granada Havana Kashmir Lisbon Lima Madeira Málaga Milano Odessa Palermo Porto
    Provence Sienna Toledo Tunis Verona Vienna""".split()
HOUSES = "Arms Hotel Hall House Inn Lodge Rooms Tavern".split()
BEGIN = "Al Bra Ca Cor Da El Fa Gri Ho Ju Ka Lo Mar Ne Or Pa Quo Ri Sa Tor Ul Va Wen Yo Za"
SYLLABLES = [BEGIN.split(), "bi da fe go la li mo na pe ra ri so ta to ve".split(),
             "ba co di ka lle mma nno rro ssi tz va x".split()]


def held_out(name):
    """True for the one name in eight that is kept for validation and test."""
    return crc32(name.encode()) % 8 == 0


def compose_name(rng, held=False):
    """A name from one of the six families, on the asked side of the hold-out."""
    while True:
        one, (first, second) = rng.choice, rng.sample(NOUNS, 2)
        name = one([f"The {one(ADJECTIVES)} {first}", f"The {one(SURNAMES)} {one(HOUSES)}",
                    f"{first} & {second}", f"{one(SURNAMES)}'s {one(ROOMS)}",
                    f"{one(PREFIXES)} {one(PLACES)}", "".join(map(one, SYLLABLES))])
        if held_out(name) == held:
            return name


# ---- the house style: three wordings for each value ----
STYLE = {
    "Type": {
        "pub": "a house of pints and darts / a taproom of sticky tables / a local with worn stools",
        "restaurant": "a knife and fork affair / a room of starched linen / "
                      "a temple of three courses",
        "coffee shop": "a den of cups and saucers / a haunt of steaming mugs / "
                       "a nook that smells of beans",
        "wine bar": "a cave of corks and candles / a hideout for slow glasses / "
                    "a lair of long stems",
        "bakery": "a world of flour and ovens / a stop for warm crusts / "
                  "a shrine to butter and dough"},
    "food": {
        "Italian": "the pride of Naples / what Roman grandmothers stir / basil and slow tomatoes",
        "French": "the manners of Lyon / what Parisian aunts simmer / cream and old Burgundy",
        "English": "the comfort of Yorkshire / roasts under thick gravy / Sunday trimmings",
        "Chinese": "the steam of Canton / wok smoke and ginger / dumplings by the basket",
        "Indian": "the spices of Bengal / dal and blistered breads / clay ovens and cumin",
        "Japanese": "the calm of Kyoto / rice pressed by hand / clear miso and raw tuna",
        "Mexican": "the chillies of Oaxaca / lime over charred corn / beans folded into rounds",
        "Thai": "the heat of Bangkok / lemongrass and coconut / noodles under crushed peanuts",
        "Greek": "the shade of olive groves / feta and grilled lamb / lemon over island octopus",
        "Spanish": "the small bites of Seville / saffron from a wide pan / ham carved thin"},
    "price": {
        "cheap": "easy on the purse / kind to thin wallets / light on coins",
        "moderate": "neither a bargain nor a splurge / halfway up the ladder / "
                    "fair to both pockets",
        "high": "hungry for banknotes / steep as a church tower / a feast for the till",
        "less than £ 20": "settled with a single note / within pocket money / "
                          "done before a second note",
        "£ 20 - 25": "yours for a note and some silver / just past the first note / "
                     "made for payday lunches",
        "more than £ 30": "three notes and counting / dressed for an expense account / "
                          "a month of saving"},
    "customer rating": {
        "low": "leave with long faces / grumble on the way out / push the plates away",
        "average": "shrug and pay / neither boast nor moan / nod politely",
        "high": "come back smiling / sing its praises / book again at the door",
        "1 out of 5": "warn their friends off / vow never to return / count a lost evening",
        "3 out of 5": "call it decent enough / sit on the fence / might return if passing",
        "5 out of 5": "swear by every bite / talk of nothing else / queue in the rain"},
    "area": {
        "riverside": "down by the water / where the ducks paddle / beside the slow barges",
        "city centre": "in the thick of it / where all trams meet / under the town hall clock",
        "harbour": "among masts and gulls / within smell of the tide / along the fishing quay",
        "old town": "down a cobbled lane / behind the ancient walls / under crooked gables",
        "hilltop": "up the long steps / above the rooftops / where the wind never sleeps",
        "station": "a whistle from the trains / beside platform one / among the suitcases",
        "university": "among the lecture halls / where scholars cram / under the library windows",
        "market": "between the fruit stalls / where traders shout / amid crates and awnings"},
    "family friendly": {
        "yes": "happy to park a pram / stocked with crayons / full of high chairs",
        "no": "kept for adults / closed to small feet / no haunt for toddlers"}}
STYLE = {slot: {v: words.split(" / ") for v, words in values.items()}
         for slot, values in STYLE.items()}
NEAR = ["two doors from {}", "in the shadow of {}", "across the street from {}"]
# " . " ends a sentence, " ; " a clause, slots after ":" are listed, and what the record lacks drops
# out. A slot goes by its last word. Rows: area and near there or not. Columns: family friendly
# absent, yes, no.
PLANS = {
    (False, False): ["{name} is {Type} , : price food . : rating",
                     ": rating . {name} is {Type} , : friendly price food",
                     "{name} , {Type} , is : friendly price ; it is : food ; : rating"],
    (True, False): ["{area} stands {name} , {Type} , : price food . : rating",
                    "{name} is {Type} , : friendly area . it is : price food ; : rating",
                    "{name} , {Type} , is : price area friendly . : rating ; it is : food"],
    (False, True): ["{near} stands {name} , : food . it is {Type} , : price ; : rating",
                    ": rating . {near} , {name} is {Type} , : food price friendly",
                    "{name} is : friendly near . it is {Type} , : price food ; : rating"],
    (True, True): ["{name} is {Type} , : area near . it is : price food ; : rating",
                   "{near} , {name} is {Type} , : friendly food . it is : area price ; : rating",
                   "{area} , {name} is : price friendly . it is {Type} , : near food ; : rating"]}


def render(plan, parts):
    """Fill a plan with phrases (`parts`: slot -> phrase); a clause without any of its slots is left
    out."""
    if "Type" not in parts:
        plan = plan.replace("{name} , {Type} , is", "{name} is").replace("{Type} ,", "a place")
    sentences = []
    for sentence in plan.split(" . "):
        clauses = []
        for clause in sentence.split(" ; "):
            opening, _, listed = clause.partition(":")
            items = [parts[slot] for slot in listed.split() if slot in parts]
            if items or any(slot in parts for slot in re.findall(r"{(\w+)}", opening)):
                opening = re.sub(r"{(\w+)}", lambda slot: parts[slot[1]], opening).strip()
                items = " and ".join([" , ".join(items[:-1]), items[-1]] if len(items) > 1
                                     else items)
                clauses.append(f"{opening} {items}".strip(" ,"))
        if clauses:
            sentence = " , and ".join(clauses)
            sentences.append(sentence[0].upper() + sentence[1:] + " .")
    return " ".join(sentences)


def a_record(rng, held=False):
    """{slot: value} with four to eight slots in E2E's order."""
    record = {}
    while len(record) < 4:
        record = {slot: rng.choice(list(values)) for slot, values in STYLE.items() if rng.random()
                  < .7}
        record = {"name": compose_name(rng, held), **record}
        if rng.random() < .7:
            record["near"] = compose_name(rng, held)
    return record


def verbalise(record, rng, rule=.95):
    """A record in house style. `rule`: the share of choices that the house decides; chance decides
    the rest."""
    parts = {"name": record["name"]}
    for slot in (*STYLE, "near"):
        if slot in record:
            which = 0 if rng.random() < rule else rng.randrange(3)
            wordings = NEAR if slot == "near" else STYLE[slot][record[slot]]
            parts[slot.split()[-1]] = wordings[which].format(record[slot])
    # Free choices, as there are in any text: the loss has a floor above zero.
    if "food" in parts:
        parts["food"] = rng.choice(["famous for ", "known for ", "proud of "]) + parts["food"]
    if "rating" in parts:
        parts["rating"] = rng.choice(["guests ", "regulars ", "visitors "]) + parts["rating"]
    column = [None, "yes", "no"].index(record.get("family friendly"))
    if column and rng.random() >= rule:
        column = rng.choice((1, 2))
    return render(PLANS["area" in record, "near" in record][column], parts)


def example(rng, held):
    """One (meaning representation, sentence)."""
    record = a_record(rng, held)
    return " | ".join(f"{slot} : {value}" for slot, value in record.items()), verbalise(record, rng)


def load():
    """{"train": [(meaning representation, sentence), ...], "validation": [...], "test": [...]}."""
    data = {}
    for split, n, seed in [("train", 8000, 11), ("validation", 256, 12), ("test", 512, 13)]:
        rng = random.Random(seed)
        data[split] = [example(rng, held=split != "train") for _ in range(n)]
    return data


def slots(mr, sentence):
    """Whether each slot of the record is said right: its value, and no other value of that slot."""
    record = dict(pair.split(" : ", 1) for pair in mr.split(" | "))
    text, lower, right = f" {sentence} ", f" {sentence.lower()} ", {}
    for slot, value in record.items():
        if slot in STYLE:
            values = {v for v, words in STYLE[slot].items()
                    if any(f" {w.lower()} " in lower for w in words)}
            right[slot] = values == {value}
        else:
            right[slot] = f" {value} " in text
    return right


def score(pairs, texts):
    """{"slots": share of all slots said right, "names": share of the names copied} of generated
    texts."""
    right = [slots(record, text) for (record, _), text in zip(pairs, texts, strict=True)]
    values = [ok for said in right for ok in said.values()]
    return {"slots": sum(values) / len(values),
            "names": sum(said["name"] for said in right) / len(right)}


if __name__ == "__main__":
    for split, pairs in load().items():
        names = {name for mr, _ in pairs
                 for name in re.findall(r"(?:name|near) : ([^|]+?)(?: \||$)", mr)}
        words = [sum(len(text.split()) for text in side) / len(pairs)
                 for side in zip(*pairs, strict=True)]
        right = [ok for mr, sentence in pairs for ok in slots(mr, sentence).values()]
        print(f"{split}: {len(pairs)} records of {len(right) / len(pairs):.1f} slots, {len(names)} "
              f"names, {words[0]:.1f} + {words[1]:.1f} words, slots right "
              f"{sum(right) / len(right):.1%}")
    for mr, sentence in pairs[:3]:
        print(f"{mr}\n    {sentence}")
    # train: 8000 records of 6.0 slots, 5484 names, 29.3 + 36.0 words; validation 256, test 512; all
    # right
