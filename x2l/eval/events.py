"""Audio events: which class of sound an answer names.

The model is asked openly and answers in a sentence; it is right when that names the class of the recording and no other
class of the set.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

FUNCTION_WORDS = frozenset("a an the of is in".split())


def read_answer(text: str, classes: Sequence[str]) -> str:
    """The one class all of whose content words stand in the answer, or ``""`` where none or several do.

    A Chinese class is named where it stands in the answer as it is.
    """
    said = set(re.findall(r"[a-z]+", text.lower()))
    named = [name for name in classes if (words := _words(name)) <= said and (words or name in text)]
    return named[0] if len(named) == 1 else ""


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z]+", name.lower())) - FUNCTION_WORDS
