"""Video: exact frames against a full decode by PyAV, odd and broken files, and the interface against the image's."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from conftest import picture, tiny_model, write_shard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from x2l import train
from x2l.build import build, initialise
from x2l.config import RECIPES, ModelConfig, load_train_config
from x2l.data import video
from x2l.data.collate import Collator
from x2l.data.media import DECODERS, MediaError
from x2l.data.video import decode_video, list_frames, opened
from x2l.modalities.image import interface as image_interface
from x2l.modalities.video import import_image, interface
from x2l.types import Features, Media, Part, Sample, assistant, user

X264 = {"preset": "ultrafast"}
KINDS: dict[str, tuple[str, str, dict[str, str]]] = {
    "closed groups with B-frames": ("mp4", "libx264", {"bf": "2", "g": "12"}),
    "open groups": ("matroska", "libx264", {"x264-params": "open-gop=1:bframes=3:keyint=12:b-pyramid=2"}),
    "one group": ("mp4", "libx264", {"x264-params": "keyint=infinite:bframes=3"}),
    "intra refresh": ("mp4", "libx264", {"x264-params": "intra-refresh=1:keyint=20:bframes=0"}),
    "transport stream": ("mpegts", "libx264", {"g": "12", "bf": "2"}),
    "program stream": ("mpeg", "mpeg2video", {"g": "12", "bf": "2"}),
    "avi, whose stamps are guesses": ("avi", "libx264", {"g": "12", "bf": "2"}),
    "avi": ("avi", "mjpeg", {}),
    "webm, with hidden frames": ("webm", "libvpx", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "10"}),
    "flash": ("flv", "libx264", {"g": "12"}),
    "windows media": ("asf", "wmv2", {"g": "12"}),
    "gif": ("gif", "gif", {}),
}
PIXELS = {"gif": "rgb8", "mjpeg": "yuvj420p"}


def frame(number: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """A moving edge, so that neighbours differ."""
    pixels = np.full((size[1], size[0], 3), (number * 4) % 256, np.uint8)
    pixels[:, (number * 3) % size[0] :] = 255 - (number * 4) % 256
    return pixels


def clip(
    container: str = "mp4", codec: str = "libx264", options: dict[str, str] | None = None, num: int = 50,
    stamps: Sequence[int] | None = None, size: tuple[int, int] = (64, 48), rotate: int = 0, sound: bool = False,
) -> bytes:  # fmt: skip
    """A video of ``frame`` 0, 1, ... shown at ``stamps`` (in 25ths of a second; one after another by default)."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=25, options={**(X264 if codec == "libx264" else {}), **(options or {})})
        stream.width, stream.height = size
        stream.pix_fmt = PIXELS.get(codec, "yuv420p")
        stream.codec_context.time_base = Fraction(1, 25)
        if rotate:
            stream.set_display_rotation(rotate)
        for number, stamp in enumerate(stamps or range(num)):
            picture = av.VideoFrame.from_ndarray(frame(number, size), format="rgb24")
            picture.pts, picture.time_base = stamp, Fraction(1, 25)
            out.mux(stream.encode(picture))
        out.mux(stream.encode())
    return buffer.getvalue()


