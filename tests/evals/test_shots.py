"""Solved examples in the form of Flamingo's successors: the prompts by hand, whom they are drawn for, and what results
say of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_cosmo
import torch
from benchmark_samples import WRITERS, emoji

from mm.config import RunConfig
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.tokens import make_segment
from mm.errors import ConfigError
from mm.evals import TASKS
from mm.evals.items import Item
from mm.evals.prompts import answer_text, build, decoding, spelt
from mm.evals.run import Settings, Source, run_task, sources, table
from mm.models.generate import generate, log_likelihoods
from mm.models.system import GenerativeSystem

Model = tuple[GenerativeSystem, Layout]
END = "<|endofchunk|>"


@pytest.fixture(scope="module")
def cosmo() -> Model:
    system = tiny_cosmo.build().eval()
    return system, system.config.layout()


@pytest.fixture
def open_qwen2vl(tiny_config: Callable[..., RunConfig]) -> Model:
    torch.manual_seed(0)
    config = tiny_config()
    return config.model.build().eval(), config.model.layout()


def written(name: str, folder: Path, count: int = 4) -> str:
    folder.mkdir(exist_ok=True)
    return str(WRITERS[name](folder, count))


def items_of(name: str, folder: Path) -> list[Item]:
    return list(TASKS[name]().items(written(name, folder)))


def ids_of(model: Model, prompt: Any) -> list[int]:
    return make_segment(prompt, model[1], "prompt", Limits(), closed=False).ids.tolist()


def records(out: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"{name}.items.jsonl").read_text().splitlines()]


def run(model: Model, name: str, path: str, out: Path, settings: Settings, **rest: Any) -> dict[str, Any]:
    return run_task(*model, Source(TASKS[name](), path), settings, out, {"model": "tiny"}, **rest)


def test_captions_are_asked_as_published(cosmo: Model, tmp_path: Path) -> None:
    """`<s>`, then a chunk for each example: the picture's token, `Output:`, the caption, the end of the chunk."""
    layout = cosmo[1]
    task, (one, two, three, *_) = TASKS["captions"](), items_of("captions", tmp_path)
    prompt = build(task, one, "flamingo", layout, [two], [three])
    first, second, third = (f"A picture of a {picture.name}." for picture in emoji()[:3])
    assert spelt(prompt, layout) == f"Output:{third}{END}<image>Output:{second}{END}<image>Output:"
    encode, token, image = layout.tokenizer.encode, layout.tokenizer.id, layout.pad
    assert ids_of(cosmo, prompt) == [
        *(token("<s>"), *encode(f"Output:{third}"), token(END)),
        *(image, *encode(f"Output:{second}"), token(END)),
        *(image, *encode("Output:")),
    ]
    assert answer_text(task, one, "flamingo", first) == first
    asked = decoding(task, "flamingo", layout)
    assert (asked.max_new_tokens, asked.stop, asked.stop_ids) == (20, ("Output:",), (token(END),))


def test_questions_are_asked_as_published(cosmo: Model, open_qwen2vl: Model, tmp_path: Path) -> None:
    """A model whose documents have a break behind pictures is asked with that break."""
    task, (one, two, three, *_) = TASKS["vqa"](), items_of("vqa", tmp_path)
    name = emoji()[1].name
    for model, after in ((cosmo, ""), (open_qwen2vl, "\n")):
        layout = model[1]
        prompt = build(task, one, "flamingo", layout, [two])
        chunk = f"<image>{after}Question:What is it? Short answer:"
        assert spelt(prompt, layout) == f"{chunk}{name}{END}{chunk}"
        texts = build(task, one, "flamingo", layout, [], [two, three])
        assert spelt(texts, layout).count("<image>") == 1 and spelt(texts, layout).endswith(f"{END}{chunk}")
        assert spelt(texts, layout).startswith(f"Question:What is it? Short answer:{name}{END}Question:")
        token = layout.tokenizer.id
        ids = ids_of(model, prompt)
        places = [n for n, id in enumerate(ids) if id == token(END)]
        assert len(places) == 1 and ids[0] == token("<s>")
        asked = decoding(task, "flamingo", layout)
        assert (asked.max_new_tokens, asked.stop, asked.stop_ids) == (5, ("Question:",), (token(END),))


