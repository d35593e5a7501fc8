"""Clips whose frames are numbered by their brightness: the right ones come at the right times, from every container."""

import builtins
import io
import subprocess
import sys
from bisect import bisect_right
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mm.data import video
from mm.data.media import ImageTransform, draw_box
from mm.data.sample import keyed_rng
from mm.data.video import VideoHeader, cut_video, decode_video, frame_times, frame_times_fps, probe_video
from mm.errors import DataError

av = pytest.importorskip("av")

PLAIN = ImageTransform(16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
STEP = 4  # levels from one frame to the next
FORMATS = {
    "mp4": ("mp4", "libx264", {"bf": "3", "crf": "12"}),
    "mp4 fragmented": ("mp4", "libx264", {"crf": "12"}),
    "mov": ("mov", "libx265", {"x265-params": "log-level=none:crf=12:pools=none"}),
    "webm vp8": ("webm", "libvpx", {"crf": "4", "b": "2M"}),
    "webm vp9": ("webm", "libvpx-vp9", {"crf": "10", "b": "0"}),
    "webm live": ("webm", "libvpx", {"crf": "4", "b": "2M"}),
    "mkv": ("matroska", "libx264", {"bf": "2", "crf": "12"}),
    "avi": ("avi", "mpeg4", {"b": "2M", "bf": "2"}),
    "avi mjpeg": ("avi", "mjpeg", {"q:v": "2"}),
}
CONTAINER = {"mp4 fragmented": {"movflags": "frag_keyframe+empty_moov"}, "webm live": {"live": "1"}}


def clip(
    name: str = "mp4",
    frames: int = 60,
    rate: int = 24,
    pts: list[int] | None = None,
    size: tuple[int, int] = (64, 48),
    rotation: int = 0,
    sound: bool = False,
    draw: Any = None,
    gop: int = 12,
) -> bytes:
    """`pts` in 1/1000 s. `draw` gives uint8 [H, W, 3] for a frame's number; else frame i has brightness 4 i."""
    format, codec, options = FORMATS[name]
    file = io.BytesIO()
    with av.open(file, "w", format=format, options=CONTAINER.get(name, {})) as out:
        stream = out.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size = gop
        if pts:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        if sound:
            audio = out.add_stream("libopus" if format in ("webm", "matroska") else "aac", rate=48000)
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            silence.sample_rate = 48000
            for packet in audio.encode(silence):
                out.mux(packet)
        for i in range(frames):
            pixels = np.full((size[1], size[0], 3), i * STEP, dtype=np.uint8) if draw is None else draw(i)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if pts:
                frame.pts, frame.time_base = pts[i], Fraction(1, 1000)
            for packet in stream.encode(frame):
                out.mux(packet)
        for one in (stream, audio) if sound else (stream,):
            for packet in one.encode(None):
                out.mux(packet)
    return file.getvalue()


def numbers(frames: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) * 255 / STEP) for frame in frames]


def probed(data: bytes) -> VideoHeader:
    return probe_video(data, "s", 10**7, 1000)


@pytest.mark.parametrize("name", FORMATS)
def test_the_frame_shown_at_each_time(name: str) -> None:
    data = clip(name)
    header = probed(data)
    assert (header.width, header.height, header.has_audio) == (64, 48, False)
    assert header.seconds == pytest.approx(2.5, abs=0.002)
    assert header.frames == 60 or (header.frames is None and name in ("mp4 fragmented", "webm vp8", "webm vp9", "mkv"))
    times = frame_times(header, 8)
    assert numbers(decode_video(data, times, PLAIN, "s")) == [3, 11, 18, 26, 33, 41, 48, 56]
    # In any order, before and after keyframes, at the very start and end, and each time twice.
    times = (2.49, 0.0, 1.0 + 1 / 48, 0.5 - 1 / 48, 0.5 + 1 / 48, 2.49, 0.0, 0.02)
    assert numbers(decode_video(data, times, PLAIN, "s")) == [59, 0, 24, 11, 12, 59, 0, 0]
    found = decode_video(data, [(i + 0.5) / 24 for i in range(60)], PLAIN, "s")
    assert numbers(found) == list(range(60))


