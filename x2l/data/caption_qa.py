"""Questions about a photo that its human captions answer, by stated rules.

Five people described the photo independently; a fact becomes an answer only when several of them state it and none
contradicts. Precision comes first: a photo that yields nothing is common. The rules, one function each:

- colour: two captions give a noun that occurs once in the photo the same colours, none gives others.
- count: three captions count the same number of dogs, or people; at most one counts fewer; nobody speaks of a crowd or,
  for people, of a busy place.
- animal, who, sport: the captions name one and the same kind.
- doing: two captions have the same main verb; the answer is one caption's own clause.
- wearing: two captions dress the only person in the same garment.
- holding, riding: two captions give the verb the same object.
- where, setting: two captions name the place with a preposition; words for indoors and outdoors do not meet.
- presence: "yes" when two captions name the thing; "no" when none names it or comes near it; half of each, thing by thing.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from x2l.data import caption_words as words
from x2l.data.caption_scene import ACTORS, PRONOUN, TOKEN, Mention, Scene
from x2l.data.prompts import phrasings


class QA(NamedTuple):
    """A question and its answer; ``kind`` is the rule that made it, a key of ``RULES``."""

    kind: str
    question: str
    answer: str


class Fact(NamedTuple):
    """What a rule found: which phrasings to use, and what fills them."""

    phrasing: str
    slots: dict[str, str]


Wanted = Callable[[str], bool]

WHERE = {
    place: re.compile(rf"\b(?:{prepositions}) (?:(?!of |and |with |in |on )[a-z-]+ ){{0,3}}(?:{nouns})\b")
    for place, (nouns, prepositions, _) in words.PLACES.items()
}
PRESENCE = {  # thing -> words that name it; those and words near it
    thing: (frozenset(nouns.split()), frozenset(f"{nouns} {near}".split())) for thing, (_, nouns, near, _) in words.PRESENCE.items()
}
SPORTS = {name: re.compile(rf"\b(?:{pattern})") for name, pattern in words.SPORTS.items()}


def _agreeing(options: list[str], at_least: int = 2) -> str | None:
    """The option that enough captions give, when none gives another."""
    votes = Counter(options)
    return options[0] if len(votes) == 1 and len(options) >= at_least else None


def colour(scene: Scene, rng: random.Random) -> Iterator[Fact]:
    """Ask "What colour is the dog?", for nouns that occur once."""
    things = {m.thing for found in scene.mentions for m in found if m.colours}
    for thing in sorted(things & (words.OBJECTS | set(words.ANIMALS))):
        if thing in words.ANIMALS and scene.num_animals(thing) != 1:
            continue
        named = scene.named(thing)
        once = all(sum(m.thing == thing for m in found) <= 1 for found in scene.mentions)
        if once and not any(m.plural for m in named) and (colours := _colours(named)):
            yield Fact("colour", {"thing": thing, "colour": colours})


def clothes_colour(scene: Scene, rng: random.Random) -> Iterator[Fact]:
    """Ask "What colour is the man's shirt?", for the only person in the photo."""
    if scene.person and not scene.animals:
        for garment in sorted({m.noun for found in scene.mentions for m in found} & words.GARMENTS):
            named = [m for m in scene.named(garment) if not m.plural]
            if colours := _colours(named):
                owner = f"the {scene.person}'s {garment}"
                yield Fact("colours" if garment in words.PAIRED else "colour", {"thing": owner[4:], "colour": colours})


def _colours(named: list[Mention]) -> str | None:
    return _agreeing([_join(m.colours) for m in named if m.colours])


def count(scene: Scene, rng: random.Random) -> Iterator[Fact]:
    """Ask "How many dogs are there?"; one is asked about half as often, so that it does not become the habit."""
    numbers = {animal: scene.num_animals(animal) for animal in scene.animals}
    if not scene.support(words.BUSY):
        numbers["person"] = scene.num_people
    for thing, number in numbers.items():
        if number and (number > 1 or rng.random() < 0.5):
            yield Fact("count1" if number == 1 else "count", _counted(thing, number))


def animal(scene: Scene, rng: random.Random) -> Iterator[Fact]:
    """Ask "What animal is this?", where three captions name the only kind."""
    if len(scene.animals) == 1 and sum(any(m.thing in words.ANIMALS for m in found) for found in scene.mentions) >= 3:
        number = scene.num_animals(scene.animals[0])
        if number:
            yield Fact("animal", _counted(scene.animals[0], number))


def who(scene: Scene, rng: random.Random) -> Iterator[Fact]:
    """Ask "Who is in the photo?", where three captions call the only person the same, alone or with one animal."""
    if scene.person is None or scene.person == "person" or scene.support(frozenset(words.PEOPLE[scene.person].split())) < 3:
        return
    if not scene.animals:
        yield Fact("who", {"who": f"a {scene.person}"})
    elif len(scene.animals) == 1 and scene.num_animals(scene.animals[0]) == 1:
        yield Fact("who", {"who": f"a {scene.person} and {_a(scene.animals[0])}"})


def doing(scene: Scene, rng: random.Random) -> Iterator[Fact]:
    """Ask "What is the dog doing?", in the words of a caption whose main verb another caption shares."""
    if scene.subject is None:
        return
    thing, number = scene.subject
    clauses = [clause for i in range(len(scene.captions)) if (clause := scene.clause(i, number > 1))]
    votes = Counter(verb for verb, _ in clauses)
    agreed = [text for verb, text in clauses if votes[verb] >= 2 and len(text.split()) <= 9]
    if agreed:
        text = rng.choice(agreed)
        pronoun = "they" if number > 1 else PRONOUN.get(thing, "it" if thing in words.ANIMALS else "the " + thing)
        yield Fact("doing" if number == 1 else "doings", _counted(thing, number) | {"pronoun": pronoun, "doing": text})


def wearing(scene: Scene, rng: random.Random) -> Iterator[Fact]:
    """Ask "What is the man wearing?", for the only person."""
    if not scene.person or scene.animals:
        return
    worn = []
    for garment in sorted({m.noun for found in scene.mentions for m in found} & words.GARMENTS):
        named = scene.named(garment)
        if len({id(found) for found in scene.mentions if any(m.noun == garment for m in found)}) < 2:
            continue
        options = {_join(m.colours) for m in named if m.colours}
        if (garment == "shirt" and len(options) != 1) or (garment == "glasses" and scene.named("sunglasses")):
            continue  # "a shirt" says nothing; the same glasses under two names
        phrase = " ".join([*options, garment]) if len(options) == 1 else garment
        worn.append(phrase if garment in words.PAIRED else _a(phrase))
    if worn:
        pronoun = PRONOUN.get(scene.person, "the " + scene.person)
        yield Fact("wearing", _counted(scene.person, 1) | {"pronoun": pronoun, "worn": _join(worn[:2])})


def holding(scene: Scene, rng: random.Random) -> Iterator[Fact]:
    """Ask "What is the man holding?", "What does the dog have in its mouth?"."""
    if scene.subject is None or scene.subject[1] > 1:
        return
    thing = scene.subject[0]
    if thing in words.PEOPLE:
        noun = _agreeing(scene.objects(r"(?:holding|holds|carrying|carries)", words.HOLDABLE))
        phrasing = "holding"
    else:
        noun = _agreeing(
            scene.objects(r"(?:with|holding|holds|carrying|carries|has)", words.HOLDABLE, r" in (?:its|his|her|the) mouth")
        )
        phrasing = "mouth"
    if noun:
        yield Fact(phrasing, _counted(thing, 1) | {"held": _a(noun)})


def riding(scene: Scene, rng: random.Random) -> Iterator[Fact]:
    """Ask "What is the man riding?"."""
    noun = _agreeing(scene.objects(r"(?:riding|rides|ride)(?: on)?", words.RIDEABLE))
    if noun and scene.person:
        yield Fact("riding", _counted(scene.person, 1) | {"ridden": _a(noun)})


def where(scene: Scene, rng: random.Random) -> Iterator[Fact]:
    """Ask "Where is the dog?"."""
    if scene.subject is None:
        return
    texts = [" ".join(tokens) for tokens in scene.lower]
    votes = {place: sum(bool(pattern.search(text)) for text in texts) for place, pattern in WHERE.items()}
    for broad, narrow in words.NARROWER.items():
        if any(votes[place] for place in narrow):
            votes[broad] = 0
    best = max(votes, key=lambda place: votes[place])
    if votes[best] >= 2:
        thing, number = scene.subject
        yield Fact("where" if number == 1 else "wheres", _counted(thing, number) | {"where": words.PLACES[best][2]})


def setting(scene: Scene, rng: random.Random) -> Iterator[Fact]:
    """Ask "Is this indoors or outdoors?"; outdoors, the common case, is asked about less often."""
    outside, inside = scene.support(words.OUTDOORS), scene.support(words.INDOORS)
    if outside >= 2 and not inside and rng.random() < 0.25:
        yield Fact("setting", {"setting": "outdoors"})
    elif inside >= 2 and not outside:
        yield Fact("setting", {"setting": "indoors"})


def sport(scene: Scene, rng: random.Random) -> Iterator[Fact]:
    """Ask "What sport is this?"."""
    texts = [" ".join(tokens) for tokens in scene.lower]
    named = {name: sum(bool(pattern.search(text)) for text in texts) for name, pattern in SPORTS.items()}
    named = {name: number for name, number in named.items() if number}
    if len(named) == 1 and max(named.values()) >= 3:
        yield Fact("sport", {"sport": next(iter(named))})


def presence(scene: Scene, rng: random.Random) -> Iterator[Fact]:
    """Ask "Is there a dog?"."""
    present = [thing for thing, (nouns, _) in PRESENCE.items() if scene.support(nouns) >= 2]
    if not present:
        return
    if rng.random() < 0.5:
        thing, phrasing = rng.choice(present), "yes"
    else:
        absent = _absent(scene)
        if not absent:
            return
        thing, phrasing = rng.choices(absent, [words.PRESENCE[thing][3] for thing in absent])[0], "no"
    yield Fact(phrasing, {"thing": words.PRESENCE[thing][0], "bare": thing})


def _absent(scene: Scene) -> list[str]:
    """Things that no caption comes near; people only where nearly every caption names an actor that the lists know."""
    known = sum(any(m.thing in ACTORS for m in found) for found in scene.mentions) >= len(scene.captions) - 1
    things = [thing for thing in PRESENCE if known or thing not in words.PEOPLE]
    return [thing for thing in things if not scene.support(PRESENCE[thing][1])]


RULES: dict[str, Callable[[Scene, random.Random], Iterator[Fact]]] = {
    "colour": colour,
    "clothes colour": clothes_colour,
    "count": count,
    "animal": animal,
    "who": who,
    "doing": doing,
    "wearing": wearing,
    "holding": holding,
    "riding": riding,
    "where": where,
    "setting": setting,
    "sport": sport,
    "presence": presence,
}


def question_answers(captions: list[str], rng: random.Random, num_pairs: int, may_ask: Wanted = lambda question: True) -> list[QA]:
    """Up to ``num_pairs`` questions of different kinds about a photo, in random order.

    Args:
        captions: independent English descriptions of one photo; five are usual, fewer yield fewer facts.
        rng: chooses rules, facts and phrasings; the same seed gives the same pairs.
        may_ask: which questions are wanted; a fact is asked about in a phrasing of these, or not at all.
    """
    scene = Scene([TOKEN.findall(caption) for caption in captions])
    kinds = list(RULES)
    rng.shuffle(kinds)
    pairs: list[QA] = []
    for kind in kinds:
        facts = list(RULES[kind](scene, rng)) if len(pairs) < num_pairs else []
        if facts:
            fact = rng.choice(facts)
            questions, answers = phrasings("qa", "en")[fact.phrasing]
            answer = rng.choice(answers).format(**fact.slots)
            if wanted := asked(questions, fact, may_ask):
                pairs.append(QA(kind, rng.choice(wanted), answer[0].upper() + answer[1:]))
    return pairs


def asked(questions: Sequence[str], fact: Fact, may_ask: Wanted) -> list[str]:
    """The wanted ones of a fact's questions."""
    return [text for question in questions if may_ask(text := question.format(**fact.slots))]


def _counted(thing: str, number: int) -> dict[str, str]:
    plural = {"person": "people", "man": "men", "woman": "women", "child": "children", "baby": "babies", "sheep": "sheep"}
    things = plural.get(thing, thing + "s")
    name = words.NUMBER_NAMES[number]
    return {
        "thing": thing,
        "things": things,
        "number": name,
        "counted": _a(thing) if number == 1 else f"{name} {things}",
        "actors": f"the {thing}" if number == 1 else f"the {things}",
    }


def _a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" and not noun.startswith("uni") else "a ") + noun


def _join(items: list[str] | tuple[str, ...]) -> str:
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
