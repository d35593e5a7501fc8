"""Studies: every run once, rows kept, and what was stopped goes on."""

import gzip
import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_run import TINY

from benchmarks import study
from benchmarks.studies import cosmo, mert, moma, simvlg
from benchmarks.study import Row, Run, Study
from mm.config import RunConfig
from mm.data.loader import one_pass
from mm.data.packed import PackedDataset
from mm.data.prepare import pack_split
from mm.train.stages import take_over


def config(steps: int) -> dict[str, Any]:
    return {**TINY, "train": {**TINY["train"], "max_steps": steps}, "evaluation": {"candidates": 4, "samples": 0}}


def test_runs_are_made_once_and_may_use_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "HERE", tmp_path)
    prepared = []

    def after(rows: list[Row]) -> dict[str, Any]:
        return with_cache(config(rows[-1]["steps"] + 1))

    def with_cache(values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "data": {**values["data"], "cache": str(cache)}}

    first = Run("first", 0, 0.1, lambda rows: with_cache(config(1)))
    one = Study("tiny", "a try", lambda: prepared.append(1), [first, Run("after", 3, 0.1, after)], lambda rows: "")
    study.run_study(one, tmp_path / "work", minutes=0.15)
    assert "left for the next time" in capfd.readouterr().out
    assert [row["run"] for row in study.read_rows("tiny")] == ["first"]
    study.run_study(one, tmp_path / "work", minutes=None)
    rows = study.read_rows("tiny")
    assert [(row["run"], row["seed"], row["steps"]) for row in rows] == [("first", 0, 1), ("after", 3, 2)]
    said = json.loads((tmp_path / "work/after-3/run/eval.json").read_text())
    assert rows[1]["result"] == said and rows[1]["seconds"] > 0 and rows[1]["loss_tokens"] > rows[0]["loss_tokens"]
    study.run_study(one, tmp_path / "work", minutes=None)
    assert study.read_rows("tiny") == rows, "nothing is run again"
    with pytest.raises(SystemExit, match="ended with status 2"):
        study.run_one("tiny", Run("bad", 0, 0.1, lambda rows: {"data": {}}), [], tmp_path / "bad")


def test_a_run_may_be_measured_further_or_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(study, "HERE", tmp_path)

    def trained(rows: list[Row]) -> dict[str, Any]:
        assert rows[-1]["run"] == "alone"
        values = config(1)
        return {**values, "data": {**values["data"], "cache": str(cache)}}

    def after(folder: Path) -> dict[str, Any]:
        return {"files": sorted(path.name for path in folder.iterdir()), "there": (folder / "run/eval.json").exists()}

    runs = [Run("alone", 2, 0.1, None, after), Run("both", 2, 0.1, trained, after)]
    study.run_study(Study("tiny", "a try", lambda: None, runs, lambda rows: ""), tmp_path / "work", None)
    alone, both = study.read_rows("tiny")
    assert alone["result"] == {"files": [], "there": False} and "steps" not in alone
    assert both["result"]["there"] and both["result"]["files"] == ["run", "study.yaml"]
    assert both["steps"] == 1 and "caption_loss" in both["result"]


