"""`make demo`: real questions about real photos that registry packages ship, and a spoken question."""

from __future__ import annotations

from rich.console import Console

from x2l.assistant import Assistant
from x2l.chat import Chat
from x2l.weights import resolve

SKLEARN, SKIMAGE = "pypi:scikit-learn==1.7.2/sklearn/datasets/images", "pypi:scikit-image==0.25.2/skimage/data"
PHOTOS = {  # weights spec -> sha256
    f"{SKLEARN}/china.jpg": "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
    f"{SKLEARN}/flower.jpg": "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
    f"{SKIMAGE}/astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
    f"{SKIMAGE}/chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
}
SPOKEN = "x2l:demo/question.flac"  # "Why is the sky blue?" by flite's voice slt, which no training has heard
QUESTIONS = ("Describe this photo in one sentence.", "Is there a person in the photo?")


def demo(console: Console, model: str = "tiny") -> None:
    """Ask the default model two questions about each photo, and one by voice; answers are streamed as they come."""
    paths = [resolve(spec, sha256) for spec, sha256 in PHOTOS.items()]
    assistant = Assistant.load(model)
    decode = {"max_new_tokens": 48}
    for path in paths:
        chat = Chat(assistant, decode, console)
        chat.attach("image", path)
        console.print(f"\n[bold]{path.name}[/] {path}", highlight=False, soft_wrap=True)
        for question in QUESTIONS:
            console.print(f"[cyan]> {question}[/]", highlight=False)
            chat.ask(question)
    recording = resolve(SPOKEN)
    chat = Chat(assistant, decode, console)
    chat.attach("speech", recording)
    console.print(f"\n[bold]{recording.name}[/] {recording}", highlight=False, soft_wrap=True)
    console.print("[cyan]> (spoken) Why is the sky blue?[/]", highlight=False)
    chat.ask()
    console.print("\nYour own photo: [bold].venv/bin/x2l chat --image photo.jpg[/]", highlight=False)
