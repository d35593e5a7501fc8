"""The command line as a user meets it: bad input is one line and status 2, results are parseable, runs end to end."""

import contextlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from mm.cli import main
from mm.data.builtin import folder

NO_TEST = ("data.test=[]", "data.validation=[]")


def picture(format: str = "PNG", size: int = 64) -> bytes:
    out = io.BytesIO()
    noise = Image.effect_noise((size, size), 90).convert("RGB")
    noise.save(out, format)
    return out.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], cut: int | None = None) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    if cut is not None:
        path.write_bytes(path.read_bytes()[:cut])
    return path


def good(count: int = 12) -> list[tuple[str, bytes]]:
    return [m for i in range(count) for m in ((f"{i:03d}.png", picture()), (f"{i:03d}.txt", f"picture {i}".encode()))]


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    """Runs a command that must fail with one line; returns it."""
    assert main(arguments) == status
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("mm: ")]
    assert len(lines) == 1 and "Traceback" not in captured.err, captured.err
    return lines[0]


def shard_case(name: str, path: Path) -> str:
    """Writes a bad shard; returns what the line must say."""
    if name == "truncated":
        write_tar(path, good(), cut=9000)
        return "truncated"
    if name == "outside":
        write_tar(path, [*good(2), ("../../evil.png", picture()), ("../../evil.txt", b"x")])
        return "points outside"
    if name == "corrupt header":
        write_tar(path, [*good(2), ("900.png", b"not a picture"), ("900.txt", b"x")])
        return "not a readable"
    if name == "empty picture":
        write_tar(path, [*good(2), ("900.png", b""), ("900.txt", b"x")])
        return "empty (0 bytes)"
    if name == "not utf-8":
        write_tar(path, [*good(2), ("900.png", picture()), ("900.txt", "naïve".encode("latin-1"))])
        return "not UTF-8"
    if name == "too long":
        write_tar(path, [*good(2), ("900.png", picture()), ("900.txt", b"word " * 400)])
        return "data.too_long=split or drop"
    if name == "no caption":
        write_tar(path, [*good(2), ("900.png", picture())])
        return "no caption"
    if name == "damaged pixels":
        write_tar(path, [*good(2), ("900.png", picture()[:3000]), ("900.txt", b"cut in the middle")])
        return "the picture is damaged"
    assert name == "missing"
    return "does not exist"