def full(blob: bytes) -> list[bytes]:
    """The oracle: every frame of a plain decode by PyAV."""
    with av.open(io.BytesIO(blob), format=video._container(blob)) as file:
        return [picture.to_image().tobytes() for picture in file.decode(video=0)]


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_those_of_a_full_decode(kind: str) -> None:
    blob = clip(*KINDS[kind])
    everything = full(blob)
    for num in (1, 2, 8, 50):
        middles = [(2 * k + 1) * len(everything) // (2 * num) for k in range(num)]
        decoded = decode_video(blob, num)
        assert [picture.tobytes() for picture in decoded] == [everything[i] for i in middles], num


@settings(deadline=None, max_examples=25)
@example(group=1, between=0, open_group=False, num=1, wanted=1, container="mpegts")
@given(
    group=st.integers(1, 30), between=st.integers(0, 4), open_group=st.booleans(), num=st.integers(1, 40),
    wanted=st.integers(1, 12), container=st.sampled_from(["mp4", "matroska", "mpegts"]),
)  # fmt: skip
def test_any_group_structure(group: int, between: int, open_group: bool, num: int, wanted: int, container: str) -> None:
    options = {"x264-params": f"keyint={group}:bframes={between}:open-gop={int(open_group)}:scenecut=0"}
    blob = clip(container, "libx264", options, num)
    everything = full(blob)
    assert len(everything) == num
    got = [picture.tobytes() for picture in decode_video(blob, wanted)]
    assert got == [everything[(2 * k + 1) * num // (2 * wanted)] for k in range(wanted)]


@pytest.mark.parametrize("kind", ["closed groups with B-frames", "open groups", "transport stream", "webm, with hidden frames"])
def test_seeking_finds_the_frames_without_the_slow_way(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "_in_order", lambda *_: pytest.fail("decoded in order"))
    decode_video(clip(*KINDS[kind]), 4)


def test_little_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One frame next to its key frame costs a few packets of 300, not 300."""
    sent = []
    plain = video._packets

    def watched(*arguments: Any) -> Any:
        for number, packet in plain(*arguments):
            sent.append(number)
            yield number, packet

    monkeypatch.setattr(video, "_packets", watched)
    blob = clip(options={"x264-params": "keyint=12:bframes=2:scenecut=0"}, num=300)
    decode_video(blob, 8)
    assert len(sent) <= 8 * 18
    assert len(set(sent)) == len(sent)


def test_frames_are_uniform_in_time_when_the_rate_varies() -> None:
    stamps = [0, 1, 2, 3, 4, 50, 51, 90]  # the sixth frame is shown for 1 of 91 parts, the fifth for 46
    blob = clip(options={"bf": "0"}, stamps=stamps, container="matroska")
    everything = full(blob)
    shown = [everything.index(picture.tobytes()) for picture in decode_video(blob, 10)]
    expected = [max(i for i, stamp in enumerate(stamps) if stamp <= (2 * k + 1) * 91 / 20) for k in range(10)]
    assert shown == expected


def test_one_frame_and_a_still_picture_are_shown_all_the_time() -> None:
    assert len({id(picture) for picture in decode_video(clip(num=1), 8)}) == 1
    still = decode_video(picture((250, 0, 0)), 8)
    assert len(still) == 8
    assert still[0].getpixel((0, 0)) == (250, 0, 0)


def test_cover_art_is_no_video_stream() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        track = out.add_stream("aac", rate=16_000)
        art = out.add_stream("mjpeg", rate=1)
        art.width = art.height = 32
        art.pix_fmt = "yuvj420p"
        art.disposition = av.stream.Disposition.attached_pic
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate, sound.pts = 16_000, 0
        out.mux(track.encode(sound))
        out.mux(track.encode())
        out.mux(art.encode(av.VideoFrame.from_ndarray(frame(0, (32, 32)), format="rgb24")))
        out.mux(art.encode())
    with pytest.raises(MediaError, match="no video stream"):
        decode_video(buffer.getvalue())


@pytest.mark.parametrize(("blob", "reason"), [(b"", "not a readable video"), (b"text" * 99, "not a readable video")])
def test_what_is_no_video(blob: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=reason):
        decode_video(blob)
    with pytest.raises(MediaError, match="cannot read"):
        decode_video(tmp_path / "missing.mp4")


@pytest.mark.parametrize("container", ["matroska", "mp4"])
@pytest.mark.parametrize("keep", [0.05, 0.3, 0.5, 0.8])
def test_a_file_that_lost_its_end_is_refused(container: str, keep: float) -> None:
    blob = clip(container, options={"g": "10"} | ({"movflags": "+faststart"} if container == "mp4" else {}), num=100)
    with pytest.raises(MediaError, match=r"cut off|not a readable video|no frames"):
        decode_video(blob[: int(keep * len(blob))])


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(sorted(KINDS)), keep=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), max_size=5),
)  # fmt: skip
def test_damaged_videos_decode_or_raise_media_error(kind: str, keep: float, flips: list[tuple[float, int]]) -> None:
    blob = bytearray(SMALL.setdefault(kind, clip(*KINDS[kind], num=12)))
    for place, mask in flips:
        blob[int(place * len(blob))] ^= mask
    with contextlib.suppress(MediaError):
        assert len(decode_video(bytes(blob[: int(keep * len(blob))]), 3)) == 3


SMALL: dict[str, bytes] = {}


def test_phone_videos_are_upright() -> None:
    plain, turned = decode_video(clip(), 1)[0], decode_video(clip(rotate=-90), 1)[0]
    assert turned.size == plain.size[::-1]
    assert turned.tobytes() == plain.transpose(Image.Transpose.ROTATE_270).tobytes()


def test_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    blob = clip(num=20)
    with pytest.raises(ValueError, match="num_frames=0"):
        decode_video(blob, 0)
    monkeypatch.setattr(video, "MAX_SAMPLED_PIXELS", 5 * 64 * 48)
    assert len(decode_video(blob, 5)) == 5
    with pytest.raises(MediaError, match="6 frames of 64 x 48 pixels exceed 15360 in all: take fewer"):
        decode_video(blob, 6)
    monkeypatch.setattr(video, "MAX_PACKETS", 10)
    with pytest.raises(MediaError, match="more than 10 frames"):
        decode_video(blob)
    monkeypatch.setattr(video, "MAX_PIXELS", 1000)
    with pytest.raises(MediaError, match="64 x 48 pixels, the limit is 1000"):
        decode_video(blob)


def test_a_very_long_video_costs_no_more_memory_than_its_frames() -> None:
    """Ten hours at a frame a minute: the listing holds numbers alone."""
    blob = clip("matroska", options={"bf": "0", "g": "10"}, stamps=[1500 * i for i in range(600)])
    with opened(blob) as (file, stream):
        listing = list_frames(file, stream)
    assert len(listing.pts) == 600
    assert listing.uniform(8) == [(2 * k + 1) * (599 * 1500 + 1) // 16 // 1500 for k in range(8)]  # the last frame is short
    assert len(decode_video(blob)) == 8


def test_a_playlist_opens_nothing(tmp_path: Path) -> None:
    (tmp_path / "secret.mp4").write_bytes(clip())
    for text in (f"#EXTM3U\n#EXTINF:1,\nfile://{tmp_path}/secret.mp4\n", f"ffconcat version 1.0\nfile {tmp_path}/secret.mp4\n"):
        with pytest.raises(MediaError):
            decode_video(text.encode())


# ---------------------------------------------------------------- the interface

SIZES: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "num_queries": 4, "cross_every": 1}


def video_features(*num_frames: int) -> Features:
    torch.manual_seed(1)
    return Features(torch.randn(len(num_frames), max(num_frames), 9, 8), torch.tensor(num_frames))


@pytest.mark.parametrize("max_frames", [0, 6])
def test_the_video_interface_starts_as_the_image_interface(max_frames: int, tmp_path: Path) -> None:
    """Step 0: each frame becomes what the image interface makes of it, whatever else is in the batch."""
    torch.manual_seed(0)
    image = torch.nn.Sequential(*image_interface(8, 24, 0.02, **SIZES)).eval()
    save_file(image.state_dict(), tmp_path / "image.safetensors")
    frames = torch.nn.Sequential(*interface(8, 24, 0.02, max_frames=max_frames, **SIZES)).eval()
    initialise(frames, f"image:{tmp_path / 'image.safetensors'}")
    if not max_frames:
        initialise(frames, str(tmp_path / "image.safetensors"))  # the weights are the same, name by name
    features = video_features(5, 2, 1)
    out = frames(features)
    assert out.lengths.tolist() == [20, 8, 4]
    for i, num in enumerate([5, 2, 1]):
        alone = [image(Features(features.x[i, t : t + 1], torch.tensor([9]))).x[0] for t in range(num)]
        torch.testing.assert_close(out.x[i, : num * 4], torch.cat(alone), atol=1e-6, rtol=1e-5)


def test_weights_of_another_shape_are_named() -> None:
    frames = torch.nn.Sequential(*interface(8, 24, 0.02, **SIZES))
    state = frames.state_dict()
    state["0.queries"] = state["0.queries"][:2]
    with pytest.raises(ValueError, match=r"\['0.queries'\]"):
        import_image(state, frames)


def test_the_mean_of_the_frames_is_one_picture_long() -> None:
    """Videos of 1 and 3 frames in a batch: the mean over each one's own frames, by the weights of the image interface."""
    torch.manual_seed(0)
    frames, mean = (torch.nn.Sequential(*interface(8, 24, 0.02, mean_frames=m, **SIZES)).eval() for m in (False, True))
    mean.load_state_dict(frames.state_dict())
    videos = Features(torch.randn(2, 3, 9, 8), torch.tensor([1, 3]))
    long, short = frames(videos), mean(videos)
    assert short.lengths.tolist() == [4, 4]
    torch.testing.assert_close(short.x[0], long.x[0, :4])
    torch.testing.assert_close(short.x[1], long.x[1].unflatten(0, (3, 4)).mean(0))


def test_places_in_time_tell_equal_frames_apart() -> None:
    torch.manual_seed(0)
    frames = torch.nn.Sequential(*interface(8, 24, 0.02, max_frames=3, **SIZES)).eval()
    same = Features(video_features(1).x.expand(1, 3, 9, 8), torch.tensor([3]))
    first, second, _ = frames(same).x[0].split(4)
    torch.testing.assert_close(first, second)
    frames(same).x.square().sum().backward()
    places = frames[0].places
    assert places.grad.abs().sum(1).min() > 0
    with torch.no_grad():
        places.sub_(places.grad)
    first, second, _ = frames(same).x[0].split(4)
    torch.testing.assert_close(first, second)  # equal frames have equal gradients so far
    with torch.no_grad():
        places[1] += 1
    first, second, _ = frames(same).x[0].split(4)
    assert not torch.allclose(first, second)
    with pytest.raises(ValueError, match="4 frames for max_frames=3 places"):
        frames(video_features(4))


def both(llm_folder: Path, **more: Any) -> ModelConfig:
    model = tiny_model(llm_folder)
    image = model["modalities"]["image"]  # type: ignore[index]
    return ModelConfig.model_validate(model | {"modalities": {"image": image, "video": image | more}})


def test_image_and_video_share_one_encoder(llm_folder: Path) -> None:
    built = build(both(llm_folder, decode={"num_frames": 5}))
    image, movie = (built.model.modalities[name] for name in ("image", "video"))
    assert movie.encoder.encoder is image.encoder
    collator = Collator(built.renderer, built.processors, built.decoders, built.decode)
    blob = clip(num=30)
    inputs = collator.process("video", [blob, picture((9, 9, 9))])
    assert inputs["pixels"].shape[0] == 6  # the still picture once
    batched = movie.encode(Media(inputs=inputs))
    assert batched.x.shape == (2, 5, 4, 8)
    alone = torch.stack([image.encode(Media(inputs=built.processors["image"]([f]))).x[0] for f in decode_video(blob, 5)])
    torch.testing.assert_close(batched.x[0], alone)
    mirrored = collator.process("video", [blob], view=1)["pixels"][0]
    torch.testing.assert_close(mirrored, inputs["pixels"][0].flip(1), atol=0.02, rtol=0)


def test_a_conversation_about_a_photo_and_a_video(llm_folder: Path) -> None:
    from x2l.assistant import Assistant

    model = Assistant(build(both(llm_folder)))
    question = user(Part("image", bytes=picture((250, 0, 0))), Part("video", bytes=clip(num=9)), "What differs?")
    batch = model.collator.prompt([[question]])
    assert model.model.embed(batch).embeds.shape[1] == batch.input_ids.shape[1] - 2 + 4 + 8 * 4
    assert isinstance(model.generate_text([Sample("q", (question,))], max_new_tokens=3)[0], str)


def test_wrong_options_are_named(llm_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"modalities\.video\.decode: .*num_frame"):
        build(both(llm_folder, decode={"num_frame": 5}))
    assert len(DECODERS["video"](clip(num=3), num_frames=2)) == 2


def test_the_recipe_steps_twice(llm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X2L_CACHE", str(tmp_path / "cache"))
    load_train_config("tiny/stage2_video")
    raw: dict[str, Any] = yaml.safe_load((RECIPES / "tiny/stage2_video.yaml").read_text(encoding="utf-8"))
    image = tiny_model(llm_folder)["modalities"]["image"]  # type: ignore[index]
    first = build(ModelConfig.model_validate(tiny_model(llm_folder))).model.modalities["image"].get_submodule("interface")
    save_file({name: t.contiguous() for name, t in first.state_dict().items()}, tmp_path / "image.safetensors")
    raw["model"] = tiny_model(llm_folder, video=image)
    raw["init"] = dict.fromkeys(raw["init"], f"image:{tmp_path / 'image.safetensors'}")
    rows = {
        f"v{i}": {"mkv": clip("matroska", num=10 + i), "json": json.dumps({"text": "bin red", "lang": "en"}).encode()}
        for i in range(4)
    }
    write_shard(tmp_path / "data/grid-s1/train-0000.tar", rows)
    photos = {f"p{i}": {"png": picture((i, 9, 9)), "json": b'{"en": ["A dog runs .", "A dog ."]}'} for i in range(4)}
    write_shard(tmp_path / "data/flickr8k/train-0000.tar", photos)
    write_shard(tmp_path / "data/flickr8k/val-0000.tar", photos)
    raw |= {"data_root": str(tmp_path / "data"), "run": str(tmp_path / "run"), "steps": 2, "epochs": None, "batch_size": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    folder = train.train(load_train_config(str(tmp_path / "recipe.yaml")))
    assert (folder / "video.safetensors").is_file()
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == [1, 2]


def test_messages_may_name_a_video() -> None:
    sample = Sample("v", (user(Part("video", bytes=b"x"), "?"), assistant("!")))
    assert [part.type for part in sample.media] == ["video"]
