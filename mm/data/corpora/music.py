"""Music rendered from scores: what plays, how fast and how many voices is known exactly, since it was chosen here.

Scores come from music21's corpus, the sound from a small General MIDI soundfont. Parsing a score is what costs, so
several windows are cut from each and each is rendered with several instruments. The key is the one that music21's
analysis finds for the whole score (Krumhansl and Schmuckler): an estimate, and the home key rather than the window's.
"""

import importlib
import io
import math
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mm.data.corpora.build import Workbench
from mm.errors import ConfigError

# music21 and the synthesizer, and what music21 imports. The synthesizer's own dependency, PyAudio, is only needed to
# play aloud and has no wheel for Linux.
LIBRARIES = {
    "music21": "10.5.1",
    "tinysoundfont": "0.3.7",
    "chardet": "7.7.0",
    "more-itertools": "11.2.1",
    "webcolors": "25.10.0",
}
SOUNDFONT = "usr/share/sounds/sf2/TimGM6mb.sf2"
# Folder of music21's corpus -> the composer, or "" where every score names its own, if any.
COLLECTIONS = {
    "bach": "Johann Sebastian Bach", "beethoven": "Ludwig van Beethoven", "haydn": "Joseph Haydn",
    "monteverdi": "Claudio Monteverdi", "mozart": "Wolfgang Amadeus Mozart",
    "palestrina": "Giovanni Pierluigi da Palestrina", "ryansMammoth": "", "trecento": "",
}  # fmt: skip
SCORES = (".abc", ".krn", ".mxl", ".xml")
# General MIDI programs.
INSTRUMENTS = {
    "piano": 0, "harpsichord": 6, "marimba": 12, "church organ": 19, "guitar": 24, "violin": 40,
    "cello": 42, "trumpet": 56, "alto saxophone": 65, "oboe": 68, "clarinet": 71, "flute": 73,
}  # fmt: skip
TEMPI = (60, 80, 100, 120, 140)
RATE = 24_000
WINDOWS = 2
RENDERINGS = 2
PERCUSSION = 9  # the channel that General MIDI keeps for it
LICENCE = "score: by permission of its encoder, see music21's corpus/license.txt; soundfont GPL-2"


@dataclass(frozen=True, order=True)
class Note:
    """Start and end in quarter notes, the voice it belongs to, its MIDI pitch."""

    start: float
    end: float
    voice: int
    pitch: int


def build(bench: Workbench) -> None:
    wanted, seconds = bench.options["count"], bench.options["seconds"]
    if wanted < 1:
        raise ConfigError(f"music: count is {wanted}; expected 1 or more")
    if not 1 <= seconds <= 600:
        raise ConfigError(f"music: seconds is {seconds:g}; expected 1 to 600")
    libraries = [bench.library(name, version) for name, version in LIBRARIES.items()]
    soundfont = (bench.unpack("timgm6mb-soundfont", SOUNDFONT.__eq__) / SOUNDFONT).read_bytes()
    with _importable(libraries), bench.shards("music") as shards:
        rng = random.Random(bench.options["seed"])
        corpus = libraries[0] / "music21" / "corpus"
        paths = list(_in_turn(corpus, rng))
        # Of many clips each score gives more; half of the windows are expected to be full.
        windows = max(WINDOWS, math.ceil(2 * wanted / (RENDERINGS * len(paths))))
        for path in paths:
            if bench.counts["clips"] == wanted:
                break
            try:
                notes, about = read_score(path)
            except Exception:  # music21 raises whatever its parsers stumble over
                bench.counts["scores dropped: cannot be parsed"] += 1
                continue
            bench.counts["scores"] += 1
            source = path.relative_to(libraries[0]).as_posix()
            clips = draw_clips(notes, rng, seconds, windows)
            if not clips:
                bench.counts["scores without a clip: too short, or silent for a second"] += 1
            for number, (clip, instrument, tempo) in enumerate(clips):
                if bench.counts["clips"] == wanted:
                    break
                audio = render(clip, INSTRUMENTS[instrument], tempo, seconds, soundfont)
                voices = len({note.voice for note in clip})
                members = {**about, "instrument": instrument, "tempo": tempo, "voices": voices}
                members |= {"caption": caption_of(members), "source": source, "licence": LICENCE}
                stem = path.relative_to(corpus).with_suffix("").as_posix()
                key = f"{stem.replace('/', '-')}-{number}".replace(".", "_")
                shards.write(key, {"flac": _flac(audio), "json": members})
                bench.counts["clips"] += 1
                bench.counts[f"clips of {instrument}"] += 1
                bench.progress("rendering clips", bench.counts["clips"])
        if missing := wanted - bench.counts["clips"]:
            bench.counts["clips short of those asked for: the scores gave no more"] = missing


def _in_turn(corpus: Path, rng: random.Random) -> Iterator[Path]:
    """Scores in random order, one of each collection in turn while it has any."""
    piles = []
    for name in COLLECTIONS:
        # Some are there in two formats; both would be the same piece.
        found = sorted(path for path in (corpus / name).rglob("*") if path.suffix in SCORES)
        pile = list({path.with_suffix(""): path for path in found}.values())
        rng.shuffle(pile)
        piles.append(pile)
    while any(piles):
        for pile in piles:
            if pile:
                yield pile.pop()


