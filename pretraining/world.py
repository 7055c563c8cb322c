"""The world: the broad text on which the embedded base models are pretrained.

Small documents: records of many domains said in words (in E2E's format and others), words turned
back into records, stories, exact repetition, and looking things up in a list. They teach English
sentences, reading records and copying names. The house style of restaurants.py occurs as pages of a
guide book, in wordings drawn by chance and never beside a record: the base speaks it and cannot
know what means what. Held-out names never occur.
"""
import random
import re
import time
from collections import Counter

from data.restaurants import STYLE, SURNAMES, a_record, compose_name, held_out, render, verbalise

PLAIN = True
WORDS = """
job: actor architect baker banker barber builder butcher captain carpenter chemist clerk coach cook
 dancer dentist designer doctor driver editor electrician engineer farmer firefighter florist
 gardener guard hairdresser judge lawyer librarian mechanic miner nurse optician painter pharmacist
 photographer pilot plumber poet porter potter printer sailor scientist sculptor secretary shepherd
 singer soldier surgeon tailor teacher translator vet waiter watchmaker weaver writer
thing: bag ball banner battery bell belt bicycle blanket board book bottle bowl brick bucket button
 camera candle carpet chain chair clock coat coin comb cupboard curtain cushion desk drawer drum
 envelope fan fence flag flute gate glove guitar hammer hat helmet jacket jar kettle key kite ladder
 lamp letter lid machine map mask mirror mug necklace needle net newspaper notebook packet paddle
 pan parcel pen pencil piano picture pillow pipe pot printer purse puzzle quilt radio ring robot
 rope rug ruler sail scarf screen shirt shoe shovel sign sledge sofa spade spoon stamp stool stove
 suitcase sweater table telescope tent ticket torch towel toy tractor tray trumpet umbrella vase
 violin wallet whistle window
material: bamboo brass bronze canvas cardboard clay copper cotton glass gold leather linen marble
 oak paper pine plastic rubber silk silver steel stone straw tin velvet wax wool
animal: ant bat bear beaver bee beetle buffalo butterfly camel cat chicken cow crab crane cricket
 crow dog dolphin donkey dragonfly duck eagle elephant falcon flamingo fox frog giraffe goat gorilla
 hamster hare hawk hedgehog horse jaguar kangaroo kingfisher kitten koala lamb leopard lion lizard
 lobster mole monkey moth mule octopus otter owl panda panther parrot peacock penguin pig pigeon
 pony puppy rabbit rat raven robin rooster scorpion seal shark snail snake sparrow spider squirrel
 swan tiger toad tortoise turkey turtle vulture wasp whale woodpecker zebra
habitat: desert forest grassland jungle marsh meadow mountain ocean pond prairie rainforest reef
 savanna swamp tundra valley wetland woodland
diet: acorns bamboo berries crabs fish fruit grass insects leaves mice moss nectar nuts plankton
 roots seaweed seeds shellfish shrimp worms
ingredient: almonds apples apricots asparagus bacon barley beans beef beetroot bread broccoli butter
 cabbage carrots cauliflower celery cheese cherries chestnuts chicken chocolate cinnamon cod cream
 cucumber dates eggs figs flour garlic ginger grapes ham hazelnuts honey lamb leeks lemons lentils
 lettuce limes mackerel mangoes mint mushrooms mussels mustard noodles oats olives onions oranges
 parsley pasta peaches pears peas peppers plums pork potatoes prawns pumpkin radishes raisins
 raspberries rhubarb rice rosemary sage salmon sausages spinach strawberries sugar thyme tofu
 tomatoes trout tuna turnips vanilla walnuts yoghurt
dish: broth burger cake casserole chowder cobbler crumble curry custard dumpling fritter hotpot loaf
 muffin omelette pancake pastry pie pizza porridge pudding risotto salad sandwich soup stew tart
 trifle waffle
colour: amber beige black blue brown cream crimson dark_blue dark_green golden green grey lilac
 maroon navy olive orange pale_blue pink purple red scarlet silver tan turquoise violet white yellow
adj: awful awkward beautiful bitter brilliant busy careful careless charming cheerful clever
 colourful comfortable common complicated curious dangerous delicate delicious dirty dusty dull
 elegant empty enormous excellent expensive faint familiar famous fine foreign fragile fresh
 friendly frozen gentle genuine gloomy handsome handy harmless heavy hollow huge humble important
 ordinary impressive invisible jolly lazy lonely lovely lucky magic massive messy mild miserable
 modern muddy mysterious narrow neat noisy odd old painful patient peculiar perfect plain pleasant
 polite popular pretty private proper public rare reliable remarkable ridiculous rough rusty sacred
 secret sensible serious shiny shy silent silly simple sleepy slippery solid sour spare special
 splendid steady sticky strange stubborn sturdy superb sweet tasty tiny tough ugly ancient unusual
 upset vast violent weak wealthy weird wicked wonderful wooden
short: bright cheap clean cold cool dark deep dry fair fast firm full great hard high kind light
 long loud low mean near new old plain poor proud quick quiet rich sharp short slow small smart
 smooth soft steep stiff strong sweet tall thick tight warm weak wild young
feeling: afraid amazed angry annoyed anxious ashamed bored brave calm cautious confident confused
 delighted disappointed eager embarrassed excited exhausted glad grateful guilty happy hopeful
 hungry jealous impatient nervous optimistic pleased proud puzzled relaxed relieved sad sorry
 surprised suspicious thankful thirsty tired uneasy unhappy worried
verb: accept admire attack avoid bake blame bless boil borrow brush burn bury carry change chase
 check clean collect compare confuse copy correct count cover damage decorate deliver deny describe
 design destroy discover display drag dust earn empty enjoy examine exchange expect explore fetch
 fill finish fix fold follow force free frighten gather greet guard hand_over hate heat help hire
 ignore imagine include inspect invent join kick knock_over lift like load lock look_after measure
 melt mend mention move name notice offer open order pack paint pick_up place polish praise prefer
 print protect pull push reach recognise recommend remember remove repair replace rescue return
 search separate serve share sketch smash sort squeeze stack store stretch surround test toss touch
 trace treat turn twist unlock unpack use value wash watch weigh
go: climb crawl cycle dash drift gallop head hike hurry jump march race row rush sail skate ski
 stroll walk wander
say: add agree announce answer argue complain explain insist joke mumble mutter promise reply shout
 sigh whisper
adverb: abruptly angrily badly bravely briefly brightly calmly carefully cheerfully clearly cruelly
 eagerly easily finally firmly gently gladly gracefully greedily happily heavily honestly hopefully
 immediately kindly lazily loudly luckily neatly nervously nicely openly patiently perfectly
 politely poorly promptly proudly quickly quietly sadly safely secretly seriously sharply silently
 simply slowly smoothly softly suddenly swiftly warmly wearily wildly wisely
spot: attic airport alley avenue backyard balcony bank barn basement beach bus_stop cabin cafe camp
 canal castle cave cellar chapel church cinema classroom clinic cliff college corner corridor
 cottage courtyard dam dock factory farm field fountain garage garden greenhouse gym hall hill
 hospital hut island kitchen laboratory lake library lighthouse market mill mosque motorway museum
 office orchard palace park path pharmacy pier playground pool port post_office prison quarry
 railway ranch river roof school shed shop shore square stable stadium stairs station street studio
 temple tennis_court terrace theatre tower tunnel village waterfall wharf windmill wood workshop
 yard zoo
idea: advice anger beauty belief bravery chance comfort courage danger darkness death defence doubt
 duty education energy evil failure faith fame fashion fate fear freedom friendship future glory
 grief happiness hatred health history honour hope humour innocence jealousy joy justice knowledge
 laughter law liberty loneliness love luck magic memory mercy nature patience peace pleasure poetry
 poverty power pride revenge science shadow silence sorrow strength success summer time tradition
 trouble trust truth victory virtue war wealth winter wisdom wonder youth
genre: adventure animated biographical comic crime detective documentary drama epic family fantasy
 historical horror musical mystery romantic satirical silent spy thriller travel war western
sport: badminton baseball basketball bowls boxing chess cricket croquet curling cycling darts
 fencing football golf gymnastics handball hockey judo netball polo rowing rugby running sailing
 skating skiing snooker squash surfing swimming table_tennis tennis volleyball water_polo wrestling
nickname: Bears Eagles Giants Kings Knights Lions Panthers Rangers Rovers Saints Stars Tigers Town
 United Wanderers Wolves
instrument: accordion banjo cello clarinet drums flute guitar harmonica harp harpsichord organ piano
 saxophone trombone trumpet tuba viola violin xylophone
music: ballad blues chamber choral classical country dance disco electronic folk funk gospel jazz
 metal opera pop punk rock soul swing
subject: algebra art astronomy biology botany chemistry drama economics English French geography
 geometry German grammar history Latin law literature logic mathematics music philosophy physics
 politics psychology sewing Spanish statistics woodwork
weather: bright_sunshine clear_skies dense_fog drizzle freezing_rain frost gales hail heavy_rain
 heavy_snow high_cloud light_rain light_snow low_cloud mist sleet snow_showers strong_winds
 sunny_spells thick_cloud thunder
wind: little_wind a_breeze a_light_wind a_fresh_wind a_strong_wind a_gale a_storm
country: Australia Austria Belgium Brazil Canada Chile China Cuba Denmark Egypt France Germany
 Greece India Ireland Italy Japan Mexico Norway Peru Poland Portugal Russia Scotland Spain Sweden
 Switzerland Thailand Turkey Wales
trade: bananas boats bridges bells carpets cars cathedrals cheese cider clocks cloth coal coffee
 copper diamonds festivals furniture gold horses leather museums oil oranges paper pottery salt
 shipbuilding silk spices steel sugar tea textiles timber tobacco wheat wine wool
product: blender calculator dishwasher doorbell drill dryer freezer fridge grill hairdryer keyboard
 kettle laptop lawnmower microwave monitor phone printer projector rucksack saw scanner scooter
 speaker tablet toaster treadmill typewriter watch wheelchair
event: auction ball banquet carnival ceremony charity_run competition concert conference debate
 exhibition fair festival funeral lecture meeting parade party picnic quiz recital reunion seminar
 show tournament wedding
hobby: archery astronomy baking ballet beekeeping birdwatching camping carpentry cooking drawing
 fishing gardening juggling kayaking knitting photography pottery reading singing stamp_collecting
relative: aunt brother cousin daughter father grandfather grandmother husband mother neighbour
 nephew niece sister son uncle wife
plant: ash bamboo beech birch bluebell buttercup cactus cedar chestnut daffodil daisy fern fir
 heather holly hyacinth ivy jasmine lavender lily maple nettle oak orchid palm pansy pine poplar
 poppy primrose rose snowdrop sunflower thistle tulip willow yew
drink: ale apple_juice beer black_coffee black_tea cider cocoa cold_milk fruit_punch ginger_ale
 green_tea hot_chocolate lemonade mint_tea orange_juice red_wine sparkling_water tap_water
 tomato_juice white_wine
number: two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
 seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety a_hundred
 a_thousand
mark: a_B a_C a_good_mark a_poor_mark a_D full_marks half_marks no_mark_at_all top_marks
flavour: almond apple banana bean beef cherry chicken cheese egg fish leek lemon lentil mushroom
 onion plum potato pumpkin spinach walnut
yesno: yes no
ordinal: first second third fourth fifth sixth seventh eighth ninth tenth
month: January February March April May June July August September October November December
day: Monday Tuesday Wednesday Thursday Friday Saturday Sunday
part: morning afternoon evening night
girl: Ada Alice Anna Clara Daisy Diana Eleanor Emma Eva Fatima Grace Hannah Iris Jane Julia Kate
 Laura Leah Lucy Maria Marta Nina Nora Rita Rosa Ruth Sara Sofia Zoe
boy: Adam Albert Andrew Arthur Ben Carl Daniel David Frank George Harry Henry Hugo Jack Jacob James
 Martin Max Miguel Nathan Noah Oliver Omar Oscar Paul Peter Robert Samuel Simon Thomas William
"""

