"""Emoji: every picture of the Noto Color Emoji font that Unicode's CLDR names, in full size and 20 languages.

The shipped data set `builtin:emoji` is the part of it without skin tones, at 64 pixels. A picture's `group` is the
shipped one's, and a picture with a skin tone is in the group of the one without, so that a split by group never has
near-twins on two sides, nor any of the shipped test pictures where it should not.
"""

import io

from mm.data.corpora.build import Workbench, on_white

LANGUAGES = [
    "en", "de", "fr", "es", "it", "pt", "nl", "pl", "cs", "ru", "uk", "tr", "ar", "hi", "th", "vi", "id", "ja", "ko",
    "zh",
]  # fmt: skip
LICENCE = "picture OFL-1.1, text Unicode-DFS-2016"
# Without tones, two hands of a handshake are no emoji that Unicode names.
HANDSHAKE = {"🫱🫱": "🤝"}
# The five tones shown alone are a group too.
FIRST_TONE = "\U0001f3fb"


def build(bench: Workbench) -> None:
    from PIL import Image

    from mm.data.builtin import build_emoji as builtin

    class Bitmaps(builtin.Glyphs):
        """The glyphs as they lie in the font."""

        def picture(self, sequence: str) -> Image.Image | None:
            buffer = builtin.hb.Buffer()
            buffer.add_str(sequence)
            buffer.guess_segment_properties()
            builtin.hb.shape(self._font, buffer)
            names = [self._names[info.codepoint] for info in buffer.glyph_infos]
            drawn = [name for name in names if name in self._strike]
            return Image.open(io.BytesIO(self._strike[drawn[0]].imageData)) if len(drawn) == 1 else None

    font_package, cldr_package = builtin.PACKAGES
    font = (bench.unpack(font_package, lambda path: path == builtin.FONT) / builtin.FONT).read_bytes()
    files = {
        f"{builtin.CLDR}/{kind}/{language}.xml": b""
        for kind in ("annotations", "annotationsDerived")
        for language in LANGUAGES
    }
    cldr = bench.unpack(cldr_package, files.__contains__)
    files = {path: (cldr / path).read_bytes() for path in files}
    texts = {language: builtin.read_annotations(files, language) for language in LANGUAGES}

    plain = builtin.make_samples(font, files)
    builtin.assign_groups(plain)
    groups = {builtin.concept(sample.emoji): sample.group for sample in plain}

    glyphs = Bitmaps(font)
    sequences = {builtin.key_of(glyphs.qualify(sequence)): sequence for sequence in texts["en"]}
    with bench.shards("emoji") as shards:
        for key, sequence in sorted(sequences.items()):
            emoji = glyphs.qualify(sequence)
            picture = glyphs.picture(emoji)
            if picture is None:
                bench.counts["dropped: the font has no single glyph for it"] += 1
                continue
            captions = [
                {"language": language, "text": name, "keywords": keywords}
                for language in LANGUAGES
                if sequence in texts[language]
                for name, keywords in [texts[language][sequence]]
            ]
            tones = sum(char in builtin.SKIN_TONES for char in emoji)
            bare = "".join(char for char in emoji if char not in builtin.SKIN_TONES) or FIRST_TONE
            concept = builtin.concept(bare)
            group = groups.get(HANDSHAKE.get(concept, concept), builtin.key_of(bare))
            out = io.BytesIO()
            on_white(picture).save(out, "PNG")
            about = {"captions": captions, "emoji": emoji, "group": group, "skin_tones": tones, "licence": LICENCE}
            shards.write(key, {"png": out.getvalue(), "json": about})
            bench.counts["pictures"] += 1
            bench.counts["pictures with a skin tone"] += bool(tones)
            bench.counts["captions"] += len(captions)
            bench.progress("drawing emoji", bench.counts["pictures"])
