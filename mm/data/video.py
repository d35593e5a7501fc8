"""Clips: their header without decoding, and the frames shown at given times with.

A clip is demuxed once: its packets say which frame is shown when, and where decoding can start. Then only what lies
between a keyframe and a wanted frame is decoded, in any container, with or without an index. Seeking is never left to
the container, whose idea of a timestamp differs from format to format.

Frames are turned as the container says (phones store portrait clips sideways), and colours follow the matrix that the
stream names, BT.601 where it names none.
"""

import io
import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from statistics import median
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from mm.data.media import Decoder, ImageTransform, draw_box, normalise, resize
from mm.errors import DataError

if TYPE_CHECKING:
    import av
    from av.container import InputContainer

VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "mov", "avi")
Span = tuple[float, float]
"""Start and end of the part that is meant, in seconds."""

MUXERS = {"mp4": "mp4", "mov": "mov", "webm": "webm", "mkv": "matroska"}
"""Of containers that say when each frame is shown."""
CUT = ("h264", "hevc", "vp9", "av1")
"""Codecs of which each packet is a frame that is shown: VP8 and MPEG-4 have others, too."""

_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"  # and no playlists, which would open other files
_FRAME_PIXELS = 1 << 25  # 8K; what one frame may cost in memory, many times over in a decoder
_PACKETS = 1 << 22  # of all streams: four hours at 60 frames/s is 2^20
_DECODED_PIXELS = 10**11  # minutes of work on one core: 108,000 frames of 720p between keyframe and wanted frame
_SLACK = 0.01
_GROUP = 10.0  # seconds between keyframes, at most, of most encoders


@dataclass(frozen=True, slots=True)
class VideoHeader:
    """What can be known of a clip without decoding it. Width and height in pixels, as shown (after rotation).

    `frames` is None where the container does not count them. `codec` is FFmpeg's name of it.
    """

    width: int
    height: int
    seconds: float
    frames: int | None
    has_audio: bool
    codec: str = ""


def frame_times(
    header: VideoHeader, frames: int, span: Span | None = None, where: str = "the clip"
) -> tuple[float, ...]:
    """Seconds from the start: the middle of each of `frames` equal parts of the clip, or of a span of it.

    Raises `DataError` where the span lies outside the clip.
    """
    start, end = _bounds(header, span, where)
    return tuple(start + (i + 0.5) * (end - start) / frames for i in range(frames))


def frame_times_fps(
    header: VideoHeader, fps: float, max_frames: int, span: Span | None = None, where: str = "the clip"
) -> tuple[float, ...]:
    """Like `frame_times`, with about `fps` frames a second: at least one, and `max_frames` at most."""
    start, end = _bounds(header, span, where)
    return frame_times(header, max(1, min(max_frames, round((end - start) * fps))), span, where)


def _bounds(header: VideoHeader, span: Span | None, where: str) -> Span:
    if span is None:
        return 0.0, header.seconds
    start, end = max(0.0, span[0]), min(span[1], header.seconds)
    if not start < end:
        raise DataError(f"{where}: no frames in the span {span}, for the clip has {header.seconds:g} s")
    return start, end


def probe_video(file: bytes | BinaryIO, where: str, max_pixels: int, max_seconds: float) -> VideoHeader:
    """Header from the container; no frames are decoded. `where` names the sample in errors; raises `DataError`.

    A stream that does not state its duration (webm as browsers record it) is demuxed to the end to find it.
    """
    if isinstance(file, bytes):
        file = io.BytesIO(file)
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    with _open(file, where) as container:
        stream = _stream(container, where)
        width, height = stream.codec_context.width, stream.codec_context.height
        limit = min(max_pixels, _FRAME_PIXELS)
        if not 0 < width * height <= limit:
            raise DataError(f"{where}: frames of {width}x{height} pixels; expected 1 to {limit:,} (data.max_pixels)")
        if _rotation(container) % 180 == 90:
            width, height = height, width
        frames = stream.frames or None
        seconds = _stated_seconds(container, stream)
        if seconds is None:
            timeline = _Timeline(container, stream, size, where)
            seconds, frames = timeline.seconds, len(timeline.shown)
        has_audio = bool(container.streams.audio)
        codec = stream.codec_context.codec.canonical_name
    if not 0 < seconds < math.inf:
        raise DataError(f"{where}: the clip is empty ({seconds:g} s)")
    if seconds > max_seconds:
        raise DataError(
            f"{where}: {seconds:.0f} s of video are more than data.max_seconds = {max_seconds:g}; "
            "leave it out or raise the limit"
        )
    return VideoHeader(width, height, seconds, frames, has_audio, codec)