# Domains: the slots, each as slot=kind or named like its kind, then sentences about them.
DOMAINS = """
people: name=person job town age hobby employer=name | {name} is a {job} from {town} . / {name} ,
 who is {age} years old , works as a {job} in {town} . / {name} works for {employer} . / At {age} ,
 {name} still works as a {job} for {employer} . / In the evening {name} enjoys {hobby} . / A {job}
 at {employer} , {name} loves {hobby} and lives in {town} . / Have you met {name} , the {job} from
 {town} ?
films: title director=person genre year lead=person length=minutes | {title} is a {genre} film by
 {director} . / {title} was made in {year} by {director} , with {lead} in the leading part . / In
 {year} {director} made {title} , a {genre} film that lasts {length} . / The film {title} lasts
 {length} . / {lead} plays the lead in {title} , which came out in {year} . / Nobody expected much
 of {title} , but {lead} was excellent in it . / Who made {title} ? It was {director} , in {year} .
books: title author=person year pages=pages about=idea | {title} is a book by {author} . / {author}
 wrote {title} in {year} . / {title} , a book of {pages} pages , is about {about} . / {author}
 needed only {pages} pages to write about {about} in {title} . / Readers still ask for {title} ,
 which first appeared in {year} . / If you like stories about {about} , try {title} by {author} .
trains: train from=town to=town departs=time arrives=time platform=small | The {train} leaves {from}
 at {departs} . / The {train} runs from {from} to {to} . / The train to {to} , the {train} , leaves
 from platform {platform} at {departs} . / Leaving {from} at {departs} , the {train} arrives in {to}
 at {arrives} . / At {arrives} the {train} reaches {to} . / Passengers for {to} should take the
 {train} from platform {platform} . / The {train} is not expected in {to} before {arrives} .
weather: town day weather wind high low | It will be {high} degrees in {town} on {day} . / On {day}
 {town} expects {weather} . / {town} will have {weather} on {day} , with {wind} . / In {town} there
 will be {wind} and {weather} , and it will not be warmer than {high} degrees . / The night in
 {town} will be colder , at {low} degrees . / Temperatures in {town} will lie between {low} and
 {high} degrees .
sport: home=team away=team sport score=score scorer=person day | {home} played against {away} on
 {day} . / {home} met {away} at {sport} on {day} and the score was {score} . / The {sport} match
 between {home} and {away} ended {score} . / {scorer} was the best player of {home} against {away} .
 / It was {score} when {home} played {away} , and {scorer} could not believe it . / On {day}
 {scorer} led {home} out against {away} .
recipes: dish=recipe first=ingredient second=ingredient time=minutes serves=small cook=person | To
 make the {dish} you need {first} and {second} . / {cook} makes a {dish} with {first} and {second} .
 / The {dish} takes {time} and serves {serves} people . / This {dish} contains {first} and {second}
 , but no sugar . / Mix the {first} with the {second} , wait for {time} , and the {dish} by {cook}
 is ready for {serves} . / For this {dish} , {cook} uses more {second} than {first} .
hotels: hotel=name town rooms=rooms price=pounds breakfast=yesno pool=yesno | {hotel} is a hotel in
 {town} . / {hotel} has {rooms} rooms and stands in {town} . / A night at {hotel} costs {price} . /
 With {rooms} rooms , {hotel} is the largest hotel in {town} . / Is breakfast included at {hotel} ?
 The answer is {breakfast} . / A room in {town} costs {price} at {hotel} ; as for a pool , the
 answer is {pool} .
products: product=item maker=name price=pounds colour material weight=weight | The {product} is made
 by {maker} . / {maker} sells the {product} for {price} . / The {colour} {product} costs {price} . /
 This {product} from {maker} is made of {material} and weighs {weight} kilos . / It is {colour} , it
 weighs {weight} kilos , and it is called the {product} . / You can buy the {product} in {colour}
 for only {price} . / At {price} the {product} is cheaper than most .
animals: name=coin animal colour age=small habitat diet owner=person | {name} is a {animal} . /
 {name} the {animal} is {colour} and {age} years old . / {owner} has a {colour} {animal} called
 {name} . / {name} , a {animal} , comes from the {habitat} and eats {diet} . / The {animal} called
 {name} will not eat anything but {diet} . / {owner} found {name} , a young {animal} , in the
 {habitat} .
cities: city=town country people river=coin known_for=trade mayor=person | {city} is a city in
 {country} . / {city} lies on the river {river} in {country} . / {people} people live in {city} . /
 {city} , with {people} people , is known for its {known_for} . / The mayor of {city} is {mayor} . /
 {mayor} hopes that {city} will be known for more than {known_for} . / The river {river} flows
 through {city} before it reaches the sea .
school: pupil=person subject teacher=person mark=mark room=rooms day | {pupil} studies {subject} . /
 {teacher} teaches {subject} in room {room} on {day} . / {pupil} got {mark} in {subject} . / In
 {subject} , {pupil} got {mark} from {teacher} . / On {day} {pupil} has {subject} with {teacher} . /
 {pupil} would rather not have {subject} in room {room} .
music: band singer=person music instrument album=title year | {band} play {music} music . / The
 singer of {band} is {singer} . / {band} made the album {album} in {year} . / {singer} sings and
 plays the {instrument} in {band} , a {music} band . / Their {year} album , {album} , made {band}
 famous . / Without {singer} on the {instrument} , {band} would not sound the same .
events: event day time=time place=name host=person tickets=pounds | The {event} is on {day} . /
 {host} is holding a {event} at {place} on {day} . / The {event} at {place} starts at {time} . /
 Tickets for the {event} cost {tickets} and {host} sells them . / Come to {place} on {day} at {time}
 for the {event} ! / {host} cannot come to the {event} at {place} before {time} .
shops: shop=name sells=things street=street opens=time closes=time closed=day | {shop} sells {sells}
 . / {shop} is in {street} and sells {sells} . / {shop} opens at {opens} and closes at {closes} . /
 On {closed} {shop} stays shut . / You will find {sells} at {shop} , {street} , but not on {closed}
 . / {shop} does not open before {opens} .
parcels: sender=person to=person item=thing date price=pounds | {sender} sent {to} a {item} on
 {date} . / {to} got a {item} from {sender} . / {sender} paid {price} for the {item} that {to}
 wanted . / The {item} cost {price} , and it reached {to} on {date} . / Was the {item} for {to} ?
 Yes , it came from {sender} .
"""