@pytest.mark.parametrize(("name", "sound"), [("mkv", False), ("webm vp9", False), ("mkv", True), ("mp4", True)])
def test_a_clip_that_begins_late_is_as_long_as_it_is_shown(name: str, sound: bool) -> None:
    """Matroska says when a stream ends on a clock that it need not begin at 0 of."""
    data = clip(name, pts=[2000 + 50 * i for i in range(60)], sound=sound)
    header = probed(data)
    assert header.seconds == pytest.approx(3.0, abs=0.1)
    times = frame_times(header, 6)
    assert numbers(decode_video(data, times, PLAIN, "s")) == [int(time / 0.05) for time in times]


def test_frames_without_times_of_their_own_come_in_order() -> None:
    """Some writers store decoding times alone, though the codec reorders: box.mp4 of OpenCV's samples is one."""
    file = io.BytesIO()
    with av.open(io.BytesIO(clip("mp4", frames=48))) as source, av.open(file, "w", format="mp4") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for count, packet in enumerate(p for p in source.demux() if p.size):
            packet.stream = stream
            packet.dts = packet.pts = round(count / 24 / packet.time_base)
            out.mux(packet)
    data = file.getvalue()
    times = [(i + 0.5) / 24 for i in (0, 1, 2, 3, 7, 13, 14, 30, 31, 47)]
    assert numbers(decode_video(data, times, PLAIN, "s")) == [0, 1, 2, 3, 7, 13, 14, 30, 31, 47]


OPEN = {"bf": "3", "crf": "12", "x264-params": "open-gop=1:b-pyramid=strict"}
PARTS = ((1.0, 1.21, 1.3), (0.0, 0.13), (2.2, 2.45), (2.3, 2.1, 2.1))


@pytest.mark.parametrize(
    ("name", "rotation"),
    [("webm vp9", 0), *((name, turn) for name in ("mp4", "mp4 fragmented", "mov", "mkv") for turn in (0, -90))],
)
def test_a_cut_clip_shows_the_same_to_the_last_bit(name: str, rotation: int) -> None:
    data = clip(name, draw=scene, size=(96, 64), rotation=rotation, sound=True, gop=6)
    for times in PARTS:
        cut, found = cut_video(data, times, name.split()[0])
        assert len(cut) < len(data) / 2 and not probed(cut).has_audio
        expected = decode_video(data, times, PLAIN, "s")
        assert np.array_equal(decode_video(cut, found, PLAIN, "s"), expected)
        assert (cut, found) == cut_video(data, times, name.split()[0]), "the same bytes whenever it is done"
        assert cut_video(cut, found, name.split()[0])[0] is cut, "there is nothing more to leave out"


def test_clips_are_cut_where_frames_lean_on_those_after_a_keyframe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open groups of pictures, of uneven length, in colours that the container names."""
    monkeypatch.setitem(FORMATS, "open", ("mp4", "libx264", {**OPEN, "colorspace": "bt709", "color_range": "tv"}))
    pts = [40 * i + (17 * i) % 29 for i in range(60)]
    data = clip("open", pts=pts, draw=scene, size=(96, 64), gop=6)
    for start in np.linspace(0, 2.0, 23):
        times = (start, start + 0.2)
        cut, found = cut_video(data, times, "mp4")
        assert len(cut) < len(data) / 2
        assert np.array_equal(decode_video(cut, found, PLAIN, "s"), decode_video(data, times, PLAIN, "s")), start


@pytest.mark.parametrize("options", [{"use_editlist": "0"}, {"movflags": "frag_keyframe+empty_moov"}, {}])
def test_clips_that_begin_with_frames_before_their_keyframe(
    options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As streams do that were copied from somewhere in the middle."""
    monkeypatch.setitem(FORMATS, "open", ("mp4", "libx264", OPEN))
    file = io.BytesIO()
    with (
        av.open(io.BytesIO(clip("open", frames=120, draw=scene, size=(96, 64), gop=6))) as source,
        av.open(file, "w", format="mp4", options=options) as out,
    ):
        stream = out.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux() if packet.size]
        second = [n for n, packet in enumerate(packets) if packet.is_keyframe][1]
        for packet in packets[second:]:
            packet.stream = stream
            out.mux(packet)
    data, count = file.getvalue(), 0
    for start in np.linspace(0, 3, 31):
        times = (start, start + 0.2)
        cut, found = cut_video(data, times, "mp4")
        count += cut is not data
        try:
            expected = decode_video(data, times, PLAIN, "s")
        except DataError:
            continue
        assert np.array_equal(decode_video(cut, found, PLAIN, "s"), expected), start
    assert count > 10


