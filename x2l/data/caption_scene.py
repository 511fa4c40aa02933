"""What several captions of one photo say: noun phrases, numbers, main verbs, read with a small lexicon and no parser."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from x2l.data import caption_words as words

TOKEN = re.compile(r"[A-Za-z0-9](?:[\w-]|'(?!s\b))*|'s|[.,;:!?]")


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
CLAUSE_END = frozenset(["who", "that", "which", "while", "whilst", "as", ",", ".", ";", ":", "!", "?"])
ACTORS = frozenset(words.PEOPLE | words.ANIMALS)
PRONOUN = {"man": "he", "boy": "he", "woman": "she", "girl": "she"}


@dataclass
class Scene:
    """The captions of one photo, read once."""

    captions: list[list[str]]  # tokens as written

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

    def clause(self, i: int, plural: bool) -> tuple[str, str] | None:
        """The main verb of a caption, and its clause as "running through the grass"; None if the sentence is not that plain."""
        tokens, found = self.lower[i], self.mentions[i]
        if not found or found[0].start > 0 or found[0].plural != plural or found[0].thing not in ACTORS:
            return None
        at = found[0].end
        if tokens[at : at + 1] and tokens[at] in ("in", "with", "wearing"):
            span = tokens[at : at + 11]
            stops = [k for k, token in enumerate(span) if token in ("is", "are")]
            if not stops or not CLAUSE_END.isdisjoint(span[: stops[0]]):
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
        for token, low in zip(self.captions[i][at + 1 :], tokens[at + 1 :], strict=True):
            if low in CLAUSE_END or low == "and":
                break
            tail.append(token)
        text = " ".join([ING_OF[base], *tail]).replace(" 's", "'s")
        return words.SAME_ACTION.get(base, base), text

    def objects(self, verb: str, nouns: frozenset[str], after: str = "") -> list[str]:
        """The noun that follows the verb as its object, in each caption that has one."""
        pattern = re.compile(rf"\b{verb} (?:a|an|the|his|her|its)((?: [a-z-]+){{1,3}}?){after or r'(?= [^a-z]| [a-z]+)'}")
        found = []
        for tokens in self.lower:
            for match in pattern.finditer(" ".join(tokens)):
                phrase = (match[1] if after else _phrase(" ".join(tokens)[match.start(1) :])).split()
                if phrase and phrase[-1] in nouns:
                    found.append({"bicycle": "bike", "racquet": "racket", "cellphone": "phone"}.get(phrase[-1], phrase[-1]))
        return found


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
    return not known and token[0].isalnum() and token not in PLURAL and token not in words.PEOPLE


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


def _phrase(text: str) -> str:
    """The words up to the end of the noun phrase that opens the text."""
    kept: list[str] = []
    for token in text.split():
        verb = token in ING or (kept and token in PRESENT and token not in THINGS)
        if verb or token in words.BOUNDARY or not token[0].isalpha():
            break
        kept.append(token)
    return " ".join(kept)
