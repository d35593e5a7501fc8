"""The studies of text on a handful of documents: every run's config is one, and tables say what rows hold."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks import texts
from benchmarks.studies import continual, infinite_compute, meco, moma, optimizers, pcfg
from benchmarks.study import Row, Study
from mm.config import RunConfig, load_config
from mm.train.trainer import Trainer, Unwatched

STUDIES = {one.STUDY.name: one.STUDY for one in (continual, infinite_compute, meco, optimizers, pcfg)}


@pytest.fixture
def corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Documents of every domain, and of one in another language."""
    folder = tmp_path / "corpora/debian-text"
    folder.mkdir(parents=True)
    for domain in texts.DOMAINS:
        with gzip.open(folder / f"{domain}-000000.jsonl.gz", "wt") as file:
            for n in range(60):
                text = f"{domain} text {n}: " + " ".join(f"word{n * k % 17}" for k in range(40))
                about = {"id": f"{domain}/{n}", "domain": domain, "language": "en" if n else "de", "text": text}
                file.write(json.dumps(about) + "\n")
    monkeypatch.setattr(moma, "CORPORA", tmp_path / "corpora")
    monkeypatch.setattr(texts, "DATA", tmp_path / "texts")
    monkeypatch.setattr(texts, "HELD_OUT", 0.2)
    monkeypatch.setattr(infinite_compute, "DATA", tmp_path / "infinite")
    optimizers.shares.cache_clear()
    texts.prepare()
    infinite_compute.prepare()
    return tmp_path


def test_documents_are_held_out_by_their_ids(corpora: Path) -> None:
    ids: dict[str, set[str]] = {}
    for split in texts.SPLITS:
        for domain in texts.DOMAINS:
            lines = (texts.DATA / f"{domain}-{split}.jsonl").read_text().splitlines()
            ids.setdefault(split, set()).update(json.loads(line)["id"] for line in lines)
    assert sum(map(len, ids.values())) == len(set.union(*ids.values())) == 59 * len(texts.DOMAINS)
    assert all(ids.values())