def test_a_clip_stays_whole_where_a_cut_saves_little_or_could_differ() -> None:
    data = clip(gop=6)
    assert cut_video(data, (0.1, 2.3), "mp4") == (data, [0.1, 2.3]), "most of it is needed"
    for name, ext in (("avi", "avi"), ("webm vp8", "webm"), ("mp4", "webm")):  # what is no frame, another codec
        one = clip(name, gop=6)
        assert cut_video(one, (0.5, 0.6), ext) == (one, [0.5, 0.6])
    for bad in (b"", b"no clip", data[:1000], data[:-9] + b"x" * 9):
        cut, found = cut_video(bad, (0.5, 0.6), "mp4")  # what is wrong is said when it is decoded
        assert cut is bad or np.array_equal(
            decode_video(cut, found, PLAIN, "s"), decode_video(data, (0.5, 0.6), PLAIN, "s")
        )
    assert cut_video(data, (5.0,), "mp4")[0] is data, "behind its end"


def scene(i: int) -> np.ndarray:
    rng = np.random.default_rng(7)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    return np.roll(np.asarray(small.resize((96, 64), Image.Resampling.BICUBIC)), i * 2, axis=1)


@pytest.mark.parametrize("name", ["mp4", "webm vp9", "avi"])
def test_pixels_are_those_of_decoding_everything(name: str) -> None:
    data = clip(name, draw=scene, size=(96, 64))
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
    start = min(frame.time for frame in frames)
    shown = [frame.time - start for frame in frames]
    times = np.random.default_rng(0).uniform(0, 2.5, 12)
    found = decode_video(data, times.tolist(), PLAIN, "s")
    for time, one in zip(times, found, strict=True):
        frame = frames[bisect_right(shown, time) - 1].to_image()
        expected = np.asarray(frame.resize((16, 16), Image.Resampling.BICUBIC), dtype=np.float32) / 255
        np.testing.assert_allclose(one.transpose(1, 2, 0), expected, atol=1e-6)
    fast = decode_video(data, times.tolist(), PLAIN, "s", decoder="fast")
    assert np.abs(fast - found).max() * 255 < 4.01


@pytest.mark.parametrize("name", ["mp4", "webm vp8", "mkv"])
def test_frames_of_uneven_length(name: str) -> None:
    pts = np.cumsum([0, *np.random.default_rng(1).choice([10, 20, 40, 200], 49)]).tolist()
    data = clip(name, frames=50, rate=25, pts=pts)
    for i in (0, 1, 7, 20, 33, 48):
        middle = (pts[i] + pts[i + 1]) / 2000
        assert numbers(decode_video(data, (middle, pts[i] / 1000 + 0.002), PLAIN, "s")) == [i, i]
    assert probed(data).seconds == pytest.approx(pts[-1] / 1000, abs=0.25)


@pytest.mark.parametrize("rotation", [90, 180, -90])
@pytest.mark.parametrize("name", ["mp4", "mov"])
def test_clips_are_turned_as_their_container_says(name: str, rotation: int) -> None:
    pixels = np.zeros((48, 64, 3), dtype=np.uint8)
    pixels[:24, :32] = (255, 0, 0)  # top left
    pixels[:24, 32:] = (0, 255, 0)  # top right
    data = clip(name, frames=8, rotation=rotation, draw=lambda i: pixels)
    header = probed(data)
    assert (header.width, header.height) == ((64, 48) if rotation == 180 else (48, 64))
    found = decode_video(data, frame_times(header, 2), PLAIN, "s")[0].transpose(1, 2, 0)
    turned = np.rot90(pixels, round(rotation / 90))  # counterclockwise, as FFmpeg counts
    expected = np.asarray(Image.fromarray(turned).resize((16, 16), Image.Resampling.BICUBIC)) / 255
    assert np.abs(found - expected)[2:6, 2:6].max() < 0.1 and np.abs(found - expected)[10:14, 10:14].max() < 0.1


def test_colours_follow_the_matrix_that_the_stream_names() -> None:
    for matrix, name in ((1, "bt709"), (6, "smpte170m")):
        file = io.BytesIO()
        with av.open(file, "w", format="mp4") as out:
            stream = out.add_stream("libx264", rate=24, options={"crf": "8", "colorspace": name, "color_range": "tv"})
            stream.width = stream.height = 64
            stream.pix_fmt = "yuv420p"
            red = av.VideoFrame.from_ndarray(np.full((64, 64, 3), (220, 40, 60), dtype=np.uint8), format="rgb24")
            red = red.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=1)
            for packet in [*stream.encode(red), *stream.encode(None)]:
                out.mux(packet)
        found = decode_video(file.getvalue(), (0.0,), PLAIN, "s")[0].mean(axis=(1, 2)) * 255
        np.testing.assert_allclose(found, (220, 40, 60), atol=4)


def test_only_what_is_needed_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = clip("mp4", frames=60, gop=6)
    fed = []
    decode = video._Frames._decode
    monkeypatch.setattr(video._Frames, "_decode", lambda self: fed.append(self.next) or decode(self))  # type: ignore[func-returns-value]
    assert numbers(decode_video(data, (0.02, 1.02, 2.02), PLAIN, "s")) == [0, 24, 48]
    assert len(fed) < 30 and {0, 24, 48} <= set(fed) and not {12, 20, 40} & set(fed)


@pytest.mark.parametrize("name", ["mp4", "webm vp8", "avi"])
def test_an_early_end_of_a_hundredth_repeats_the_last_frame_and_more_is_refused(name: str) -> None:
    data = clip(name)
    assert numbers(decode_video(data, (2.52,), PLAIN, "s")) == [59]
    with pytest.raises(DataError, match=r"^s/0/k: the clip ends after 2.50 s; a frame at 2.60 s was planned$"):
        decode_video(data, (0.1, 2.6), PLAIN, "s/0/k")


def test_a_stream_cut_short_is_refused() -> None:
    data = clip("webm live", draw=scene, size=(96, 64))
    times = frame_times(probed(data), 8)
    assert decode_video(data, times, PLAIN, "s").shape == (8, 3, 16, 16)
    with pytest.raises(DataError, match=r"^s: the clip ends after"):
        decode_video(data[: len(data) // 2], times, PLAIN, "s")
    assert probed(data[: len(data) // 2]).seconds < 2


def test_times_are_the_middles_of_equal_parts() -> None:
    header = VideoHeader(64, 48, 10.0, None, False)
    assert frame_times(header, 4) == (1.25, 3.75, 6.25, 8.75)
    assert frame_times(header, 2, (4.0, 8.0)) == (5.0, 7.0)
    assert frame_times(header, 1, (9.0, 30.0)) == (9.5,)
    assert frame_times_fps(header, 0.4, 100) == frame_times(header, 4)
    assert frame_times_fps(header, 30, 16) == frame_times(header, 16)
    assert frame_times_fps(header, 0.01, 16) == (5.0,)
    assert frame_times_fps(header, 1, 100, (2.0, 4.0)) == (2.5, 3.5)
    for span in ((10.0, 12.0), (3.0, 3.0)):
        with pytest.raises(DataError, match=r"^s: no frames in the span"):
            frame_times(header, 2, span, "s")


@pytest.mark.parametrize("name", ["mp4", "webm vp8", "webm live", "mp4 fragmented"])
def test_sound_is_noticed_and_does_not_count_as_video(name: str) -> None:
    data = clip(name, sound=True)
    header = probed(data)
    assert header.has_audio and header.seconds == pytest.approx(2.5, abs=0.002)
    assert numbers(decode_video(data, (1.02,), PLAIN, "s")) == [24]


def test_one_crop_and_mirroring_for_the_whole_clip() -> None:
    transform = ImageTransform(16, (0.0,) * 3, (1.0,) * 3, crop=0.3, flip=True)  # type: ignore[arg-type]
    data = clip("mp4", frames=8, draw=lambda i: scene(0), size=(96, 64))
    whole = decode_video(data, (0.0,), ImageTransform(64, (0.0,) * 3, (1.0,) * 3), "s")  # type: ignore[arg-type]
    with av.open(io.BytesIO(data)) as container:
        image = next(container.decode(video=0)).to_image()
    mirrored = 0
    for i in range(8):
        found = decode_video(data, (0.02, 0.1, 0.3), transform, "s", rng=keyed_rng(i))
        assert np.abs(found - found[0]).max() < 0.1 and whole.shape == (1, 3, 64, 64)
        cut = image.resize((16, 16), Image.Resampling.BICUBIC, draw_box(96, 64, 0.3, keyed_rng(i)))
        expected = np.asarray(cut).transpose(2, 0, 1) / 255
        errors = [np.abs(found[0] - expected).max(), np.abs(found[0] - expected[:, :, ::-1]).max()]
        assert min(errors) < 0.1
        mirrored += errors[1] < errors[0]
    assert 0 < mirrored < 8


def test_frames_are_written_into_the_array_that_is_given() -> None:
    data = clip()
    batch = np.full((2, 4, 3, 16, 16), 7, dtype=np.float32)
    decode_video(data, (0.1, 0.2, 1.0, 2.0), PLAIN, "s", out=batch[1])
    np.testing.assert_array_equal(batch[1], decode_video(data, (0.1, 0.2, 1.0, 2.0), PLAIN, "s"))
    assert (batch[0] == 7).all()


def test_limits_and_odd_files(monkeypatch: pytest.MonkeyPatch) -> None:
    data = clip()
    with pytest.raises(DataError, match=r"^s: frames of 64x48 pixels; expected 1 to 3,000 \(data.max_pixels\)"):
        probe_video(data, "s", 3000, 10)
    with pytest.raises(DataError, match=r"^s: 2 s of video are more than data.max_seconds = 1"):
        probe_video(data, "s", 10**6, 1)
    with pytest.raises(DataError, match=r"^s: the clip is empty \(0 bytes\)$"):
        probe_video(b"", "s", 10**6, 10)
    sound = io.BytesIO()
    with av.open(sound, "w", format="mp4") as out:
        audio = out.add_stream("aac", rate=48000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        silence.sample_rate = 48000
        for packet in [*audio.encode(silence), *audio.encode(None)]:
            out.mux(packet)
    with pytest.raises(DataError, match=r"^s: the file holds no video"):
        probe_video(sound.getvalue(), "s", 10**6, 10)
    # A file that names other files, or addresses, is never followed.
    for text in (
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n/etc/passwd\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile /etc/passwd\n",
    ):
        with pytest.raises(DataError, match=r"^s: not a readable mp4, webm, mkv, mov or avi clip"):
            probe_video(text.encode(), "s", 10**6, 10)
    monkeypatch.setattr(video, "_DECODED_PIXELS", 64 * 48 * 5)
    with pytest.raises(DataError, match=r"^s: too much to decode"):
        decode_video(clip(gop=100), (2.0,), PLAIN, "s")
    monkeypatch.setattr(video, "_PACKETS", 20)
    with pytest.raises(DataError, match=r"^s: the clip unpacks to more packets"):
        decode_video(data, (2.0,), PLAIN, "s")
    monkeypatch.setattr(video, "_PACKETS", 10**6)
    monkeypatch.setattr(video, "_FRAME_PIXELS", 1000)
    with pytest.raises(DataError, match=r"^s: "):
        decode_video(data, (2.0,), PLAIN, "s")


@pytest.mark.parametrize("name", ["mp4", "mov", "webm vp8", "webm vp9", "mkv", "avi"])
def test_damaged_clips_are_decoded_or_refused_in_one_line(name: str) -> None:
    data = clip(name, frames=20, draw=scene, size=(96, 64))
    rng = np.random.default_rng(4)
    times = frame_times(probed(data), 4)
    refused = 0
    for i in range(50):
        mutated = bytearray(data)
        reach = min(len(data), 300) if i % 2 else len(data)
        low = 0 if i % 3 else max(0, len(data) - 900)  # the index of mp4 and mov stands at the end
        for at in rng.integers(low, max(reach, low + 1), rng.integers(1, 10)):
            mutated[at] = rng.integers(0, 256)
        if i % 5 == 0:
            del mutated[int(rng.integers(0, len(data))) :]
        bad = bytes(mutated)
        for planned in (times, None):
            try:
                found = decode_video(
                    bad, planned or frame_times(probe_video(bad, "s/0/k", 10**6, 60), 4), PLAIN, "s/0/k"
                )
                assert found.shape == (4, 3, 16, 16) and np.isfinite(found).all()
            except DataError as error:
                refused += 1
                assert str(error).startswith("s/0/k: ") and "\n" not in str(error) and " at 0x" not in str(error)
    assert refused > 10


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = clip(frames=3)
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "av":
            raise ImportError(f"No module named '{name}'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r'^s: video needs PyAV .*; pip install "mm-pretrain\[video\]"$'):
        decode_video(data, (0.0,), PLAIN, "s")


def test_importing_loads_neither_pyav_nor_torch() -> None:
    code = "import sys, mm.data.video; assert not {'av', 'torch'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
