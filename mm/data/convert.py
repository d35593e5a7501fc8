"""Open-Qwen2VL's published packs, `{tar}/{uuid}.pkl`, as a source: what `mm data convert` packs anew.

A pickle is a program. Python's unpickler runs it, and a list of admitted names does not make that harmless: it still
sets attributes of what is admitted, makes room as the file says, and hashes keys that take for ever. Here a machine of
our own has only the instructions that build plain values. It imports nothing and calls nothing: what a pickle would
call is written down by name (`Call`), names that these packs do not hold are refused, and what is left, numbers and
bytes, is checked as all data are.

A pack is a dict (Open-Qwen2VL, `sequence_packing_image_to_pil.py`): `image_tensors`, Pillow pictures; `input_ids`, a
LongTensor of samples one behind the other, -200 for a picture, padded; `lengths` of the samples, of which a picture
takes 144. It is taken apart into its samples. Padding is what `lengths` leave over, whichever id it has: the packer
writes `<|pad|>`, which the published trainer did not know as padding.
"""

import io
import json
import pickletools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from pydantic import PrivateAttr

from mm.data.config import DataConfig
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.packed import PackedDataset
from mm.data.prepare import Workers, pack_split
from mm.data.sample import Media, Part, Sample, Tokens
from mm.data.shards import Folder, Group, Shard, folders_with
from mm.data.sources import FilesConfig, FilesSource, sample_id, shortened
from mm.errors import DataError