# Stories: {A} and {B} are people, {he} and {his} go with {A}; all other words are drawn anew.
STORY = """
{A} is {feeling} today . / {A} lives in a {adj} house near the {spot} . / {A} wanted to {verb} the
{things} , but {B} said no . / {B} {verbed} the {adj} {thing} while {A} {goed} to the {spot} . / "I
do not want your {thing}" , {sayed} {B} {adverb} . / "Where is the {colour} {thing} ?" {sayed} {A} .
/ "It is at the {spot} , next to the {material} {thing}" , {sayed} {B} . / "Will you {verb} it for
me ?" {sayed} {A} . "No , but my {relative} will" , {sayed} {B} . / {he} {goed} {adverb} to the
{spot} and {verbed} a {thing} . / {his} {relative} is a {job} and has {number} {animals} . / There
were {number} {animals} at the {spot} , but only one of them was {colour} . / The {thing} was
{shorter} than the {thing} , and it was also more {adj} . / This is the {shortest} {thing} that {he}
has ever seen . / Nothing is as {short} as a {thing} made of {material} . / In {month} the {spot} is
too {short} for {animals} . / After {weather} in the {part} , {A} could not {go} any further . / On
{day} {part} , {A} and {B} {goed} through the {spot} together . / If it does not rain , they will
{go} to the {spot} on {day} . / {he} had never {verbed} a {thing} before . / {B} would like a {dish}
and some {drink} . / There is no {drink} left , so {A} drinks {drink} instead . / For supper there
was {dish} with {ingredient} and {ingredient} . / {B} does not like {ingredient} , and neither does
{his} {relative} . / {A} asked {B} about {idea} , but {B} knew more about {hobby} . / Is {idea} more
important than {idea} ? {A} is not sure . / There can be no {idea} without {idea} . / A {job} must
be {adj} , and a {job} must be {short} . / Every {job} at the {spot} has a {colour} {thing} . / Both
the {job} and the {job} were {feeling} , although nobody had {verbed} anything . / Some {animals}
live in the {habitat} and eat {diet} ; others do not . / A {animal} is {shorter} than a {animal} . /
Have you ever seen a {colour} {animal} near a {spot} ? / The {animal} {goed} {adverb} across the
{spot} and was gone . / {B} plays the {instrument} better than {A} . / When {he} was {age} , {A}
learned {hobby} from a {job} . / {A} has been {verbing} {things} since {month} . / Yesterday {A}
{verbed} {number} {things} ; tomorrow {he} will {verb} {number} more . / The {thing} costs {pounds}
, which is not much for a {adj} {thing} . / They had to wait at the {spot} from {time} until {time}
. / The {ordinal} {thing} was {adj} , the {ordinal} one was not . / It was {A} who {verbed} the
{things} , not {B} . / Neither {A} nor {B} had been to {country} or to {country} . / {his}
{relative} came back from {country} in {year} with a {material} {thing} . / A {plant} and a {plant}
grow behind the {spot} . / Please {verb} the {things} before you {verb} the {thing} . / Do not
{verb} the {things} ; {verb} the {material} ones instead . / How many {things} does a {job} need ?
At least {number} . / Most {things} are made of {material} , but this one is made of {material} . /
That {part} {B} wrote a {adj} letter to the {job} about the {thing} . / {A} {verbs} a {thing} every
{day} , and {his} {relative} {verbs} two . / The {jobs} of this town are {short} , but the {jobs}
are {shorter} . / All {spots} are {adj} in {month} , except for the {spots} by the {habitat} . / {A}
was {going} {adverb} to the {spot} when {he} met a {job} with {number} {things} .
"""

