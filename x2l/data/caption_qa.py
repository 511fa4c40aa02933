"""Questions about a photo that its human captions answer, by stated rules.

Five people described the photo independently; a fact becomes an answer only when several of them state it and none
contradicts. Precision comes first: a photo that yields nothing is common. The rules, one function each:

- colour: two captions give a noun that occurs once in the photo the same colours, none gives others.
- count: three captions count the same number of dogs, or people; at most one counts fewer; nobody speaks of a crowd.
- animal, who, sport: the captions name one and the same kind.
- doing: two captions have the same main verb; the answer is one caption's own clause.
- wearing: two captions dress the only person in the same garment.
- holding, riding: two captions give the verb the same object.
- where, setting: two captions name the place with a preposition; words for indoors and outdoors do not meet.
- presence: "yes" when two captions name the thing; "no" when none names it or anything near it; half of each, thing by thing.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from x2l.data import caption_words as words
from x2l.data.prompts import phrasings

TOKEN = re.compile(r"[A-Za-z0-9](?:[\w-]|'(?!s\b))*|'s|[.,;:!?]")


class QA(NamedTuple):
    """A question and its answer; ``kind`` is the rule that made it, a key of ``RULES``."""

    kind: str
    question: str
    answer: str


class Fact(NamedTuple):
    """What a rule found: which phrasings to use, and what fills them."""

    phrasing: str
    slots: dict[str, str]


class Mention(NamedTuple):
    """A noun phrase: its noun, what the noun stands for, how many of it (None: not said), its colours, its span."""

    noun: str
    thing: str
    plural: bool
    number: int | None
    colours: tuple[str, ...]
    start: int
    end: int


def _nouns() -> tuple[dict[str, str], frozenset[str]]:
    """Noun -> thing, for people and animals (their lists alternate singular and plural) and objects; all plural nouns."""
    things = {noun: noun for noun in words.OBJECTS | words.HOLDABLE | words.GARMENTS}
    plural = {f"{noun}s" for noun in things} - words.PAIRED
    things |= {f"{noun}s": noun for noun in things}
    for thing, text in (words.PEOPLE | words.ANIMALS).items():
        things |= dict.fromkeys(text.split(), thing)
        plural |= set(text.split()[1::2])
    return things, frozenset(plural)


def _verb_forms() -> tuple[dict[str, str], dict[str, str]]:
    """-ing form -> base, and present tense ("runs", "run") -> base."""
    ing: dict[str, str] = {}
    present: dict[str, str] = {}
    for base in words.ACTIONS:
        if base in words.DOUBLING:
            stem = base + base[-1]
        elif base == "lie":
            stem = "ly"
        else:
            stem = base[:-1] if base.endswith("e") and not base.endswith("ee") else base
        ing[f"{stem}ing"] = base
        ending = "es" if re.search(r"(s|x|sh|ch|o)$", base) else "s"
        third = base[:-1] + "ies" if base == "fly" or base == "carry" else base + ending
        present |= {third: base, base: base}
    return ing, present


THINGS, PLURAL = _nouns()
ING, PRESENT = _verb_forms()
ING_OF = {base: form for form, base in ING.items()}
ACTORS = frozenset(words.PEOPLE | words.ANIMALS)
WHERE = {
    place: re.compile(rf"\b(?:{prepositions}) (?:(?!of |and |with |in |on )[a-z-]+ ){{0,3}}(?:{nouns})\b")
    for place, (nouns, prepositions, _) in words.PLACES.items()
}
PRESENCE = {  # thing -> words that name it; those and words near it
    thing: (frozenset(nouns.split()), frozenset(f"{nouns} {near}".split()))
    for thing, (_, nouns, near, _) in words.PRESENCE.items()
}
SPORTS = {name: re.compile(rf"\b(?:{pattern})") for name, pattern in words.SPORTS.items()}
PRONOUN = {"man": "he", "boy": "he", "woman": "she", "girl": "she"}


@dataclass
class Scene:
    """The captions of one photo, read once."""

    captions: list[list[str]]  # tokens as written
    rng: random.Random

    @cached_property
    def lower(self) -> list[list[str]]:
        return [[token.lower() for token in caption] for caption in self.captions]

    @cached_property
    def mentions(self) -> list[list[Mention]]:
        return [list(_mentions(tokens)) for tokens in self.lower]

    @cached_property
    def vocabulary(self) -> list[set[str]]:
        return [set(tokens) for tokens in self.lower]

    def support(self, nouns: frozenset[str]) -> int:
        """How many captions hold one of the words."""
        return sum(not nouns.isdisjoint(vocabulary) for vocabulary in self.vocabulary)

    def named(self, thing: str) -> list[Mention]:
        """Every mention of the thing."""
        return [mention for found in self.mentions for mention in found if mention.thing == thing]

    @cached_property
    def num_people(self) -> int | None:
        """The number of people, where the captions agree on it."""
        if any(token in words.CROWDS or _unknown_people(token) for tokens in self.lower for token in tokens):
            return None
        counts = [_count(found, frozenset(words.PEOPLE)) for found in self.mentions]
        return _agreed(counts, single=4)

    def num_animals(self, animal: str) -> int | None:
        """The number of dogs (or another animal), where the captions agree on it."""
        return _agreed([_count(found, frozenset([animal])) for found in self.mentions], single=3)

    @cached_property
    def person(self) -> str | None:
        """What the only person is called by most: man, woman, boy, girl, child, or person when they differ."""
        if self.num_people != 1:
            return None
        names = Counter(m.thing for found in self.mentions for m in found if m.thing in words.PEOPLE)
        specific = [name for name in ("man", "woman", "boy", "girl", "child", "baby") if names[name] >= 2]
        genders = {PRONOUN[name] for name in names if name in PRONOUN}
        if len(genders) > 1:
            return "person"
        return max(specific, key=lambda name: names[name]) if specific else "person"

    @cached_property
    def animals(self) -> list[str]:
        """Kinds of animals that any caption names."""
        return sorted({m.thing for found in self.mentions for m in found if m.thing in words.ANIMALS})

    @cached_property
    def subject(self) -> tuple[str, int] | None:
        """The only kind of actor and its number: ("dog", 2); None where people and animals meet, or are not counted."""
        people = any(m.thing in words.PEOPLE for found in self.mentions for m in found)
        if people and not self.animals and self.num_people:
            return (self.person or "person", self.num_people)
        if not people and len(self.animals) == 1 and (number := self.num_animals(self.animals[0])):
            return self.animals[0], number
        return None


def _mentions(tokens: list[str]) -> Iterator[Mention]:
    """Noun phrases of known nouns, left to right; nouns that only modify another noun are left out."""
    for i, noun in enumerate(tokens):
        following = tokens[i + 1] if i + 1 < len(tokens) else "."
        if noun not in THINGS or following in words.HEADS or (following in THINGS and THINGS[following] not in words.GARMENTS):
            continue
        start = i
        while start > 0 and i - start < 7 and _modifies(tokens, start - 1):
            start -= 1
        phrase = tokens[start:i]
        if set(phrase) & words.NOT_REAL:
            continue
        plural = noun in PLURAL or (noun == "people")
        determiner = tokens[start - 1] if start > 0 else ""
        if plural:
            number = next((words.NUMBERS[t] for t in [determiner, *phrase] if t in words.NUMBERS), None)
        else:
            number = 0 if determiner in ("the", "other") or "other" in phrase else 1
        colours = tuple(dict.fromkeys("gray" if t == "grey" else t for t in phrase if t in words.COLOURS))
        yield Mention(noun, THINGS[noun], plural, number, colours, max(0, start - 1), i + 1)


def _modifies(tokens: list[str], i: int) -> bool:
    """Whether the token can stand inside a noun phrase that reaches to its right."""
    token = tokens[i]
    if token in ("and", ","):
        return i > 0 and tokens[i - 1] in words.COLOURS and tokens[i + 1] in words.COLOURS
    known = token in words.BOUNDARY or token in words.ONE or token in words.NUMBERS or token in words.CROWDS
    return not known and token[0].isalnum() and token not in PLURAL and not (token in THINGS and token in words.PEOPLE)


def _unknown_people(token: str) -> bool:
    """Whether a word looks like a plural of people that no list knows ("photographers"), whom nobody has counted."""
    return token not in THINGS and token not in words.NOT_PEOPLE and token.endswith(("ers", "ors", "ists", "ants", "men"))


def _count(found: list[Mention], things: frozenset[str]) -> int | None:
    """How many of the things one caption counts; None when it names none, or a plural without a number."""
    counted = [mention for mention in found if mention.thing in things]
    if not counted or any(mention.number is None for mention in counted):
        return None
    if any(mention.plural for mention in counted) and len([m for m in counted if m.number]) > 1:
        return None  # "two dogs, one dog with a ball": parts of what is counted already
    return sum(mention.number or 0 for mention in counted) or 1  # "the dog" alone is one


def _agreed(counts: list[int | None], single: int) -> int | None:
    """The number that at least three captions give (``single`` for one) and that none exceeds, at most one below it."""
    votes = Counter(count for count in counts if count)
    if not votes:
        return None
    number, support = votes.most_common(1)[0]
    fewer = sum(votes[count] for count in votes if count < number)
    fits = max(votes) == number and fewer <= 1 and support >= (single if number == 1 else 3)
    return number if fits and number in words.NUMBER_NAMES else None


def _agreeing(options: list[str], at_least: int = 2) -> str | None:
    """The option that enough captions give, when none gives another."""
    votes = Counter(options)
    return options[0] if len(votes) == 1 and len(options) >= at_least else None


def colour(scene: Scene) -> Iterator[Fact]:
    """ "What colour is the dog?", for nouns that occur once."""
    things = {m.thing for found in scene.mentions for m in found if m.colours}
    for thing in sorted(things & (words.OBJECTS | set(words.ANIMALS))):
        if thing in words.ANIMALS and scene.num_animals(thing) != 1:
            continue
        named = scene.named(thing)
        once = all(sum(m.thing == thing for m in found) <= 1 for found in scene.mentions)
        if once and not any(m.plural for m in named) and (colours := _colours(named)):
            yield Fact("colour", {"thing": thing, "colour": colours})


def clothes_colour(scene: Scene) -> Iterator[Fact]:
    """ "What colour is the man's shirt?", for the only person in the photo."""
    if scene.person and not scene.animals:
        for garment in sorted({m.noun for found in scene.mentions for m in found} & words.GARMENTS):
            named = [m for m in scene.named(garment) if not m.plural]
            if colours := _colours(named):
                owner = f"the {scene.person}'s {garment}"
                yield Fact("colours" if garment in words.PAIRED else "colour", {"thing": owner[4:], "colour": colours})


def _colours(named: list[Mention]) -> str | None:
    return _agreeing([_join(m.colours) for m in named if m.colours])


def count(scene: Scene) -> Iterator[Fact]:
    """ "How many dogs are there?"; one is asked about half as often, so that it does not become the habit."""
    numbers = {animal: scene.num_animals(animal) for animal in scene.animals} | {"person": scene.num_people}
    for thing, number in numbers.items():
        if number and (number > 1 or scene.rng.random() < 0.5):
            yield Fact("count1" if number == 1 else "count", _counted(thing, number))


def animal(scene: Scene) -> Iterator[Fact]:
    """ "What animal is this?", where three captions name the only kind."""
    if len(scene.animals) == 1 and sum(any(m.thing in words.ANIMALS for m in found) for found in scene.mentions) >= 3:
        number = scene.num_animals(scene.animals[0])
        if number:
            yield Fact("animal", _counted(scene.animals[0], number))


def who(scene: Scene) -> Iterator[Fact]:
    """ "Who is in the photo?", where three captions call the only person the same, alone or with one animal."""
    if scene.person is None or scene.person == "person" or scene.support(frozenset(words.PEOPLE[scene.person].split())) < 3:
        return
    if not scene.animals:
        yield Fact("who", {"who": f"a {scene.person}"})
    elif len(scene.animals) == 1 and scene.num_animals(scene.animals[0]) == 1:
        yield Fact("who", {"who": f"a {scene.person} and {_a(scene.animals[0])}"})


def doing(scene: Scene) -> Iterator[Fact]:
    """ "What is the dog doing?", in the words of a caption whose main verb another caption shares."""
    if scene.subject is None:
        return
    thing, number = scene.subject
    clauses = [clause for i in range(len(scene.captions)) if (clause := _clause(scene, i, number > 1))]
    votes = Counter(verb for verb, _ in clauses)
    agreed = [text for verb, text in clauses if votes[verb] >= 2 and len(text.split()) <= 9]
    if agreed:
        text = scene.rng.choice(agreed)
        pronoun = "they" if number > 1 else PRONOUN.get(thing, "it" if thing in words.ANIMALS else "the " + thing)
        yield Fact("doing" if number == 1 else "doings", _counted(thing, number) | {"pronoun": pronoun, "doing": text})


def _clause(scene: Scene, i: int, plural: bool) -> tuple[str, str] | None:
    """The main verb of a caption, and its clause as "running through the grass"; None if the sentence is not that plain."""
    tokens, found = scene.lower[i], scene.mentions[i]
    if not found or found[0].start > 0 or found[0].plural != plural or found[0].thing not in ACTORS:
        return None
    at = found[0].end
    if tokens[at : at + 1] and tokens[at] in ("in", "with", "wearing"):
        span = tokens[at : at + 11]
        stops = [k for k, token in enumerate(span) if token in ("is", "are")]
        if not stops or set(span[: stops[0]]) & set(["who", "that", "which", "while", "as", ","]):
            return None
        at += stops[0]
    while at < len(tokens) and (tokens[at] in ("is", "are") or tokens[at].endswith("ly")) and tokens[at] not in PRESENT:
        at += 1
    if at >= len(tokens):
        return None
    base = ING.get(tokens[at]) or PRESENT.get(tokens[at])
    if base is None:
        return None
    tail = []
    for token, low in zip(scene.captions[i][at + 1 :], tokens[at + 1 :], strict=True):
        if low in ("while", "as", "whilst", "that", "which", "who", "and", ",", ".", ";", "!", "?", ":"):
            break
        tail.append(token)
    text = " ".join([ING_OF[base], *tail]).replace(" 's", "'s")
    return words.SAME_ACTION.get(base, base), text


def wearing(scene: Scene) -> Iterator[Fact]:
    """ "What is the man wearing?", for the only person."""
    if not scene.person or scene.animals:
        return
    worn = []
    for garment in sorted({m.noun for found in scene.mentions for m in found} & words.GARMENTS):
        named = scene.named(garment)
        if len({id(found) for found in scene.mentions if any(m.noun == garment for m in found)}) < 2:
            continue
        options = {_join(m.colours) for m in named if m.colours}
        if garment == "shirt" and len(options) != 1:
            continue  # "a shirt" says nothing
        phrase = " ".join([*options, garment]) if len(options) == 1 else garment
        worn.append(phrase if garment in words.PAIRED else _a(phrase))
    if worn:
        pronoun = PRONOUN.get(scene.person, "the " + scene.person)
        yield Fact("wearing", _counted(scene.person, 1) | {"pronoun": pronoun, "worn": _join(worn[:2])})


def holding(scene: Scene) -> Iterator[Fact]:
    """ "What is the man holding?", "What does the dog have in its mouth?"."""
    if scene.subject is None or scene.subject[1] > 1:
        return
    thing = scene.subject[0]
    if thing in words.PEOPLE:
        noun = _agreeing(_objects(scene, r"(?:holding|holds|carrying|carries)", words.HOLDABLE))
        phrasing = "holding"
    else:
        noun = _agreeing(
            _objects(scene, r"(?:with|holding|holds|carrying|carries|has)", words.HOLDABLE, r" in (?:its|his|her|the) mouth")
        )
        phrasing = "mouth"
    if noun:
        yield Fact(phrasing, _counted(thing, 1) | {"held": _a(noun)})


def riding(scene: Scene) -> Iterator[Fact]:
    """ "What is the man riding?"."""
    noun = _agreeing(_objects(scene, r"(?:riding|rides|ride)(?: on)?", words.RIDEABLE))
    if noun and scene.person:
        yield Fact("riding", _counted(scene.person, 1) | {"ridden": _a(noun)})


def _objects(scene: Scene, verb: str, nouns: frozenset[str], after: str = "") -> list[str]:
    """The noun that follows the verb as its object, in each caption that has one."""
    pattern = re.compile(rf"\b{verb} (?:a|an|the|his|her|its)((?: [a-z-]+){{1,3}}?){after or r'(?= [^a-z]| [a-z]+)'}")
    found = []
    for tokens in scene.lower:
        for match in pattern.finditer(" ".join(tokens)):
            phrase = (match[1] if after else _phrase(" ".join(tokens)[match.start(1) :])).split()
            if phrase and phrase[-1] in nouns:
                found.append({"bicycle": "bike", "racquet": "racket", "cellphone": "phone"}.get(phrase[-1], phrase[-1]))
    return found


def _phrase(text: str) -> str:
    """The words up to the end of the noun phrase that opens the text."""
    kept: list[str] = []
    for token in text.split():
        if (
            token in words.BOUNDARY
            or not token[0].isalpha()
            or token in ING
            or (kept and token in PRESENT and token not in THINGS)
        ):
            break
        kept.append(token)
    return " ".join(kept)


def where(scene: Scene) -> Iterator[Fact]:
    """ "Where is the dog?"."""
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


def setting(scene: Scene) -> Iterator[Fact]:
    """ "Is this indoors or outdoors?"; outdoors, the common case, is asked about less often."""
    outside, inside = scene.support(words.OUTDOORS), scene.support(words.INDOORS)
    if outside >= 2 and not inside and scene.rng.random() < 0.25:
        yield Fact("setting", {"setting": "outdoors"})
    elif inside >= 2 and not outside:
        yield Fact("setting", {"setting": "indoors"})


def sport(scene: Scene) -> Iterator[Fact]:
    """ "What sport is this?"."""
    texts = [" ".join(tokens) for tokens in scene.lower]
    named = {name: sum(bool(pattern.search(text)) for text in texts) for name, pattern in SPORTS.items()}
    named = {name: number for name, number in named.items() if number}
    if len(named) == 1 and max(named.values()) >= 3:
        yield Fact("sport", {"sport": next(iter(named))})


def presence(scene: Scene) -> Iterator[Fact]:
    """ "Is there a dog?"."""
    present = [thing for thing, (nouns, _) in PRESENCE.items() if scene.support(nouns) >= 2]
    if not present:
        return
    if scene.rng.random() < 0.5:
        thing, phrasing = scene.rng.choice(present), "yes"
    else:
        absent = [thing for thing, (_, near) in PRESENCE.items() if not scene.support(near)]
        if not absent:
            return
        thing, phrasing = scene.rng.choices(absent, [words.PRESENCE[thing][3] for thing in absent])[0], "no"
    yield Fact(phrasing, {"thing": words.PRESENCE[thing][0], "bare": thing})


RULES: dict[str, Callable[[Scene], Iterator[Fact]]] = {
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


def question_answers(captions: list[str], rng: random.Random, num_pairs: int) -> list[QA]:
    """Up to ``num_pairs`` questions of different kinds about a photo, in random order.

    Args:
        captions: independent English descriptions of one photo; five are usual, fewer yield fewer facts.
        rng: chooses rules, facts and phrasings; the same seed gives the same pairs.
    """
    scene = Scene([TOKEN.findall(caption) for caption in captions], rng)
    kinds = list(RULES)
    rng.shuffle(kinds)
    pairs: list[QA] = []
    for kind in kinds:
        facts = list(RULES[kind](scene)) if len(pairs) < num_pairs else []
        if facts:
            fact = rng.choice(facts)
            questions, answers = phrasings("qa", "en")[fact.phrasing]
            answer = rng.choice(answers).format(**fact.slots)
            pairs.append(QA(kind, rng.choice(questions).format(**fact.slots), answer[0].upper() + answer[1:]))
    return pairs


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