def test_the_music_study_keeps_pieces_apart_and_fits_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, data = tmp_path / "music", tmp_path / "data"
    corpus.mkdir()
    with tarfile.open(corpus / "music-000000.tar", "w") as tar:
        for number in range(120):
            fields = {"source": f"piece {number // 4}", "key": "C major", "instrument": "oboe", "tempo": 60}
            mert.add(tar, f"{number}.flac", bytes([number]))
            mert.add(tar, f"{number}.json", json.dumps(fields).encode())
    monkeypatch.setattr(mert, "CORPUS", corpus)
    monkeypatch.setattr(mert, "DATA", data)
    mert.write_splits()
    pieces: dict[str, set[str]] = {}
    sound = set()
    for split in mert.SPLITS:
        with tarfile.open(data / f"{split}.tar") as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        about = [json.loads(content) for name, content in files.items() if name.endswith("json")]
        assert {one["split"] for one in about} == {split}
        pieces[split] = {one["source"] for one in about}
        sound |= {content for name, content in files.items() if name.endswith("flac")}
    assert sum(map(len, pieces.values())) == len(set().union(*pieces.values())) == 30 and len(sound) == 120
    assert all(pieces.values()) and len(pieces["train"]) > len(pieces["test"]) > len(pieces["validation"])

    assert sum(run.minutes for run in mert.RUNS) + 20 <= 180, "20 for the corpus and the centroids"
    for arm in mert.ARMS:
        made = RunConfig.model_validate({**mert.config(arm), "out": "x"})
        in_a_step = made.train.batch_tokens // made.data.context_length
        assert in_a_step % made.train.micro_batch == 0 and made.data.context_length % mert.CLIP == 0
        assert made.model.encoder.layout().count(120_000)[0] == mert.CLIP
    numbers = {"value": 0.5, "low": 0.4, "high": 0.6, "constant": 0.1}
    probes = {
        label: {
            "recordings": {"test": 9},
            "groups": {"test": 3},
            "metrics": {metric: numbers},
            "against": {metric: numbers},
        }
        for label, metric in mert.LABELS.items()
    }
    alone = {label: {key: one[key] for key in one if key != "against"} for label, one in probes.items()}
    rows = [
        {"run": "cqt", "seed": 0, "result": {"probes": alone}},
        {"run": "full", "seed": 1, "steps": 3, "seconds": 60.0, "result": {"test_codes": 9.25, "probes": probes}},
    ]
    shown = mert.show(rows)
    assert shown.count("0.500 (0.400 to 0.600)") == 6 and shown.count("+0.500 (+0.400 to +0.600)") == 3
    assert "| full | 1 | 3 | 60 | 9.250 |" in shown and "9 clips of 3 test pieces" in shown and mert.show([])


def shard(path: Path, files: dict[str, dict[str, Any]], picture_name: str = "png") -> None:
    """With a picture of its own for each."""
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for number, (key, about) in enumerate(files.items()):
            picture = io.BytesIO()
            Image.new("RGB", (100, 80), (5 * number % 256, 90, 200)).save(picture, "PNG")
            mert.add(tar, f"{key}.json", json.dumps(about).encode())
            mert.add(tar, f"{key}.{picture_name}", picture.getvalue())


def write_corpora(folder: Path) -> None:
    """Eight emoji in four groups, one of them with a skin tone; 32 stamps and drawings of 16 kinds; 400 documents."""

    def captions(text: str) -> list[dict[str, str]]:
        return [{"language": "de", "text": "auf Deutsch"}, {"language": "en", "text": text}]

    shard(folder / "emoji/emoji-0.tar", {
        f"{n}": {"captions": captions(f"emoji {n}"), "group": f"{n // 2}", "skin_tones": int(n == 7)} for n in range(8)
    })  # fmt: skip
    kinds = [f"{one}{number}" for one in "abcdefgh" for number in (1, 2)]
    shard(folder / "stamps/images-0.tar", {f"animals-{one}": {"captions": captions(f"a {one}")} for one in kinds})
    shard(folder / "clipart/clipart-0.tar", {f"things-{one}": {"caption": f"the {one}"} for one in kinds})
    (folder / "debian-text").mkdir()
    with gzip.open(folder / "debian-text/words-0.jsonl.gz", "wt") as file:
        for n in range(400):
            text = f"document {n}: " + "words " * 1500
            about = {"id": f"words/{n}", "language": "en" if n % 2 else "fr", "text": text}
            file.write(json.dumps(about) + "\n")


