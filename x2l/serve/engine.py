"""The engine: conversations in, streamed answers out, many at a time on one loaded model.

One thread owns the model. Each turn of its loop computes a chunk of the waiting prompts and then one token of every
answer in progress (continuous batching). HTTP, web page and scripts share one Engine object.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from x2l.assistant import Assistant
from x2l.modalities.hearing import GrowingSpeech, can_settle
from x2l.model import sample
from x2l.serve.answer import Answer, Busy, Decode, EngineError, RequestError, Timeout
from x2l.serve.forward import GivenUp, Prompt, forward_of
from x2l.serve.intake import DecodeMedia, EngineConfig, Intake, Stats
from x2l.serve.job import Job
from x2l.serve.lanes import Caches, Lanes
from x2l.serve.store import KV, EmbeddingStore, Prefix, PrefixStore
from x2l.types import Features, Media, Message, Part

log = logging.getLogger(__name__)
SHARED = 32  # positions beyond those whose states are known: a prompt that has so many in common with one in work waits for it
# Positions of use to somebody else for which a pass goes on that nobody waits for. Fewer cost them little beside the reading of the
# weights, which they have before them anyway; how much of the pass is left is not asked.
WORTH_FINISHING = 128
STALLED = 120.0  # seconds without a turn of the loop while there is work, after which the engine counts as dead


class Engine:
    """Answers conversations on one model.

    >>> engine = Engine(Assistant.load("tiny"))  # it closes itself when Python ends
    >>> answer = engine.submit([user(Part("image", path="photo.jpg"), "What is it?")])
    >>> for piece in answer:
    ...     print(piece, end="")

    Args:
        assistant: the loaded model.
        config: its bounds.
        decode_media: opens media files, such as a `DecoderPool`; by default they are trusted and opened in this process.
    """

    def __init__(
        self,
        assistant: Assistant,
        config: EngineConfig = EngineConfig(),  # noqa: B008
        decode_media: DecodeMedia | None = None,
    ):
        self.assistant, self.config = assistant, config
        self.model, self.stats = assistant.model, Stats()
        self.embeddings, self.prefixes = EmbeddingStore(config.embedding_bytes), PrefixStore(config.prefix_bytes)
        self.intake = Intake(assistant, config, self.embeddings, self.stats, decode_media)
        speech: Any = self.model.modalities["speech"] if "speech" in self.reads else None
        # None: spoken turns are read whole.
        self.growing_speech = GrowingSpeech(speech) if speech is not None and can_settle(speech) else None
        self._allocate()
        self.stops = set(assistant.eos)  # ids that end an answer
        self._active = list[Job]()  # rows of _lanes belong to them, in order
        self._ready = list[Job]()  # their prompts are complete; they become rows before the next token
        self._waiting: deque[Job] = deque()
        self._filling = list[Job]()  # their prompts are being computed, or next
        self._open = 0  # answers that are not finished, those whose media are still being decoded included
        self._wake = threading.Condition()
        self._closed, self._beat = False, time.monotonic()
        self._thread = threading.Thread(target=self._run, name="x2l-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # PyTorch aborts where a thread still computes when Python ends

    @property
    def reads(self) -> list[str]:
        """The modalities that the model takes."""
        return self.assistant.reads

    @property
    def capacity(self) -> int:
        """Answers that may be open at a time."""
        return self.config.max_batch + self.config.max_queue

    @property
    def alive(self) -> bool:
        """Whether the engine goes on answering."""
        stalled = self._open > 0 and time.monotonic() - self._beat > STALLED
        return self._thread.is_alive() and not self._closed and not stalled

    @property
    def status(self) -> str:
        """``ok``, or why no answers can be had."""
        return "ok" if self.alive else "engine stopped"

    @property
    def load(self) -> tuple[int, int]:
        """Answers in progress, and all that are open."""
        return len(self._active), self._open

    def submit(
        self,
        messages: Sequence[Message],
        decode: Decode = Decode(),  # noqa: B008
        owner: str = "",
        upto: Part | None = None,
    ) -> Answer:
        """Decode the media, queue the conversation, and return its answer to be read; blocks for the media alone.

        Args:
            messages: the conversation; its last message is answered.
            decode: how to answer.
            owner: whoever asks; states of a prompt are reused for the same owner only.
            upto: a media part of the conversation: only what stands before it is computed, for a later call to start from; and an
                `EarlyPart` itself.

        Raises:
            RequestError: the model does not read a modality, a file is broken, or the text alone exceeds the context.
            Busy: the queue is full.
            EngineError: the engine is dead or closed.
        """
        with self._wake:
            if not self.alive:
                raise EngineError("the engine has stopped")
            if self._open >= self.capacity:
                self.stats.refused += 1
                raise Busy(f"{self._open} requests are in work or waiting, the limit is {self.capacity}")
            self._open += 1
        try:
            job = self.intake.job(messages, decode, owner, upto)
        except BaseException:
            with self._wake:
                self._open -= 1
            raise
        with self._wake:
            if self._closed:
                self._open -= 1
                raise EngineError("the engine has stopped")
            self.stats.requests += 1
            self._waiting.append(job)
            self._wake.notify()
        return job.answer

    def close(self) -> None:
        """Stop the thread; open answers end with an error."""
        atexit.unregister(self.close)
        self._closed = True
        with self._wake:
            self._wake.notify()
        self._thread.join(timeout=30)

    # --- in the engine's thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._await_work():
                    self._turn()
        except BaseException:
            log.exception("the engine has died")
        finally:
            with self._wake:
                self._closed = True
            for job in [*self._active, *self._ready, *self._waiting, *self._filling]:
                self._end(job, EngineError("the engine has stopped"))

    def _await_work(self) -> bool:
        with self._wake:
            while not (self._waiting or self._active or self._filling or self._closed):
                self._beat = time.monotonic()
                self._wake.wait(timeout=1.0)
            self._beat = time.monotonic()
            return not self._closed

    def _allocate(self) -> None:
        """The LLM's forward pass, and where the states of answers are kept."""
        with torch.inference_mode():
            self._caches = Caches(self.model.llm)
        self.forward = forward_of(self.model.llm, self.config.packed_bytes, self.config.weight_bits)
        self._lanes = self._no_lanes()

    def _no_lanes(self) -> Lanes:
        return Lanes(self.forward, self.model.llm.get_input_embeddings(), self._caches)

    def _turn(self) -> None:
        self._drop()
        self._fill()
        try:
            if self._ready:
                self._lanes.join([job.cache for job in self._ready], [job.prompt_length for job in self._ready])
                for job in self._ready:
                    job.cache = None
                self._active, self._ready = self._active + self._ready, []
            if self._active:
                self._step()
        except Exception:
            self.stats.errors += 1
            lost, self._active, self._ready = [*self._active, *self._ready], [], []
            self._lanes = self._no_lanes()
            log.exception("a decode step failed; %d answers are lost", len(lost))
            for job in lost:
                if not job.answer.finish_reason:  # its last token may have come before the failure
                    self._end(job, EngineError("the model failed while answering"))

    def _reject(self, jobs: Sequence[Job], error: Exception) -> None:
        """Fail those of ``jobs`` whose prompts are not complete."""
        if not isinstance(error, RequestError):
            self.stats.errors += 1
            log.error("a prompt failed", exc_info=error)
            error = EngineError("the model failed on this request")
        failed = [job for job in self._filling if job in jobs]
        self._filling = [job for job in self._filling if job not in jobs]
        for job in failed:
            self._end(job, error)

    def _drop(self) -> None:
        """Let go of what nobody waits for any more."""
        now = time.monotonic()
        gone = {job for job in [*self._active, *self._waiting, *self._filling] if job.over(now)}
        if not gone:
            return
        with self._wake:
            dropped = [job for job in [*self._waiting, *self._filling, *self._active] if job in gone]
            self._waiting = deque(job for job in self._waiting if job not in gone)
        self._filling = [job for job in self._filling if job not in gone]
        self._retain([job for job in self._active if job not in gone])
        for job in dropped:
            if job.answer.cancelled:
                self.stats.cancelled += 1
                self._finish(job, "cancelled")
            else:
                self._end(job, Timeout(f"the request took longer than {self.config.request_seconds:g} s"))

    def _fill(self) -> None:
        """Compute waiting prompts, a chunk of positions in all; those that are complete become ready.

        Answers in progress wait for no more than that and one prompt's media.
        """
        room, looked = self.config.prefill_chunk, False
        while room > 0:
            group, looked = self._gather(room, looked)
            if not group:
                return
            room -= self._read(group)

    def _gather(self, room: int, looked: bool) -> tuple[list[Job], bool]:
        """Prompts to compute together, in the order in which they came; and ``looked``, or whether an interface had to run.

        No prompt waits for the media of one behind it. A prompt that begins as another one of them does waits for its states; one
        that exceeds a chunk is cut where it would be if it came alone.
        """
        chunk, group = self.config.prefill_chunk, list[Job]()
        while room > 0 and (job := self._next(len(group))):
            fresh = not self._seen(job)
            if fresh and looked and (self._active or group):
                break
            looked |= fresh
            try:
                if job.embeds is None:
                    self._embed(job)
                if not self._fits(job, group):
                    break
                if job.cache is None:
                    self._recall(job)
            except Exception as error:
                self._reject([job], error)
                if fresh:
                    break
                continue
            if any(job.shared(other) >= job.length + SHARED for other in group):
                job.cache = None
                break
            rest = job.prompt_length - job.length
            if rest > room and room < chunk:
                break
            group.append(job)
            room -= rest
        return group, looked

    def _next(self, index: int) -> Job | None:
        """The prompt to go on with behind the first ``index``; None where none waits, or the batch is full."""
        with self._wake:
            rows = len(self._active) + len(self._ready) + len(self._filling)
            if index == len(self._filling) and self._waiting and rows < self.config.max_batch:
                self._filling.append(self._waiting.popleft())
        return self._filling[index] if index < len(self._filling) else None

    def _read(self, group: Sequence[Job]) -> int:
        """Compute each prompt's next chunk, and with its end the answer's first token; returns how many positions that were.

        What fails is rejected: all of them, if the pass does. A pass in vain is given up.
        """
        prompts = []
        for job in group:
            assert job.embeds is not None
            start, end = job.length, min(job.length + self.config.prefill_chunk, job.prompt_length)
            positions = torch.arange(start, end, device=self.model.device)[None]
            prompts.append(Prompt(job.embeds[:, start:end], positions, job.cache))
        try:
            rows = self.forward.prompts(prompts, partial(self._in_vain, group)).split(1)
        except GivenUp:
            return self.config.prefill_chunk
        except Exception as error:
            self._reject(group, error)
            return self.config.prefill_chunk  # no more before the next token: others might fail, too
        for job, prompt, logits in zip(group, prompts, rows, strict=True):
            job.length += prompt.positions_BL.shape[1]
            if job.length == job.prompt_length:
                try:
                    self._begin(job, logits)
                except Exception as error:
                    self._reject([job], error)
        return sum(prompt.positions_BL.shape[1] for prompt in prompts)

    def _begin(self, job: Job, logits: Tensor) -> None:
        """A prompt is complete: its states are kept, and its answer begins."""
        self.stats.prompt_tokens += job.prompt_length
        self.stats.cached_tokens += job.answer.usage.cached
        self._remember(job, [(layer.keys, layer.values) for layer in job.cache.layers], fed=0)  # for prompts that wait, too
        ended = self._append(job, self._choose(job, logits))
        self._filling.remove(job)
        if not ended:
            self._ready.append(job)

    def _in_vain(self, group: Sequence[Job]) -> bool:
        """Whether nobody waits for ``group`` any more, others do, and none of them has much use for the states of a prompt that
        this pass completes: those alone are kept.

        With no others, what has begun is finished: whoever left may come again, as a spoken turn does that was not over.
        """
        now = time.monotonic()
        if not all(job.over(now) for job in group):
            return False
        with self._wake:
            behind = [job for job in [*self._waiting, *self._filling] if not job.over(now)]
        others = [*behind, *(job for job in [*self._active, *self._ready] if not job.over(now))]
        kept = [mine for mine in group if mine.prompt_length - mine.length <= self.config.prefill_chunk]
        return bool(others) and not any(job.shared(mine) >= mine.length + WORTH_FINISHING for job in behind for mine in kept)

    def _seen(self, job: Job) -> bool:
        """Whether no interface has to run for its media."""
        return all(item.embeds is not None or self.embeddings.get(item.key) is not None for item in job.items)

    def _embed(self, job: Job) -> None:
        """Run the interfaces on what is not known yet, and lay the whole prompt out as embeddings."""
        for item in job.items:
            if item.embeds is None:
                item.embeds = self.embeddings.get(item.key)  # another request may have brought the same file since
            if item.embeds is None:
                read: Features = self.model.modalities[item.modality](Media(inputs=item.inputs))
                item.embeds = read.x[0, : int(read.lengths[0])].clone()
                self.embeddings.put(item.key, item.embeds)
        job.lay_out(self.model)
        self.intake.check_context(job.prompt_length, job.decode)

    def _fits(self, job: Job, group: Sequence[Job]) -> bool:
        """Whether the states of a row beside those of ``group``, padded as rows are, stay in bounds; a row alone always fits."""
        others = [*self._active, *self._ready, *group]
        longest = max(min(row.prompt_length + row.limit, self.intake.context) for row in (job, *others))
        return not others or (len(others) + 1) * longest * self._caches.bytes_per_position <= self.config.kv_bytes

    def _recall(self, job: Job) -> None:
        """Start from the states of the longest prefix that was computed before."""
        known, kv = self.prefixes.find(job.symbols)
        known = min(known, job.prompt_length - 1)  # one position is computed in any case, for its logits
        job.cache = self._caches.load([(k[:, :, :known], v[:, :, :known]) for k, v in kv])
        job.length = job.answer.usage.cached = known

    def _step(self) -> None:
        try:
            logits = self._lanes.step([job.ids[-1] for job in self._active], partial(self._in_vain, self._active))
        except GivenUp:
            return
        self.stats.steps += 1
        greedy = logits.float().argmax(-1).tolist()  # in bfloat16 argmax takes twice as long
        staying = []
        for i, job in enumerate(self._active):
            token = greedy[i] if job.decode.temperature == 0 else self._choose(job, logits[i : i + 1])
            if not self._append(job, token):
                staying.append(job)
        self._retain(staying)

    def _choose(self, job: Job, logits: Tensor) -> int:
        return int(sample(logits, job.decode.temperature, job.decode.top_p, job.generator))

    def _append(self, job: Job, token: int) -> bool:
        """Take the next token; True when it ends the answer."""
        if token in self.stops:
            reason = "stop"
        else:
            job.ids.append(token)
            self.stats.completion_tokens += 1
            job.answer.usage.completion += 1
            if piece := job.text.push(token):
                job.answer.put(piece)
            full = len(job.ids) >= job.limit or job.prompt_length + len(job.ids) >= self.intake.context
            reason = "stop" if job.text.stopped else "length" if full else ""
        if not reason:
            return False
        if rest := job.text.finish():
            job.answer.put(rest)
        self.stats.completed += 1
        self._finish(job, reason)
        return True

    def _retain(self, staying: list[Job]) -> None:
        """Let the other rows leave; what was computed for them is kept for later turns."""
        if len(staying) == len(self._active):
            return
        stay = set(staying)
        for i, job in enumerate(self._active):
            if job not in stay:
                self._remember(job, self._lanes.states(i), self._lanes.lengths[i] - job.prompt_length)
        self._lanes.keep([i for i, job in enumerate(self._active) if job in stay])
        self._active = staying

    def _remember(self, job: Job, kv: KV, fed: int) -> None:
        """Keep the states of a prompt and the first ``fed`` tokens of its answer."""
        self.prefixes.put((*job.symbols, *job.ids[:fed]), Prefix((*job.widths, *[1] * fed), kv))

    def _finish(self, job: Job, reason: str) -> None:
        job.answer.finish_reason = reason
        self._end(job, None)

    def _end(self, job: Job, last: Exception | None) -> None:
        with self._wake:
            self._open -= 1
        job.answer.put(last)