def decode_video(
    data: bytes,
    times: tuple[float, ...] | list[float],
    transform: ImageTransform,
    where: str,
    out: np.ndarray | None = None,
    *,
    rng: np.random.Generator | None = None,
    decoder: Decoder = "exact",
) -> np.ndarray:
    """float32 [F, 3, size, size], written into `out` where it is given: the frame shown at each of `times` (seconds
    from the first frame), that is, the last one that starts no later.

    A stream that ends up to 1 % early repeats its last frame. `rng` draws one crop and mirroring for the whole clip.
    `decoder` names the resizing, as for pictures. Raises `DataError` for what is damaged or ends earlier.
    """
    assert isinstance(transform.size, int), "frames are squares"
    shape = (len(times), 3, transform.size, transform.size)
    if out is None:
        out = np.empty(shape, dtype=np.float32)
    assert out.dtype == np.float32 and out.shape == shape, (out.dtype, out.shape, shape)
    with _open(io.BytesIO(data), where) as container:
        stream = _stream(container, where)
        timeline = _Timeline(container, stream, len(data), where)
        box, mirrored = None, False
        frames = _Frames(stream.codec_context, timeline, where)
        last: tuple[int, int] | None = None
        for index in sorted(range(len(times)), key=lambda index: times[index]):
            wanted = timeline.shown_at(times[index])
            if last is not None and last[0] == wanted:
                out[index] = out[last[1]]
                continue
            image = _upright(frames.at(wanted))
            if last is None and rng is not None:
                height, width = image.shape[:2]
                box = draw_box(width, height, transform.crop, rng) if transform.crop < 1 else None
                mirrored = transform.flip and rng.random() < 0.5
            pixels = resize(image, shape[2:], box, decoder)
            normalise(pixels[:, ::-1] if mirrored else pixels, transform, out[index])
            last = wanted, index
    return out


def share_of(header: VideoHeader, times: Sequence[float], ext: str) -> float:
    """About what share of a file `cut_video` needs for the frames at `times`; 1 where it leaves the file as it is."""
    if ext not in MUXERS or header.codec not in CUT:
        return 1.0
    return min(1.0, (max(times) - min(times) + _GROUP) / header.seconds)


def cut_video(data: bytes, times: Sequence[float], ext: str) -> tuple[bytes, list[float]]:
    """What of a clip the frames at `times` (seconds) need, and the times of these frames in it.

    The packets from the keyframe before the first of them to the last, as they are, in a container of the same kind:
    `decode_video` gives the same to the last bit. Sound is left out. The clip itself, where that saves less than half,
    where the new container says something else of these packets, and where the clip is damaged. The same bytes
    whenever it is done with one version of FFmpeg.
    """
    whole = data, [*times]
    if ext not in MUXERS:
        return whole
    try:
        with _open(io.BytesIO(data), "") as container:
            stream = _stream(container, "")
            before = _Timeline(container, stream, len(data), "")
            wanted = [before.shown_at(time) for time in times]
            indices = [before.pts.index(pts) for pts in wanted]
            first = min(before.keyframe(min(wanted)), *indices)
            packets = before.packets[first : max(indices) + 1]
            known = stream.codec_context.codec.canonical_name in CUT and not before.in_order
            if not known or 2 * sum(packet.size for packet in packets) > len(data):
                return whole
            abouts = [_about(container)]
            cut = _muxed(packets, MUXERS[ext])
        with _open(io.BytesIO(cut), "") as container:
            after = _Timeline(container, _stream(container, ""), len(cut), "")
            abouts.append(_about(container))
    except DataError:  # damaged, or nothing that such a container takes
        return whole
    alike = abouts[0] == abouts[1] and not after.in_order and _alike(packets, after.packets)
    if not alike or 2 * len(cut) > len(data):
        return whole
    places = [after.pts[index - first] for index in indices]
    found = [(pts - after.shown[0] + 0.5) * after.tick for pts in places]  # half a tick: nothing is rounded down
    within = min(found) >= 0 and max(found) <= after.seconds
    return (cut, found) if within and [after.shown_at(time) for time in found] == places else whole


