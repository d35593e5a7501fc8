"""Whole evaluations of a tiny random model: through the command line, stopped and gone on with, scored both ways."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_samples import WRITERS, emoji

from mm.cli import main
from mm.config import RunConfig
from mm.data.layout import Layout
from mm.errors import ConfigError, DataError
from mm.evals import TASKS
from mm.evals.prompts import answer_text, build, decoding
from mm.evals.run import Settings, Source, read_records, run_task, sources, table
from mm.models.generate import generate, log_likelihoods
from mm.models.prompts import Form, autocast
from mm.models.system import GenerativeSystem, weights_digest

Model = tuple[GenerativeSystem, Layout]


@pytest.fixture
def model(tiny_config: Callable[..., RunConfig]) -> Model:
    torch.manual_seed(0)
    config = tiny_config()
    return config.model.build().eval(), config.model.layout()


def run(model: Model, name: str, path: Path, out: Path, settings: Settings = Settings(), **rest: Any) -> dict[str, Any]:  # noqa: B008
    return run_task(*model, Source(TASKS[name](), str(path)), settings, out, {"model": "tiny"}, **rest)


def written(name: str, folder: Path) -> Path:
    """A sample in a folder of its own."""
    (folder / name).mkdir()
    return WRITERS[name](folder / name)


def lines(out: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"{name}.items.jsonl").read_text().splitlines()]


def test_all_tasks_by_the_command_line(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {name: written(name, tmp_path) for name in WRITERS}
    given = [part for name, path in paths.items() for part in ("--task", f"{name}={path}")]
    capsys.readouterr()
    command = ["eval", str(trained), *given, "--limit", "3", "--batch", "2", "--out", str(tmp_path / "out")]
    assert main([*command, "--json"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [result["task"] for result in results] == list(TASKS)
    for result in results:
        assert result["n"] == 3 and result["prompt"] == "raw-1" and result["scored"] == {"generate": 3}
        assert result == json.loads((tmp_path / "out" / f"{result['task']}.json").read_text())
        assert result["metric"] in result["metrics"] and result["weights"]
    before = (tmp_path / "out" / "mmmu.items.jsonl").read_bytes()
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in TASKS) and "raw-1" in shown
    assert (tmp_path / "out" / "mmmu.items.jsonl").read_bytes() == before
    assert main([*command, "--template", "plain"]) == 2
    assert "holds results with template 'chatml', not 'plain'" in capsys.readouterr().err
    assert main([*command, "--precision", "bf16"]) == 2
    assert "holds results with precision 'fp32', not 'bf16'" in capsys.readouterr().err
    assert main([*command, "--prompt", "chat"]) == 2
    assert "holds results with prompt 'raw-1', not 'chat-1'" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["raw", "chat"])
def test_outputs_are_those_of_the_prompts_one_by_one(form: Form, model: Model, tmp_path: Path) -> None:
    system, layout = model
    path = written("mmmu", tmp_path)
    run(model, "mmmu", path, tmp_path / "out", Settings(form), batch=3)
    task = TASKS["mmmu"]()
    for record, item in zip(lines(tmp_path / "out", "mmmu"), task.items(str(path)), strict=True):
        (alone,) = generate(system, layout, [build(task, item, form, layout)], decoding(task, form, layout))
        assert record["output"] == alone and record["id"] == item.id
        assert record["parsed"] == task.parse(item, alone)


def test_the_likeliest_choice_is_taken(model: Model, tmp_path: Path) -> None:
    system, layout = model
    path = written("mathvista", tmp_path)
    result = run(model, "mathvista", path, tmp_path / "out", Settings(scoring="likelihood"), batch=3)
    assert result["scored"] == {"generate": 3, "likelihood": 1}  # free answers have no candidates
    task = TASKS["mathvista"]()
    item = next(task.items(str(path)))
    (record,) = (one for one in lines(tmp_path / "out", "mathvista") if one["scoring"] == "likelihood")
    prompt = build(task, item, "raw", layout)
    assert answer_text(task, item, "raw", "B") == " B"
    expected = {one: log_likelihoods(system, layout, [prompt], [f" {one}"])[0] for one in "ABCD"}
    assert record["log_likelihoods"] == pytest.approx(expected, abs=1e-4)
    assert record["parsed"] == max(expected, key=lambda one: expected[one])


def test_in_bfloat16(model: Model, tmp_path: Path) -> None:
    system, layout = model
    path = written("pope", tmp_path)
    settings = Settings(scoring="likelihood", precision="bf16")
    assert run(model, "pope", path, tmp_path / "out", settings, limit=1)["precision"] == "bf16"
    task = TASKS["pope"]()
    item = next(task.items(str(path)))
    (record,) = lines(tmp_path / "out", "pope")
    prompts = [build(task, item, "raw", layout)] * 2
    with autocast(system, "bf16"):
        values = log_likelihoods(system, layout, prompts, [" yes", " no"])
    assert record["log_likelihoods"] == pytest.approx(dict(zip(("yes", "no"), values, strict=True)), abs=1e-5)
    assert values != log_likelihoods(system, layout, prompts, [" yes", " no"])


def test_a_stopped_run_goes_on(model: Model, tmp_path: Path) -> None:
    path = written("pope", tmp_path)
    whole = run(model, "pope", path, tmp_path / "whole", batch=4)

    def stop(what: str, count: int) -> None:
        if count >= 8:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(model, "pope", path, out, batch=4, progress=stop)
    assert len(lines(out, "pope")) == 8 and "metrics" not in json.loads((out / "pope.json").read_text())
    with open(out / "pope.items.jsonl", "a") as file:
        file.write('{"id": "random/1", "cut off')
    resumed = run(model, "pope", path, out, batch=4)
    same = ("n", "metrics", "by", "answered", "prompt", "decoding")
    assert {key: resumed[key] for key in same} == {key: whole[key] for key in same}
    timeless = [{key: value for key, value in one.items() if key != "seconds"} for one in lines(out, "pope")]
    assert timeless == [
        {key: value for key, value in one.items() if key != "seconds"} for one in lines(tmp_path / "whole", "pope")
    ]


def test_more_items_are_added_and_fewer_are_fewer(model: Model, tmp_path: Path) -> None:
    path, out = written("vqa", tmp_path), tmp_path / "out"
    assert run(model, "vqa", path, out, limit=2)["n"] == 2
    assert run(model, "vqa", path, out)["n"] == 4
    assert len(lines(out, "vqa")) == 4
    assert run(model, "vqa", path, out, limit=1)["n"] == 1


def test_items_that_were_changed_are_not_taken_for_answered(model: Model, tmp_path: Path) -> None:
    path, out = written("vqa", tmp_path), tmp_path / "out"
    run(model, "vqa", path, out)
    for changed in ("prompt", "answer"):
        rows = lines(out, "vqa")
        other = [{**rows[0], changed: ["x"] if changed == "answer" else "x"}, *rows[1:]]
        (out / "vqa.items.jsonl").write_text("".join(json.dumps(one) + "\n" for one in other))
        with pytest.raises(ConfigError, match=f"{rows[0]['id']} has another prompt or other answers"):
            run(model, "vqa", path, out)
        (out / "vqa.items.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert run(model, "vqa", path, out)["n"] == 4


def test_results_of_something_else_are_not_mixed_in(model: Model, tmp_path: Path) -> None:
    path, out = written("vqa", tmp_path), tmp_path / "out"
    with pytest.raises(DataError, match="does not exist"):  # leaves nothing that another run would be
        run(model, "vqa", tmp_path / "typo.json", out)
    run(model, "vqa", path, out)
    for settings in (Settings("chat"), Settings(shots=1), Settings(scoring="likelihood"), Settings(seed=1)):
        with pytest.raises(ConfigError, match="choose another --out"):
            run(model, "vqa", path, out, settings)
    for source in (
        Source(TASKS["vqa"](), str(path), tmp_path),
        Source(TASKS["vqa"](), str(path), None, None, tmp_path),
    ):
        with pytest.raises(ConfigError, match=r"images None.*choose another --out"):
            run_task(*model, source, Settings(), out, {})
    system = model[0]
    before = weights_digest(system)
    with torch.no_grad():
        next(system.parameters()).add_(1e-3)
    assert weights_digest(system) != before
    (out / "vqa.items.jsonl").write_text("[]\n")
    with pytest.raises(DataError, match="damaged"):
        read_records(out / "vqa.items.jsonl")


def test_examples_are_seeded_and_never_the_question(model: Model, tmp_path: Path) -> None:
    path = written("mmbench", tmp_path)

    def prompts(out: str, **settings: Any) -> list[str]:
        run(model, "mmbench", path, tmp_path / out, Settings(shots=2, **settings))
        return [record["prompt"] for record in lines(tmp_path / out, "mmbench")]

    drawn = prompts("a")
    assert drawn == prompts("b") and drawn != prompts("c", seed=1)
    for prompt in drawn:
        first, second, question = prompt.split("<|endofchunk|>")
        options = [sorted(part.split("\n")[2:-2], key=str) for part in (first, second, question)]
        names = [{option.partition(". ")[2] for option in some} for some in options]
        assert names[2] not in names[:2]  # no rotation of the question either
    fixed = prompts("d", fixed_shots=True)
    assert len({prompt.rpartition("<|endofchunk|>")[0] for prompt in fixed}) <= 4 < len(set(drawn))
    with pytest.raises(ConfigError, match="there are 3 examples"):
        run(model, "vqa", written("vqa", tmp_path), tmp_path / "e", Settings(shots=4))


def test_examples_of_another_file(model: Model, tmp_path: Path) -> None:
    """Of a file that holds the pictures of the questions too: none is an example for itself."""
    for name, count in (("test", 2), ("train", 4)):
        (tmp_path / name).mkdir()
        WRITERS["captions"](tmp_path / name, count)
    source = Source(
        TASKS["captions"](),
        str(tmp_path / "test/captions_val2017.json"),
        None,
        str(tmp_path / "train/captions_val2017.json"),
    )
    run_task(*model, source, Settings(shots=3), tmp_path / "out", {})
    for number, record in enumerate(lines(tmp_path / "out", "captions")):
        *shots, question = record["prompt"].split("<|endofchunk|>")
        others = [one for n, one in enumerate(emoji()[:4]) if n != number]
        assert question == "<image>\n"
        assert sorted(shots) == sorted(f"<image>\nA picture of a {one.name}." for one in others)


def test_captions_of_our_own_shards(model: Model, tmp_path: Path) -> None:
    """A source as in a config: one language, its prompt before the caption."""
    file = tmp_path / "emoji.yaml"
    file.write_text(
        'kind: captions\npath: builtin:emoji/test-*.tar.gz\nprompt: "{language}: "\nonly: {language: [en, de]}\n'
    )
    result = run(model, "captions", file, tmp_path / "out", limit=6)
    found = lines(tmp_path / "out", "captions")
    assert result["n"] == 6 and set(result["metrics"]) == {"cider", "exact", *(f"bleu_{n}" for n in range(1, 5))}
    assert [one["meta"]["prompt"] for one in found] == ["en: ", "de: "] * 3
    assert all(one["prompt"].endswith(one["meta"]["prompt"]) and len(one["answer"]) == 1 for one in found)


def test_tasks_are_named(tmp_path: Path) -> None:
    (one,) = sources(["pope=a.json"], images=["pope=pictures"], examples=["pope=b.json"])
    assert (one.task.name, one.path, one.images, one.examples) == ("pope", "a.json", Path("pictures"), "b.json")
    for given, message in (
        ((["pop=a"],), "did you mean 'pope'"),
        ((["pope"],), "expected NAME=PATH"),
        ((["pope=a", "pope=b"],), "given twice"),
        ((["pope=a"], ["vqa=b"]), "not among --task"),
    ):
        with pytest.raises(ConfigError, match=message):
            sources(*given)
    assert table([]).row_count == 0


def test_results_do_not_become_items(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose another --out"):
        run(model, "ai2d", written("ai2d", tmp_path), tmp_path / "ai2d" / "out")