def test_the_experts_study_has_its_groups_apart_and_its_modalities_even(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moma, "CORPORA", tmp_path)
    monkeypatch.setattr(moma, "DATA", tmp_path / "data")
    assert all(n % moma.EVERY == 0 for n in (moma.STEPS, moma.SEED_STEPS))
    monkeypatch.setattr(moma, "STEPS", 4)  # for which there are pictures here
    monkeypatch.setattr(moma, "SEED_STEPS", 2)
    with pytest.raises(SystemExit, match="mm data build emoji --out"):
        moma.write_splits()
    write_corpora(tmp_path)
    moma.write_splits()
    groups: dict[str, set[str]] = {}
    for split in moma.SPLITS:
        with tarfile.open(tmp_path / f"data/pictures-{split}.tar") as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        captions = [json.loads(data)["caption"] for name, data in files.items() if name.endswith("json")]
        times = moma.CUTTINGS if split == "train" else 1
        assert all(captions.count(one) == times for one in captions) and "auf Deutsch" not in captions
        assert "emoji 7" not in captions, "it has a skin tone"
        groups[split] = {one if one.startswith("emoji") else one[:-1] for one in captions}
        groups[split] = {f"emoji {int(one[6:]) // 2}" if one.startswith("emoji") else one for one in groups[split]}
        assert all(Image.open(io.BytesIO(data)).size == (64, 64) for name, data in files.items() if "jpg" in name)
    assert sum(map(len, groups.values())) == len(set().union(*groups.values())) == 20
    texts = [
        json.loads(line)["text"]
        for split in moma.SPLITS
        for line in gzip.open(tmp_path / f"data/text-{split}.jsonl.gz", "rt")
    ]
    assert len(texts) == len(set(texts)) and all(int(one.split(":")[0][9:]) % 2 for one in texts)
    assert len(texts) / 200 == pytest.approx(moma.DOCUMENTS, abs=0.08)

    (tmp_path / "data/vq").mkdir()
    about = {"model_type": "janus_vqgan", "num_embeddings": 256, "channel_multiplier": [1, 1, 2, 2], "num_patches": 8}
    (tmp_path / "data/vq/config.json").write_text(json.dumps(about))
    raw = RunConfig.model_validate({**moma.config("dense", data=moma.raw_data()), "out": "unused"})
    pack_split(raw.data, "train", raw.model.layout(), 0, tmp_path / "data/packed/train")
    packed = PackedDataset(tmp_path / "data/packed/train")
    tokens = {name: 0.0 for name in moma.KINDS}
    for source, share in moma.shares().items():
        counts = packed.about["ledger"][source]
        image = counts["image_tokens"] + 2 * counts["image"]
        tokens["image"] += share * image / counts["segment_tokens"]
        tokens["text"] += share * (1 - image / counts["segment_tokens"])
    assert tokens["text"] == pytest.approx(tokens["image"], abs=1e-3)

    whole = {arm: RunConfig.model_validate({**moma.config(arm), "out": "x"}) for arm in moma.MINUTES}
    steps = {arm: sum(one.train.max_steps or 0 for one in run.stage_runs()) for arm, run in whole.items()}
    assert steps == {**dict.fromkeys(whole, moma.STEPS), "dense": moma.LONGER * moma.STEPS}
    seed, upcycled = whole["upcycled"].stage_runs()
    assert (seed.model.experts.groups, upcycled.model.experts.groups) == (moma.ARMS["1t1i"], moma.ARMS["4t4i"])
    assert whole["dense"].model.experts is None and whole["upcycled"].stages[1].carry_on
    assert sum(run.minutes for run in moma.RUNS) + 20 <= 180, "20 for the VQ model and codes"
    moma.flops.cache_clear()
    per_step = {arm: moma.flops(arm) for arm in ("dense", "4t4i")}
    moma.flops.cache_clear()
    assert 0.9 < per_step["4t4i"] / per_step["dense"] < 1.01, "routers beyond the MLPs, which no padding goes through"


def law_row(run: str, seed: int, points: int, better: dict[str, float]) -> Row:
    """Loss 20 - log(FLOPs times a factor by modality) a token, and a number of each pool's own, the same for all."""

    def sums(kind: str, flops: float) -> list[float]:
        return [100 * (20 + pool % 3 - math.log(better[kind] * flops)) for pool in range(moma.POOLS)]

    found: list[dict[str, Any]] = []
    for n in range(1, points + 1):
        choice = {kind: sums(kind, n * 1e6) for kind in moma.KINDS}
        found.append({"step": 75 * n, "flops": n * 1e6, "auxiliary_flops": n * 1e4, "choice": choice})
        if run == "4t4i":
            found[-1]["auxiliary"] = {kind: sums(kind, n * 5e5) for kind in moma.KINDS}
    tokens = dict.fromkeys(moma.KINDS, [100] * moma.POOLS)
    return {"run": run, "seed": seed, "seconds": 60.0, "result": {"tokens": tokens, "points": found}}