PICTURE, PICTURE_LENGTH = -200, 144  # as an id, and in `lengths`
MAX_INSTRUCTIONS = 200_000  # some thousand are usual
NAMES = re.compile(
    r"collections OrderedDict|torch LongStorage|torch\._utils _rebuild_tensor_v2|torch\.storage _load_from_bytes"
    r"|PIL\.Image Image|PIL\.\w+ImagePlugin \w+ImageFile"
    r"|PIL\.PngImagePlugin iTXt|PIL\.TiffImagePlugin IFDRational|fractions Fraction"  # what files say of themselves
)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
TAKEN = {
    **{"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2},
    **{"STACK_GLOBAL": 2, "REDUCE": 2, "NEWOBJ": 2, "BUILD": 1, "BINPERSID": 1},
}
"""Values that an instruction takes from the stack."""
STORAGE_MAGIC, STORAGE_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # torch.serialization, before zip files
SAME_TOKENIZER = "take the tokenizer and template that the packs were made with"
MAX_WEBP = 16_383  # along a side
LOSSLESS: dict[str, dict[str, Any]] = {"webp": {"lossless": True, "exact": True, "method": 0, "quality": 0}, "png": {}}
"""Of a photograph of 384 x 384 this WebP has 207 KB, written in 3.5 ms and read in 2.4; PNG 245 KB, 33 and 3.3 ms. With
`method: 4` it has 181 KB, in 77 ms."""
MODES = {"1": 1, "L": 8, "P": 8, "LA": 16, "PA": 16, "I;16": 16, "RGB": 24, "YCbCr": 24, "RGBA": 32, "CMYK": 32}
"""Bits of a pixel as Pillow pickles it; every row begins with a new byte."""


class Refused(ValueError):
    """Why a pack is not read, in words."""


class Name(str):
    """What a pickle imports, as `module name`. It is not imported."""


@dataclass(slots=True, eq=False)
class Call:
    """What a pickle makes by calling `name` with `arguments`, and then giving it `state`. It is not called."""

    name: Name
    arguments: Any
    state: Any = None


def read_pickle(file: BinaryIO) -> Any:
    """The value of the pickle that `file` stands at, made of plain values and `Call`s; `file` then stands behind it.

    Raises `Refused` for names and instructions that published packs do not hold; ValueError, LookupError or TypeError
    for what is no pickle.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []  # what marks have set aside
    memo: dict[Any, Any] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if count == MAX_INSTRUCTIONS:
            raise Refused(f"a pickle of over {MAX_INSTRUCTIONS:,} instructions")
        name = opcode.name
        items: list[Any] = []
        if name in ("TUPLE", "APPENDS", "SETITEMS"):
            items, stack = stack, below.pop()
        elif name in TAKEN:
            items = [stack.pop() for _ in range(TAKEN[name])][::-1]
        match name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                below.append(stack)
                stack = []
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append(CONSTANTS[name])
            case _ if name in LITERALS:
                stack.append(argument)
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE" | "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(items))
            case "APPEND" | "APPENDS":
                _a(list, stack[-1]).extend(items)
            case "SETITEM" | "SETITEMS":
                for key, value in zip(items[::2], items[1::2], strict=True):
                    _a(dict, stack[-1])[key if type(key) is int else _a(str, key)] = value
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_admitted(_a(str, argument)))
            case "STACK_GLOBAL":
                stack.append(_admitted(" ".join(_a(str, one) for one in items)))
            case "REDUCE" | "NEWOBJ":
                call = Call(_a(Name, items[0]), _a(tuple, items[1]))
                stack.append({} if call.name == "collections OrderedDict" and not call.arguments else call)
            case "BUILD":
                _a(Call, stack[-1]).state = items[0]
            case "BINPERSID":
                stack.append(Call(Name("persistent id"), items[0]))
            case _:
                raise Refused(
                    f"a pickle with the instruction {name}, which published packs do not hold; it was not run"
                )
    raise ValueError("a pickle without an end")


def _a(kind: type, value: Any) -> Any:
    """The value, which is to be exactly of this type: what a file gives may look like anything else."""
    if type(value) is not kind:
        raise TypeError(f"{type(value).__name__} in place of {kind.__name__}")
    return value


def _admitted(name: str) -> Name:
    if not NAMES.fullmatch(name):
        found = shortened(name.replace(" ", ".").encode("unicode_escape").decode())
        raise Refused(
            f"a pickle that imports {found}; published packs hold plain values, tensors and Pillow pictures alone, so "
            "it was not run"
        )
    return Name(name)


def read_tensor(found: Any) -> np.ndarray:
    """int64 [n]: a one-dimensional LongTensor, as `pickle` writes it. Raises `Refused`, or TypeError and the like."""
    if not isinstance(found, Call) or found.name != "torch._utils _rebuild_tensor_v2":
        raise Refused(f"{_called(found)} in place of a LongTensor")
    storage, start, (size,), stride, *_ = found.arguments
    values = _read_storage(storage)
    if _a(tuple, stride) != (1,) or not 0 <= _a(int, start) <= start + _a(int, size) <= len(values):
        raise Refused(f"a tensor that does not lie in its storage of {len(values)} values")
    return values[start : start + size]


def _read_storage(found: Any) -> np.ndarray:
    """int64 [n]. A storage is five pickles, of a number, a version, the machine, the storage, its key; then values."""
    if not isinstance(found, Call) or found.name != "torch.storage _load_from_bytes":
        raise Refused(f"{_called(found)} in place of a tensor's storage")
    (data,) = found.arguments
    file = io.BytesIO(_a(bytes, data))
    magic, protocol, machine, storage, keys = (read_pickle(file) for _ in range(5))
    if (magic, protocol, _a(dict, machine)["little_endian"]) != (STORAGE_MAGIC, STORAGE_PROTOCOL, True):
        raise Refused("a tensor's storage of another format or machine")
    what, kind, key, _, count, view = _a(Call, storage).arguments
    if (what, kind, view) != ("storage", "torch LongStorage", None) or keys != [_a(str, key)]:
        raise Refused("a tensor's storage that is not plain int64")
    values = file.read()
    if not 8 * _a(int, count) == 8 * int.from_bytes(values[:8], "little") == len(values) - 8:
        raise Refused(f"a tensor's storage with {len(values) - 8} bytes for another number of values")
    return np.frombuffer(values, "<i8", offset=8)


def read_picture(found: Any, limits: Limits) -> Media:
    """A Pillow picture, as `pickle` writes it, as lossless WebP: the same pixels, in RGB, or RGBA if it is transparent.

    The packer makes every picture RGB, but leaves what the file said of a transparent colour in `info`; so that counts
    in palettes alone. Raises `Refused`, or TypeError and the like.
    """
    if not isinstance(found, Call) or not re.fullmatch(r"PIL\.\w+ (Image|\w+ImageFile)", found.name):
        raise Refused(f"{_called(found)} in place of a Pillow picture")
    info, mode, (width, height), palette, data = _a(list, found.state)[:5]
    if _a(str, mode) not in MODES:
        raise Refused(f"a picture of mode {shortened(mode)!r}, expected one of {', '.join(MODES)}")
    size = _a(int, width), _a(int, height)
    if min(size) < 1 or width * height > limits.pixels:
        raise Refused(f"a picture of {width}x{height} pixels, data.max_pixels is {limits.pixels:,}")
    expected = -(-width * MODES[mode] // 8) * height
    if len(_a(bytes, data)) != expected:
        raise Refused(f"a picture of {width}x{height} pixels with {len(data)} bytes in place of {expected}")
    said = _a(dict, info)
    transparency = said.get("transparency") if mode == "P" else None
    if type(transparency) not in (int, bytes, type(None)):
        raise Refused(f"a picture with a {type(transparency).__name__} for its transparency")
    ext = "webp" if max(size) <= MAX_WEBP else "png"
    file = io.BytesIO()
    try:
        picture = Image.frombytes(mode, size, data)
        if mode in ("P", "PA"):
            picture.putpalette(bytes(_a(list, palette)))
        if transparency is not None:
            picture.info["transparency"] = transparency
        picture = picture.convert("RGBA" if transparency is not None or mode in ("LA", "PA", "RGBA") else "RGB")
        picture.save(file, ext, **LOSSLESS[ext])
    except Exception as error:  # Pillow's own, of many kinds
        raise Refused(f"a picture that Pillow cannot make ({type(error).__name__}: {shortened(error)})") from None
    return Media("image", file.getvalue(), ext)


def _read_pictures(found: list[Any], limits: Limits, most: int) -> Iterator[Media]:
    """Of `most` bytes of pixels: a pickle may show the same ones again and again, but has no more than its file."""
    total = 0
    for one in found:
        yield read_picture(one, limits)
        total += len(one.state[4])
        if total > most:
            raise Refused(f"pictures of over {most:,} bytes, more than the file has")


def _called(value: Any) -> str:
    return value.name.replace(" ", ".") if isinstance(value, Call) else type(value).__name__


class PickledPacksConfig(FilesConfig):
    """Folders of published packs; `path` names one that they lie in."""

    kind: str = "pickled_packs"
    _layout: Layout = PrivateAttr()  # what the token ids are held against

    def build(self, root: str) -> "PickledPacks":
        return PickledPacks(self, root, self._layout)


class PickledPacks(FilesSource):
    """The samples of published packs. A shard is a folder of them: what was one tar of captions."""

    def __init__(self, config: FilesConfig, root: str, layout: Layout) -> None:
        super().__init__(config, root)
        template = layout.template
        if template.bos is None or template.eos is None:
            raise DataError("published packs have a begin and an end of text; model.template has not both")
        self._tokenizer, self._after = layout.tokenizer, template.after_media
        self._edges = [(name, self._tokenizer.id(name)) for name in (template.bos, template.eos)]

    def shards(self) -> list[str]:
        return folders_with(".pkl", self._path, self._root)

    def open(self, path: str, limits: Limits) -> Shard:
        return Folder(path, ".pkl")

    def samples(self, group: Group, limits: Limits) -> list[Sample]:
        id = sample_id(self.name, group)
        where = f"{group.shard.path}/{group.key}.pkl"
        if group.size("pkl") > limits.media_bytes:
            raise DataError(f"{where}: {group.size('pkl'):,} bytes are more than data.max_media_bytes")
        try:
            pack = _a(dict, read_pickle(io.BytesIO(group.read("pkl"))))
            documents = split_pack(read_tensor(pack["input_ids"]), _a(list, pack["lengths"]))
            found = _a(list, pack["image_tensors"])
            if (places := sum(np.count_nonzero(ids == PICTURE) for ids in documents)) != len(found):
                raise Refused(f"{len(found)} pictures for {places} places")
            pictures = _read_pictures(found, limits, group.size("pkl"))
            return [
                Sample(f"{id}#{k}", tuple(self._parts(ids, pictures, f"its sample {k}")))
                for k, ids in enumerate(documents)
            ]
        except Refused as error:
            raise DataError(f"{where}: {error}") from None
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise DataError(
                f"{where}: not laid out as a published pack ({type(error).__name__}: {shortened(error)})"
            ) from None

    def _parts(self, ids: np.ndarray, pictures: Iterator[Media], what: str) -> list[Part]:
        """Of one sample, less the begin and end of text, which the template puts there again."""
        for found, (name, id) in zip((ids[0], ids[-1]), self._edges, strict=True):
            if found != id:
                raise Refused(f"{what} has the id {found} where the config's {name} is {id}; {SAME_TOKENIZER}")
        inner = ids[1:-1]
        parts: list[Part] = []
        start = 0
        for end in (*np.flatnonzero(inner == PICTURE), len(inner)):
            if end > start:
                first = self._tokenizer.token(int(inner[start]))
                if start and not first.startswith(self._after):
                    raise Refused(
                        f"{what} has {first!r} behind a picture where {self._after!r} belongs; {SAME_TOKENIZER}"
                    )
                parts.append(Tokens(inner[start:end]))
            if end < len(inner):
                parts.append(next(pictures))
            start = end + 1
        if not parts:
            raise Refused(f"{what} is empty")
        return parts


def split_pack(ids: np.ndarray, lengths: list[int]) -> list[np.ndarray]:
    """The ids of every sample. Behind the last there must be nothing but padding: one id again and again."""
    if not lengths or min(_a(int, length) for length in lengths) < 1:
        raise Refused("a pack without lengths, or with some below 1")
    positions = np.cumsum(np.where(ids == PICTURE, PICTURE_LENGTH, 1))
    wanted = np.cumsum(lengths)
    ends = np.searchsorted(positions, wanted)
    if wanted[-1] > positions[-1] or (positions[ends] != wanted).any():
        raise Refused(f"lengths that add up to {wanted[-1]} and do not fit the {len(ids)} ids")
    ends += 1
    padding = ids[ends[-1] :]
    if len(padding) and ((padding != padding[0]).any() or padding[0] < 0):
        raise Refused(f"{len(padding)} ids behind the last sample that are not padding")
    return [ids[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def convert(
    data: DataConfig,
    layout: Layout,
    seed: int,
    folders: list[Path],
    out: Path,
    progress: Callable[[str, int], None],
    workers: Workers,
) -> dict[str, Any] | None:
    """Pack the samples of published packs, of each folder as one source, into `out`/train, as `mm pack` does.

    Goes on where an earlier call was stopped. Returns counts and, of what was left out, the reasons; None: this slice
    is done as far as it can be, others are not.
    """
    sources = []
    for folder in folders:
        source = PickledPacksConfig(path=escape(str(folder)), name=folder.resolve().name)
        source._layout = layout
        sources.append(source)
    data = data.model_copy(update={"sources": sources})
    packed = pack_split(data, "train", layout, seed, out / "train", progress, workers)
    if packed is None:
        return None
    about = PackedDataset(packed).about
    quarantine = packed / "quarantine.jsonl"
    refused = quarantine.read_text(encoding="utf-8").splitlines() if quarantine.exists() else []
    return {
        "folder": str(packed),
        **{name: about[name] for name in ("packs", "tokens", "fill")},
        "samples": sum(one["samples"] for one in about["ledger"].values()) - len(refused),
        "refused": [json.loads(line)["reason"] for line in refused],
    }
