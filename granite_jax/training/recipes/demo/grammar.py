"""A seeded text grammar of office and household requests, in the raw-transcript style of Granite Speech.

Texts are lower case without punctuation, digits are spelled as words. Most sentences carry *invented* proper
names. A name's spelling follows from how an English synthesizer pronounces it, so a recognizer can spell names
that it has never seen; a model that only remembers words cannot.

Names and sentences are divided into a training and a held-out part by stable hashes of their text, not by
order of generation: the two parts stay disjoint for all seeds and counts.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

Split = Literal["train", "heldout"]

NAMED_SHARE = 0.6
MIN_WORDS, MAX_WORDS = 4, 16
_HELDOUT_NAMES = 5  # one name in five is held out
_HELDOUT_TEXTS = 10  # one sentence in ten is held out


@dataclass(frozen=True)
class Sentence:
    """A sentence to say.

    Fields:
      text: only a-z, apostrophes and single spaces.
      names: the invented names in the text, in order.
      kind: where the sentence comes from.
    """

    text: str
    names: tuple[str, ...]
    kind: str = "grammar"


def words(text: str) -> tuple[str, ...]:
    """The entries of a comma-separated list."""
    return tuple(" ".join(entry.split()) for entry in text.split(",") if entry.strip())


# --- invented names ------------------------------------------------------------------------------------------
# Two shapes: C V C . C V C ("zelgad") and C V C . C V C V ("timbado"). Each sound has one spelling: no c, q, x, w, y,
# no doubled letter, no vowel digraph, no letter that turns silent.

_ONSET = words("b, d, f, g, h, j, k, l, m, n, p, r, t, v, z, sh, br, dr, fr, gr, kr, pr, tr, bl, fl, gl, pl")
_CODA = tuple("lnmkvz")
_MIDDLE = tuple("bdfgkmnptvz")
_END = words("k, t, v, z, d, g, b, p, sh, n, m")
_MIDDLE_OPEN = tuple("bdfgkmnvz")

# Spellings that a synthesizer reads with another vowel than the letter's own, reduces to a schwa, or merges.
_UNCLEAR = re.compile(
    r"g[ei]|[ao]l|ng|nk|o[mn]|h[ao]m|[tdf]u[nm]|z[sz]|kk|mm|nn|vv|mn|pf|zk$|^(b|d|r|pr|br)e|fu|vf|zs|tsh|[kz]t"
    r"|mb$|[lm]ov|trev|[aou][nm]$"
)
_ENGLISH = frozenset(
    words(
        """bandana, bandit, brandish, gambit, grandad, hazmat, humbug, kelvin, limpid, lumbago, lumpish, melvin,
    mendoza, mintaka, pulpit, pundit, shindig, tenpin, timpani"""
    )
)


def _bucket(text: str, salt: str, buckets: int) -> int:
    """A stable hash: `hash()` differs from process to process."""
    digest = hashlib.sha256(f"{salt}:{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % buckets


def name_split(name: str) -> Split:
    """The part a name belongs to, whatever the seed."""
    return "heldout" if _bucket(name, "name", _HELDOUT_NAMES) == 0 else "train"


def text_split(text: str) -> Split:
    """The part a whole sentence belongs to, whatever the seed."""
    return "heldout" if _bucket(text, "text", _HELDOUT_TEXTS) == 0 else "train"


def pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    """Draws one of `options`."""
    return options[int(rng.integers(len(options)))]


def _spell(rng: np.random.Generator) -> str:
    short = rng.random() < 0.6
    first_vowels = tuple("aeiou") if short else tuple("aeiu")
    opening = pick(rng, _ONSET) + pick(rng, first_vowels) + pick(rng, _CODA) + pick(rng, _MIDDLE)
    if short:
        return opening + pick(rng, tuple("aiou")) + pick(rng, _END)
    return opening + pick(rng, tuple("aiou")) + pick(rng, _MIDDLE_OPEN) + pick(rng, tuple("aio"))


def invent_name(rng: np.random.Generator, split: Split) -> str:
    """Draws a lower-case invented name of `split`: six to nine letters, two or three syllables."""
    while True:
        name = _spell(rng)
        if name not in _ENGLISH and not _UNCLEAR.search(name) and name_split(name) == split:
            return name


# --- slots ---------------------------------------------------------------------------------------------------

ONES = words("one, two, three, four, five, six, seven, eight, nine")
TEENS = words("ten, eleven, twelve, thirteen, fourteen, fifteen, sixteen, seventeen, eighteen, nineteen")
TENS = words("twenty, thirty, forty, fifty, sixty, seventy, eighty, ninety")
ORDINALS = words(
    """first, second, third, fourth, fifth, sixth, seventh, eighth, ninth, tenth, eleventh, twelfth, thirteenth,
    fourteenth, fifteenth, sixteenth, seventeenth, eighteenth, nineteenth, twentieth, thirtieth"""
)
ORDINALS += tuple(f"twenty {o}" for o in ORDINALS[:9])
_NUMBERS = ONES + TEENS + TENS + tuple(f"{t} {o}" for t in TENS for o in ONES)
MONTHS = words("january, february, march, april, may, june, july, august, september, october, november, december")
_WEEKDAYS = words("monday, tuesday, wednesday, thursday, friday, saturday, sunday")

_SLOTS: dict[str, tuple[str, ...]] = {
    "number": _NUMBERS,
    "digit": (*ONES, "zero"),
    "few": ONES[1:] + TEENS[:3],
    "ordinal": ORDINALS,
    "month": MONTHS,
    "weekday": _WEEKDAYS,
    "hour": (*ONES, "ten", "eleven", "twelve"),
    "minute": words("ten, fifteen, twenty, twenty five, thirty, forty, forty five, fifty, fifty five"),
    "half": words("in the morning, in the afternoon, in the evening, at night, after lunch, before noon"),
    "person": words(
        """anna, peter, maria, david, laura, thomas, julia, robert, emma, daniel, sophie, michael, helen, victor,
        alice, martin, nina, oscar, clara, simon, ruth, henry, grace, adam, linda, george, sarah, frank, diana,
        edward, my wife, my brother, my sister, my manager, our lawyer, the doctor, the landlord, the plumber,
        my mother, the teacher, the accountant, the new intern, my neighbour, the driver"""
    ),
    "team": words(
        """the finance team, the design group, customer support, the legal department, the sales office,
        the warehouse, human resources, the board, the whole crew, the research group, the front desk, marketing,
        the night shift, the security staff, procurement, everyone on the project, the volunteers, our partners"""
    ),
    "city": words(
        """london, paris, berlin, madrid, boston, chicago, dublin, oslo, tokyo, vienna, lisbon, prague, sydney,
        toronto, denver, glasgow, geneva, athens, cairo, mumbai, seattle, houston, budapest, stockholm, hamburg,
        singapore"""
    ),
    "place": words(
        """the airport, the station, the library, the old harbour, the museum, the hospital, the market, the hotel,
        the stadium, the theatre, the post office, the bakery, the gym, the park, the garage, the school,
        the bank, the pharmacy, the river bridge, the town hall, the castle, the bus stop, the university,
        the zoo, the factory"""
    ),
    "room": words(
        """the kitchen, the bedroom, the living room, the hallway, the office, the basement, the meeting room,
        the lobby, the bathroom, the garden, the main hall, the conference room, the attic, the workshop,
        the balcony, the canteen"""
    ),
    "thing": words(
        """the budget, the report, the contract, the invoice, the slides, the schedule, the proposal,
        the blue folder, the keys, the printer, the laptop, the draft, the photos, the agenda, the receipt,
        the survey, the blueprint, the package, the ticket, the spreadsheet, the summary, the minutes,
        the translation, the travel plan, the figures, the password, the parking permit, the insurance form,
        the project plan, the training video, the customer list"""
    ),
    "topic": words(
        """the budget, the holiday, solar panels, the new website, public transport, the election, ancient history,
        the roof repair, machine learning, vegetable soup, the winter storm, football, the merger, rent control,
        chess openings, the moon landing, electric cars, tax law, the school play, coral reefs,
        the product launch, the hiring plan, jazz music, the delayed shipment, the leaking pipe, mountain birds,
        the broken elevator"""
    ),
    "event": words(
        """the meeting, the interview, the lunch, the dentist appointment, the workshop, the concert,
        the weekly call, the rehearsal, the inspection, the birthday party, the training, the board meeting,
        the delivery, the flight, the haircut, the budget review, the press briefing, the dinner, the wedding,
        the yoga class, the exam, the webinar"""
    ),
    "food": words(
        """pizza, green tea, black coffee, brown bread, fresh milk, orange juice, tomato soup, rice, noodles, apples,
        cheese, eggs, butter, chicken curry, salad, pancakes, lemons, olive oil, chocolate cake, sparkling water,
        honey, potatoes, mushrooms, salmon, garlic bread, vanilla ice cream, onions, strawberries, yogurt,
        dark chocolate"""
    ),
    "goods": words(
        """batteries, light bulbs, envelopes, pencils, paper towels, printer paper, garden chairs, winter coats,
        candles, umbrellas, notebooks, headphones, running shoes, coffee filters, plastic boxes, screws, towels,
        stamps, markers, water bottles, name badges, folding tables, dish soap, toothbrushes, tea cups,
        safety helmets"""
    ),
    "device": words(
        """the lights, the heating, the fan, the radio, the television, the alarm, the coffee machine,
        the dishwasher, the projector, the printer, the air conditioner, the lamp, the oven, the speaker,
        the washing machine, the camera, the screen, the sprinkler, the vacuum cleaner, the microphone"""
    ),
    "color": words(
        """red, blue, green, yellow, purple, orange, white, black, silver, pink, brown, golden, dark grey"""
    ),
    "music": words(
        """some jazz, soft piano music, the latest news, a podcast about history, classical guitar,
        my workout playlist, ocean sounds, folk songs, the evening radio show, opera, drum music,
        the album with the red cover, quiet music"""
    ),
    "vehicle": words(
        """taxi, train, bus, ferry, flight, rental car, bicycle, van, tram, night train, minibus, shuttle"""
    ),
    "adjective": words(
        """short, urgent, friendly, detailed, private, quick, polite, long, formal, final, monthly, second, careful,
        simple, honest, useful, strange, quiet, modern, heavy, cheap, empty, broken, perfect"""
    ),
    "want": words("i want to, i would like to, we need to, i have to, let's, we should, i'd like to, help me"),
    "reason": words(
        """because i am late, if there is time, as soon as possible, before the break, when you can,
        for the customer, without delay, and tell me the result, if nobody objects, until further notice,
        just this once, after the storm, and keep it short, like last time, if the weather is good,
        once the work is done"""
    ),
    "polite": words(
        """please, can you, could you, would you, could you please, okay now, i need you to, don't forget to, hey,
        quickly"""
    ),
    "when": words(
        """today, tomorrow, tonight, tomorrow morning, next week, this evening, this afternoon, next month,
        on {weekday}, next {weekday}, on {weekday} {half}, at {hour} {minute}, at {hour} o'clock,
        at half past {hour}, at quarter to {hour}, on {month} {ordinal}, on the {ordinal} of {month},
        in {few} days, in {few} weeks, in {number} minutes, before {weekday}, by the end of {month},
        around {hour} {half}, every {weekday}, at noon, at midnight, after {hour} o'clock"""
    ),
}

