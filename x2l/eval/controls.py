"""Control conditions: the same questions with the image, sound or video swapped, blanked or taken away.

A score that does not fall under a control was not earned by looking; ``typed`` alone makes a question easier.
"""

from __future__ import annotations

import io
import wave
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from PIL import Image

from x2l.types import Message, Part, Sample

Key = Callable[[Part], str]  # the identity of a media part, e.g. the sha256 of its bytes


def derangement(groups: Sequence[str], seed: int) -> list[int]:
    """A permutation that sends every position to one of another group; the same seed gives the same one.

    Raises:
        ValueError: one group holds more than half of all positions, so none exists.
    """
    size, counts = len(groups), Counter(groups)
    name, largest = counts.most_common(1)[0] if groups else ("", 0)
    if size < 2 or 2 * largest > size:
        raise ValueError(f"{largest} of {size} samples are alike in what is to be exchanged ({name[:80]!r}): at most half may be")
    generator = np.random.default_rng(seed)
    names = sorted(counts)
    rank = dict(zip(names, generator.permutation(len(names)).tolist(), strict=True))
    # Equal groups stand together; a rotation by the largest group's size leaves none in its own group.
    ranked = sorted(generator.permutation(size).tolist(), key=lambda i: rank[groups[i]])
    source = [0] * size
    for position, index in enumerate(ranked):
        source[index] = ranked[(position + largest) % size]
    return source


def wrong_image(samples: Sequence[Sample], key: Key, seed: int, modality: str = "image") -> list[Sample]:
    """Every sample with the images of another sample, never with the same ones.

    Raises:
        ValueError: the samples do not all hold the same number of images, or too many share one.
    """
    return _exchange(samples, ["|".join(map(key, parts)) for parts in _media(samples, modality)], seed, modality)


def wrong_speech(samples: Sequence[Sample], key: Key, seed: int) -> list[Sample]:
    """Every sample with the recording of another question, by ``sample.meta["typed"]`` where it says what is asked: two voices may
    ask the same.

    Raises:
        ValueError: the samples do not all hold the same number of recordings, or too many ask the same.
    """
    asked = zip(samples, _media(samples, "speech"), strict=True)
    return _exchange(samples, [sample.meta.get("typed") or "|".join(map(key, parts)) for sample, parts in asked], seed, "speech")


def blank(samples: Sequence[Sample], key: Key, seed: int, modality: str = "image") -> list[Sample]:
    """Every image replaced by a plain mid-grey one."""
    buffer = io.BytesIO()
    Image.new("RGB", (224, 224), (128, 128, 128)).save(buffer, "PNG")
    grey = Part(modality, bytes=buffer.getvalue())
    return [_swap(sample, modality, [grey for p in sample.media if p.type == modality]) for sample in samples]


def no_image(samples: Sequence[Sample], key: Key, seed: int, modality: str = "image") -> list[Sample]:
    """Every image taken away."""
    return [_swap(sample, modality, []) for sample in samples]


def wrong_sound(samples: Sequence[Sample], key: Key, seed: int, modality: str = "audio") -> list[Sample]:
    """Every sample with the sound of another class, classes being told by the first reference.

    Raises:
        ValueError: one class holds more than half of the samples.
    """
    return _exchange(samples, [sample.meta["references"][0] for sample in samples], seed, modality)


def silence(samples: Sequence[Sample], key: Key, seed: int, modality: str = "audio") -> list[Sample]:
    """Every sound replaced by five seconds of digital silence."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as out:
        out.setparams((1, 2, 16_000, 0, "NONE", ""))
        out.writeframes(bytes(2 * 5 * 16_000))
    nothing = Part(modality, bytes=buffer.getvalue())
    return [_swap(sample, modality, [nothing for p in sample.media if p.type == modality]) for sample in samples]


def typed(samples: Sequence[Sample], key: Key, seed: int) -> list[Sample]:
    """Every spoken question in writing, as ``sample.meta["typed"]`` has it: the same, with nothing to hear.

    Raises:
        ValueError: a sample says not what is asked in it.
    """
    if unknown := [sample.id for sample in samples if "typed" not in sample.meta]:
        raise ValueError(f"control typed needs spoken questions whose words are known; {unknown[0]} is none")
    return [_swap(sample, "speech", [Part("text", text=sample.meta["typed"])]) for sample in samples]


CONTROLS: dict[str, Callable[..., list[Sample]]] = {
    "wrong-image": wrong_image,
    "blank": blank,
    "no-image": no_image,
    "wrong-sound": wrong_sound,
    "silence": silence,
    "wrong-video": partial(wrong_image, modality="video"),
    "wrong-speech": wrong_speech,
    "typed": typed,
}


def _media(samples: Sequence[Sample], modality: str) -> list[list[Part]]:
    return [[part for part in sample.media if part.type == modality] for sample in samples]


def _exchange(samples: Sequence[Sample], groups: Sequence[str], seed: int, modality: str) -> list[Sample]:
    """Each sample with the media of one of another group."""
    media = _media(samples, modality)
    numbers = {len(parts) for parts in media}
    if len(numbers) != 1 or 0 in numbers:
        raise ValueError(f"wrong-{modality} needs one number of {modality} parts in all samples, got {sorted(numbers)}")
    return [_swap(sample, modality, media[j]) for sample, j in zip(samples, derangement(groups, seed), strict=True)]


def _swap(sample: Sample, modality: str, new: list[Part]) -> Sample:
    """Replace the parts of one modality in reading order; an empty list removes them."""
    fresh = iter(new)
    messages = []
    for message in sample.messages:
        content = [next(fresh, None) if part.type == modality else part for part in message.content]
        messages.append(Message(message.role, tuple(part for part in content if part is not None)))
    return replace(sample, messages=tuple(messages))
