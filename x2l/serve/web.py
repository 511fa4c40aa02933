"""`x2l web`: the chat page. Static files and one description of the model; it talks to the HTTP API beside it.

Not Gradio: its release of the day would replace the Pillow that opens strangers' photos with an older one and bring a
dozen packages, while the page needs none, runs under a content security policy without exceptions, and uses the same
routes, limits and keys as every other client.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse

from x2l.serve.app import ServerConfig
from x2l.serve.engine import Engine
from x2l.serve.limits import Gate

TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}
LOOKAHEAD = 1.5  # seconds of sound after which speech is settled: shorter costs words (docs/serve.md)
CHINESE = "今天天气很好，我们一起去公园散步。"


def add_page(gate: Gate, engines: Mapping[str, Engine], config: ServerConfig) -> None:
    """Add the page to the API: ``/`` and ``/page/...``, which need no key, and ``/page/model``, which does.

    The files are read here, so that no request ever becomes a path.

    Args:
        engines: by model name; all of them answer each question, next to each other.
    """
    for file in files("x2l.serve").joinpath("page").iterdir():
        path = "/" if file.name == "index.html" else f"/page/{file.name}"
        kind = TYPES[file.name.rsplit(".", 1)[1]]
        gate.open_paths.add(path)
        gate.app.add_api_route(path, _static(file.read_bytes(), kind), include_in_schema=False)
    facts = describe(engines, config)

    @gate.app.get("/page/model", include_in_schema=False)
    async def model() -> JSONResponse:
        return JSONResponse(facts)


def _static(content: bytes, kind: str) -> Any:
    async def static() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return static


def describe(engines: Mapping[str, Engine], config: ServerConfig) -> dict[str, Any]:
    """What the page must know: the models, and bounds."""
    limits = config.limits
    return {
        "models": [describe_model(name, engine) for name, engine in engines.items()],
        "max_media": limits.max_media,
        "max_file_bytes": limits.max_file_bytes,
        "max_body_bytes": limits.max_body_bytes,
        "max_seconds": limits.max_seconds,
        "max_new_tokens": min(min(engine.config.max_new_tokens, engine.intake.context // 2) for engine in engines.values()),
    }


def describe_model(name: str, engine: Engine) -> dict[str, Any]:
    """A model's name, who reads each modality, when speech is settled (seconds, if at all), whether it knows Chinese."""
    assistant, reads = engine.assistant, {}
    for kind, part in assistant.config.modalities.items():
        modality: Any = assistant.model.modalities[kind]
        modules = [type(module).__name__ for module in modality.interface]
        reads[kind] = " → ".join([part.encoder.name.rsplit(":", 1)[-1], *modules])
    return {
        "model": name,
        "reads": reads,
        "lookahead": LOOKAHEAD if engine.growing_speech else None,
        "chinese": knows_chinese(assistant.tokenizer),
    }


def knows_chinese(tokenizer: Any) -> bool:
    """Whether a vocabulary holds common Chinese words: one that was not made for it spells characters in bytes."""
    return len(tokenizer.encode(CHINESE, add_special_tokens=False)) <= len(CHINESE)