def test_the_experts_study_reads_savings_off_the_dense_curve() -> None:
    spent = [1.0, 2.0, 8.0]
    losses = [10 - math.log(one) for one in spent]
    assert moma.needed(spent, losses, 10 - math.log(3)) == (pytest.approx(3), True)
    assert moma.needed(spent, losses, 11) == (1, True) and moma.needed(spent, losses, 7) == (8, False)
    better = {"text": 1.5, "image": 2.5}
    dense = law_row("dense", 0, 16, dict.fromkeys(moma.KINDS, 1.0))
    ours = law_row("4t4i", 0, 8, better)
    assert moma.saving(dense, ours, "choice", "text") == [(pytest.approx(1.5, abs=1e-3), True)]
    assert moma.saving(dense, ours, "choice", "all") == [(pytest.approx(math.sqrt(1.5 * 2.5), abs=2e-3), True)]
    assert moma.saving(dense, ours, "auxiliary", "text") == [(pytest.approx(0.75, abs=1e-3), True)]
    assert moma.saving(dense, ours, "choice", "image") == [(pytest.approx(2), False)], "the curve ends there"
    shown = moma.show([dense, ours, law_row("8x", 1, 8, better)])
    # What is of a pool is so for both curves, and draws change nothing.
    assert "| 4t4i | 1.94 (1.94 to 1.94; 1.94 to 1.94) | 1.50 (1.50 to 1.50; 1.50 to 1.50) | more than 2.00" in shown
    assert "| 4t4i, auxiliary routers | 0.97" in shown and "| *4t4i in the paper: 1.4B, 1T tokens* | *3.7*" in shown
    assert "| 8x | 1 | 600 |" in shown and "| 8x | 1.94" not in shown, "its seed has no dense run yet"
    assert moma.show([]) == ""


def test_the_contrastive_study_keeps_pairs_apart_and_measures_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moma, "CORPORA", tmp_path)
    monkeypatch.setattr(cosmo, "DATA", tmp_path / "data")
    with pytest.raises(SystemExit, match="mm data build stamps --out"):
        cosmo.write_splits()
    write_corpora(tmp_path)
    page = [{"text": "Before."}, {"image": "0000.png"}, {"text": "A dialog."}]
    shard(tmp_path / "gimp-help/en-0.tar", {f"page-{n}": {"parts": page} for n in range(40)}, "0000.png")
    cosmo.write_splits()
    keys: dict[str, set[str]] = {}
    for split in cosmo.SPLITS:
        found = cosmo.groups(tmp_path / f"data/pairs-{split}.tar")
        assert all(len(one) == 2 and json.loads(one["json"])["caption"] for one in found.values())
        keys[split] = set(found) | set(cosmo.groups(tmp_path / f"data/manual-{split}.tar"))
    assert sum(map(len, keys.values())) == len(set().union(*keys.values())) == 1855 + 32 + 40
    assert all(any(key.startswith(kind) for key in keys["train"]) for kind in ("emoji", "stamps", "clipart", "page"))

    (tmp_path / "debian-text/dictionary-0.jsonl.gz").touch()
    parts = [RunConfig.model_validate({**made(), "out": "x"}) for made in (cosmo.tower_config, cosmo.lm_config)]
    runs = {arm: RunConfig.model_validate({**cosmo.config(arm), "out": "x"}) for arm in cosmo.ARMS}
    assert len({run.model.layout().fingerprint() for run in runs.values()}) == 1, "one packed set for all"
    assert all(run.train.max_steps == cosmo.STEPS for run in runs.values())
    assert parts[1].model.layout().tokenizer.fingerprint() == runs["both"].model.layout().tokenizer.fingerprint()
    prepared = cosmo.MINUTES["tower"] + cosmo.MINUTES["lm"]
    assert sum(run.minutes for run in cosmo.RUNS) + prepared <= 75

    raw = RunConfig.model_validate({**cosmo.config("both"), "data": cosmo.raw_data(), "out": "x"})
    layout = raw.model.layout()
    pack_split(raw.data, "test", layout, 0, tmp_path / "data/packed/test")
    torch.manual_seed(0)
    clip, system = parts[0].model.build(), raw.model.build()
    take_over(system, cosmo.tower_of(clip.state_dict(), system.vision.featurizer), None, "CLIP")
    batch = next(one_pass(PackedDataset(tmp_path / "data/packed/test"), layout, 1))
    pixels = batch.media["image"].stacked()[:3]
    clip.clip.visual.output_tokens = True
    with torch.no_grad():
        torch.testing.assert_close(system.vision.of_squares(pixels), clip.clip.visual(pixels)[1], rtol=1e-4, atol=1e-4)
        output, losses = system(batch), cosmo.losses_of(system, batch)
    assert sum(loss for loss, _ in losses.values()) == pytest.approx(float(output.losses["next_token"]), rel=1e-5)
    assert sum(tokens for _, tokens in losses.values()) == batch.targets and [*losses] == batch.ids[0]
    assert len(output.features["image"]) == len(losses)
    said = {id: layout.tokenizer.decode([*tokens[1:-1]]) for id, tokens in cosmo.captions_of(batch).items()}
    tars = cosmo.groups(tmp_path / "data/pairs-test.tar")
    assert said == {id: json.loads(tars[id.split("/")[-1]]["json"])["caption"] for id in said}