def test_choices_are_listed_and_every_task_has_the_form(cosmo: Model, tmp_path: Path) -> None:
    layout = cosmo[1]
    for name in TASKS:
        some = items_of(name, tmp_path / name)
        prompt = spelt(build(TASKS[name](), some[0], "flamingo", layout, some[1:2], some[2:3]), layout)
        chunks = prompt.split(END)
        assert len(chunks) == 3 and "<image>" not in chunks[0] and "<image>" in chunks[1]
        assert chunks[2].endswith(("Short answer:", "Output:")) and "\n<image>" not in prompt
    one = items_of("ai2d", tmp_path / "one")[0]
    asked = build(TASKS["ai2d"](), one, "flamingo", layout)
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(one.letters, one.options, strict=True))
    assert spelt(asked, layout) == f"<image>Question:What is drawn?\n{listed} Short answer:"


@pytest.mark.parametrize("form", ["raw", "chat"])
def test_shots_of_text_have_no_picture_in_the_other_forms_either(form: Any, cosmo: Model, tmp_path: Path) -> None:
    layout = cosmo[1]
    for name in ("vqa", "captions", "mmmu"):
        task, (one, two, *_) = TASKS[name](), items_of(name, tmp_path / name)
        with_pictures, without = (build(task, one, form, layout, *shots) for shots in (([two],), ([], [two])))
        bare = build(task, one, form, layout)
        pictures = [spelt(prompt, layout).count("<image>") for prompt in (bare, without, with_pictures)]
        assert pictures[0] == pictures[1] < pictures[2]
        if form == "raw":
            after_begin = ids_of(cosmo, bare)[1:]
            assert ids_of(cosmo, without)[-len(after_begin) :] == after_begin


@pytest.mark.parametrize("name", ["captions", "vqa", "pope"])
def test_no_item_is_an_example_for_itself(name: str, cosmo: Model, tmp_path: Path) -> None:
    """Neither in its own file, nor in another that holds it too, whatever it is called there."""
    path = written(name, tmp_path / name, 4)
    other = written(name, tmp_path / "other", 6)
    if name == "captions":
        file = Path(other)
        file.write_text(file.read_text().replace('"id": ', '"id": 7').replace('"image_id": ', '"image_id": 7'))
    task = TASKS[name]()
    asked = {item.id: item for item in task.items(path)}
    for n, examples in enumerate((None, path, other)):
        out = tmp_path / f"out{n}"
        settings = Settings("flamingo", shots=3, seed=n)
        run_task(*cosmo, Source(task, path, examples=examples), settings, out, {}, limit=4)
        found = records(out, name)
        for record in found:
            item = asked[record["id"]]
            *shots, question = record["prompt"].split(END)
            solved = question.replace("<image>", "") + task.shown(item)
            assert len(shots) == 3
            if name == "captions":  # every picture's caption names what it shows
                assert solved not in [shot.replace("<image>", "") for shot in shots]
        if name == "vqa":  # one question for all pictures, whose names are the answers
            assert all(f"Short answer:{task.shown(asked[one['id']])}" not in one["prompt"] for one in found)
        if name == "pope":  # of the three splits two ask it of the same picture again
            yes = [one for one in found if one["answer"] == ["yes"]]
            assert yes and all(f"{asked[one['id']].question} Short answer:yes" not in one["prompt"] for one in yes)


def test_examples_depend_on_seed_and_item_alone(cosmo: Model, tmp_path: Path) -> None:
    path = written("captions", tmp_path / "captions", 8)

    def prompts(out: str, seed: int = 0, **rest: Any) -> list[str]:
        run(cosmo, "captions", path, tmp_path / out, Settings("flamingo", shots=2, text_shots=2, seed=seed), **rest)
        return [record["prompt"] for record in records(tmp_path / out, "captions")]

    drawn = prompts("a")
    assert drawn == prompts("b", batch=3) and drawn != prompts("c", seed=1)
    assert drawn[:3] == prompts("d", limit=3)
    assert all([chunk.count("<image>") for chunk in one.split(END)] == [0, 0, 1, 1, 1] for one in drawn)
    assert len({one.rpartition(END)[0] for one in drawn}) == 8