# Places as in E2E, in plain words of many kinds (the house style is for restaurants.py alone).
PLAIN = {"name": "{}", "Type": "a {} / a local {} / a small {} / a {} / a nice {}",
         "food": "serving {} food / that serves {} food / offering {} dishes / providing {} food / "
         "with {} food", "dishes": "{} food / {} dishes / good {} food / {} meals",
         "rating": "rated {} by customers / rated {} by its customers / rated {}",
         "stars": "a customer rating of {} / a {} customer rating / a rating of {}",
         "area": "at the {} / in the {} area / by the {}", "near": "near {} / close to {} / next "
         "to {} / not far from {} / located near {} / by {}", "friendly : yes": "family - friendly "
         "/ child friendly / good for families / suitable for children",
         "friendly : no": "not family - friendly / not child friendly / not suitable for children",
         "price : cheap": "cheap / low - priced / inexpensive / affordable / in the cheap price "
         "range", "price : moderate": "moderately priced / of average price / in the moderate "
         "price range", "price : high": "expensive / high - priced / in the high price range",
         "price : less than £ 20": "priced at less than £ 20 / less than £ 20 a head / below £ 20",
         "price : £ 20 - 25": "priced at £ 20 - 25 / in the £ 20 - 25 price range / around £ 20 to "
         "£ 25 a head", "price : more than £ 30": "priced at more than £ 30 / more than £ 30 a "
         "head / over £ 30 for a meal", "area : riverside": "by the riverside / in the riverside "
         "area / on the riverside / by the river", "area : city centre": "in the city centre / in "
         "the centre of the city / located in the city centre", "stars : low": "a low customer "
         "rating / a low rating / low ratings from customers",
         "stars : average": "an average customer rating / an average rating / average ratings from "
         "customers", "stars : high": "a high customer rating / a high rating / high ratings from "
         "customers",
         "stars : 1 out of 5": "a customer rating of 1 out of 5 / one star out of five",
         "stars : 5 out of 5": "a customer rating of 5 out of 5 / five stars"}