def test_the_contrastive_study_ranks_and_compares() -> None:
    image, text = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    alike = torch.eye(5, dtype=torch.bool)
    alike[1, 3] = alike[3, 1] = True
    expected = []
    for i in range(5):
        best = max(float(image[i] @ text[j]) for j in range(5) if alike[i, j])
        expected.append(sum(float(image[i] @ text[j]) >= best for j in range(5) if not alike[i, j]))
    assert cosmo.ranks(image, text, alike) == expected
    assert cosmo.ranks(torch.ones(5, 2), torch.ones(5, 2), alike) == [4, 3, 4, 3, 4], (
        "what is all the same finds nothing"
    )

    def row(run: str, seed: int, loss: float, rank: int) -> Row:
        found = {
            "losses": [loss, 2 * loss], "tokens": [1, 2], "manual_losses": [3.0], "manual_tokens": [2],
            "image_to_text": [0, rank], "text_to_image": [rank, rank],
        }  # fmt: skip
        said = {"caption_loss": loss, "shuffled_loss": loss + 0.5, "match_accuracy": 0.25}
        return {"run": run, "seed": seed, "seconds": 60.0, "result": {**found, **said}}

    rows = [row("generative", 0, 4.0, 7), row("both", 0, 3.5, 3), row("both", 1, 3.0, 3)]
    shown = cosmo.show(rows)
    assert "| both | 2 | 60 (60 to 60) | 3.250 (3.250 to 3.250) | +0.500 | 25.0 % | 1.500" in shown
    assert "| both | 50.0 (0.0 to 100.0) | 100.0 (100.0 to 100.0) |" in shown and "50.0 %, 250.0 %" in shown
    assert "| both, less generative | -0.500 (-0.500 to -0.500; -0.500) | +50.0 (" in shown
    assert "less contrastive" not in shown and cosmo.show([])


def test_the_merging_study_reads_equal_steps_and_equal_time_off_its_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cosmo, "DATA", tmp_path)
    tokenizer = cosmo.train_tokenizer(iter(["a caption"]), 300)
    tokenizer.add_special_tokens(["<visual>"])
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer/tokenizer.json"))
    for arm in (*simvlg.CONNECTORS, *simvlg.TOWERS, *simvlg.JOINED):
        run = RunConfig.model_validate({**simvlg.config(arm), "out": "x"})
        layout = run.model.layout()
        taken = layout.image.tokens if layout.image else layout.video.count()[0]  # type: ignore[union-attr]
        assert taken == simvlg.positions(arm)
        assert run.train.batch_tokens // (taken + simvlg.TEXT) == simvlg.PAIRS
        assert (run.train.max_steps or 0) % simvlg.EVERY == 0 or arm in simvlg.JOINED
    arms = [*simvlg.CONNECTORS][:4]
    assert [simvlg.positions(arm) for arm in arms] == [65, 45, 25, 11]
    assert [simvlg.positions(arm) for arm in simvlg.TOWERS] == [64, 48, 32, 8]
    assert sum(run.minutes for run in simvlg.RUNS) <= 75

    def row(run: str, second: float, loss: float) -> Row:
        curve = [[20 * n, 20 * n * second, loss - 0.1 * n] for n in range(1, 5)]
        found = {"losses": [loss], "tokens": [1], "caption_loss": loss, "shuffled_loss": loss}
        return {"run": run, "seed": 0, "steps": 80, "seconds": 80 * second, "curve": curve, "result": found}

    shown = simvlg.show([row(arms[0], 2.0, 4.0), row(arms[2], 1.0, 4.5)])
    assert "validation loss after 80 steps | after 80 s" in shown
    assert f"| {arms[0]} | 65 | 1 | 2.00 | 3.600 (3.600 to 3.600) | 3.800 (3.800 to 3.800) | 80 |" in shown
    assert f"| {arms[2]} | 25 | 1 | 1.00 | 4.100 (4.100 to 4.100) | 4.100 (4.100 to 4.100) | 80 |" in shown
    assert f"| {arms[2]} | +0.500 (+0.500 to +0.500; +0.500) |" in shown and simvlg.show([]) == ""