@pytest.mark.parametrize("settings", [Settings("flamingo", shots=2), Settings("flamingo", text_shots=2)])
def test_outputs_are_those_of_the_prompts_one_by_one(settings: Settings, cosmo: Model, tmp_path: Path) -> None:
    system, layout = cosmo
    path = written("captions", tmp_path / "captions")
    result = run(cosmo, "captions", path, tmp_path / "out", settings, batch=3)
    assert result["prompt"] == "flamingo-1" and result["seed"] == 0
    assert (result["shots"], result["text_shots"]) == (settings.shots, settings.text_shots)
    task = TASKS["captions"]()
    items = list(task.items(path))
    by_caption = {f"Output:{task.shown(item)}": item for item in items}
    for record, item in zip(records(tmp_path / "out", "captions"), items, strict=True):
        *chunks, _ = record["prompt"].split(END)
        shots = [by_caption[chunk.removeprefix("<image>")] for chunk in chunks]
        given = (shots, []) if settings.shots else ([], shots)
        (alone,) = generate(
            system, layout, [build(task, item, "flamingo", layout, *given)], decoding(task, "flamingo", layout)
        )
        assert record["output"] == alone


def test_the_likeliest_answer_after_shots(cosmo: Model, tmp_path: Path) -> None:
    system, layout = cosmo
    path = written("pope", tmp_path / "pope", 2)
    settings = Settings("flamingo", scoring="likelihood", shots=2)
    run(cosmo, "pope", path, tmp_path / "out", settings, limit=2)
    task = TASKS["pope"]()
    everything = {item.question: item for item in task.items(path)}
    (record, _), item = records(tmp_path / "out", "pope"), next(task.items(path))
    questions = [
        chunk.partition("Question:")[2].partition(" Short answer:")[0] for chunk in record["prompt"].split(END)
    ]
    prompt = build(task, item, "flamingo", layout, [everything[one] for one in questions[:2]])
    assert spelt(prompt, layout) == record["prompt"]
    expected = log_likelihoods(system, layout, [prompt] * 2, ["yes", "no"])
    assert record["log_likelihoods"] == pytest.approx(dict(zip(("yes", "no"), expected, strict=True)), abs=1e-4)


def test_decoding_is_changed_and_said(cosmo: Model, tmp_path: Path) -> None:
    path = written("captions", tmp_path / "captions")
    searched = {"beams": 3, "length_penalty": -2.0, "min_new_tokens": 4, "max_new_tokens": 9}
    settings = Settings("flamingo", shots=1, decoding=searched)
    result = run(cosmo, "captions", path, tmp_path / "out", settings, limit=2)
    assert result["decoding"].items() >= searched.items() and result["decoding"]["stop"] == ("Output:",)
    with pytest.raises(ConfigError, match="holds results with decoding"):
        run(cosmo, "captions", path, tmp_path / "out", Settings("flamingo", shots=1))
    shown = table([result, {**result, "text_shots": 2}])
    assert [*shown.columns[6].cells] == ["1", "1 + 2 of text"]


def test_as_many_shots_as_there_are(cosmo: Model, tmp_path: Path) -> None:
    path = written("captions", tmp_path / "captions")
    with pytest.raises(ConfigError, match="4 shots: there are 3 examples for item 0"):
        run(cosmo, "captions", path, tmp_path / "out", Settings("flamingo", shots=2, text_shots=2))
    with pytest.raises(ConfigError, match="text_shots -1: expected 0 or more"):
        Settings(text_shots=-1)
    wide = written("captions", tmp_path / "wide", 12)
    result = run(cosmo, "captions", wide, tmp_path / "eleven", Settings("flamingo", shots=11), limit=1)
    assert result["n"] == 1


def test_pictures_of_examples_may_lie_elsewhere(cosmo: Model, tmp_path: Path) -> None:
    path, other = written("captions", tmp_path / "test", 2), written("captions", tmp_path / "train", 5)
    moved = tmp_path / "pictures"
    (tmp_path / "train/val2017").rename(moved)
    (one,) = sources([f"captions={path}"], [], [f"captions={other}"], [f"captions={moved}"])
    assert one.example_images == moved
    run_task(*cosmo, one, Settings("flamingo", shots=3), tmp_path / "out", {})
    assert len(records(tmp_path / "out", "captions")) == 2


def test_a_picture_takes_one_position(cosmo: Model, tmp_path: Path) -> None:
    """So 32 shots are hardly longer than their text."""
    path = written("captions", tmp_path / "captions", 12)
    items = list(TASKS["captions"]().items(path))
    prompt = build(TASKS["captions"](), items[0], "flamingo", cosmo[1], [items[n % 11 + 1] for n in range(32)])
    segment = make_segment(prompt, cosmo[1], "prompt", Limits(), closed=False)
    assert np.sum(segment.ids == cosmo[1].pad) == 33 == len(segment.media)
