"""Where the voice is in a growing recording, by the energy of 20 ms frames: enough to see a pause, and no second model."""

from __future__ import annotations

import numpy as np

RATE = 16_000  # Hz
FRAME = 320  # samples, 20 ms
QUIET = 33.0  # RMS of 16-bit samples (-60 dBFS): the lowest noise floor
RISE = 1.01  # the noise floor's growth a frame: it falls at once and doubles in 1.4 s
ABOVE = 3.0  # a voice is louder than the noise floor by this factor
TAIL = RATE // 5  # samples that are kept after the last voice


class Pauses:
    """Hears 16-bit samples at 16 kHz in chunks; how they are cut makes no difference.

    Args:
        end_silence: seconds of silence after a voice that end the speech; what comes later is not heard any more.
    """

    def __init__(self, end_silence: float | None = None) -> None:
        self.end_silence = end_silence
        self.samples = 0  # heard
        self.voiced_until = 0  # end of the last frame with a voice in it; 0 while there was none
        self.over = False
        self._floor = QUIET
        self._rest = np.zeros(0, np.int16)

    def push(self, pcm: np.ndarray) -> None:
        """The next samples, (S,) int16."""
        if self.over:
            return
        wave = np.concatenate([self._rest, pcm])
        start = self.samples - len(self._rest)
        whole = len(wave) // FRAME * FRAME
        frames = wave[:whole].reshape(-1, FRAME).astype(np.float64)
        for i, rms in enumerate(np.sqrt(np.square(frames).mean(1)).tolist(), 1):
            self._floor = max(QUIET, min(rms, self._floor * RISE))
            self._frame(start + i * FRAME, rms > ABOVE * self._floor)
            if self.over:
                break
        self._rest, self.samples = wave[whole:], self.samples + len(pcm)

    def _frame(self, end: int, voiced: bool) -> None:
        if voiced:
            self.voiced_until = end
        elif self.voiced_until and self.end_silence is not None:
            self.over = end - self.voiced_until >= self.end_silence * RATE

    @property
    def kept(self) -> int:
        """How many samples are the recording: up to `TAIL` after the last voice, or all where there is none. Never fewer later."""
        return min(self.samples, self.voiced_until + TAIL) if self.voiced_until else self.samples
