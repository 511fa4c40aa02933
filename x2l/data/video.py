"""Frames of a video, uniform in time and exact, for little more work than they need.

The packets are listed first, which decodes nothing: time-stamps place every frame, key packets say where decoding may
begin. Each frame is then reached from where the decoder stands or by a seek, whichever decodes less, and what no other
frame refers to is passed over. Where time-stamps do not name the frames, the file is decoded in order instead.
"""

from __future__ import annotations

import io
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.stream import Disposition
from numpy.typing import NDArray
from PIL import Image

from x2l.data.media import CONTAINERS, MAX_PIXELS, MediaError, decode_image, load

NUM_FRAMES = 8
MAX_PACKETS = 2_000_000  # of the video stream: 18 hours at 30 frames a second
MAX_SAMPLED_PIXELS = 256_000_000  # of all frames of one video together
SEEK_PACKETS = 4  # a seek costs about as much as decoding so many packets
HEADER_TELLS_LENGTH = ("mov", "matroska", "avi", "asf")
CUT_OFF = 0.9  # a file that reaches less of the length in its header has lost its end

# A file that names no container here opens nothing: FFmpeg's own guessing would follow playlists.
VIDEO_CONTAINERS: dict[str, Callable[[bytes], bool]] = CONTAINERS | {
    "ogg": lambda blob: blob[:4] == b"OggS",
    "mov": lambda blob: blob[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"),
    "mpegts": lambda blob: blob[:1] + blob[188:189] == b"\x47\x47" or blob[4:5] + blob[196:197] == b"\x47\x47",
    "mpegvideo": lambda blob: blob[:4] == b"\x00\x00\x01\xb3",
    "gif": lambda blob: blob[:4] == b"GIF8",
    "ivf": lambda blob: blob[:4] == b"DKIF",
    "yuv4mpegpipe": lambda blob: blob[:10] == b"YUV4MPEG2 ",
}

# Degrees counter-clockwise, as the file asks for -> how to turn the picture
UPRIGHT = {
    90: Image.Transpose.ROTATE_90,
    -90: Image.Transpose.ROTATE_270,
    180: Image.Transpose.ROTATE_180,
    -180: Image.Transpose.ROTATE_180,
}


def decode_video(source: bytes | str | Path, num_frames: int = NUM_FRAMES) -> list[Image.Image]:
    """Decode ``num_frames`` frames: those shown in the middle of as many equal parts of the video's time.

    Always so many, upright RGB; where the video has fewer, or holds one for long (variable frame rate), a frame stands
    in the list several times, as the same object. A still picture is a video of one frame. Without usable time-stamps
    the parts are equal in frames. Cover art is no video stream.

    Raises:
        MediaError: no video, cut off (less of it than its header says), damaged beyond a single frame, or larger than
            ``MAX_PIXELS`` a frame, ``MAX_SAMPLED_PIXELS`` in all or ``MAX_PACKETS``.
        ValueError: ``num_frames`` is not positive.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames}: a video becomes at least one frame")
    blob = load(source)
    if _container(blob) is None:
        return [_still(blob)] * num_frames
    try:
        with opened(blob) as (file, stream):
            listing = list_frames(file, stream)
            ranks = listing.uniform(num_frames)
            _check_size(stream, len(set(ranks)))
            pictures = _sought(file, stream, listing, ranks) if listing.exact else {}
        if pictures.keys() != set(ranks):
            pictures = _in_order(blob, ranks, len(listing.order))
    except MediaError:
        raise
    except Exception as error:  # FFmpeg raises a kind for every errno, Pillow and the container others
        raise MediaError(f"not a readable video ({type(error).__name__})") from error
    return [pictures[rank] for rank in ranks]


def check_video(source: bytes | str | Path) -> None:
    """Decode one frame of a video; MediaError if there is none, as in `decode_video`."""
    decode_video(source, 1)


def _still(blob: bytes) -> Image.Image:
    try:
        return decode_image(blob)
    except MediaError as error:
        if "not a readable image" not in str(error):
            raise
        raise MediaError("not a readable video: expected MP4, Matroska, WebM, AVI, MPEG, Ogg, FLV, GIF or a picture") from error


def _container(blob: bytes) -> str | None:
    return next((name for name, matches in VIDEO_CONTAINERS.items() if matches(blob)), None)


@contextmanager
def opened(blob: bytes) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream that is no cover art.

    Raises:
        MediaError: no such stream, no decoder for it, or frames larger than ``MAX_PIXELS``.
    """
    with av.open(io.BytesIO(blob), "r", format=_container(blob)) as file:
        streams = [stream for stream in file.streams.video if not stream.disposition & Disposition.attached_pic]
        if not streams:
            raise MediaError("the file has no video stream")
        if streams[0].codec_context is None:
            raise MediaError("the file's video codec is not supported")
        width, height = streams[0].width, streams[0].height
        if width * height > MAX_PIXELS:
            raise MediaError(f"the video has {width} x {height} pixels, the limit is {MAX_PIXELS} in all")
        streams[0].codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # frames may grow beyond what the header says
        yield file, streams[0]


class Listing(NamedTuple):
    """The packets of a video, in decoding order; "number" is a packet's place in it, "rank" a frame's place in time."""

    pts: NDArray[np.int64]  # of each packet's frame, in the stream's time base
    starts: NDArray[np.int64]  # numbers of the packets at which decoding may begin
    seeks: NDArray[np.int64]  # time-stamps that lead there: decoding time, by which containers are indexed
    order: NDArray[np.int64]  # numbers of the shown frames' packets, by rank
    end: int  # when the last frame ends
    exact: bool  # whether time-stamps name the frames

    def uniform(self, num: int) -> list[int]:
        """Ranks of the frames shown in the middle of ``num`` equal parts of the time, or of the frames."""
        if not self.exact:
            return [(2 * k + 1) * len(self.order) // (2 * num) for k in range(num)]
        shown = self.pts[self.order]
        first, length = int(shown[0]), max(1, self.end - int(shown[0]))
        middles = [first + (2 * k + 1) * length // (2 * num) for k in range(num)]
        return [int(rank) for rank in (np.searchsorted(shown, middles, "right") - 1).clip(0)]


def list_frames(file: Any, stream: Any) -> Listing:
    """Read every packet without decoding it.

    Raises:
        MediaError: no packets, more than ``MAX_PACKETS``, or the file is cut off.
    """
    stamps, starts, seeks, shown = array("q"), array("q"), array("q"), array("q")
    ends: dict[int, int] = {}  # of every stream, in its time base
    duration, mine, vp8 = 0, stream.index, stream.codec_context.name in ("vp8", "libvpx")
    stamped = file.format.name != "avi" or not stream.codec_context.has_b_frames  # AVI does not say when they are shown
    for packet in file.demux():
        if not packet.size:
            continue
        pts, dts, lasts, index = packet.pts, packet.dts, packet.duration or 0, packet.stream_index
        stamp = dts if pts is None else pts
        if stamp is not None and stamp + lasts > ends.get(index, -(1 << 63)):
            ends[index] = stamp + lasts
            duration = lasts if index == mine else duration
        if index != mine:
            continue
        number = len(stamps)
        if number == MAX_PACKETS:
            raise MediaError(f"the video has more than {MAX_PACKETS} frames: cut it into shorter ones")
        if packet.is_keyframe:
            starts.append(number)
            seeks.append(0 if stamp is None else stamp if dts is None else min(stamp, dts))
        if not packet.is_discard and not (vp8 and not memoryview(packet)[0] & 0x10):  # VP8's frames for reference alone
            shown.append(number)
        stamped = stamped and pts is not None
        stamps.append(number if pts is None else pts)
    if not shown:
        raise MediaError("the video has no frames")
    bases = {each.index: each.time_base for each in file.streams}
    _check_whole(file, [float(end * bases[index]) for index, end in ends.items() if bases.get(index)])
    return _listing(np.array(stamps), np.array(starts), np.array(seeks), np.array(shown), stamped, duration)


def _listing(pts: Any, starts: Any, seeks: Any, shown: Any, stamped: bool, duration: int) -> Listing:
    order = shown[np.argsort(pts[shown], kind="stable")] if stamped else shown
    increasing = stamped and len(starts) > 0 and bool((np.diff(pts[starts]) > 0).all())
    exact = increasing and len(np.unique(pts)) == len(pts)
    gap = int(np.median(np.diff(pts[order]))) if len(order) > 1 else 0
    return Listing(pts, starts, seeks, order, int(pts[order[-1]]) + (duration or gap), exact)


def _check_whole(file: Any, ends: Sequence[float]) -> None:
    if file.format.name.split(",")[0] not in HEADER_TELLS_LENGTH or not file.duration or not ends:
        return
    told, found = file.duration / av.time_base, max(ends) - (file.start_time or 0) / av.time_base
    if found < CUT_OFF * told:
        raise MediaError(f"the video is cut off: {max(0.0, found):.1f} of its {told:.1f} s are there")


def _check_size(stream: Any, num_frames: int) -> None:
    if num_frames * stream.width * stream.height > MAX_SAMPLED_PIXELS:
        raise MediaError(
            f"{num_frames} frames of {stream.width} x {stream.height} pixels exceed {MAX_SAMPLED_PIXELS} in all: "
            "take fewer frames or a smaller video"
        )


def _sought(file: Any, stream: Any, listing: Listing, ranks: Sequence[int]) -> dict[int, Image.Image]:
    """The frames at ``ranks``, by seeking where that saves work; some are missing where a file keeps no promise."""
    decoder = stream.codec_context
    wanted = {int(listing.pts[listing.order[rank]]): rank for rank in ranks}
    needed = {int(listing.order[rank]) for rank in ranks}
    pictures: dict[int, Image.Image] = {}
    packets: Iterator[tuple[int, Any]] = iter(())
    at: int | None = None  # the packet that the decoder would take next
    for stamp, rank in sorted(wanted.items()):
        # A start before its time: what precedes a key frame in time may refer to packets before it.
        key = max(0, int(np.searchsorted(listing.pts[listing.starts], stamp, "right")) - 1)
        start = int(listing.starts[key])
        if rank not in pictures and (at is None or start - at >= SEEK_PACKETS):
            packets, at = _packets(file, stream, listing, key), start
        while rank not in pictures:
            number, packet = next(packets, (None, None))
            if number in needed:
                decoder.skip_frame = "DEFAULT"
            elif packet is not None:
                decoder.skip_frame = "NONREF"
            try:
                frames = decoder.decode(packet)
            except av.FFmpegError:
                return pictures
            pictures |= {wanted[frame.pts]: _picture(frame) for frame in frames if frame.pts in wanted}
            if rank not in pictures and (packet is None or any(frame.pts is None or frame.pts > stamp for frame in frames)):
                return pictures
            at = None if number is None else number + 1
    return pictures


def _packets(file: Any, stream: Any, listing: Listing, key: int) -> Iterator[tuple[int, Any]]:
    """(number, packet) from the ``key``-th start on; nothing where the seek leads past it or elsewhere."""
    start = int(listing.starts[key])
    try:
        file.seek(int(listing.seeks[key]), stream=stream)
    except av.FFmpegError:
        return
    number = -1
    for packet in file.demux(stream):
        if not packet.size:
            continue
        if number < 0:
            found: Any = np.flatnonzero(listing.pts == packet.pts) if packet.pts is not None else []
            if len(found) != 1 or found[0] > start:
                return
            number = int(found[0])
        if number >= start:
            yield number, packet
        number += 1


def _in_order(blob: bytes, ranks: Sequence[int], num: int) -> dict[int, Image.Image]:
    """The frames at ``ranks`` among ``num``, counted while decoding from the beginning.

    Where damage leaves fewer frames than packets, the ranks are scaled to what is left.
    """
    wanted = {rank: rank for rank in ranks}
    for _ in range(2):
        found: dict[int, Image.Image] = {}
        count = 0
        for frame in _decoded(blob):
            if count in wanted.values():
                found[count] = _picture(frame)
            count += 1
            if len(found) == len(set(wanted.values())):
                return {rank: found[place] for rank, place in wanted.items()}
        wanted = {rank: rank * count // num for rank in ranks}
    raise MediaError("no frame of the video can be decoded")


def _decoded(blob: bytes) -> Iterator[Any]:
    with opened(blob) as (file, stream):
        for packet in file.demux(stream):
            try:
                yield from packet.decode()
            except av.InvalidDataError:  # one damaged packet; the decoder goes on with the next
                continue


def _picture(frame: Any) -> Image.Image:
    image: Image.Image = frame.to_image()
    turn = UPRIGHT.get(int(frame.rotation))
    return image if turn is None else image.transpose(turn)
