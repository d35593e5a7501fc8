"""The page of a run says what its files say, whatever is missing, and nothing from them becomes markup."""

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

import pytest
from PIL import Image

from mm.errors import DataError
from mm.page import duration, percent, short
from mm.report import report_page

HOSTILE = "<script>alert(1)</script> & <img src=x onerror=y>"
EVAL = {
    "step": 40, "caption_loss": 2.317, "unigram_loss": 5.412, "shuffled_loss": 2.981, "match_accuracy": 0.184,
    "match_accuracy_plain": 0.121, "match_chance": 1 / 32, "test_items": 222,
}  # fmt: skip
COUNTS = {
    "samples": 1700, "filtered": 0, "quarantined": 10, "pieces": 0, "inserted_tokens": 0,
    "audio": 0, "audio_tokens": 0, "video": 0, "video_tokens": 0, "too_long": 5, "too_long_tokens": 900,
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
        if tag not in ("meta", "img", "br"):
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


def test_config_and_metrics_alone_are_enough(tmp_path: Path) -> None:
    assert "No step was logged" in Page(report_page(write_run(tmp_path / "a", rows=[]))).words
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
    code = "import sys, mm.report; print({'torch', 'matplotlib', 'jinja2', 'numpy', 'PIL'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("value", "written"),
    [(9_999, "9,999"), (12_345, "12.3 k"), (999_499, "999 k"), (1_000_000, "1.00 M"), (45_678_901, "45.7 M")],
)
def test_short_numbers(value: float, written: str) -> None:
    assert short(value).replace("\u2009", " ") == written


def test_words_for_numbers() -> None:
    assert percent(0.1837).replace("\u2009", " ") == "18.4 %"
    assert [duration(s) for s in (42, 61, 3599, 5025)] == ["42 s", "1 min", "1 h 0 min", "1 h 24 min"]