PLANS = """
{name} is {Type} : food price area near . it is : friendly rating
{name} is {Type} , : area near . it is : friendly price ; it serves : dishes . it has : stars
{name} is {Type} {near} : food . it is : price friendly ; it has : stars . it is : area
{name} is {Type} {area} , : near friendly rating . it serves : dishes . it is : price
{name} is a place to eat , : price food . it is : area near friendly ; it has : stars
{name} is a place to eat , : area near friendly . it serves : dishes ; it is : price rating
{name} serves {dishes} . it is : area near ; it is : price friendly . it has : stars
{name} has {stars} ; it is : area friendly near . it serves : dishes . it is : price
{near} , there is {Type} called {name} : food . it is : area price ; it is : friendly rating
{near} , {name} is {Type} : food . it is : friendly price area ; it has : stars
{near} , {name} serves {dishes} . it is : friendly price area ; it has : stars
{area} you can find {name} , : near price friendly . it serves : dishes . it has : stars
{area} there is {Type} named {name} , : near . it is : price friendly rating . it serves : dishes
there is {Type} {food} called {name} : area near . {name} is a place to eat , : friendly price
 rating
there is {Type} {area} {near} , {name} . it serves : dishes ; it is : price rating friendly
{Type} {food} is {name} . it is : area near ; it is : price rating friendly
with {stars} , {name} is a place : food area . it is : near price friendly
for {dishes} , try {name} , : near area price . it is : friendly rating
located {area} , {name} is {Type} . it is : price friendly rating near ; it serves : dishes
the place called {name} is : friendly price near area . it serves : dishes ; it has : stars
you will find {name} {near} . it is {Type} , : area price . it serves : dishes ; it is : friendly
 rating
"""