CASES = (
    "truncated", "outside", "corrupt header", "empty picture", "not utf-8", "too long", "no caption", "damaged pixels",
    "missing",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_data_is_one_line(
    case: str, tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = tmp_path / "shards" / "web-000.tar"
    shard.parent.mkdir()
    expected = shard_case(case, shard)
    source = f"data.sources=[{{kind: captions, path: '{shard}'}}]"
    arguments = ["train", str(tiny()), source, *NO_TEST, "data.visits=1", f"data.cache={tmp_path / 'cache'}"]
    line = fails([*arguments, "train.batch_tokens=128", "train.micro_batch=1"], capsys)
    assert expected in line and "web-000" in line
    assert not (tmp_path / "evil.png").exists() and not list(tmp_path.rglob("*.partial*"))


def test_bad_samples_are_left_out_and_counted_when_allowed(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One damaged header (found while packing) and one picture cut in its pixels (found while loading) of 12."""
    members = [*good(10), ("900.png", b"x"), ("900.txt", b"x"), ("901.png", picture()[:3000]), ("901.txt", b"cut")]
    shard = write_tar(tmp_path / "web-000.tar", members)
    arguments = [
        "train", str(tiny()), f"data.sources=[{{kind: captions, path: '{shard}', name: web}}]", *NO_TEST,
        "data.visits=1", f"data.cache={tmp_path / 'cache'}", "data.max_bad_fraction=20%", "train.batch_tokens=128",
        "train.micro_batch=1", "train.max_steps=4",
    ]  # fmt: skip
    assert main(arguments) == 0
    about = json.loads((tmp_path / "run/data.json").read_text())["train"]
    assert about["ledger"]["web"]["samples"] == 12 and about["ledger"]["web"]["quarantined"] == 1
    assert {bad["id"] for bad in json.loads((tmp_path / "run/quarantine.json").read_text())} == {"web/web-000/901"}


def test_a_run_that_ended_for_bad_samples_goes_on_without_them(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One more picture is cut than may be: packing does not see it."""
    cut = picture()[:3000]
    members = [*good(10), ("901.png", cut), ("901.txt", b"x"), ("902.png", cut), ("902.txt", b"x")]
    shard = write_tar(tmp_path / "web-000.tar", members)
    arguments = [
        "train", str(tiny()), f"data.sources=[{{kind: captions, path: '{shard}', name: web}}]", *NO_TEST,
        "data.visits=1", f"data.cache={tmp_path / 'cache'}", "data.max_bad_fraction=10%", "train.batch_tokens=128",
        "train.micro_batch=1", "train.max_steps=12", "train.log_every=1000",
    ]  # fmt: skip
    assert "2 of 12 samples are unreadable" in fails(arguments, capsys)
    found = [one["id"] for one in json.loads((tmp_path / "run/quarantine.json").read_text())]
    (tmp_path / "skip.txt").write_text("\n".join(found))
    assert main([*arguments, f"data.skip_ids={tmp_path / 'skip.txt'}", "--resume"]) == 0


def test_a_packed_set_of_another_tokenizer_is_refused(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pack", str(tiny()), "--out", str(tmp_path / "packed")]) == 0
    other = tmp_path / "tokenizer"
    shutil.copytree(folder("emoji") / "tokenizer", other)
    values = json.loads((other / "tokenizer.json").read_text())
    values["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(values))
    config: dict[str, Any] = yaml.safe_load(tiny().read_text())
    config["data"] = {"packed": str(tmp_path / "packed"), "context_length": 128, "workers": 0}
    path = tmp_path / "packed.yaml"
    path.write_text(yaml.safe_dump(config))
    capsys.readouterr()
    line = fails(["train", str(path), f"model.language.tokenizer={other}"], capsys)
    assert "packed for another model: tokenizer" in line and not (tmp_path / "run/checkpoints").exists()
    assert "image" in fails(["train", str(path), "model.connector.tokens=9"], capsys)
    assert "context_length" in fails(["train", str(path), "data.context_length=256"], capsys)
    # And the config as it was packed for trains.
    assert main(["train", str(path), "train.max_steps=2", "evaluation.candidates=0"]) == 0


def test_commands_end_to_end_with_json(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def result(*arguments: str) -> dict[str, Any]:
        assert main([*arguments, "--json"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1  # nothing but the object is on stdout
        found: dict[str, Any] = json.loads(lines[-1])
        return found

    config = str(tiny())
    packed = result("pack", config, "--out", str(tmp_path / "packed"))
    assert set(packed) == {"train", "validation", "test"} and packed["train"]["fill"] > 0.8
    page = tmp_path / "inspect.html"
    inspected = result(
        "inspect", str(tmp_path / "packed/train"), "--tokenizer", "builtin:emoji", "--out", str(page), "--rows", "3"
    )
    assert inspected["packs"] == packed["train"]["packs"] and page.read_text().count("<html") == 1
    by_name = page.read_text()
    result("inspect", str(tmp_path / "packed/train"), "--tokenizer", config, "--out", str(page), "--rows", "3")
    assert page.read_text() == by_name
    trained = result("train", config, "train.max_steps=2")
    assert trained["test_items"] == 93
    run = str(tmp_path / "run")
    assert result("config", str(tmp_path / "run/config.yaml"))["train"]["max_steps"] == 2
    (tmp_path / "a.webp").write_bytes(picture("WEBP"))
    image = str(tmp_path / "a.webp")
    (row,) = result("generate", run, "--image", image, "--prompt", "en: ", "--max-new-tokens", "5")["answers"]
    assert row["images"] == [image] and isinstance(row["answer"], str)
    assert Path(result("report", run)["page"]).read_text().count("</html>") == 1
    found = result("doctor")
    assert found["problems"] == [] and found["machine"]["attention"].startswith("SDPA")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["train", "nowhere.yaml"], "no such config file"),
        (["report", "nowhere"], "nowhere"),
        (["inspect", "nowhere"], "not a packed data set"),
        (["generate", "nowhere", "--image", "x.png"], "x.png"),
        (["train", "x.yaml", "--nosuch"], "unknown argument '--nosuch'"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert text in fails(arguments, capsys)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no such config file"):
        main(["train", str(tmp_path / "x.yaml"), "--debug"])


def test_errors_are_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "nowhere.yaml", "--json"]) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["status"] == 2


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """As another user, where this one is root; as root everything may be written."""
    if os.geteuid() != 0:
        yield
        return
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.mark.parametrize("setting", ["out", "data.cache"])
def test_no_write_permission_is_one_line(
    setting: str, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder that is somebody else's, or that was made read-only."""
    with tempfile.TemporaryDirectory() as name:
        theirs, mine = Path(name) / "theirs", Path(name) / "mine"
        theirs.mkdir()
        mine.mkdir()
        config = Path(name) / "tiny.yaml"
        config.write_text(tiny().read_text())
        for path, mode in ((Path(name), 0o755), (theirs, 0o555), (mine, 0o777)):
            path.chmod(mode)
        places = {"out": mine / "run", "data.cache": mine / "cache", setting: theirs / "x"}
        with unprivileged():
            line = fails(["train", str(config), *(f"{key}={place}" for key, place in places.items())], capsys)
        assert "no permission" in line and str(theirs) in line
        theirs.chmod(0o755)


def test_a_full_disk_while_packing_is_one_line(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import mm.data.prepare as prepare

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, os.strerror(28), "packs-000000.tar")

    monkeypatch.setattr(prepare, "write_shard", full)
    line = fails(["train", str(tiny()), f"data.cache={tmp_path / 'cache'}"], capsys)
    assert "the disk is full" in line and "--resume" in line and not list((tmp_path / "cache").rglob("*.tar"))
    line = fails(["pack", str(tiny()), f"data.cache={tmp_path / 'cache'}"], capsys)
    assert "the disk is full; free some space and run this again" in line


def test_torch_and_torchvision_that_do_not_fit_are_recognised() -> None:
    from mm.doctor import torch_mismatch

    assert torch_mismatch("2.14.1", "0.29.1", "2.14.1") == []
    assert "CPU-only build" in torch_mismatch("2.13.0+cpu", "0.28.0", "2.13.0")[0]
    assert "built for torch 2.14.1, but torch 2.13.0+cpu is" in torch_mismatch("2.13.0+cpu", "0.29.1", "2.14.1")[0]
    assert torch_mismatch(None, "0.29.1", "2.14.1") == []
