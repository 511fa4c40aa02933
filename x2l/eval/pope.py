"""Hallucination in the manner of POPE (Li et al., 2023): "Is there a dog in the image?", yes or no in equal numbers.

POPE asks about COCO's annotated objects. Here the objects are those that five Flickr8k captions name: "yes" where two
captions or more name the object, "no" where none names it or anything it could be mistaken for. Nobody names
everything that he sees, so a few "no" are wrong in truth: compare systems on this set, not with POPE's own numbers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from x2l.eval.metrics import caption_tokens

# object -> (the words that name it, further words that make its absence doubtful). Scenery that people see but leave
# unsaid (trees, sky) is not asked about, nor the camera that they smile at.
OBJECTS: dict[str, tuple[str, str]] = {
    "dog": ("dog dogs puppy puppies", "animal animals terrier retriever poodle greyhound hound collie labrador pup"),
    "cat": ("cat cats kitten kittens", "animal animals"),
    "horse": ("horse horses pony ponies", "animal animals cowboy rodeo jockey polo"),
    "bird": ("bird birds seagull seagulls duck ducks pigeon pigeons", "animal animals goose geese"),
    "child": ("child children boy boys girl girls kid kids toddler baby", "people family crowd person students"),
    "woman": ("woman women lady ladies", "people person couple crowd family group girl girls bride players"),
    "man": ("man men guy guys gentleman", "people person couple crowd family group boy boys player players he his"),
    "ball": ("ball balls football basketball baseball", "soccer tennis volleyball toy toys game player players"),
    "frisbee": ("frisbee frisbees", "disc disk toy toys"),
    "bicycle": ("bicycle bicycles bike bikes", "cyclist cyclists biker bikers bmx rider motorbike motorcycle biking"),
    "motorcycle": ("motorcycle motorcycles motorbike dirtbike", "bike bikes biker motocross rider atv dirt racer race"),
    "car": ("car cars suv jeep", "vehicle vehicles traffic truck taxi van street road race"),
    "boat": ("boat boats canoe kayak raft", "ship water kayaker canoeing kayaking rafting sail"),
    "skateboard": ("skateboard skateboards", "skateboarder skateboarding skater board ramp skateboarders"),
    "snowboard": ("snowboard snowboards", "snowboarder snowboarding board ski skis skier snow"),
    "surfboard": ("surfboard surfboards", "surfer surfing surf board wave waves"),
    "hat": ("hat hats cap caps", "helmet hood headdress cowboy"),
    "helmet": ("helmet helmets", "hat cap biker rider cyclist racer football hockey climber"),
    "umbrella": ("umbrella umbrellas", "parasol rain shade"),
    "bench": ("bench benches", "seat seats chair sitting sits sit"),
    "chair": ("chair chairs armchair", "seat seats sofa couch bench sitting sits sit table"),
    "snow": ("snow", "snowy ski skis skiing sled ice winter snowboard snowboarder mountain"),
    "grass": ("grass", "grassy field lawn yard park meadow outside outdoors garden green hill soccer football baseball track"),
    "beach": ("beach beaches", "sand sandy ocean sea shore water surf surfer coast wave waves"),
    "rope": ("rope ropes", "leash climber climbing climbs string swing cord"),
    "guitar": ("guitar guitars", "musician musicians instrument band music"),
}  # fmt: skip
_NAMES = {name: frozenset(words.split()) for name, (words, _) in OBJECTS.items()}
_NEAR = {name: frozenset((words + " " + near).split()) for name, (words, near) in OBJECTS.items()}


def named(captions: Sequence[str]) -> tuple[set[str], set[str]]:
    """The objects that two captions or more name, and those of whose absence the captions leave no doubt."""
    tokens = [set(caption_tokens(caption)) for caption in captions]
    everything = set().union(*tokens)
    present = {name for name, words in _NAMES.items() if sum(bool(words & found) for found in tokens) >= 2}
    return present, {name for name, words in _NEAR.items() if not words & everything}


class Question(NamedTuple):
    """A yes/no question about the image at an index."""

    image: int
    name: str
    text: str
    answer: str


def ask(captions: Sequence[Sequence[str]], per_object: int = 20, seed: int = 0) -> list[Question]:
    """For each object up to ``per_object`` questions with the answer yes and as many with the answer no.

    Balanced object by object, so that whoever answers without the image, however well he knows which objects are
    common, is right half of the time.
    """
    rng = np.random.default_rng(seed)
    found = [named(texts) for texts in captions]
    questions = []
    for name in OBJECTS:
        present = [i for i, (there, _) in enumerate(found) if name in there]
        absent = [i for i, (_, missing) in enumerate(found) if name in missing]
        num = min(per_object, len(present), len(absent))
        for answer, images in (("yes", present), ("no", absent)):
            questions += [Question(images[i], name, question(name), answer) for i in rng.permutation(len(images))[:num]]
    return sorted(questions)


def question(name: str) -> str:
    """POPE's wording."""
    if name in ("snow", "grass"):
        return f"Is there {name} in the image?"
    return f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in the image?"


def read_answer(text: str) -> str:
    """``yes``, ``no`` or ``""`` by the first sentence; POPE itself takes everything without a "no" for a yes."""
    words = re.findall(r"[a-z']+", re.split(r"[.\n]", text.lower().strip(), maxsplit=1)[0])
    if any(word in ("no", "not") or word.endswith("n't") for word in words):
        return "no"
    return "yes" if "yes" in words else ""
