"""Text normalisation before error rates: named options, named presets, a version that is stored with every score.

An error rate without its normaliser is no number: punctuation, digits and fillers alone move it by points.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

VERSION = "x2l-1"  # raise it whenever any output changes

LATIN = "A-Za-z\u00c0-\u024f"
FILLERS = {
    "en": ("uh", "uhh", "um", "umm", "eh", "er", "erm", "ah", "hm", "hmm", "mm", "mhm", "huh"),
    "zh": tuple("呃啊嗯哦唉诶"),
}
# Before and after these, 儿 is a syllable of its own rather than a colouring of the one before.
OWN_SYLLABLE = [f"{char}儿" for char in "女婴幼孤胎少小健育产弃宠男患娃生侄孙"]
OWN_SYLLABLE += [f"儿{char}" for char in "子女童科歌媳孙时戏"]
_OWN_SYLLABLE = re.compile("|".join(OWN_SYLLABLE) + "|儿")


@dataclass(frozen=True)
class Normalizer:
    """A callable text -> text; what each option does is applied in the order of the fields.

    Attributes:
        language: ``en`` or ``zh``; decides how numbers are read, and which fillers there are.
        width: NFKC, so that full-width letters, digits and punctuation become plain ones.
        case: lower case.
        script: ``simplified``, ``traditional`` or None for as it is (by OpenCC).
        numbers: digits to words or hanzi, as they are spoken; 2023年 and long numbers digit by digit.
        punctuation: removed; an apostrophe between letters stays, a hyphen becomes a space.
        fillers: hesitations (uh, 呃) removed.
        erhua: the 儿 of retroflex endings removed, kept in words such as 女儿.
    """

    language: str
    width: bool = True
    case: bool = True
    script: str | None = None
    numbers: bool = True
    punctuation: bool = True
    fillers: bool = False
    erhua: bool = False

    def __post_init__(self) -> None:
        if self.language not in FILLERS:
            raise ValueError(f"unknown language {self.language!r}: use one of {sorted(FILLERS)}")
        if self.script not in (None, "simplified", "traditional"):
            raise ValueError(f"unknown script {self.script!r}: use simplified or traditional, or leave it out")

    @property
    def name(self) -> str:
        """What is stored beside a score: version, language and the options that are on."""
        options = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "language"}
        on = [name if value is True else f"{name}={value}" for name, value in options.items() if value]
        return f"{VERSION}:{self.language}:{'+'.join(on)}"

    def __call__(self, text: str) -> str:
        if self.width:
            text = unicodedata.normalize("NFKC", text)
        if self.case:
            text = text.lower()
        if self.script is not None:
            text = _opencc(self.script).convert(text)
        if self.numbers:
            text = _numbers_zh(text) if self.language == "zh" else _numbers_en(text)
        if self.punctuation:
            text = _strip_punctuation(text)
        if self.fillers:
            text = _strip_fillers(text, self.language)
        if self.erhua:
            text = _OWN_SYLLABLE.sub(lambda match: "" if match[0] == "儿" else match[0], text)
        return " ".join(text.split())


# Named settings: wenet-like leaves digits as they are; speechio-like drops fillers and erhua, as its leaderboard does.
PRESETS = {
    "en": Normalizer("en"),
    "zh": Normalizer("zh"),
    "wenet-like": Normalizer("zh", numbers=False),
    "speechio-like": Normalizer("zh", script="simplified", fillers=True, erhua=True),
}


def preset(name: str) -> Normalizer:
    """The normaliser of a name.

    Raises:
        ValueError: no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown normaliser {name!r}: use one of {sorted(PRESETS)}")
    return PRESETS[name]


def _strip_punctuation(text: str) -> str:
    text = re.sub(rf"(?<=[{LATIN}])[’'](?=[{LATIN}])", "\0", text)  # an apostrophe inside a word is part of it
    kept = (" " if unicodedata.category(char)[0] in "PS" else char for char in text)
    return "".join(kept).replace("\0", "'")


def _strip_fillers(text: str, language: str) -> str:
    if language == "zh":
        return re.sub(f"[{''.join(FILLERS['zh'])}]", "", text)
    return " ".join(word for word in text.split() if word not in FILLERS["en"])


def _numbers_zh(text: str) -> str:
    text = re.sub(r"(?<![0-9.])([0-9]{4})(?=年)", lambda m: _digits_zh(m[1]), text)
    text = re.sub(r"([0-9]+(?:\.[0-9]+)?)%", lambda m: "百分之" + _number_zh(m[1]), text)
    return re.sub(r"[0-9]+(?:\.[0-9]+)?", lambda m: _number_zh(m[0]), text)


def _number_zh(number: str) -> str:
    whole, _, fraction = number.partition(".")
    spoken = _digits_zh(whole) if len(whole) > 8 or (whole[0] == "0" and len(whole) > 1) else _an2cn(whole)
    return f"{spoken}点{_digits_zh(fraction)}" if fraction else spoken


def _digits_zh(digits: str) -> str:
    return "".join("零一二三四五六七八九"[int(digit)] for digit in digits)


def _an2cn(number: str) -> str:
    import cn2an

    return str(cn2an.an2cn(number, "low"))


def _numbers_en(text: str) -> str:
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text)
    text = re.sub(r"(?<=[0-9])\s*%", " percent", text)
    return re.sub(r"[0-9]+(?:st|nd|rd|th)\b|[0-9]+(?:\.[0-9]+)?", lambda m: f" {_number_en(m[0])} ", text)


def _number_en(number: str) -> str:
    engine = _inflect()
    long = len(number.partition(".")[0]) > 8 or re.match(r"0[0-9]", number)
    words: Any = engine.number_to_words(number, group=1) if long else engine.number_to_words(number, andword="")
    return re.sub(r"[,\s-]+", " ", str(words))


@cache
def _inflect() -> Any:
    import inflect

    return inflect.engine()


@cache
def _opencc(script: str) -> Any:
    try:
        import opencc
    except ImportError as error:
        raise ValueError(f"script={script!r} needs OpenCC: pip install opencc") from error
    return opencc.OpenCC("t2s" if script == "simplified" else "s2t")
