"""Small real benchmarks in the exact formats of the published ones, out of the shipped emoji: a picture and its name.

`WRITERS` has one function a task: it writes into a folder and returns the path to give to `--task`.
"""

import base64
import csv
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mm.data.builtin import folder

Rows = list[dict[str, Any]]
LETTERS = "ABCD"


@dataclass(frozen=True)
class Emoji:
    name: str
    emoji: str
    image: Image.Image

    def encoded(self, format: str = "JPEG") -> bytes:
        out = io.BytesIO()
        self.image.save(out, format)
        return out.getvalue()


@cache
def emoji(count: int = 12) -> list[Emoji]:
    """Test pictures with their English names, in the order of their code points."""
    members: dict[str, bytes] = {}
    with tarfile.open(folder("emoji") / "test-000.tar.gz") as tar:
        for info in tar:
            members[info.name] = tar.extractfile(info).read()  # type: ignore[union-attr]
    found = []
    for key in sorted({name.split(".")[0] for name in members})[:count]:
        about = json.loads(members[f"{key}.json"])
        name = next(one["text"] for one in about["captions"] if one["language"] == "en")
        found.append(Emoji(name, about["emoji"], Image.open(io.BytesIO(members[f"{key}.webp"])).convert("RGB")))
    return found


def choices(number: int, count: int = 4) -> tuple[list[str], str]:
    """Names to choose from for a picture, and the letter of its own."""
    names = [one.name for one in emoji()]
    right = number % count
    wrong = [names[(number + k) % len(names)] for k in range(1, count)]
    return [*wrong[:right], names[number], *wrong[right:]], LETTERS[right]


def write_tsv(path: Path, rows: Rows) -> Path:
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        table.writeheader()
        table.writerows(rows)
    return path


def mmbench(root: Path, count: int = 4) -> Path:
    """Every question with all rotations of its options; rotated rows name the picture's row, one question has two
    options and a hint."""
    rows: Rows = []
    for number, one in enumerate(emoji()[:count]):
        options, letter = choices(number, 2 if number == 1 else 4)
        for turn in range(len(options)):
            turned = options[turn:] + options[:turn]
            row = {"index": number + turn * 1_000_000, "question": 'What does the "picture" show?'}
            row |= {"hint": "One of the names is right.\nThe others are not." if number == 1 else ""}
            row |= {key: turned[k] if k < len(turned) else "" for k, key in enumerate(LETTERS)}
            row |= {"answer": LETTERS[turned.index(options[LETTERS.index(letter)])]}
            row |= {"category": ("object", "sign")[number % 2], "l2-category": "perception", "split": "dev"}
            rows.append({**row, "image": base64.b64encode(one.encoded()).decode() if turn == 0 else str(number)})
    return write_tsv(root / "mmbench_dev.tsv", rows)


def seedbench(root: Path, count: int = 4) -> Path:
    pictures = root / "SEED-Bench-image"
    pictures.mkdir()
    questions: Rows = []
    for number, one in enumerate(emoji()[:count]):
        options, letter = choices(number)
        (pictures / f"{number}_77").write_bytes(one.encoded())
        row = {"answer": letter, **{f"choice_{k.lower()}": v for k, v in zip(LETTERS, options, strict=True)}}
        row |= {"data_id": f"{number}_77", "data_type": "image", "question": "Which of these is it?"}
        questions.append({**row, "question_id": str(100 + number), "question_type_id": 5})
    questions.append({**questions[0], "data_type": "video", "data_id": "1.mp4", "question_id": "v1"})
    file = root / "SEED-Bench.json"
    file.write_text(json.dumps({"questions": questions, "question_type": {"Instance Identity": 5}}))
    return file


def mmstar(root: Path, count: int = 4) -> Path:
    rows: Rows = []
    for number, one in enumerate(emoji()[:count]):
        options, letter = choices(number)
        listed = ", ".join(f"{k}: {v}." for k, v in zip(LETTERS, options, strict=True))
        row = {"index": number, "question": f"Which name fits <image 1>?\nOptions: {listed}", "image": one.encoded()}
        row |= {"answer": letter, "category": ("math", "coarse perception")[number % 2]}
        row |= {"l2_category": ("geometry", "image emotion")[number % 2]}
        rows.append({**row, "meta_info": {"source": "emoji", "split": "val", "image_path": f"images/{number}.jpg"}})
    pq.write_table(pa.Table.from_pylist(rows), root / "mmstar.parquet", row_group_size=3)
    return root / "mmstar.parquet"


def ai2d(root: Path, count: int = 4) -> Path:
    """As lmms-lab publishes it: in a folder, pictures as structs, the answer a place among the options."""
    rows: Rows = []
    for number, one in enumerate(emoji()[:count]):
        options, letter = choices(number)
        row = {"question": "What is drawn?", "options": options, "answer": str(LETTERS.index(letter))}
        rows.append({**row, "image": {"bytes": one.encoded("PNG"), "path": None}})
    (root / "data").mkdir()
    half = count // 2
    for shard, some in enumerate((rows[:half], rows[half:])):
        pq.write_table(pa.Table.from_pylist(some), root / "data" / f"test-{shard:05d}-of-00002.parquet")
    return root


def textvqa(root: Path, count: int = 4) -> Path:
    (root / "train_images").mkdir()
    data: Rows = []
    for number, one in enumerate(emoji()[:count]):
        (root / "train_images" / f"abc{number}.jpg").write_bytes(one.encoded())
        answers = [one.name] * 6 + [f"the {one.name}", one.name.upper() + "."] + ["unanswerable", "a picture"]
        row = {"question": "what does it show?", "image_id": f"abc{number}", "question_id": 34602 + number}
        data.append({**row, "answers": answers, "image_width": 64, "image_height": 64, "set_name": "val"})
    file = root / "TextVQA_0.5.1_val.json"
    file.write_text(json.dumps({"dataset_type": "val", "dataset_name": "textvqa", "data": data}, indent=1))
    return file


