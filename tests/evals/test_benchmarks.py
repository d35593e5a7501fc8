"""Readers, prompts and metrics of every benchmark, on samples in the published formats."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from benchmark_samples import WRITERS, choices, emoji
from PIL import Image

from mm.data.layout import ImageLayout, Layout, Template
from mm.data.limits import Limits
from mm.data.media import ImageTransform
from mm.data.sample import Media
from mm.data.tokenizer import Tokenizer
from mm.data.tokens import make_segment
from mm.errors import DataError
from mm.evals import TASKS
from mm.evals.items import Item
from mm.evals.prompts import answer_text, build, decoding, spelt
from mm.evals.run import summary
from mm.models.prompts import Form

Paths = dict[str, Path]
N0, N1, N2, N3 = (one.name for one in emoji()[:4])


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in WRITERS.items()}


@pytest.fixture(scope="module")
def layout() -> Layout:
    tokenizer = Tokenizer.load("builtin:emoji")
    transform = ImageTransform(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    template = Template(bos="<s>", eos="<|im_end|>", after_media="\n")
    return Layout(tokenizer, template, tokenizer.id("<|endoftext|>"), ImageLayout(4, 9, transform))


def items(name: str, paths: Paths) -> list[Item]:
    return list(TASKS[name]().items(str(paths[name])))


def looks_like(media: Media, number: int) -> bool:
    """Whether a picture is the emoji of that number (JPEG may change it a little)."""
    found = np.asarray(Image.open(io.BytesIO(media.read())).convert("RGB"), dtype=float)
    distances = [np.abs(found - np.asarray(one.image, dtype=float)).mean() for one in emoji()]
    return int(np.argmin(distances)) == number


def test_every_task_is_read_with_its_pictures(paths: Paths) -> None:
    numbers = {
        **{name: [0, 1, 2, 3] for name in WRITERS},
        "mmbench": [0] * 4 + [1] * 2 + [2] * 4 + [3] * 4,
        "pope": [0, 0, 1, 1, 2, 2, 3, 3] * 3,
    }
    assert numbers.keys() == TASKS.keys() == WRITERS.keys()
    for name, expected in numbers.items():
        found = items(name, paths)
        assert len(found) == len({item.id for item in found}) == len(expected), name
        if name != "mmmu":
            assert all(looks_like(item.media[0], n) for item, n in zip(found, expected, strict=True)), name


def test_choices_carry_their_options_and_letter(paths: Paths) -> None:
    for name in ("mmbench", "seedbench", "mmstar", "ai2d"):
        seen: dict[int, int] = {}
        for item in items(name, paths):
            number = next(n for n in range(4) if looks_like(item.media[0], n))
            assert item.options[item.letters.index(item.answers[0])] == emoji()[number].name, (name, item)
            seen[number] = seen.get(number, 0) + 1
            if seen[number] == 1:
                assert (list(item.options), item.answers[0]) == choices(number, len(item.options)), name


def test_ids_and_groups(paths: Paths) -> None:
    ids = {name: [item.id for item in items(name, paths)] for name in TASKS}
    assert ids["mmbench"][:6] == ["0", "1000000", "2000000", "3000000", "1", "1000001"]
    assert [item.meta["question"] for item in items("mmbench", paths)][:6] == ["0"] * 4 + ["1"] * 2
    assert items("mmbench", paths)[4].hint == "One of the names is right.\nThe others are not."
    assert ids["seedbench"] == ["100", "101", "102", "103"]
    assert ids["ai2d"] == [f"test-0000{shard}-of-00002/{row}" for shard in (0, 1) for row in (0, 1)]
    assert ids["textvqa"][0] == "34602" and len(items("textvqa", paths)[0].answers) == 10
    assert ids["pope"][0] == "adversarial/1" and ids["pope"][-1] == "random/8"
    assert ids["mmmu"] == [
        "validation_Art_Theory_1",
        "validation_Art_Theory_2",
        "validation_Math_3",
        "validation_Math_4",
    ]
    assert [item.meta["subject"] for item in items("mmmu", paths)] == ["Art_Theory"] * 2 + ["Math"] * 2
    assert ids["vqa"][0] == "42000" and items("vqa", paths)[0].answers == (N0,) * 10
    assert items("captions", paths)[1].answers == (f"A picture of a {N1}.", f"the {N1}, drawn small")


def test_of_a_folder_the_evaluated_split_is_taken(tmp_path: Path) -> None:
    """Of files of the published names, one beside the other."""
    for name in ("vqa", "textvqa", "mmbench"):
        (tmp_path / name).mkdir()
    folder = WRITERS["vqa"](tmp_path / "vqa")
    row = {"question_id": 1, "question": "What?", "image_id": 1}
    (folder / "v2_OpenEnded_mscoco_train2014_questions.json").write_text(json.dumps({"questions": [row]}))
    (folder / "v2_mscoco_train2014_annotations.json").write_text(json.dumps({"annotations": [row]}))
    assert len(list(TASKS["vqa"]().items(str(folder)))) == 4
    file = WRITERS["textvqa"](tmp_path / "textvqa")
    for name in ("TextVQA_Rosetta_OCR_v0.2_val.json", "TextVQA_0.5.1_train.json"):
        shutil.copy(file, file.with_name(name))
    assert len(list(TASKS["textvqa"]().items(str(file.parent)))) == 4
    file = WRITERS["mmbench"](tmp_path / "mmbench")
    shutil.copy(file, file.with_name("MMBench_TEST_EN.tsv"))
    file.rename(file.with_name("MMBench_DEV_EN.tsv"))
    assert len(list(TASKS["mmbench"]().items(str(file.parent)))) == 14


def test_pictures_of_mmmu_stand_where_they_are_named(paths: Paths) -> None:
    second = items("mmmu", paths)[1]
    assert [looks_like(media, n) for media, n in zip(second.media, (2, 1, 3), strict=True)] == [True] * 3


A4 = f"A. {N0}\nB. {emoji()[1].name}\nC. {emoji()[2].name}\nD. {emoji()[3].name}"
LETTER = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."
GOLDEN: list[tuple[str, int, Form, str]] = [
    ("mmbench", 0, "raw", f'<image>\nWhat does the "picture" show?\n{A4}\n{LETTER}\nAnswer:'),
    ("mmbench", 0, "chat", f'[user] <image>\nWhat does the "picture" show?\n{A4}\n{LETTER}[assistant] '),
    (
        "mmbench",
        4,
        "chat",
        '[user] <image>\nOne of the names is right.\nThe others are not.\nWhat does the "picture" show?\n'
        f"A. {emoji()[2].name}\nB. {N1}\n{LETTER}[assistant] ",
    ),
    ("seedbench", 0, "raw", f"<image>\nWhich of these is it?\n{A4}\n{LETTER}\nAnswer:"),
    (
        "mmstar",
        0,
        "raw",
        "<image>\nQuestion: Which name fits <image 1>?\nOptions: "
        f"A: {N0}., B: {N1}., C: {N2}., D: {N3}.\n{LETTER}\nAnswer:",
    ),
    ("ai2d", 0, "raw", f"<image>\nWhat is drawn?\n{A4}\n{LETTER}\nAnswer:"),
    ("textvqa", 0, "raw", f"<image>\nQuestion: what does it show?\n{SHORT}\nAnswer:"),
    ("textvqa", 0, "chat", f"[user] <image>\nwhat does it show?\n{SHORT}[assistant] "),
    ("mathvista", 0, "raw", f"<image>\nHow much is it?\n{A4}\n{LETTER}\nAnswer:"),
    ("mathvista", 1, "raw", f"<image>\nHow much is it?\n{SHORT}\nAnswer:"),
    ("pope", 0, "raw", f"<image>\nQuestion: Is there a {N0} in the image?\n{SHORT}\nAnswer:"),
    (
        "mmmu",
        0,
        "raw",
        "The following are multiple choice questions about  Art Theory.\n\n"
        f"<image>\n Which name fits the picture?\n{A4}\n{LETTER}\nAnswer:",
    ),
    (
        "mmmu",
        1,
        "chat",
        f"[user] Which is <image>\n not <image>\n?\nA. <image>\n\nB. {N1}\nC. {emoji()[3].name}\n"
        f"D. {emoji()[4].name}\n{LETTER}[assistant] ",
    ),
    ("mmmu", 3, "chat", f"[user] <image>\n Which name fits the picture?\n{SHORT}[assistant] "),
    ("vqa", 0, "raw", f"<image>\nQuestion: What is it?\n{SHORT}\nAnswer:"),
    ("captions", 0, "raw", "<image>\n"),
    ("captions", 0, "chat", "[user] <image>\nProvide a short image description.[assistant] "),
]


@pytest.mark.parametrize(("name", "number", "form", "text"), GOLDEN)
def test_golden_prompts(name: str, number: int, form: Form, text: str, paths: Paths, layout: Layout) -> None:
    prompt = build(TASKS[name](), items(name, paths)[number], form, layout)
    assert spelt(prompt, layout) == text


def test_a_raw_prompt_is_tokens_of_the_published_text(paths: Paths, layout: Layout) -> None:
    """Begin of text, the picture's places, and the text behind `<image>` as one run: nothing added, nothing twice."""
    for after_media in ("\n", ""):
        spelling = Template(bos="<s>", eos="<|im_end|>", after_media=after_media)
        one = Layout(layout.tokenizer, spelling, layout.pad, layout.image)
        for name in ("mmbench", "pope", "textvqa", "captions"):
            task, item = TASKS[name](), items(name, paths)[0]
            segment = make_segment(build(task, item, "raw", one), one, "", Limits(), closed=False)
            text = "\n" + task.text(item, "raw")
            expected = [one.tokenizer.id("<s>"), *[one.pad] * 4, *one.tokenizer.encode(text)]
            assert segment.ids.tolist() == expected, name
            assert segment.loss_tokens == 0


def test_solved_examples(paths: Paths, layout: Layout) -> None:
    task = TASKS["textvqa"]()
    first, second, third, _ = items("textvqa", paths)
    prompt = build(task, third, "raw", layout, [first, second])
    question = f"<image>\nQuestion: what does it show?\n{SHORT}\nAnswer:"
    assert spelt(prompt, layout) == f"{question} {N0}<|endofchunk|>{question} {N1}<|endofchunk|>{question}"
    segment = make_segment(prompt, layout, "", Limits(), closed=False)
    assert segment.ids.tolist().count(layout.tokenizer.id("<|endofchunk|>")) == 2
    assert [looks_like(one.media, n) for one, n in zip(segment.media, range(3), strict=True)] == [True] * 3
    chat = build(task, third, "chat", layout, [first])
    asked = f"[user] <image>\nwhat does it show?\n{SHORT}[assistant] "
    assert spelt(chat, layout) == f"{asked}{N0}{asked}"
    caption = build(TASKS["captions"](), items("captions", paths)[1], "raw", layout, items("captions", paths)[:1])
    assert spelt(caption, layout) == f"<image>\nA picture of a {N0}.<|endofchunk|><image>\n"
    mmbench = build(TASKS["mmbench"](), items("mmbench", paths)[6], "raw", layout, items("mmbench", paths)[:1])
    assert f"\n{LETTER}\nAnswer: A<|endofchunk|><image>\n" in spelt(mmbench, layout)


def test_where_raw_answers_end(layout: Layout, paths: Paths) -> None:
    task, tokenizer = TASKS["pope"](), layout.tokenizer
    found = decoding(task, "raw", layout)
    assert [tokenizer.token(id) for id in found.stop_ids] == [".", ",", "\n", "<|endofchunk|>"]
    assert (found.max_new_tokens, found.temperature, found.stop) == (16, 0.0, ())
    assert decoding(task, "chat", layout).stop_ids == ()
    item = items("pope", paths)[0]
    assert answer_text(task, item, "raw", "yes") == " yes" and answer_text(task, item, "chat", "yes") == "yes"
    assert answer_text(TASKS["captions"](), items("captions", paths)[0], "raw", "a cat") == "a cat"


def test_stop_characters_have_qwens_ids(layout: Layout, paths: Paths) -> None:
    """In the byte order of GPT-2, which begins Qwen's vocabulary, `.`, `,` and newline are 13, 11 and 198."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    qwen = Layout(Tokenizer(backend, "bytes"), layout.template, 0)
    assert decoding(TASKS["pope"](), "raw", qwen).stop_ids == (13, 11, 198)
    # Without `<|endofchunk|>` examples end in an empty line.
    first, second, *_ = items("captions", paths)
    prompt = build(TASKS["captions"](), second, "raw", qwen, [first])
    assert spelt(prompt, qwen) == f"<image>\nA picture of a {N0}.\n\n<image>\n"


def records(name: str, paths: Paths, answer: Callable[[Item], str]) -> list[dict[str, Any]]:
    task, found = TASKS[name](), []
    for item in items(name, paths):
        output = answer(item)
        parsed = task.parse(item, output)
        record = {"id": item.id, "output": output, "parsed": parsed, "answer": list(item.answers), "meta": item.meta}
        found.append({**record, "right": task.right(item, parsed), "scoring": "generate", "seconds": 0.5})
    return found


def numbers(name: str, paths: Paths, answer: Callable[[Item], str]) -> dict[str, Any]:
    return summary(TASKS[name](), records(name, paths, answer))


def test_right_answers_score_one(paths: Paths) -> None:
    for name in TASKS:
        found = numbers(name, paths, lambda item: item.answers[0])
        if name == "textvqa":  # six of ten agree outright, two more once normalised
            assert found["metrics"]["accuracy"] == pytest.approx(1.0)
        elif name == "captions":
            assert found["metrics"]["exact"] == 1.0 and found["metrics"]["bleu_4"] == pytest.approx(1.0)
        else:
            assert found["metrics"]["accuracy"] == 1.0, name
        assert found["answered"] == found["n"] and found["seconds"] == pytest.approx(0.5 * found["n"])


def test_numbers_of_one_letter_for_all(paths: Paths) -> None:
    """`A` throughout: of each question's rotations one is right, so all rotations of none."""
    found = numbers("mmbench", paths, lambda item: "A")
    assert found["metrics"] == {"accuracy": 4 / 14, "contains": 4 / 14, "circular": 0.0}
    assert found["by"]["category"] == {"object": {"n": 8, "right": 0.25}, "sign": {"n": 6, "right": 2 / 6}}
    mmstar = numbers("mmstar", paths, lambda item: "A" if item.id in "02" else item.answers[0])
    assert mmstar["metrics"]["accuracy"] == 0.75
    assert mmstar["metrics"]["average"] == pytest.approx((0.5 + 1.0) / 2)
    told = numbers("seedbench", paths, lambda item: "abcd")  # holds every letter, and says none
    assert told["metrics"] == {"accuracy": 0.0, "contains": 1.0} and told["answered"] == 0


def test_numbers_of_pope(paths: Paths) -> None:
    """Says yes to all but the second question of a split, which is a no, and no longer to the third, which is a yes."""
    said = {"2": "No.", "3": "no", "4": "it may be"}
    result = numbers("pope", paths, lambda item: said.get(item.id.split("/")[1], "Yes"))
    found = result["metrics"]
    # Of 8: yes at 1, 5, 6, 7, 8, of which 1, 5, 7 are right; no at 2 (right) and 3; nothing at 4, a no.
    assert found["accuracy"] == pytest.approx(4 / 8)
    assert found["precision"] == pytest.approx(3 / 5) and found["recall"] == pytest.approx(3 / 4)
    assert found["f1"] == found["mean_f1"] == pytest.approx(2 * 0.6 * 0.75 / 1.35)
    assert found["yes_ratio"] == pytest.approx(5 / 8)
    assert result["by"]["split"].keys() == {"random", "popular", "adversarial"}
    assert all(
        split == {"n": 8, **{key: pytest.approx(found[key]) for key in split if key != "n"}} and len(split) == 6
        for split in result["by"]["split"].values()
    )


def test_free_answers_are_judged_by_type(paths: Paths) -> None:
    outputs = {"1": "nonsense", "2": "It is 14.", "3": "about 1.449", "4": "1 and 2"}
    found = numbers("mathvista", paths, lambda item: outputs[item.id])
    assert found["metrics"]["accuracy"] == 0.75
    assert found["metrics"]["mmmu_rules"] == 0.5  # 14; 1.449 is 1.45 at two decimals; a list is compared as text
    assert found["by"]["answer_type"]["text"] == {"n": 1, "right": 0.0}
    mmmu = numbers("mmmu", paths, lambda item: "The result is seven" if not item.options else item.answers[0])
    assert mmmu["by"]["subject"] == {"Art_Theory": {"n": 2, "right": 1.0}, "Math": {"n": 2, "right": 1.0}}


FIRST = {  # the file of a folder that holds the first row
    "ai2d": "data/test-00000-of-00002.parquet",
    "mathvista": "data/testmini-00000-of-00001.parquet",
    "pope": "coco_pope_adversarial.json",
    "mmmu": "Art_Theory/validation-00000-of-00001.parquet",
    "vqa": "v2_OpenEnded_mscoco_val2014_questions.json",
}
NEEDED = {
    "mmbench": ["index", "question", "answer", "image"],
    "seedbench": ["question", "choice_b", "data_type", "data_id", "question_id", "answer"],
    "mmstar": ["index", "question", "image", "answer"],
    "ai2d": ["question", "answer", "image"],
    "textvqa": ["question", "image_id", "answers"],
    "mathvista": ["pid", "question", "answer", "question_type", "answer_type", "choices"],
    "pope": ["question_id", "image", "text", "label"],
    "mmmu": ["id", "question", "options", "answer", "question_type", "image_1"],
    "vqa": ["question", "image_id"],
    "captions": ["file_name"],
}


def without(name: str, file: Path, field: str) -> None:
    """Takes a field out of the file's first row."""
    if file.suffix == ".tsv":
        with open(file, newline="") as old:
            rows = list(csv.DictReader(old, delimiter="\t"))
        rows[0][field] = ""
        with open(file, "w", newline="") as new:
            table = csv.DictWriter(new, list(rows[0]), delimiter="\t")
            table.writeheader()
            table.writerows(rows)
    elif file.suffix == ".parquet":
        rows = pq.read_table(file).to_pylist()
        rows[0][field] = None
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif name == "pope":
        first, *rest = file.read_text().splitlines()
        left = {key: value for key, value in json.loads(first).items() if key != field}
        file.write_text("\n".join([json.dumps(left), *rest]))
    else:
        content = json.loads(file.read_text())
        key = "images" if name == "captions" else next(key for key in ("questions", "data") if key in content)
        del content[key][0][field]
        file.write_text(json.dumps(content))


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in NEEDED.items() for field in fields])
def test_a_missing_field_is_one_line(name: str, field: str, tmp_path: Path) -> None:
    path = WRITERS[name](tmp_path)
    file = path / FIRST[name] if name in FIRST else path
    without(name, file, field)
    with pytest.raises(DataError) as error:
        list(TASKS[name]().items(str(path)))
    text = str(error.value)
    assert "\n" not in text and file.name in text and (field in text or "image" in text), text


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    def fails(name: str, path: Path) -> str:
        with pytest.raises(DataError) as error:
            list(TASKS[name]().items(str(path)))
        return str(error.value)

    (tmp_path / "a").mkdir()
    path = WRITERS["pope"](tmp_path / "a")
    (tmp_path / "secret.jpg").write_bytes(emoji()[0].encoded())
    lines = (path / "coco_pope_random.json").read_text()
    (path / "coco_pope_adversarial.json").write_text(lines.replace("COCO_val2014_000000000000.jpg", "../secret.jpg"))
    assert "points outside" in fails("pope", path)
    (path / "coco_pope_adversarial.json").write_text(lines.replace("COCO_val2014_000000000000.jpg", "gone.jpg"))
    assert "no picture 'gone.jpg'" in fails("pope", path) and "--images" in fails("pope", path)
    (path / "coco_pope_adversarial.json").write_text(lines.replace('"yes"', '"maybe"'))
    assert "'maybe' is neither yes nor no" in fails("pope", path)
    (path / "val2014" / "COCO_val2014_000000000000.jpg").write_bytes(b"GIF89a no picture")
    (path / "coco_pope_adversarial.json").write_text(lines)
    assert "neither jpg, png nor webp" in fails("pope", path)
    (tmp_path / "b").mkdir()
    mmmu = WRITERS["mmmu"](tmp_path / "b")
    assert "are this split's published?" in fails("mmmu", mmmu / "Math" / "test-00000-of-00001.parquet")
    table = mmmu / "Math" / "validation-00000-of-00001.parquet"
    rows = pq.read_table(table).to_pylist()
    pq.write_table(pa.Table.from_pylist([{**rows[0], "options": "__import__('os').remove('x')"}]), table)
    assert "options or answer cannot be read" in fails("mmmu", table)
    pq.write_table(pa.Table.from_pylist([{**rows[0], "question": "<image 5>?"}]), table)
    assert "no image_5" in fails("mmmu", table)
    (tmp_path / "none").mkdir()
    assert "no table in this folder" in fails("mmbench", tmp_path / "none")
    (tmp_path / "bad.tsv").write_bytes(b"index\timage\n1\t\xff\n")
    assert "UTF-8" in fails("mmbench", tmp_path / "bad.tsv")


STRANGE: list[Any] = [
    None,
    5,
    -1.5,
    True,
    "",
    "x",
    "nan",
    "[" * 1500,
    [],
    [[]],
    {},
    {"a": 1},
    "../../etc/passwd",
    "A" * 400,
]


@pytest.mark.parametrize("name", ["seedbench", "textvqa", "mathvista", "pope", "vqa", "vqa answers", "captions"])
def test_strange_values_are_refused_in_one_line_or_read(name: str, tmp_path: Path) -> None:
    """Whatever a field of a JSON row holds, nothing but items or a `DataError` comes of it."""
    name, _, answers = name.partition(" ")
    path = WRITERS[name](tmp_path)
    if name == "mathvista":
        file = path = tmp_path / "testmini.json"
        rows = pq.read_table(tmp_path / FIRST[name]).to_pylist()
        (tmp_path / "images").mkdir()
        for row in rows:
            (tmp_path / row["image"]).write_bytes(row.pop("decoded_image")["bytes"])
        content: Any = {row["pid"]: row for row in rows}
        targets = list(content.values())
    elif name == "pope":
        file = path / FIRST[name]
        content = targets = [json.loads(line) for line in file.read_text().splitlines()]
    else:
        file = path / FIRST[name] if name in FIRST else path
        file = path / "v2_mscoco_val2014_annotations.json" if answers else file
        content = json.loads(file.read_text())
        targets = [some[0] for some in content.values() if isinstance(some, list) and some]
    write = json.dumps if name != "pope" else lambda rows: "\n".join(map(json.dumps, rows))
    file.write_text(write(content))
    assert len(list(TASKS[name]().items(str(path)))) > 3
    read = refused = 0
    for target in targets[:2]:
        for field, kept in list(target.items()):
            for strange in STRANGE:
                target[field] = strange
                file.write_text(write(content))
                try:
                    read += bool(list(TASKS[name]().items(str(path))))
                except DataError as error:
                    refused += 1
                    assert "\n" not in str(error) and len(str(error)) < 1000
            target[field] = kept
    assert read and refused