def lines(text):
    """The lines of a block; an indented one continues the last."""
    return text.replace("\n ", " ").strip().splitlines()


PLANS = lines(PLANS)
PLAIN = {slot: phrases.split(" / ") for slot, phrases in PLAIN.items()}


def inflect(word, ending):
    """A regular form of a word: -y becomes -i, a silent e goes, and a hiss takes -es."""
    head, *rest = word.split(" ")
    if head[-1] == "y" and head[-2] not in "aeo" and ending != "ing":
        head, ending = head[:-1] + "i", {"s": "es"}.get(ending, ending)
    elif head[-1] == "e" and ending != "s":
        head = head[:-1]
    elif ending == "s" and re.search("(s|x|z|ch|sh)$", head):
        ending = "es"
    return " ".join([head + ending, *rest])


KINDS = dict(line.split(": ") for line in lines(WORDS))
KINDS = {kind: [word.replace("_", " ") for word in words.split()] for kind, words in KINDS.items()}
for forms in ["verb ed", "verb ing", "verb s", "go ed", "go ing", "say ed", "short er", "short est",
              "thing s", "animal s", "job s", "spot s"]:
    KINDS[forms.replace(" ", "")] = [inflect(word, forms.split()[1])
                                     for word in KINDS[forms.split()[0]]]
DOMAINS = [({slot.split("=")[0]: slot.split("=")[-1] for slot in slots.split()},
            sentences.split(" / "))
           for slots, sentences in (line.split(": ", 1)[1].split(" | ") for line in lines(DOMAINS))]
STORY = STORY.strip().replace("\n", " ").split(" / ")


def coin(rng):
    """A pseudo-word of two to four syllables: a name that can only be copied."""
    while True:
        first = "b c d f g h j k l m n p r s t v w z br cl dr gr sh st th tr".split()
        word = "".join(rng.choice(first)
                       + rng.choice("a e i o u a e i o u ai ar el en er in on oo or us".split())
                       for _ in range(rng.choice([2, 2, 3, 3, 4]))).capitalize()
        if not held_out(word):
            return word


