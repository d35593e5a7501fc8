"""The page of a run says what its files say, whatever is missing, and nothing from them becomes markup.

A page of several runs puts them on one scale.
"""

import copy
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_run import TINY

from mm.cli import main
from mm.compare import compare_page, config_differences, distinct_names
from mm.curves import apart, mean_before, smooth, thin, three
from mm.errors import DataError
from mm.page import duration, percent, short
from mm.report import read_run, report_page

HOSTILE = "<script>alert(1)</script> & <img src=x onerror=y>"
EVAL = {
    "step": 40, "caption_loss": 2.317, "unigram_loss": 5.412, "shuffled_loss": 2.981, "match_accuracy": 0.184,
    "match_accuracy_plain": 0.121, "match_chance": 1 / 32, "test_items": 222,
}  # fmt: skip
COUNTS = {
    "samples": 1700, "filtered": 0, "quarantined": 10, "pieces": 0, "unlearned": 0, "inserted_tokens": 0,
    "metadata_tokens": 0,
    "audio": 0, "audio_tokens": 0, "audio_samples": 0, "video": 0, "video_tokens": 0,
    "too_long": 5, "too_long_tokens": 900,
    "segments": 1685,
    "segment_tokens": 44321, "image": 1685, "image_tokens": 26960, "text_tokens": 17361, "loss_tokens": 11111,
    "masked_tokens": 33210,
}  # fmt: skip
TRAIN = {
    "packs": 90, "tokens": 44321, "row_tokens": 46080, "padding": 1759, "fill": 0.961827,
    "settings": {"context_length": 512, "visits": 1}, "ledger": {"emoji": COUNTS},
}  # fmt: skip
RUN = {
    "versions": {"torch": "2.99.1"},
    "parameters": {
        "vision": {"total": 831234, "trained": 0}, "language": {"total": 4300001, "trained": 4300001},
    },
    "device": "cpu", "attention": "segments", "command": "mm train x.yaml", "steps": 40, "seconds": 5025,
}  # fmt: skip