def test_who_is_held_out_is_drawn_from_all_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever they stand, a beginning of each, until there is enough."""
    monkeypatch.setattr(texts, "BEGINNING", 10)
    documents = [{"id": f"x/{n}", "text": f"{n:04d}" * 5} for n in range(1000)]
    found = [*texts.beginnings(documents, 195)]
    assert [len(one["text"]) for one in found] == [10] * 19 + [5]
    numbers = [int(one["text"][:4]) for one in found]
    assert min(numbers) < 200 and max(numbers) > 800 and numbers != sorted(numbers)
    assert [*texts.beginnings(documents[::-1], 195)] == found


@pytest.mark.parametrize("arm", ["union", "infinite, replay 25 %"])
def test_domains_are_measured_with_stages_and_without(arm: str, corpora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, steps in (("STEPS", 2), ("WARMUP", 1), ("ANNEAL", 1)):
        monkeypatch.setattr(continual, name, steps)
    schedule = {"kind": "constant", "warmup": 0}
    monkeypatch.setattr(continual, "SCHEDULES", {"cosine": schedule, "infinite": schedule})
    monkeypatch.setattr(texts, "CONTEXT", 64)
    tiny = texts.model(32, 1)
    monkeypatch.setattr(texts, "model", lambda *_: tiny)
    config = {**continual.config(arm, 1e-3), "seed": 0, "out": str(corpora / "run")}
    config["data"]["cache"] = str(corpora / "cache")
    for stage in config.get("stages", []):
        stage["data"]["cache"] = str(corpora / "cache")
    (corpora / "study.yaml").write_text(yaml.safe_dump(config))
    Trainer(load_config(corpora / "study.yaml"), Unwatched()).run()
    stages = continual.measured(corpora)["stages"]
    assert [{*one} for one in stages] == [{*continual.DOMAINS}] * 3
    result = json.loads((corpora / "run/eval.json").read_text())
    assert stages[-1] == pytest.approx({name: result[f"test_loss/{name}"] for name in continual.DOMAINS}, rel=1e-5)


def fake_rows(study: Study, corpora: Path) -> list[Row]:
    """A row for every run, in order, each config written, read and checked with the rows before it."""
    rows: list[Row] = []
    rng = np.random.default_rng(0)
    for run in study.runs:
        config: Any = None
        if run.config is not None:
            path = corpora / "study.yaml"
            path.write_text(yaml.safe_dump({**run.config(rows), "seed": run.seed, "out": "unused"}))
            config = load_config(path)
            assert isinstance(config, RunConfig)
        steps = 1000
        curve = [[step, 0.3 * step, 8 - np.log(step) / 2 + rng.normal(0, 0.01)] for step in range(100, steps + 1, 100)]
        result = {
            "exported": "member",
            "test_loss": float(curve[-1][2]),
            "stages": [{domain: float(rng.normal(5, 0.1)) for domain in continual.DOMAINS} for _ in range(3)],
            "tokens": [10, 20, 30],
            "nats": {name: rng.normal(50, 1, 3).tolist() for name in ("right", "wrong", "none")},
            "sizes": [{"K": k, "loss": 4 + 1 / k, "probabilities": 4.1 + 1 / k, "subsets": 3} for k in range(1, 6)],
            "loss": [{"told": told, "model": 1.5, "bayes": 1.4} for told in (0, 3)],
            "probes": {"accuracy": rng.random((3, 10, 3)).tolist(), "bayes": rng.random((10, 3)).tolist()},
            "grammatical": [{"prompts": [0, 4, 8], "own": [0.1, 0.5, 0.9], "any": [0.9] * 3, "bayes": [0.2, 0.6, 1.0]}],
        }
        rows.append(
            {
                "run": run.name, "seed": run.seed, "steps": steps, "seconds": 300.0 + len(rows),
                "step_seconds": 0.3 + 0.001 * len(rows), "loss_tokens": 4e6, "curve": curve, "result": result,
            }
        )  # fmt: skip
    return rows


@pytest.mark.parametrize("name", STUDIES)
def test_every_run_has_a_config_and_every_row_a_place(
    name: str, corpora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = fake_rows(STUDIES[name], corpora)
    for some in ([], rows[:1], rows[: len(rows) // 2], rows):
        shown = STUDIES[name].show(some)
        for table in shown.split("\n\n"):
            widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
            assert len(widths) <= 1
    assert len(shown) > 300
    assert sum(run.minutes for run in STUDIES[name].runs) <= 2 * 180  # two runs at a time, of one thread each


def test_what_is_tuned_is_chosen_on_validation_and_not_on_test() -> None:
    """The second value is the best one to validate with, the first one to test with."""

    def rows(names: list[str]) -> list[Row]:
        found = []
        for n, name in enumerate(names):
            result = {"test_loss": float(n), "stages": [{"a": float(n)}], "nats": {"none": [float(n)]}, "tokens": [1]}
            found.append({"run": name, "seed": 0, "curve": [[100, 1.0, abs(n - 1.0)]], "result": result})
        return found

    rates = optimizers.ARMS["Muon"][1]
    assert optimizers.best_rate("Muon", rows([f"Muon, {rate:g}" for rate in rates]))[0] == rates[1]
    tried = [*rows([f"Muon, {rate:g}" for rate in rates]), *rows(["Muon, half", "Muon"])]
    assert optimizers.rate("Muon", tried) == rates[1]
    assert [row["run"] for row in optimizers.finals("Muon", tried)] == ["Muon"]
    tried[-2]["curve"][0][2] = -1.0
    assert optimizers.rate("Muon", tried) == rates[1] / 2
    assert [row["run"] for row in optimizers.finals("Muon", tried)] == ["Muon, half"]
    peaks = continual.ARMS["union"][2]
    assert continual.best_rate("union", rows([f"union, {rate:g}" for rate in peaks]))[0] == peaks[1]
    assert meco.best_rate("plain", rows([f"plain, {rate:g}" for rate in meco.RATES]))[0] == meco.RATES[1]
    size, rates = "96 x 3", infinite_compute.RATES["96 x 3"]
    by_rate = rows([f"{size}, rate {rate:g}" for rate in rates])
    assert infinite_compute.rate_of(size, by_rate) == rates[1]
    by_decay = rows(["", *(infinite_compute.name_of(size, decay) for decay in infinite_compute.DECAYS[1:])])
    by_decay[1]["curve"][0][2] = -1.0
    assert infinite_compute.decay_of(size, [*by_rate, *by_decay]) == infinite_compute.DECAYS[1]


def test_optimizers_are_counted_in_flops(corpora: Path) -> None:
    adamw, muon, soap, sophia = (optimizers.flops(arm) for arm in ("AdamW", "Muon", "SOAP", "Sophia"))
    assert adamw < sophia == pytest.approx(1.1 * adamw)
    assert adamw < min(muon, soap)


def test_parameters_are_those_of_the_model(corpora: Path) -> None:
    config = infinite_compute.config("96 x 3", 0.1, 1e-3)
    run = RunConfig.model_validate({**config, "out": "unused"})
    rows = run.model.build(weights=False).language.get_input_embeddings().num_embeddings
    found = sum(parameter.numel() for parameter in run.model.build(weights=False).parameters())
    assert found == infinite_compute.parameters("96 x 3") - (texts.VOCABULARY - rows) * 96