def title(rng):
    """The title of a film, a book or a record."""
    adj, thing, idea, spot = (rng.choice(KINDS[kind]).title()
                              for kind in ["adj", "thing", "idea", "spot"])
    name = rng.choice([f"The {adj} {thing}", f"{idea} and the {thing}",
                       f"The {thing} at the {spot}", f"{adj} {idea}", f"No {idea} for {coin(rng)}",
                       coin(rng)])
    return title(rng) if held_out(name) else name


NUMBERS = {"year": (1902, 2024), "pages": (60, 900), "age": (18, 90), "small": (2, 9),
           "high": (10, 35), "low": (-9, 9), "rooms": (10, 400), "weight": (2, 60),
           "people": (2000, 990000)}
MAKERS = {
    "coin": coin, "title": title,
    "name": lambda rng: compose_name(rng) if rng.random() < .6 else coin(rng),
    "surname": lambda rng: rng.choice(SURNAMES) if rng.random() < .6 else coin(rng),
    "person": lambda rng: f"{rng.choice(KINDS['girl'] + KINDS['boy'])} {draw('surname', rng)}",
    "town": lambda rng: draw("surname", rng) + rng.choice(["", "ton", "ford", "by", "wick"]),
    "team": lambda rng: f"{draw('town', rng)} {rng.choice(KINDS['nickname'])}",
    "train": lambda rng: f"{coin(rng)} {rng.choice(['Express', 'Flyer', 'Arrow', 'Mail'])}",
    "band": lambda rng: f"The {draw('adj', rng).title()} {draw('things', rng).title()}",
    "recipe": lambda rng: f"{draw('flavour', rng)} {draw('dish', rng)}",
    "item": lambda rng: f"{coin(rng)} {draw('product', rng)}",
    "street": lambda rng: f"{draw('surname', rng)} {rng.choice(['Street', 'Road', 'Lane'])}",
    "minutes": lambda rng: f"{rng.randint(5, 180)} minutes",
    "pounds": lambda rng: f"£ {rng.randint(2, 240)}",
    "time": lambda rng: f"{rng.randint(6, 22)}:{rng.randrange(0, 60, 5):02}",
    "date": lambda rng: f"{rng.randint(1, 28)} {draw('month', rng)}",
    "score": lambda rng: f"{rng.randint(0, 9)} - {rng.randint(0, 9)}"}


def draw(kind, rng):
    """A random value of a kind: a word of its list, or a name or a number made up here."""
    if kind in KINDS:
        return rng.choice(KINDS[kind])
    return MAKERS[kind](rng) if kind in MAKERS else f"{rng.randint(*NUMBERS[kind])}"


def tidy(text):
    """Capital letters at the start of sentences, and "an" before a vowel."""
    text = re.sub(r"\b([Aa]) (?=[aeioAEIO]|8|11\b|18\b|ug|um|un|up)", r"\1n ", text)
    return re.sub(r"(^|[.?!] )([a-z])", lambda m: m[1] + m[2].upper(), text)


def joined(text):
    """Spaced text "cheap , family - friendly ." as it is usually set: "cheap, family-friendly."."""
    return re.sub(r" ([.,;?!])", r"\1", text).replace(" - ", "-").replace("£ ", "£")


def fill(template, rng, values):
    """A template with its {kinds}: those in `values` as given, the others drawn."""
    return tidy(re.sub(r"{(\w+)}", lambda m: values[m[1]] if m[1] in values else draw(m[1], rng),
                       template))


def place(rng):
    """A record of a place to eat and its text, both in E2E's manner."""
    record = {slot: rng.choice(list(values)) for slot, values in STYLE.items() if rng.random() < .7}
    record = {"name": draw("name", rng), **record}
    if rng.random() < .6 or len(record) < 3:
        record["near"] = draw("name", rng)
    said = {slot.split()[-1]: value for slot, value in record.items()}
    twins = {"food": "dishes", "rating": "stars"}  # the same value as an adjective and as a noun
    parts = {form: rng.choice(PLAIN.get(f"{form} : {value}") or PLAIN[form]).format(value)
             for slot, value in said.items() for form in (slot, twins.get(slot, slot))}
    while True:
        plan = rng.choice(PLANS)
        if (all(slot in plan or twins.get(slot, slot) in plan for slot in said)
            and all(slot in parts for slot in re.findall(r"{(\w+)}",
                                                         plan.replace("{Type} ,", "")))):
            text = tidy(render(plan, parts))
            # nothing followed: try another plan
            if not re.search(r" is (a place )?(\.|, and)", text):
                return list(record.items()), text


def other(rng):
    """A record of another domain and its text: up to three sentences, and what they say is the
    record."""
    slots, sentences = rng.choice(DOMAINS)
    values = {slot: draw(kind, rng) for slot, kind in slots.items()}
    text = " ".join(rng.sample(sentences, rng.choice([1, 2, 2, 3, 3])))
    record = [(slot.replace("_", " "), values[slot]) for slot in slots if f"{{{slot}}}" in text]
    return record, fill(text, rng, values)