def metrics(steps: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        row = {
            "step": step, "loss": 6 * math.exp(-step / 20) + 1, "lr": 1e-3, "tokens": 2000 * step,
            "loss_tokens": 500 * step, "tokens_per_second": 8000.0 + step, "pack_fill": 0.97,
            "data_wait": 0.01, "grad_norm": 1.0, "epoch": step / 10, "elapsed": float(step),
        }  # fmt: skip
        rows.append({**row, **({"validation_loss": row["loss"] + 0.25} if step % 10 == 0 else {})})
    return rows


def write_run(folder: Path, files: dict[str, Any] | None = None, rows: list[dict[str, Any]] | None = None) -> Path:
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text("model: {kind: open_qwen2vl}\nseed: 0\n")
    lines = [json.dumps(row) + "\n" for row in (metrics(40) if rows is None else rows)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    for name, value in (files or {}).items():
        (folder / name).write_text(json.dumps(value))
    return folder


def full_run(folder: Path) -> Path:
    samples = [
        {"id": f"emoji/test/{n}", "prompt": "en:", "true": f"true {n}", "generated": f"said {n}",
         "image": f"samples/{n:04d}.webp"}
        for n in range(3)
    ]  # fmt: skip
    files = {"eval.json": EVAL, "data.json": {"train": TRAIN}, "run.json": RUN, "samples.json": samples}
    run = write_run(folder, files)
    for n in range(2):
        picture = io.BytesIO()
        Image.new("RGB", (8, 8), (80 * n, 0, 0)).save(picture, "WEBP")
        (run / f"samples/{n:04d}.webp").write_bytes(picture.getvalue())
    return run


class Page(HTMLParser):
    """What a browser would see: addresses, text, and whether every tag is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in ("meta", "img", "br", "input"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data.replace("\u2009", " ")


def test_the_page_says_what_the_files_say(tmp_path: Path) -> None:
    page = Page(report_page(full_run(tmp_path / "my-run")))
    words = page.words
    for text in (
        "my-run",
        "open_qwen2vl",
        "40 steps",
        "1 h 24 min",
        "attention: segments",
        "2.99.1",
        "seed: 0",
    ):
        assert text in words, text
    for text in ("18.4 %", "among 32", "chance 3.1 %", "12.1 %", "2.317", "2.981", "5.412", "+0.664"):
        assert text in words, text
    for text in ("80,000", "20,000", "831,234", "4,300,001", "5,131,235", "frozen", "96.18 %"):
        assert text in words, text
    assert all(f"{count:,}" in words for name, count in COUNTS.items() if name not in ("image", "too_long_tokens"))
    assert words.count("✓ closes") == 2 and "✗" not in words
    assert all(f"true {n}" in words and f"said {n}" in words for n in range(3))
    assert "is missing" not in words
    last = metrics(40)[-1]
    assert f"validation {last['validation_loss']:.2f}" in words and "unigram 5.41" in words
    for curve in ("Learning rate", "Gradient norm", "Tokens a second", "Pack fill", "waiting for data"):
        assert curve in words


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    page = Page(report_page(full_run(tmp_path / "run")))
    assert sum(address.startswith("data:image/webp;base64,") for address in page.addresses) == 2
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)


def test_interval_is_wilsons(tmp_path: Path) -> None:
    # 222 trials, share 0.184: the closed form, solved for the two shares that lie 1.96 standard errors away.
    words = Page(report_page(full_run(tmp_path / "run"))).words
    found = re.search(r"interval ([\d.]+) % to ([\d.]+) %", words)
    assert found
    for end in (float(found[1]) / 100, float(found[2]) / 100):
        assert abs(0.184 - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / 222), abs=1e-3)


def test_nothing_in_the_files_becomes_markup(tmp_path: Path) -> None:
    sample = {"id": HOSTILE, "prompt": HOSTILE, "true": HOSTILE, "generated": HOSTILE, "image": HOSTILE}
    data = {HOSTILE: {**TRAIN, "ledger": {HOSTILE: COUNTS}}}
    parts = {HOSTILE: {"total": 1, "trained": 1}}
    files = {
        "samples.json": [sample], "data.json": data, "eval.json": {**EVAL, HOSTILE: HOSTILE},
        "run.json": {"parameters": parts, "versions": {HOSTILE: HOSTILE}, "device": HOSTILE},
    }  # fmt: skip
    run = write_run(tmp_path / "a<b>c", files)
    (run / "config.yaml").write_text(f"name: '{HOSTILE}'\n")
    html = report_page(run)
    page = Page(html)
    assert "<script" not in html and "<b>c" not in html and "img" not in page.tags
    assert page.words.count(HOSTILE) >= 10 and "a<b>c" in page.words


def test_a_run_stopped_early_says_what_is_missing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"run.json": RUN}, metrics(7))
    words = Page(report_page(run)).words
    assert "Step 7 of 40" in words
    for name in ("eval.json", "data.json", "samples.json"):
        assert f"{name} is missing" in words
    assert "run.json is missing" not in words and "What it learned" not in words


def test_an_evaluation_of_before_the_run_went_on_is_none(tmp_path: Path) -> None:
    for step, there in ((6, False), (7, True), (9, True)):  # steps may be taken that are not logged
        run = write_run(tmp_path / str(step), {"eval.json": {"step": step, "test_loss": 1.0}}, metrics(7))
        assert ("eval.json" in read_run(run).found) == there


def test_config_and_metrics_alone_are_enough(tmp_path: Path) -> None:
    assert "No step was logged" in Page(report_page(write_run(tmp_path / "a", rows=[]))).words
    assert "training 6.71" in Page(report_page(write_run(tmp_path / "one", rows=metrics(1)))).words
    assert "1 training run" in Page(compare_page([tmp_path / "one"])[0]).words
    rows: list[dict[str, Any]] = [{"step": 1, "loss": None}, {"step": 2, "loss": 3.5}]
    assert "training 3.50" in Page(report_page(write_run(tmp_path / "b", rows=rows))).words


def test_a_metrics_line_cut_short_is_left_out_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    run = full_run(tmp_path / "run")
    whole = (run / "metrics.jsonl").read_text()
    before = report_page(run)
    (run / "metrics.jsonl").write_text(whole + '{"step": 41, "lo')
    assert report_page(run) == before
    (run / "metrics.jsonl").write_text('{"step": 41, "lo\n' + whole)
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 1: damaged"):
        report_page(run)


def test_a_ledger_that_does_not_close_is_shown(tmp_path: Path) -> None:
    data = {"train": copy.deepcopy(TRAIN)}
    data["train"]["ledger"]["emoji"]["masked_tokens"] += 7  # type: ignore[index]
    data["train"]["padding"] += 1  # type: ignore[operator]
    words = Page(report_page(write_run(tmp_path / "run", {"data.json": data}))).words
    assert "learned + masked tokens = segment tokens: 44,328 ≠ 44,321" in words
    assert "✗ 1 open" in words and "✗ open" in words and "✓ closes" not in words


def test_pictures_outside_the_run_are_not_shown(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    sample = {"id": "x", "prompt": "", "true": "t", "generated": "g", "image": "../private.png"}
    page = Page(report_page(write_run(tmp_path / "run", {"samples.json": [sample]})))
    assert "img" not in page.tags


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run")
    (run / name).unlink()
    with pytest.raises(DataError, match=rf"not a run folder \({re.escape(name)} is missing\)") as error:
        report_page(run)
    assert "\n" not in str(error.value)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "eval.json").write_text('{"caption_loss": ')
    with pytest.raises(DataError, match=r"eval\.json: damaged"):
        report_page(run)
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(DataError, match=r"config\.yaml: damaged"):
        report_page(run)


def test_imports_stay_light() -> None:
    code = (
        "import sys, mm.report, mm.compare; print({'torch', 'matplotlib', 'jinja2', 'numpy', 'PIL'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (9_999, "9,999"),
        (9_999.7, "10.0 k"),
        (12_345, "12.3 k"),
        (999_499, "999 k"),
        (1_000_000, "1.00 M"),
        (45_678_901, "45.7 M"),
    ],
)
def test_short_numbers(value: float, written: str) -> None:
    assert short(value).replace("\u2009", " ") == written


def test_words_for_numbers() -> None:
    assert percent(0.1837).replace("\u2009", " ") == "18.4 %"
    assert [duration(s) for s in (42, 61, 3599, 5025)] == ["42 s", "1 min", "1 h 0 min", "1 h 24 min"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A real run of four steps."""
    root = tmp_path_factory.mktemp("runs")
    data = {**TINY["data"], "test": [], "cache": str(cache)}
    (root / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "data": data}))
    overrides = ["train.max_steps=4", "train.save_every=2", "evaluation.every=4", "train.batch_tokens=256"]
    assert main(["train", str(root / "tiny.yaml"), f"out={root / 'real'}", *overrides]) == 0
    return root / "real"


