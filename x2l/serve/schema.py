"""The wire form: OpenAI's chat completions. What is not supported is refused, never ignored.

https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_STOPS, MAX_STOP_CHARS = 4, 256
MAX_LOOKAHEAD = 3.0  # seconds


class Closed(BaseModel):
    """Refuses fields that it does not know, and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TextPart(Closed):
    type: Literal["text"]
    text: str


class Source(Closed):
    url: Annotated[str, Field(min_length=1, description="a data: URL, or http(s):// where the server allows it")]


class ImageSource(Source):
    detail: Literal["auto", "low", "high"] = "auto"  # accepted: every picture is read in one resolution


class ImagePart(Closed):
    type: Literal["image_url"]
    image_url: ImageSource

    @property
    def source(self) -> Source:
        return self.image_url


class AudioURLPart(Closed):
    type: Literal["audio_url"]
    audio_url: Source

    @property
    def source(self) -> Source:
        return self.audio_url


class VideoPart(Closed):
    type: Literal["video_url"]
    video_url: Source

    @property
    def source(self) -> Source:
        return self.video_url


class AudioData(Closed):
    data: Annotated[str, Field(min_length=1, description="base64")]
    format: Annotated[str, Field(max_length=16)] = "wav"  # the file itself says what it is


class AudioPart(Closed):
    type: Literal["input_audio"]
    input_audio: AudioData


class VoicePart(Closed):
    """Where the recording stands that is still to come."""

    type: Literal["voice"]


ContentPart = Annotated[TextPart | ImagePart | AudioPart | AudioURLPart | VideoPart, Field(discriminator="type")]


VoiceContentPart = Annotated[TextPart | ImagePart | AudioPart | AudioURLPart | VideoPart | VoicePart, Field(discriminator="type")]


class ChatMessage(Closed):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[ContentPart], Field(min_length=1)]
    name: Annotated[str, Field(max_length=64)] | None = None
    refusal: None = None  # fields of the client's own message type, as it sends an answer back
    audio: None = None
    tool_calls: None = None
    function_call: None = None
    annotations: list[Any] | None = Field(default=None, max_length=0)

    @property
    def parts(self) -> Sequence[ContentPart | VoicePart]:
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class TextFormat(Closed):
    type: Literal["text"]


class StreamOptions(Closed):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Key = Annotated[str, Field(max_length=64)]
Value = Annotated[str, Field(max_length=512)]
ONE_THING = "only the default is supported"


class VoiceMessage(ChatMessage):
    content: str | Annotated[list[VoiceContentPart], Field(min_length=1)]  # type: ignore[assignment]


class AnswerRequest(Closed):
    """What any request for an answer has."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Annotated[int, Field(ge=1, le=131072)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=131072)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None  # accepted and not used, like the next three
    safety_identifier: Annotated[str, Field(max_length=256)] | None = None
    metadata: Annotated[dict[Key, Value], Field(max_length=16)] | None = None
    store: Literal[False] | None = None
    n: Literal[1] | None = Field(default=None, description=ONE_THING)
    logprobs: Literal[False] | None = Field(default=None, description=ONE_THING)
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = Field(default=None, description=ONE_THING)
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = Field(default=None, description=ONE_THING)
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = Field(default=None, description=ONE_THING)
    response_format: TextFormat | None = Field(default=None, description=ONE_THING)

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def limit(self) -> int | None:
        """Longest answer asked for, in tokens."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class ChatRequest(AnswerRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1024)]
    stream: bool | None = False
    stream_options: StreamOptions | None = None


class VoiceRequest(AnswerRequest):
    messages: Annotated[list[VoiceMessage], Field(min_length=1, max_length=1024)]
    end_silence: Annotated[float, Field(ge=0.2, le=10, strict=True)] | None = Field(
        default=None, description="seconds of silence that end the speech; without it the client says when"
    )
    lookahead: Annotated[float, Field(ge=0.5, le=MAX_LOOKAHEAD, strict=True)] | None = Field(
        default=None,
        description="seconds of sound after which what was heard is settled, so that only what came since is read at the end; "
        "without it all of the recording is read at once",
    )

    @model_validator(mode="after")
    def _one_voice(self) -> VoiceRequest:
        counts = [sum(isinstance(part, VoicePart) for part in message.parts) for message in self.messages]
        if sum(counts) != 1 or not counts[-1] or self.messages[-1].role != "user":
            raise ValueError("exactly one part of the type 'voice' must stand in the last message, a user's")
        return self

    @property
    def place(self) -> int:
        """Which part of the last message the recording is."""
        return next(i for i, part in enumerate(self.messages[-1].parts) if isinstance(part, VoicePart))


class PromptDetails(BaseModel):
    cached_tokens: int
    audio_tokens: int
    image_tokens: int
    video_tokens: int


class UsageOut(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class MessageOut(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    index: Literal[0] = 0
    message: MessageOut
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: UsageOut


class ModelOut(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "x2l"
    modalities: list[str]
    lookahead: Annotated[bool, Field(description="whether spoken turns may have one")]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelOut]


class VoiceOut(BaseModel):
    url: Annotated[str, Field(description="path of the WebSocket, good for one connection")]
    sample_rate: int
    max_seconds: float
    idle_seconds: Annotated[float, Field(description="without a frame, after which the turn is over")]


class Transcription(BaseModel):
    text: str


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorOut(BaseModel):
    error: ErrorBody