def read_score(path: Path) -> tuple[list[Note], dict[str, str]]:
    """The notes of a score, and composer, title and key. Raises whatever music21 does."""
    music21: Any = importlib.import_module("music21")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        score = music21.converter.parseFile(path, forceSource=True, storePickle=False)
        notes = [note for voice, part in enumerate(score.parts) for note in _sounding(part, voice)]
        key = score.analyze("key")
    below = path.parts[max(number for number, part in enumerate(path.parts) if part in COLLECTIONS) :]
    metadata = score.metadata
    title = metadata.bestTitle if metadata else None
    if title in (None, "", path.name):  # music21 gives the file's name where there is no title
        title = " ".join(below[1:]).removesuffix(path.suffix)
    return sorted(notes), {
        "composer": COLLECTIONS[below[0]] or (metadata and metadata.composer) or "",
        "title": title,
        "key": f"{key.tonic.name} {key.mode}".replace("-", "♭"),
    }


def _sounding(part: Any, voice: int) -> list[Note]:
    """The notes of a part, tied ones joined. (music21's own stripTies takes minutes for a movement of a quartet.)"""
    notes: list[Note] = []
    last: dict[int, int] = {}  # pitch -> the number of its note so far
    for element in part.flatten().notes:
        for one in getattr(element, "notes", [element]):  # of a chord, or the note itself
            if not hasattr(one, "pitch"):  # a drum
                continue
            start, pitch = float(element.offset), int(one.pitch.midi)
            end = start + float(element.quarterLength)
            before = last.get(pitch)
            if (
                one.tie is not None
                and one.tie.type != "start"
                and before is not None
                and abs(notes[before].end - start) < 1e-6
            ):
                notes[before] = replace(notes[before], end=end)
            elif end > start:
                last[pitch] = len(notes)
                notes.append(Note(start, end, voice, pitch))
    return notes


def draw_clips(
    notes: list[Note], rng: random.Random, seconds: float, windows: int
) -> list[tuple[list[Note], str, int]]:
    """Up to `windows` of a score, each for several instruments and a tempo drawn for each: (notes, instrument, tempo).

    A window starts with a note and is as many quarters long as `seconds` take at its tempo; it has a note in every
    second. Notes are counted from its start.
    """
    found: list[tuple[list[Note], str, int]] = []
    end = max((note.end for note in notes), default=0.0)
    starts = sorted({note.start for note in notes if note.start + seconds * TEMPI[0] / 60 <= end})
    for start in rng.sample(starts, min(windows, len(starts))):
        for instrument in rng.sample(sorted(INSTRUMENTS), RENDERINGS):
            tempo = rng.choice(TEMPI)
            quarters = seconds * tempo / 60
            clip = [
                Note(note.start - start, min(note.end - start, quarters), note.voice, note.pitch)
                for note in notes
                if start <= note.start < start + quarters
            ]
            if all(any(int(note.start * 60 / tempo) == second for note in clip) for second in range(int(seconds))):
                found.append((clip, instrument, tempo))
    return found


def render(notes: list[Note], program: int, tempo: int, seconds: float, soundfont: bytes) -> np.ndarray:
    """So many seconds of mono sound, float32 [seconds * RATE], never louder than full scale."""
    tinysoundfont: Any = importlib.import_module("tinysoundfont")
    synth = tinysoundfont.Synth(samplerate=RATE)
    font = synth.sfload(soundfont)
    channels = [channel for channel in range(16) if channel != PERCUSSION]
    for channel in channels:
        synth.program_select(channel, font, 0, program)
    events = []  # (sample, on, channel, pitch): what ends at a sample ends before anything begins there
    for note in notes:
        channel = channels[note.voice % len(channels)]
        for position, on in ((note.start, True), (note.end, False)):
            events.append((round(position * 60 / tempo * RATE), on, channel, note.pitch))
    total, at = round(seconds * RATE), 0
    pieces = []
    for sample, on, channel, pitch in [*sorted(events), (total, False, 0, 0)]:
        if at < min(sample, total):
            stereo = np.frombuffer(bytes(synth.generate(min(sample, total) - at)), np.float32)
            pieces.append(stereo.reshape(-1, 2).mean(1))
            at = min(sample, total)
        if on:
            synth.noteon(channel, pitch, 90)
        else:
            synth.noteoff(channel, pitch)
    audio = np.concatenate(pieces)
    return audio / max(1.0, float(np.abs(audio).max()) / 0.99)


def caption_of(clip: dict[str, Any]) -> str:
    voices = "1 voice" if clip["voices"] == 1 else f"{clip['voices']} voices"
    by = f" by {clip['composer']}" if clip["composer"] else ""
    return (
        f"{clip['title']}{by}, played on {clip['instrument']} in {clip['key']} "
        f"at {clip['tempo']} beats per minute, {voices}"
    )


def _flac(audio: np.ndarray) -> bytes:
    soundfile: Any = importlib.import_module("soundfile")
    out = io.BytesIO()
    soundfile.write(out, audio, RATE, format="FLAC", subtype="PCM_16")
    return out.getvalue()


@contextmanager
def _importable(folders: list[Path]) -> Iterator[None]:
    """The folders may be imported from meanwhile, after everything that is installed."""
    before = list(sys.path)
    sys.path += map(str, folders)
    try:
        yield
    finally:
        sys.path[:] = before