def test_a_real_runs_page_shows_all_that_was_logged(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    words = Page(report_page(trained)).words
    for part in ("vision", "connector", "language"):
        norms = sorted(row[f"grad_norm/{part}"] for row in rows)
        assert f"{part} {three(norms[len(norms) // 2])}" in words
    for curve in ("Learning rate", "Peak memory, GB", "Pack fill", "Tokens a second"):
        assert curve in words
    learned = sorted(row["loss_tokens_per_second"] for row in rows)[len(rows) // 2]
    assert f"learned {short(learned)}".replace("\u2009", " ") in words
    assert f"validation {rows[-1]['validation_loss']:.2f}" in words
    assert all(f"step-0000000{step}" in words for step in (2, 4)) and words.count("newest") == 1
    assert "What the guard did" not in words and "Stages" not in words


def test_stages_guard_and_sources_are_shown(tmp_path: Path) -> None:
    rows = [
        {
            **row, "stage": int(row["step"] > 25), "loss_from/emoji": 2.0, "loss_from/<b>": 40.0, "loss/text": 1.5,
            "loss/contrastive": 0.25, "mfu": 0.415, "lr/x0.1": row["lr"] / 10,
        }
        for row in metrics(40)
    ]  # fmt: skip
    guard = [
        {"step": 7 + n, "reason": "the loss 34.2 is above", "ids": [["a/b/1"] * 8], "action": action}
        for n, action in enumerate(("skip", "rewind"))
    ]
    run = write_run(tmp_path / "run", {"run.json": RUN, "data.json": {"align": {"train": TRAIN}}}, rows)
    (run / "config.yaml").write_text("stages: [{name: align}, {name: fine-tune}]\n")
    (run / "guard.jsonl").write_text("".join(json.dumps(event) + "\n" for event in guard))
    page = report_page(run)
    words = Page(page).words
    for text in ("align, train", "fine-tune", "2 steps were left out", "rewind", "and 2 more", "text 1.5", "0.25",
                 "emoji 2", "<b> 40", "41.5 %", "x0.1 1e-4"):  # fmt: skip
        assert text in words, text
    assert "28,000" not in words and "50,000" in words and "30,000" in words  # tokens of the stages: 25 and 15 steps
    # One cross in the loss chart for each event.
    assert page.count("stroke: var(--bad)") >= 1 and len(re.findall(r"<use [^>]*style=\"[^\"]*--bad", page)) == 2


SOUND = {
    **TRAIN,
    "layout": {"audio": {"sampling_rate": 24000, "hop": 320, "window": 400, "alone": True}},
    "ledger": {"music": {**COUNTS, "audio": 60, "audio_tokens": 22_440, "audio_samples": 60 * 120_000}},
}
MASK = {"prob": 0.8, "length": 5, "least": 2}


def sound_run(folder: Path) -> Path:
    """Of a model of sound: 30 frames of a step's 40 are heard, 75 a second; it takes half a second a step."""
    rows = [
        {
            **row, "loss/codes": 9.0 - row["step"] / 40, "loss/cqt": 2.5, "loss/feature_penalty": 0.125,
            "code_accuracy": row["step"] / 100, "masked_frames": 0.58, "tokens/audio": 3000 * row["step"],
            "elapsed": 0.5 * row["step"],
        }
        for row in metrics(40)
    ]  # fmt: skip
    for row in rows[9::10]:
        row |= {"validation/codes": 7.75, "validation/cqt": 2.25, "validation/code_accuracy": 0.345}
    result = {
        "step": 40,
        "seed": 0,
        "evaluation": {},
        "test_loss": 11.75,
        "test_codes": 8.625,
        "test_code_accuracy": 0.306,
    }
    run = write_run(folder, {"run.json": RUN, "data.json": {"train": SOUND}, "eval.json": result}, rows)
    (run / "config.yaml").write_text(yaml.safe_dump({"seed": 0, "model": {"kind": "mert", "mask": MASK}}))
    return run


def test_a_model_of_sound_shows_objectives_metrics_and_seconds(tmp_path: Path) -> None:
    words = Page(report_page(sound_run(tmp_path / "run"))).words
    for text in (
        "Loss by objective", "codes 8.01", "cqt 2.5", "feature_penalty 0.125", "All objectives, weighted: codes, cqt",
        "Validation loss by objective", "codes 7.75", "cqt 2.25",
        "Code accuracy", "training 0.395", "validation 0.345", "Masked frames",
    ):  # fmt: skip
        assert text in words, text
    # 40 steps of 3,000 frames at 75 a second are 1,600 s of sound, in 20 s.
    assert "27 min" in words and "80seconds of sound heard a second" in words and "Seconds of sound a second" in words
    assert "5 min" in words  # in the ledger: 60 clips of 5 s
    for text in ("all objectives, weighted11.8", "codes8.62", "code_accuracy0.306"):
        assert text in words.replace("\n", ""), text
    for text in ("is missing", "perplexity", "Nats per learned token", "per learned token on held"):
        assert text not in words, text


def expert_run(folder: Path, shift: float = 0.0) -> Path:
    """Of a model with experts for text and for pictures."""
    rows = metrics(40)
    for row in rows:
        row |= {"loss/next_token": row["loss"], "loss/text": 3.0 + shift, "loss/image": 4.0, "output_norm": 17.5}
        row |= {"unrouted/text": 0.32, "unrouted/image": 0.31, "once/text": 0.42, "more/text": 0.26}
    for row in rows[9::10]:
        row |= {"validation/text": 3.125 + shift, "validation/image": 4.25, "validation/unrouted/text": 0.0625}
        row |= {"validation/output_norm": 18.5}
    return write_run(folder, {"run.json": RUN}, rows)


def test_experts_and_modalities_have_charts(tmp_path: Path) -> None:
    words = Page(report_page(expert_run(tmp_path / "run"))).words
    for text in (
        "3.125nats per text token in the last validation", "4.250nats per image token",
        "text 3", "image 4.25", "Tokens without an expert", "text 32.0 %", "image 31.0 %", "text, validation 6.2 %",
        "Tokens with one expert", "Tokens with several experts", "Norm of the last layer", "training 17.5",
        "validation 18.5",
    ):  # fmt: skip
        assert text in words, text
    page, _ = compare_page([expert_run(tmp_path / "a"), expert_run(tmp_path / "b", shift=0.25)])
    words = Page(page).words
    for text in ("Loss: text", "Validation loss: image", "Tokens without an expert: image", "3.1250", "3.3750"):
        assert text in words, text


def test_masks_are_drawn_by_the_runs_rule(tmp_path: Path) -> None:
    page = report_page(sound_run(tmp_path / "run"))
    drawn = re.findall(r'<svg class="masks" viewBox="0 0 (\d+) 1".*?</svg>', page)
    assert drawn == ["375"] * 6
    bars = [
        [(int(a), int(b)) for a, b in re.findall(r'<rect x="(\d+)" width="(\d+)"', bar)]
        for bar in re.findall(r'<svg class="masks".*?</svg>', page)
    ]
    for bar in bars:
        ends = [start + length for start, length in bar]
        assert all(end < start for end, (start, _) in zip(ends, bar[1:], strict=False)) and ends[-1] <= 375
        assert all(length >= MASK["length"] for _, length in bar[:-1])
    assert len({tuple(bar) for bar in bars}) == 6
    found = re.search(r"In the mean ([\d.]+) % of the frames", Page(page).words)
    # 60 of 370 places start a span: a frame stays when none of the 5 up to it does.
    expected = 1 - math.prod((310 - k) / (370 - k) for k in range(5))
    assert found and float(found[1]) / 100 == pytest.approx(expected, abs=0.01)
    shown = sum(length for bar in bars for _, length in bar) / (6 * 375)
    assert shown == pytest.approx(expected, abs=0.05)
    assert "What is masked" not in Page(report_page(full_run(tmp_path / "other"))).words


def law_run(folder: Path, batch: int, steps: int, every: int, noise: float = 0.0, **config: Any) -> Path:
    """A run whose loss is a function of tokens alone, whatever its batch and logging interval."""
    random = np.random.default_rng(0)
    rows = [
        {"step": step, "tokens": batch * step, "loss": loss_law(batch * step) + noise * random.normal(),
         "elapsed": 2.0 * step, "tokens_per_second": batch / 2, "data_wait": 0.0, "pack_fill": 1.0}
        for step in range(every, steps + 1, every)
    ]  # fmt: skip
    run = write_run(folder, {}, rows)
    (run / "config.yaml").write_text(yaml.safe_dump({"out": str(folder), "seed": 0, **config}))
    return run


def loss_law(tokens: float) -> float:
    return 2 + 3 * math.exp(-tokens / 400_000)


def drawn(page: str, axis: str) -> list[list[tuple[float, float]]]:
    """The lines of the first chart under an axis, in pixels, in the order of the runs."""
    section = page[page.index(f'class="by by-{axis}"') :]
    chart = section[section.index("<svg class=") : section.index("</svg>")]
    found = re.findall(r'<path d="([^"]+)" clip-path[^>]*stroke: var\(--series-(\d)\)', chart)
    lines = {int(number): re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path) for path, number in found}
    return [[(float(x), float(y)) for x, y in lines[number]] for number in sorted(lines)]


def test_runs_of_other_batch_length_and_interval_lie_on_one_curve_over_tokens(tmp_path: Path) -> None:
    runs = [
        law_run(tmp_path / "a", batch=1000, steps=1200, every=1, noise=0.01),
        law_run(tmp_path / "b", batch=4000, steps=200, every=4, noise=0.01),
    ]
    page, skipped = compare_page(runs)
    Page(page)
    assert not skipped

    def distance(axis: str) -> float:
        """In pixels of height, on average over the part that both are drawn in."""
        (ax, ay), (bx, by) = (np.array(line).T for line in drawn(page, axis))
        xs = np.linspace(max(ax.min(), bx.min()), min(ax.max(), bx.max()), 50)
        return float(np.abs(np.interp(xs, ax, ay) - np.interp(xs, bx, by)).mean())

    assert distance("tokens") < 2.5 and distance("steps") > 20 and distance("hours") > 20
    ends = [line[-1][0] for line in drawn(page, "tokens")]
    assert ends[0] > ends[1]  # 1.2 M tokens against 0.8 M


def test_the_table_gives_losses_at_the_same_tokens(tmp_path: Path) -> None:
    a = law_run(tmp_path / "a", batch=1000, steps=4000, every=1)
    b = law_run(tmp_path / "b", batch=4000, steps=200, every=4)
    words = re.sub(r"\s+", " ", Page(compare_page([a, b])[0]).words)
    # The mean of the law over the last 1/40 of the longer run: its integral, divided by the width.
    width = 4_000_000 / 40
    integral = [2 * x - 3 * 400_000 * math.exp(-x / 400_000) for x in (800_000 - width, 800_000)]
    mean = (integral[1] - integral[0]) / width
    found = re.search(
        r"at 800 k tokens, where the shortest run ends, mean over 100 k tokens(\d\.\d{4})(\d\.\d{4})", words
    )
    assert found and float(found[1]) == pytest.approx(mean, abs=1e-3)
    assert float(found[2]) == pytest.approx(mean, abs=2e-2)  # from a sixteenth of the values
    assert "Tokens4,000,000800,000" in words and "without evaluation and saving2 h 13 min" in words


def test_what_was_different_is_what_differs(tmp_path: Path) -> None:
    shared = {"data": {"context_length": 512}, "model": {"kind": "x"}}
    a = law_run(tmp_path / "a", 1000, 20, 1, train={"lr": 1e-3, "betas": [0.9, 0.95], "ema": None}, **shared)
    b = law_run(tmp_path / "b", 1000, 20, 1, train={"lr": 2e-3, "betas": [0.9, 0.99], "clip": True}, **shared)
    found = config_differences([yaml.safe_load((run / "config.yaml").read_text()) for run in (a, b)])
    found.pop("out")
    assert found == {
        "train.lr": ["0.001", "0.002"], "train.betas.1": ["0.95", "0.99"], "train.ema": ["null", "–"],
        "train.clip": ["–", "true"],
    }  # fmt: skip
    words = Page(compare_page([a, b])[0]).words
    assert all(key in words for key in found)
    assert not any(same in words for same in ("context_length", "betas.0", "seed", "model.kind", str(tmp_path)))
    assert "the same" in Page(compare_page([a])[0]).words


def test_a_broken_run_is_named_and_left_out(trained: Path, tmp_path: Path) -> None:
    empty = write_run(tmp_path / "empty", rows=[])
    broken = law_run(tmp_path / "broken", 1000, 9, 1)
    (broken / "config.yaml").write_text("a: [")
    nowhere = tmp_path / "a<b>c"
    made = law_run(tmp_path / "made", 64, 12, 2, train={"optimizer": {"lr": 0.5}})
    page, skipped = compare_page([empty, trained, broken, nowhere, made, trained])
    assert {*skipped} == {"empty", "broken", "a<b>c"} and "config.yaml: damaged" in skipped["broken"]
    words = Page(page).words
    assert "2 training runs" in words and "no step with a loss was logged" in words and "a<b>c" in words
    for name in ("real", "made", "Gradient norm", "Validation loss", "train.optimizer.lr", "train.batch_tokens"):
        assert name in words, name
    assert "<script" not in page and all(address.startswith("#") for address in Page(page).addresses)
    with pytest.raises(DataError, match=r"no run to compare: .*no step with a loss.*damaged"):
        compare_page([empty, broken])


def test_report_of_several_on_the_command_line(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "page.html"
    runs = [str(law_run(tmp_path / name, 64, 12, 2)) for name in "ab"]
    assert main(["report", *runs, str(tmp_path / "no"), "--out", str(out), "--json"]) == 0
    said = capsys.readouterr()
    left_out = re.findall("left out: (.*)", said.err)
    assert json.loads(said.out.splitlines()[-1]) == {"page": str(out), "skipped": {"no": left_out[0]}}
    assert out.read_text().count("</html>") == 1


def test_names_are_as_short_as_they_may_be(tmp_path: Path) -> None:
    assert distinct_names([tmp_path / "a/run", tmp_path / "b/run"]) == ["a/run", "b/run"]
    assert distinct_names([tmp_path / "a/one", tmp_path / "b/two"]) == ["one", "two"]


def test_smoothing_is_the_local_least_squares_line() -> None:
    random = np.random.default_rng(0)
    xs = 1e9 + np.sort(random.uniform(0, 1e8, 300))
    ys = np.exp(-(xs - 1e9) / 2e7) + random.normal(0, 0.1, 300)
    width = 1e7
    for (x, found), place in zip(smooth(list(zip(xs, ys, strict=True)), width), xs, strict=True):
        near = np.abs(xs - place) <= width / 2
        level = np.polyfit((xs[near] - place) / width, ys[near], 1)[1]
        assert near.sum() > 2 and x == place and found == pytest.approx(level, abs=1e-6)
    # A straight line stays what it is, to its ends.
    line = [(float(x), 3.0 - 0.5 * x) for x in range(50)]
    assert smooth(line, 12) == [(x, pytest.approx(y)) for x, y in line]
    assert smooth([(5.0, 1.0)], 3) == [(5.0, 1.0)]


def test_thinning_keeps_the_extremes_of_every_column() -> None:
    random = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in zip(range(10_000), random.normal(size=10_000), strict=True)]
    kept = thin(points, 100)
    assert len(kept) <= 2 * 101 + 2 and set(kept) <= set(points) and kept == sorted(kept)
    for first in range(0, 9900, 99 + 1):  # columns are 99.99 wide: their inner part
        inner = [y for x, y in points if first + 2 <= x < first + 97]
        near = [y for x, y in kept if first - 2 <= x < first + 101]
        assert max(near) >= max(inner) and min(near) <= min(inner)
    assert thin(points[:250], 100) == points[:250]


def test_the_mean_before_is_of_the_values_in_the_window() -> None:
    points = [(float(x), float(x * x)) for x in range(1, 11)]
    assert mean_before(points, 7.5, 3) == (25 + 36 + 49) / 3
    assert mean_before(points, 0.5, 3) == 1.0


def test_labels_are_moved_apart() -> None:
    assert apart([1.0, 1.1, 5.0, 1.05], 0.5) == [1.0, 2.0, 5.0, 1.5]


@pytest.mark.parametrize(
    ("value", "written"), [(0, "0"), (0.0123, "0.0123"), (5e-5, "5e-5"), (1.2e-4, "1.2e-4"), (1234567, "1.23e6")]
)
def test_three_figures(value: float, written: str) -> None:
    assert three(value) == written