def _muxed(packets: list["av.Packet"], format: str) -> bytes:
    """A container with these packets of one stream."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=format, options={"fflags": "+bitexact"}) as out:
        stream = out.add_stream_from_template(packets[0].stream)
        for packet in packets:
            copy = av.Packet(bytes(packet))
            copy.pts, copy.dts, copy.duration, copy.time_base = (
                packet.pts, packet.dts, packet.duration, packet.time_base,
            )  # fmt: skip
            copy.is_keyframe, copy.stream = packet.is_keyframe, stream
            out.mux(copy)
    return file.getvalue()


def _about(container: "InputContainer") -> tuple[Any, ...]:
    """What pixels depend on beside packets."""
    context = _stream(container, "").codec_context
    colours = (context.color_range, context.colorspace, context.color_primaries, context.color_trc)
    shape = (context.width, context.height, context.pix_fmt, bool(context.has_b_frames))
    return _rotation(container), context.name, context.codec_tag, context.extradata, shape, colours


def _alike(packets: list[Any], others: list[Any]) -> bool:
    """The same bytes at the same times from the first one on, with nothing that a decoder is told between packets."""
    told = ("new_extradata", "palette")
    if any(one.pts is None for one in (*packets, *others)) or any(
        one.has_sidedata(it) for one in packets for it in told
    ):
        return False
    if len({one.pts for one in packets}) < len(packets):  # two are one frame, or one of them is not shown
        return False

    def of(found: list[Any]) -> list[tuple[bytes, Fraction, bool]]:
        return [(bytes(one), (one.pts - found[0].pts) * one.time_base, one.is_keyframe) for one in found]

    return of(packets) == of(others)


@contextmanager
def _open(file: BinaryIO, where: str) -> Iterator["InputContainer"]:
    """The container; whatever FFmpeg raises inside the block becomes a `DataError`."""
    try:
        import av
    except ImportError as error:
        raise DataError(f'{where}: video needs PyAV ({error}); pip install "mm-pretrain[video]"') from None
    if not file.read(1):
        raise DataError(f"{where}: the clip is empty (0 bytes)")
    file.seek(0)
    options = {
        "format_whitelist": _FORMATS,
        "protocol_whitelist": "none",
        "max_pixels": str(_FRAME_PIXELS),
        "threads": "1",
    }
    try:
        with av.open(file, "r", options=options, metadata_errors="replace") as container:
            yield container
    except DataError:
        raise
    except Exception as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{where}: not a readable mp4, webm, mkv, mov or avi clip ({why})") from None


def _stream(container: "InputContainer", where: str) -> "av.VideoStream":
    """The first stream of moving pictures; covers and thumbnails are none."""
    import av.stream

    cover = av.stream.Disposition.attached_pic
    stream = next((stream for stream in container.streams.video if not stream.disposition & cover), None)
    if stream is None or stream.codec_context is None or stream.time_base is None:
        raise DataError(f"{where}: the file holds no video, or none that can be decoded")
    context = stream.codec_context
    context.thread_count = 1
    context.options = {"max_pixels": str(_FRAME_PIXELS)}
    return stream


def _rotation(container: "InputContainer") -> int:
    """Degrees counterclockwise, as the container states them.

    PyAV gives them with a decoded frame only; without one, FFmpeg's own description of the file is where they stand.
    """
    import av.logging

    dumps_format = container.dumps_format  # type: ignore[attr-defined]
    level = av.logging.get_level()
    av.logging.set_level(av.logging.INFO)
    try:
        found = re.search(r"isplay ?[mM]atrix: rotation of (-?[\d.]+) degrees", dumps_format())
    finally:
        av.logging.set_level(level)
    return round(float(found[1])) if found else 0


def _stated_seconds(container: "InputContainer", stream: "av.VideoStream") -> float | None:
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    # Matroska says when a stream ends on the file's clock, which its first frame need not be at the beginning of.
    is_matroska = "matroska" in container.format.name
    begin = float((stream.start_time or 0) * (stream.time_base or 0)) if is_matroska else 0.0
    if tag := re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", stream.metadata.get("DURATION", "")):
        return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3]) - begin
    if container.duration and not container.streams.audio:  # of the longest stream
        return container.duration / 1_000_000 - begin
    return None


class _Timeline:
    """The packets of a stream in decoding order, and when each frame is shown.

    Times are in ticks of the stream's time base. shown: sorted, without what an edit list cuts off.
    """

    def __init__(self, container: "InputContainer", stream: "av.VideoStream", size: int, where: str) -> None:
        self.where = where
        assert stream.time_base is not None
        self.tick = float(stream.time_base)
        self.packets: list[av.Packet] = []
        self.pts: list[int] = []
        self.shown: list[int] = []
        held = ends = 0
        for count, packet in enumerate(container.demux()):
            # A sample table may name the same bytes again and again.
            held += packet.size
            if count > _PACKETS or held > 2 * size + (1 << 20):
                raise DataError(f"{where}: the clip unpacks to more packets than a file of {size:,} bytes may hold")
            pts = packet.dts if packet.pts is None else packet.pts
            if packet.stream_index != stream.index or not packet.size or pts is None:
                continue
            self.packets.append(packet)
            self.pts.append(pts)
            if not packet.is_discard:
                self.shown.append(pts)
                ends = max(ends, pts + (packet.duration or 0))
        if not self.shown:
            raise DataError(f"{where}: the clip holds no frames")
        # Some writers give no presentation times: then frames come out in order with the times of other frames.
        reorders = bool(stream.codec_context.has_b_frames)
        self.in_order = reorders and all(packet.pts in (None, packet.dts) for packet in self.packets)
        self.shown.sort()
        first, last = self.shown[0], self.shown[-1]
        if ends <= last:  # durations are not stated
            gaps = [b - a for a, b in zip(self.shown, self.shown[1:], strict=False)]
            ends = last + max(1, round(median(gaps)) if gaps else 1)
        self.seconds = (ends - first) * self.tick
        self.keys: list[int] = []  # packets from which decoding can start, and their times, both rising
        self.key_pts: list[int] = []
        for i, packet in enumerate(self.packets):
            if packet.is_keyframe and (not self.key_pts or self.pts[i] > self.key_pts[-1]):
                self.keys.append(i)
                self.key_pts.append(self.pts[i])

    def shown_at(self, second: float) -> int:
        """The pts of the frame shown then."""
        if not 0 <= second <= self.seconds * (1 + _SLACK):
            raise DataError(
                f"{self.where}: the clip ends after {self.seconds:.2f} s; a frame at {second:.2f} s was planned"
            )
        ticks = self.shown[0] + math.floor(second / self.tick + 1e-6)
        return self.shown[max(0, bisect_right(self.shown, ticks) - 1)]

    def keyframe(self, pts: int) -> int:
        """The last packet from which the frame at `pts` can be decoded."""
        found = bisect_right(self.key_pts, pts)
        return self.keys[found - 1] if found else 0


class _Frames:
    """Frames by time, in rising order."""

    def __init__(self, context: Any, timeline: _Timeline, where: str) -> None:
        self.context, self.timeline, self.where = context, timeline, where
        self.next = 0  # the packet that comes next
        self.came = 0  # frames up to here, where they have no times of their own
        self.work = 0
        self.ahead: list[Any] = []  # decoded and not yet shown
        self.frame: Any = None

    def at(self, pts: int) -> Any:
        """The last frame with a time of `pts` or before."""
        key = self.timeline.keyframe(pts)
        if key > self.next:
            self.context.flush_buffers()
            self.next, self.ahead, self.frame = key, [], None
            self.came = bisect_left(self.timeline.shown, self.timeline.pts[key])
        while self.frame is None or self.frame.pts < pts:
            if not self.ahead and not self._decode():
                break
            if self.ahead and self.frame is not None and self.ahead[0].pts > pts:
                break
            if self.ahead:
                self.frame = self.ahead.pop(0)
        slack = max(1.0, _SLACK * self.timeline.seconds / self.timeline.tick)
        if self.frame is None or abs(self.frame.pts - pts) > slack or self.frame.is_corrupt:
            raise DataError(f"{self.where}: the clip is damaged (no frame at {pts * self.timeline.tick:.2f} s)")
        return self.frame

    def _decode(self) -> bool:
        """Feed one packet; False once all is decoded."""
        packets = self.timeline.packets
        if self.next > len(packets):
            return False
        frames = self.context.decode(packets[self.next] if self.next < len(packets) else None)
        self.next += 1
        self.work += sum(frame.width * frame.height for frame in frames)
        if self.work > _DECODED_PIXELS:
            raise DataError(f"{self.where}: too much to decode between the clip's keyframes; re-encode it with more")
        if self.timeline.in_order:
            for frame in frames:
                frame.pts = self.timeline.shown[min(self.came, len(self.timeline.shown) - 1)]
                self.came += 1
        self.ahead += [frame for frame in frames if frame.pts is not None]
        return True


def _upright(frame: Any) -> np.ndarray:
    """uint8 [H, W, 3]: the frame in RGB, turned as it is to be shown."""
    pixels = frame.to_ndarray(format="rgb24", threads=1)
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels
