"""Retrieval and zero-shot classification by features: ranks by loops over single pictures and texts, whole evaluations
of a tiny CLIP and a tiny COSMO, stopped and gone on with."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import tiny_cosmo
import torch
import yaml
from benchmark_samples import captions, emoji
from pairs_run import MODEL, png, write_pairs
from PIL import Image
from torch import Tensor

from mm.cli import main
from mm.data.batch import collate
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.packed import join_segments
from mm.data.sample import Media, Text
from mm.data.tokens import make_segment
from mm.errors import ConfigError, DataError
from mm.evals.run import Settings, Source, run_task, sources
from mm.evals.zero_shot import FEATURE_TASKS, Classify, Encodes, Retrieval, class_names, pixels_of, read_templates
from mm.models.system import System
from mm.models.systems.clip.config import ClipConfig

Model = tuple[System, Layout]


def clip() -> Model:
    torch.manual_seed(0)
    config = ClipConfig.model_validate(MODEL)
    return config.build().eval(), config.layout()


def cosmo() -> Model:
    system = tiny_cosmo.build().eval()
    return system, system.config.layout()


MODELS: dict[str, Callable[[], Model]] = {"clip": clip, "cosmo": cosmo}


def run(model: Model, source: Source, out: Path, **rest: Any) -> dict[str, Any]:
    return run_task(*model, source, Settings(), out, {"model": "tiny"}, **rest)


def alone(model: Model, pictures: list[Media], texts: list[str]) -> tuple[Tensor, Tensor]:
    """Features of each by itself."""
    system, layout = model
    assert isinstance(system, Encodes)
    with torch.no_grad():
        image = [system.encode_pictures(pixels_of([one], layout, ["a picture"]))[0] for one in pictures]
        return torch.stack(image), torch.stack([system.encode_texts([one])[0] for one in texts])


def place(similar: Tensor, right: set[int]) -> int:
    """Of the best of what is right, among all, from 0 on."""
    order = similar.argsort(descending=True).tolist()
    return min(order.index(one) for one in right)


def records(out: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"{name}.items.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", MODELS)
def test_recalls_are_those_of_a_loop(kind: str, tmp_path: Path) -> None:
    """Each picture has two captions."""
    model, file = MODELS[kind](), captions(tmp_path, 12)
    result = run(model, Source(Retrieval(), str(file)), tmp_path / "out", batch=5)
    items = list(Retrieval().items(str(file)))
    texts = [text for item in items for text in item.answers]
    assert (result["n"], result["texts"], result["metric"]) == (12, 24, "image_to_text_recall@1")
    image, text = alone(model, [item.media[0] for item in items], texts)
    similar = image @ text.T
    to_text = [place(row, {2 * n, 2 * n + 1}) for n, row in enumerate(similar)]
    to_image = [place(row, {n // 2}) for n, row in enumerate(similar.T)]
    for way, places in (("image_to_text", to_text), ("text_to_image", to_image)):
        for k in (1, 5, 10):
            expected = sum(one < k for one in places) / len(places)
            assert result["metrics"][f"{way}_recall@{k}"] == pytest.approx(expected)
    assert 0 < result["metrics"]["text_to_image_recall@5"] < 1
    best = similar.argsort(dim=1, descending=True)[:, :5].tolist()
    assert [one["top"] for one in records(tmp_path / "out", "retrieval")] == [[texts[n] for n in row] for row in best]


def class_folders(root: Path, classes: int = 6, each: int = 2) -> Path:
    for n in range(classes):
        folder = root / f"class_{n}"
        folder.mkdir(parents=True)
        for k in range(each):
            emoji()[(n * each + k) % 12].image.save(folder / f"{k}.PNG")
    return root


@pytest.mark.parametrize("kind", MODELS)
def test_accuracies_are_those_of_a_loop(kind: str, tmp_path: Path) -> None:
    model, folder = MODELS[kind](), class_folders(tmp_path / "set", 7)
    templates = tmp_path / "templates.txt"
    templates.write_text("a photo of a {}.\n\nthe {}\n")
    result = run(model, Source(Classify(None, str(templates)), str(folder)), tmp_path / "out", batch=4)
    items = list(Classify().items(str(folder)))
    names = [f"class {n}" for n in range(7)]
    image, text = alone(
        model, [one.media[0] for one in items], [f for n in names for f in (f"a photo of a {n}.", f"the {n}")]
    )
    rows = [(text[2 * n] + text[2 * n + 1]) / 2 for n in range(7)]
    similar = image @ torch.stack([row / row.norm() for row in rows]).T
    places = [place(row, {n // 2}) for n, row in enumerate(similar)]
    assert result["n"] == 14 and result["texts"] == 14
    for k in (1, 5):
        assert result["metrics"][f"accuracy@{k}"] == pytest.approx(sum(one < k for one in places) / 14)
    assert result["templates"] == ["a photo of a {}.", "the {}"]
    for record, row in zip(records(tmp_path / "out", "classify"), similar, strict=True):
        assert record["top"][0] == f"class_{int(row.argmax())}" and record["id"].startswith(record["answer"][0])


def test_cosmos_features_are_those_of_its_training(tmp_path: Path) -> None:
    system, layout = cosmo()
    pairs = [(tiny_cosmo.picture(n), text) for n, text in enumerate(("a red fox", "a blue hat of felt", "x"))]
    segments = [make_segment((one, Text(text)), layout, "pair", Limits()) for one, text in pairs]
    pack = join_segments([(f"{n}", "", segment) for n, segment in enumerate(segments)])
    with torch.no_grad():
        expected = system(collate([pack], layout, None)).features
    image, text = alone((system, layout), [one for one, _ in pairs], [text for _, text in pairs])
    torch.testing.assert_close(image, expected["image"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(text, expected["text"], rtol=1e-4, atol=1e-5)
    assert isinstance(system, Encodes)
    with torch.no_grad():
        torch.testing.assert_close(system.encode_texts([text for _, text in pairs]), text, rtol=1e-4, atol=1e-5)


def test_a_stopped_run_goes_on_and_a_larger_one_adds_to_it(tmp_path: Path) -> None:
    model, file = clip(), captions(tmp_path, 12)
    source = Source(Retrieval(), str(file))
    whole = run(model, source, tmp_path / "whole", batch=4)

    def stop(what: str, count: int) -> None:
        if (what, count) == ("retrieval: texts", 8):
            raise KeyboardInterrupt

    out = tmp_path / "out"
    assert run(model, source, out, batch=4, limit=5)["n"] == 5
    with pytest.raises(KeyboardInterrupt):
        run(model, source, out, batch=4, progress=stop)
    with open(out / "retrieval.texts.f32", "ab") as half:
        half.write(b"cut")
    calls: list[int] = []
    handle = model[0].clip.visual.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))  # type: ignore[union-attr, operator]
    resumed = run(model, source, out, batch=4)
    handle.remove()
    assert not calls, "pictures are not encoded again"
    assert resumed["metrics"] == whole["metrics"] and resumed["n"] == 12
    for name in ("pictures", "texts"):
        ours, theirs = (np.fromfile(folder / f"retrieval.{name}.f32", "<f4") for folder in (out, tmp_path / "whole"))
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert run(model, source, out, limit=3)["texts"] == 6
    with pytest.raises(ConfigError, match="holds results with precision 'fp32', not 'bf16'"):
        run_task(*model, source, Settings(precision="bf16"), out, {"model": "tiny"})
    with pytest.raises(ConfigError, match="lies within"):
        run(model, Source(Classify(), str(class_folders(tmp_path / "set"))), tmp_path / "set/out")


def test_features_of_what_has_changed_are_not_taken(tmp_path: Path) -> None:
    """The same paths with other pictures or captions, in the same number."""
    model, file = clip(), captions(tmp_path, 4)
    source, out, plain = Source(Retrieval(), str(file)), tmp_path / "out", file.read_text()
    first = run(model, source, out)
    known = {one.name: one.read_bytes() for one in out.glob("*.f32")}
    shuffled = json.loads(plain)
    shuffled["annotations"] = shuffled["annotations"][2:] + shuffled["annotations"][:2]
    reworded = plain.replace(f"the {emoji()[2].name}, drawn small", "another")
    for text, row in ((json.dumps(shuffled), "pictures.f32: its row 1 "), (reworded, "texts.f32: its row 6 ")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=f"{row}is not of .*choose another --out"):
            run(model, source, out)
    file.write_text(plain)
    picture = tmp_path / "val2017" / f"{3:012d}.jpg"
    before = picture.read_bytes()
    picture.write_bytes(emoji()[9].encoded("PNG"))
    with pytest.raises(ConfigError, match=r"pictures\.f32: its row 4 is not of"):
        run(model, source, out)
    picture.write_bytes(before)
    assert run(model, source, out)["metrics"] == first["metrics"]
    assert known == {one.name: one.read_bytes() for one in out.glob("*.f32")}
    elsewhere = Source(Retrieval(), str(file), tmp_path / "val2017")
    with pytest.raises(ConfigError, match="holds results with images None"):
        run(model, elsewhere, out)


def test_rows_that_do_not_say_what_they_are_of_are_computed_again(tmp_path: Path) -> None:
    model, source, out = clip(), Source(Retrieval(), str(captions(tmp_path, 4))), tmp_path / "out"
    first = run(model, source, out)
    (out / "retrieval.pictures.f32").write_bytes(bytes(4 * 16 * 4))
    keys = out / "retrieval.pictures.keys"
    keys.write_bytes(keys.read_bytes()[:7])
    assert run(model, source, out)["metrics"] == first["metrics"]


def test_other_names_of_classes_are_other_settings(tmp_path: Path) -> None:
    model, folder, names = clip(), class_folders(tmp_path / "set", 3), tmp_path / "names.txt"
    names.write_text("a fox\na hat\na tree\n")
    source = Source(Classify(str(names)), str(folder))
    run(model, source, tmp_path / "out")
    names.write_text("a fox\na tree\na hat\n")
    with pytest.raises(ConfigError, match=r"holds results with names .*choose another --out"):
        run(model, source, tmp_path / "out")


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "set", 3)
    (folder / "class_1" / "0.PNG").write_bytes(b"no picture")
    with pytest.raises(DataError, match=f"{folder}: item class_1/0.PNG of classify"):
        run(clip(), Source(Classify(), str(folder)), tmp_path / "out")


def test_karpathys_test_split(tmp_path: Path) -> None:
    (tmp_path / "val2014").mkdir()
    images = []
    for n, one in enumerate(emoji()[:5]):
        (tmp_path / "val2014" / f"COCO_val2014_{n:012d}.jpg").write_bytes(one.encoded())
        said = [{"raw": f" {one.name} {k} ", "tokens": [], "imgid": n, "sentid": k} for k in range(2)]
        row = {"filepath": "val2014", "filename": f"COCO_val2014_{n:012d}.jpg", "imgid": n, "cocoid": 100 + n}
        images.append({**row, "split": "test" if n % 2 == 0 else "restval", "sentences": said})
    file = tmp_path / "dataset_coco.json"
    file.write_text(json.dumps({"images": images, "dataset": "coco"}))
    items = list(Retrieval().items(str(file)))
    assert [(item.id, item.answers[1]) for item in items] == [(f"{100 + n}", f"{emoji()[n].name} 1") for n in (0, 2, 4)]
    assert items[1].media[0].read() == emoji()[2].encoded()


def test_a_picture_with_captions_in_several_languages_is_one(tmp_path: Path) -> None:
    file = tmp_path / "emoji.yaml"
    file.write_text(
        'kind: captions\npath: builtin:emoji/test-*.tar.gz\nprompt: "{language}: "\nonly: {language: [en, de]}\n'
    )
    items = [item for _, item in zip(range(4), Retrieval().items(str(file)), strict=False)]
    assert len({item.id for item in items}) == 4
    assert all(item.answers[0].startswith("en: ") and item.answers[1].startswith("de: ") for item in items)
    named = [item for _, item in zip(range(4), Classify().items(str(file)), strict=False)]
    assert {item.answers[0] for item in named[::2]} == {item.answers[0].removeprefix("en: ") for item in items[:2]}


def test_captions_that_are_samples_of_their_own_are_of_one_picture(tmp_path: Path) -> None:
    """Also where keys of other pictures look like pieces of one."""
    with tarfile.open(tmp_path / "pairs.tar", "w") as tar:
        for key, said in (("a", ["x", "y"]), ("b#0", ["z"]), ("b#1", ["v", "w"])):
            for ext, data in (("png", png(len(key))), ("json", json.dumps({"captions": said}).encode())):
                entry = tarfile.TarInfo(f"{key}.{ext}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    file = tmp_path / "pairs.yaml"
    answers = {}
    for which in ("all", "draw"):
        file.write_text(f"kind: captions\nname: s\npath: {tmp_path}/pairs.tar\ncaptions: {which}\n")
        answers[which] = [(item.id, item.answers) for item in Retrieval().items(str(file))]
    assert answers["all"] == [("s/pairs/a", ("x", "y")), ("s/pairs/b%230", ("z",)), ("s/pairs/b%231", ("v", "w"))]
    assert answers["all"] == answers["draw"]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_tables_of_labelled_pictures(ending: str, tmp_path: Path) -> None:
    for n in range(3):
        emoji()[n].image.save(tmp_path / f"{n}.png")
    rows = [("0.png", "cat, small"), ("1.png", "dog"), ("2.png", "cat, small")]
    file = tmp_path / f"set.{ending}"
    if ending == "jsonl":
        file.write_text("\n".join(json.dumps({"file_name": name, "label": label}) for name, label in rows))
    else:
        mark = "," if ending == "csv" else "\t"
        file.write_text("\n".join([f"file_name{mark}label", *(f'{name}{mark}"{label}"' for name, label in rows)]))
    task = Classify()
    items = list(task.items(str(file)))
    assert [item.answers for item in items] == [("cat, small",), ("dog",), ("cat, small",)]
    assert Image.open(io.BytesIO(items[2].media[0].read())).convert("RGB").tobytes() == emoji()[2].image.tobytes()
    task.open(str(file), None)
    assert task.texts([]) == ["a photo of a cat, small.", "a photo of a dog."]


def test_names_of_classes(tmp_path: Path) -> None:
    def named(labels: set[str], text: str) -> dict[str, str]:
        (tmp_path / "names.txt").write_text(text)
        return class_names(labels, str(tmp_path / "names.txt"))

    assert class_names({"red_fox", "10"}, None) == {"10": "10", "red_fox": "red fox"}
    assert list(class_names({"10", "9"}, None)) == ["9", "10"]
    assert named({"0", "2"}, "a\nb\nc\n") == {"0": "a", "1": "b", "2": "c"}
    assert named({"000", "002"}, "a\nb\nc\n") == {"000": "a", "1": "b", "002": "c"}
    assert class_names({f"{n:03d}" for n in range(1000)}, "imagenet")["007"] == open_clip.IMAGENET_CLASSNAMES[7]
    assert named({"n02", "n01"}, "a\nb\n") == {"n01": "a", "n02": "b"}
    assert named({"n02"}, "n01\ta cat\nn02\ta dog\n") == {"n01": "a cat", "n02": "a dog"}
    assert class_names({"0", "999"}, "imagenet")["999"] == open_clip.IMAGENET_CLASSNAMES[999]
    for labels, text, message in (
        ({"a", "b"}, "one\n", "1 names for 2 classes"),
        ({"3"}, "a\nb\n", "no name for the label '?3"),
        ({"a"}, "\n", "no names of classes in it"),
    ):
        with pytest.raises(DataError, match=message):
            named(labels, text)
    with pytest.raises(DataError, match="no names of classes to be read"):
        class_names({"a"}, str(tmp_path / "none"))


def test_templates(tmp_path: Path) -> None:
    published = open_clip.OPENAI_IMAGENET_TEMPLATES
    assert [one.replace("{}", "fox") for one in read_templates("openai")] == [one("fox") for one in published]
    assert len(read_templates("simple")) == 7 and read_templates(None) == ("a photo of a {}.",)
    (tmp_path / "templates.txt").write_text("a photo of a fox\n")
    with pytest.raises(ConfigError, match=r"has no \{\} where the name"):
        read_templates(str(tmp_path / "templates.txt"))


def test_what_is_no_such_set_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "empty", "expected one for each class"), (tmp_path / "none.csv", "none.csv")):
        with pytest.raises(DataError, match=message):
            list(Classify().items(str(path)))
    with pytest.raises(ConfigError, match="for --task classify"):
        sources(["retrieval=a"], classes="imagenet")
    (one,) = sources(["classify=a"], templates="simple")
    assert isinstance(one.task, Classify) and one.task.templates == "simple"
    assert set(FEATURE_TASKS) == {"retrieval", "classify"}


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP after one step."""
    folder = tmp_path_factory.mktemp("clip")
    write_pairs(folder / "pairs.tar", range(8))
    values = {
        "out": str(folder / "run"),
        "data": {
            "sources": [{"kind": "captions", "path": str(folder / "pairs.tar")}],
            "context_length": 64, "cache": str(folder / "cache"), "workers": 0,
        },
        "model": MODEL,
        "train": {
            "max_steps": 1, "batch_tokens": 64, "micro_batch": 1, "device": "cpu",
            "optimizer": {"kind": "adamw", "lr": 1e-3},
        },
    }  # fmt: skip
    (folder / "clip.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", str(folder / "clip.yaml")]) == 0
    return folder / "run"


def test_by_the_command_line(clip_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path / "test.tar", range(8, 20))
    folder = class_folders(tmp_path / "set")
    tasks = ["--task", f"retrieval={tmp_path}/test.tar", "--task", f"classify={folder}", "--templates", "simple"]
    command = ["eval", str(clip_run), *tasks, "--out", str(tmp_path / "out"), "--batch", "5"]
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [(one["task"], one["n"], one["texts"]) for one in found] == [("retrieval", 12, 12), ("classify", 12, 42)]
    assert found[1] == json.loads((tmp_path / "out/classify.json").read_text()) and found[0]["weights"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert all(f"{one['metrics'][one['metric']]:.3f}" in shown for one in found) and "features" in shown
    assert main([*command[:2], "--task", "pope=POPE"]) == 2
    assert "does not write text" in capsys.readouterr().err


def test_a_model_without_features_is_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(trained), "--task", f"retrieval={tmp_path}", "--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert "has no features of pictures and texts" in line and "kinds clip and cosmo" in line
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(DataError, match="no pictures for retrieval"):
        run(clip(), Source(Retrieval(), str(tmp_path / "empty.tar")), tmp_path / "none")