_NAMED_TEMPLATES = words(
    """{polite} call {name} {when}, {polite} send {thing} to {name} {when}, remind {name} about {event} {when},
    {want} ask {name} about {topic}, schedule {event} with {name} {when},
    move {event} with {name} to {weekday} {half}, cancel {event} with {name} and {name},
    {polite} email {team} about {topic} and copy {name}, tell {name} that {thing} is in {room},
    {polite} find the {adjective} letter from {name}, {want} book a {vehicle} from {name} to {city} {when},
    where is {name} going {when}, {name} from {team} needs {thing} {when}, what did {name} say about {topic},
    add {name} to the call {when}, invite {name} and {name} to {event} {when},
    {polite} forward the {adjective} message to {name}, open the file named {name} and read line {number},
    {polite} turn on {device} in the {name} building, {want} order {number} {goods} from {name},
    the street is called {name} and the house number is {number},
    write a {adjective} note to {name} about {topic}, {polite} pay {name} {number} dollars {when},
    {name} left {thing} near {place}, meet {name} at {place} {when}, is {name} free {when},
    {polite} book a table for {few} at the {name} restaurant {when},
    drive to {name} street and stop at {place}, {polite} change the password of {name} {when},
    {person} and {name} will bring {food}, ask doctor {name} whether {event} can start at {hour},
    play the new song by {name}, {polite} translate the {adjective} email from {name},
    {name} ordered {few} boxes of {goods} {when}, how far is {name} from {city},
    my flight to {name} leaves {when}, who is {name} and why is {thing} missing,
    {polite} print the {adjective} contract for {name} {reason},
    share {thing} with {name} but not with {name}, {name} lives at {number} {name} road,
    {polite} reserve {room} for {name} {when}, {want} visit {name} in {city} {when},
    put {thing} on the desk of {name} {reason}, the package for {name} arrives {when},
    {polite} let {name} know that {event} is cancelled, introduce {name} to {team} {when},
    give {name} the {color} folder {reason}, {name} will call you back {when},
    {polite} check whether {name} has signed the {adjective} form,
    search for hotels near {name} for {few} nights, text {name} that i will be {number} minutes late,
    {want} talk with {name} from {team} about {topic},
    the password for the {name} account is {digit} {digit} {digit} {digit},
    ask {name} to clean {room} {reason}, {polite} show me the weather in {name} {when},
    {person} wants {name} to repair {device}, start a video call with {name} and {person} {when},
    book {name} for {few} hours {when}, has {name} finished the {adjective} report about {topic},
    {polite} delete the message from {name} {reason}, {name} and {name} disagree about {topic},
    the {ordinal} speaker is {name} from {city}"""
)
_PLAIN_TEMPLATES = words(
    """{polite} turn on {device} in {room}, {polite} turn off {device} {when}, set a timer for {number} minutes,
    {want} order {few} bottles of {food} {reason}, schedule {event} {when}, {polite} cancel {event} {when},
    remind me to call {person} {when}, wake me up at {hour} {minute} {half},
    what is the weather in {city} {when}, {polite} play {music} in {room},
    add {food} and {food} to the shopping list, move {event} to {weekday} {half},
    {polite} email {team} about {topic} {reason}, book a {vehicle} to {city} {when},
    how do i get to {place} from {place}, {want} buy {number} {goods} {when},
    {polite} find {thing} and send it to {person}, read me the {adjective} news about {topic},
    paint {room} {color} and {color}, the meeting is on the {ordinal} of {month} at {hour} o'clock,
    {polite} call {person} {reason}, ask {team} for {thing} {when}, open {thing} and go to page {number},
    the code is {digit} {digit} {digit} {digit} {digit} {digit},
    {polite} write a {adjective} summary about {topic}, {person} will be at {place} {when},
    set {device} to {number} percent, is there a {vehicle} to {city} {when},
    {polite} print {number} copies of {thing}, where did {person} put the {color} umbrella,
    my number is {digit} {digit} {digit} {digit} {digit} {digit} {digit}, what time is it in {city},
    {want} learn more about {topic} {when}, dim {device} and close the door of {room},
    how many {goods} are left in {room}, {polite} move the {color} chairs to {room},
    pack {goods} and {goods} for the trip to {city}, {polite} reserve {room} {when} {reason},
    the {vehicle} from {city} is {number} minutes late, check the {adjective} email about {topic} {reason},
    {want} cook {food} with {food} {when}, {polite} bring {few} {color} boxes to {place},
    the price went from {number} to {number} dollars, tell {person} that {event} starts {when},
    skip this song and play {music}, pick up {person} from {place} {when},
    divide {number} by {few} and add {number}, {polite} lock {room} and switch off {device},
    the total is {few} hundred and {number} dollars, what is on my calendar {when},
    {polite} remind {team} about {event}, cut the {food} and heat the oven for {number} minutes,
    {person} sold {few} thousand {goods} in {month}, {polite} report the {adjective} noise near {place},
    the office on the {ordinal} floor is {adjective},
    we sold {number} percent more {goods} in {month} than in {month}, start recording and save it {reason}"""
)
_TEMPLATES: dict[bool, tuple[str, ...]] = {True: _NAMED_TEMPLATES, False: _PLAIN_TEMPLATES}
_SLOT = re.compile(r"\{(\w+)\}")


def _fill(template: str, rng: np.random.Generator, split: Split) -> Sentence:
    names: list[str] = []

    def slot(match: re.Match[str]) -> str:
        if match[1] != "name":
            return _SLOT.sub(slot, pick(rng, _SLOTS[match[1]]))
        names.append(invent_name(rng, split))
        return names[-1]

    return Sentence(_SLOT.sub(slot, template), tuple(names))


def compose(rng: np.random.Generator, split: Split) -> Sentence:
    """Draws one sentence of `split`, of 4 to 16 words; its names belong to `split` too."""
    named = bool(rng.random() < NAMED_SHARE)
    while True:
        sentence = _fill(pick(rng, _TEMPLATES[named]), rng, split)
        fits = MIN_WORDS <= len(sentence.text.split()) <= MAX_WORDS
        if fits and text_split(sentence.text) == split:
            return sentence


def sentences(seed: int, count: int, split: Split) -> Iterator[Sentence]:
    """Yields `count` sentences of `split`. The i-th depends on (`seed`, i) alone: a longer run extends a shorter."""
    for index in range(count):
        yield compose(np.random.default_rng([seed, index]), split)
