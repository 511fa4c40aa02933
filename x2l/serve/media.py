"""Wire content parts -> media parts: data URLs, base64 and, where allowed, remote files; every bound before the bytes."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Sequence

from x2l.serve.answer import RequestError
from x2l.serve.fetch import Fetcher
from x2l.serve.schema import AudioPart, AudioURLPart, ChatMessage, ImagePart, TextPart, VideoPart, VoicePart
from x2l.types import Message, Part

DATA_URL = re.compile(r"data:[\w.+-]{1,64}/[\w.+-]{1,64}(?:;[\w.+-]{1,64}=[\w.+-]{1,64})*;base64,", re.ASCII | re.IGNORECASE)

WANTED = {"image_url": ["image"], "video_url": ["video"], "voice": ["speech"]}
AnyPart = ImagePart | AudioPart | AudioURLPart | VideoPart | VoicePart


class MediaReader:
    """Turns a request's messages into the engine's.

    Args:
        reads: modalities of the model; sound is read as speech where it has speech.
        max_items: media of one request.
        max_bytes: of one file.
        fetcher: for remote URLs; None refuses them.
    """

    def __init__(self, reads: Sequence[str], max_items: int, max_bytes: int, fetcher: Fetcher | None):
        self.reads, self.max_items, self.max_bytes, self.fetcher = list(reads), max_items, max_bytes, fetcher

    async def messages(self, wire: Sequence[ChatMessage]) -> list[Message]:
        """The conversation with its media's bytes; a recording that is still to come has none.

        Raises:
            RequestError: too many media, a modality that the model lacks, or a source that is refused.
        """
        parts = [part for message in wire for part in message.parts]
        media = [part for part in parts if not isinstance(part, TextPart)]
        if len(media) > self.max_items:
            raise RequestError(f"{len(media)} media parts, the limit is {self.max_items} a request")
        names = [self.modality(part) for part in media]
        for message in wire:
            if message.role != "user" and any(not isinstance(part, TextPart) for part in message.parts):
                raise RequestError(f"media may stand in user messages only, not in a {message.role} message")
        tasks = [asyncio.ensure_future(self._bytes(part)) for part in media]
        try:
            blobs = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        ready = iter([Part(name, bytes=blob) for name, blob in zip(names, blobs, strict=True)])
        return [
            Message(
                "system" if message.role == "developer" else message.role,
                tuple(Part("text", text=part.text) if isinstance(part, TextPart) else next(ready) for part in message.parts),
            )
            for message in wire
        ]

    def modality(self, part: AnyPart) -> str:
        """Which modality of the model reads a part; RequestError if none does."""
        wanted = WANTED.get(part.type, ["speech", "audio"])
        found = next((name for name in wanted if name in self.reads), None)
        if found is None:
            raise RequestError(f"this model cannot read {part.type}: it reads {', '.join(['text', *self.reads])}")
        return found

    async def _bytes(self, part: AnyPart) -> bytes:
        if isinstance(part, VoicePart):
            return b""
        if isinstance(part, AudioPart):
            return self._base64(part.input_audio.data, "input_audio.data")
        url = part.source.url
        if match := DATA_URL.match(url):
            return self._base64(url[match.end() :], f"{part.type} data URL")
        if url[:5].lower() == "data:":
            raise RequestError(f"malformed {part.type} data URL: write data:TYPE/SUBTYPE;base64,...")
        if url.split(":", 1)[0].lower() not in ("http", "https"):
            raise RequestError(f"{part.type} takes data: URLs{' and http(s):// URLs' if self.fetcher else ''} only")
        if self.fetcher is None:
            raise RequestError("remote URLs are not allowed on this server: send the file as a data: URL")
        return await self.fetcher(url)

    def _base64(self, text: str, what: str) -> bytes:
        if len(text) * 3 // 4 > self.max_bytes + 2:
            raise RequestError(f"the {what} holds more than {self.max_bytes} bytes")
        try:
            blob = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise RequestError(f"the {what} is not valid base64") from error
        if not blob:
            raise RequestError(f"the {what} is empty")
        return blob