def mathvista(root: Path, count: int = 4) -> Path:
    """Parquet as on the hub: a choice, an integer, a float and a list, in turn."""
    rows: Rows = []
    for number, one in enumerate(emoji()[:count]):
        options, letter = choices(number)
        kind = ("text", "integer", "float", "list")[number % 4]
        answer = {"text": options[LETTERS.index(letter)], "integer": "14", "float": "1.45", "list": "[1, 2]"}[kind]
        row = {"pid": str(number + 1), "question": "How much is it?", "image": f"images/{number + 1}.jpg"}
        row |= {"decoded_image": {"bytes": one.encoded(), "path": None}, "choices": options if kind == "text" else None}
        row |= {"unit": None, "precision": 2.0 if kind == "float" else None, "answer": answer}
        row |= {"question_type": "multi_choice" if kind == "text" else "free_form", "answer_type": kind}
        about = {"category": "general-vqa", "context": "synthetic scene", "grade": "daily life", "source": "emoji"}
        rows.append({**row, "metadata": {**about, "task": "figure question answering"}, "query": "unused"})
    (root / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), root / "data" / "testmini-00000-of-00001.parquet")
    return root


def pope(root: Path, count: int = 4) -> Path:
    (root / "val2014").mkdir()
    for one in range(count):
        (root / "val2014" / f"COCO_val2014_{one:012d}.jpg").write_bytes(emoji()[one].encoded())
    for split, away in (("random", 5), ("popular", 3), ("adversarial", 1)):
        lines = []
        for number in range(count):
            for name, label in ((emoji()[number].name, "yes"), (emoji()[number + away].name, "no")):
                row = {"question_id": len(lines) + 1, "image": f"COCO_val2014_{number:012d}.jpg"}
                lines.append(json.dumps({**row, "text": f"Is there a {name} in the image?", "label": label}))
        (root / f"coco_pope_{split}.json").write_text("\n".join(lines) + "\n")
    return root


def mmmu(root: Path, count: int = 4) -> Path:
    """A folder a subject, as on the hub: pictures in the question, one in an option, and an open question."""
    for subject, some in (("Art_Theory", range(count // 2)), ("Math", range(count // 2, count))):
        rows: Rows = []
        for number in some:
            options, letter = choices(number)
            question = "<image 1> Which name fits the picture?"
            if number == 1:
                question, options = "Which is <image 2> not <image 1>?", ["<image 3>", *options[1:]]
            is_open = number == count - 1
            row = {"id": f"validation_{subject}_{number + 1}", "question": question, "explanation": ""}
            row |= {"options": "[]" if is_open else repr(options), "answer": "['7', 'seven']" if is_open else letter}
            pictures = [one.encoded("PNG") for one in emoji()[number : number + (3 if number == 1 else 1)]]
            for place in range(1, 8):
                data = pictures[place - 1] if place <= len(pictures) else None
                row[f"image_{place}"] = data and {"bytes": data, "path": f"{place}.png"}
            row |= {"img_type": "['Icons']", "topic_difficulty": "Easy", "subfield": subject.replace("_", " ")}
            rows.append({**row, "question_type": "open" if is_open else "multiple-choice"})
        (root / subject).mkdir()
        table = pa.Table.from_pylist(rows)
        pq.write_table(table, root / subject / "validation-00000-of-00001.parquet")
        hidden = [{**row, "answer": "?"} for row in rows]
        pq.write_table(pa.Table.from_pylist(hidden), root / subject / "test-00000-of-00001.parquet")
    return root


def vqa(root: Path, count: int = 4) -> Path:
    """Questions and annotations apart, as VQAv2 and OK-VQA have them."""
    (root / "val2014").mkdir()
    questions, annotations = [], []
    for number, one in enumerate(emoji()[:count]):
        (root / "val2014" / f"COCO_val2014_{number + 42:012d}.jpg").write_bytes(one.encoded())
        questions.append({"image_id": number + 42, "question": "What is it?", "question_id": (number + 42) * 1000})
        answers = [{"answer": one.name, "answer_confidence": "yes", "answer_id": k + 1} for k in range(10)]
        annotations.append({"question_id": (number + 42) * 1000, "answers": answers, "answer_type": "other"})
    (root / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": questions}))
    (root / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": annotations}))
    return root


def captions(root: Path, count: int = 4) -> Path:
    (root / "val2017").mkdir()
    pictures, annotations = [], []
    for number, one in enumerate(emoji()[:count]):
        (root / "val2017" / f"{number:012d}.jpg").write_bytes(one.encoded())
        pictures.append({"id": number, "file_name": f"{number:012d}.jpg", "height": 64, "width": 64})
        texts = (f"A picture of a {one.name}.", f"the {one.name}, drawn small")
        annotations += [{"id": 10 * number + k, "image_id": number, "caption": text} for k, text in enumerate(texts)]
    file = root / "captions_val2017.json"
    file.write_text(json.dumps({"info": {}, "images": pictures, "licenses": [], "annotations": annotations}))
    return file


WRITERS: dict[str, Callable[..., Path]] = {
    writer.__name__: writer
    for writer in (mmbench, seedbench, mmstar, ai2d, textvqa, mathvista, pope, mmmu, vqa, captions)
}