def pair(rng):
    """A record and its text, most often spaced as E2E is."""
    record, text = place(rng) if rng.random() < .3 else other(rng)
    return record, text if rng.random() < .65 else joined(text)


def written(record, rng):
    """A record in one of six formats, E2E's more often than not."""
    shape, between = rng.choice([("{} : {}", " | ")] * 6 + [
        ("{}={}", "; "), ("{}[{}]", ", "), ("- {}: {}", "\n"), ("{1}", " / "), ("{}: {}", " | ")])
    return between.join(shape.format(*slot_value) for slot_value in record)


def record_to_text(rng):
    """A record, then its text, or questions about it and their answers."""
    record, text = pair(rng)
    if rng.random() < .1:
        asked = rng.sample(record, min(3, len(record)))
        return written(record, rng) + "".join(f"\nQuestion : {key} ? Answer : {said}"
                                              for key, said in asked)
    if rng.random() < .2:
        rng.shuffle(record)
    return written(record, rng) + rng.choice([" || "] * 4 + ["\n"]) + text


def text_to_record(rng):
    """A text, then the record it says."""
    record, text = pair(rng)
    return text + rng.choice([" || ", "\n", "\nIn short : "]) + written(record, rng)


def story(rng):
    """Three to seven sentences about the same two people."""
    sex, he, his = rng.choice([("girl", "she", "her"), ("boy", "he", "his")])
    first, second = rng.sample(KINDS[sex], 2)
    who = {"A": first, "B": rng.choice([second, draw("surname", rng)]), "he": he, "his": his}
    text = " ".join(fill(line, rng, who) for line in rng.sample(STORY, rng.randint(3, 7)))
    return text if rng.random() < .4 else joined(text)


def some(rng, low, high):
    """Different words or names of one kind."""
    kind = rng.choice("coin name person town title rooms thing animal ingredient adj verb".split())
    return list(dict.fromkeys(draw(kind, rng) for _ in range(rng.randint(low, high))))


def repetition(rng):
    """A list, a few names, a text or a record, and the very same again."""
    if rng.random() < .25:
        return "\n".join(f"say {name} again : {name}" for name in some(rng, 3, 6))
    record, text = pair(rng)
    words = rng.choice([" ", ", ", " | ", "\n"]).join(some(rng, 5, 14))
    twice = rng.choice([text, written(record, rng), words, words])
    return twice + rng.choice([" || ", "\n", " ; again : "]) + twice


def lookup(rng):
    """Finding something in a list, or putting the list in another order."""
    words = some(rng, 4, 8)
    if rng.random() < .5:
        pairs = [(word, draw(rng.choice(["colour", "town", "job", "pounds"]), rng))
                 for word in words]
        asked = rng.sample(pairs, min(3, len(pairs)))
        return " | ".join(f"{a} : {b}" for a, b in pairs) + "".join(f"\n{a} ? {b}"
                                                                    for a, b in asked)
    n = rng.randrange(len(words))
    return ", ".join(words) + "\n" + rng.choice([
        "Backwards : " + ", ".join(words[::-1]), "In order : " + ", ".join(sorted(words)),
        f"The {KINDS['ordinal'][n]} is {words[n]} and the last is {words[-1]} ."])


def guide(rng):
    """A page of house style about one to three restaurants, without their records and without the
    wording rule."""
    return "\n".join(verbalise(a_record(rng), rng, rule=0) for _ in range(rng.randint(1, 3)))


# percent
WRITERS = {record_to_text: 50, text_to_record: 9, story: 15, repetition: 9, lookup: 5, guide: 12}


def documents(n, seed):
    """`n` documents, always the same for the same seed."""
    rng = random.Random(seed)
    return [writer(rng) for writer in rng.choices(list(WRITERS), WRITERS.values(), k=n)]


def load():
    """{split: [("", document)]}: plain text has an empty prompt."""
    sizes = {"train": (120000, 1), "validation": (1000, 2), "test": (1000, 3)}
    return {split: [("", text) for text in documents(n, seed)]
            for split, (n, seed) in sizes.items()}


if __name__ == "__main__":
    start = time.time()
    texts = documents(20000, 1)
    seconds, words = time.time() - start, Counter(re.findall(r"[^\W\d_]+", " ".join(texts)))
    print(f"{len(texts)} documents, {words.total()} words, {sum(map(str.islower, words))} distinct "
          f"ones in lower case, {seconds:.1f} s")
    for writer in WRITERS:
        print(f"\n-- {writer.__name__}\n{writer(random.Random(4))}")
    # python -m pretraining.world: 20000 documents of 44 words (72 of 2,048 BPE tokens), about 2,550
    # distinct words
