"""A joint run's model: each part gives what it gives alone on its rows, whatever rows share a batch."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from music_run import MODEL as MUSIC
from music_run import ROW, samples, wav
from native_run import picture
from pydantic import ValidationError
from tiny_run import TINY
from torch import Tensor

from mm.data.batch import MediaBatch, PackedBatch, collate, select_rows, with_dummies
from mm.data.layout import Layout
from mm.data.limits import Limits
from mm.data.loader import EMPTY
from mm.data.packed import Pack, join_segments
from mm.data.sample import Media, Part, Text
from mm.data.tokens import make_segment
from mm.errors import ConfigError, DataError
from mm.models.config import SYSTEMS
from mm.models.system import System
from mm.models.systems.joint.config import JointConfig
from mm.models.systems.joint.model import Joint

PARTS = {"vlm": TINY["model"], "music": MUSIC}
WEIGHTS = {"music": 0.5}
ROWS: list[list[str | int | tuple[int, str]]] = [
    [(1, "a cat"), (2, "two small dogs")], [30, 51, 17], ["words alone", (3, "a bird")], [], [90], [(4, "a fish")],
]  # fmt: skip
"""Text, a picture's number with its caption, or a recording's frames."""
OF = {"vlm": [0, 2, 3, 5], "music": [1, 4]}


def config(**changes: Any) -> JointConfig:
    return JointConfig.model_validate({"kind": "joint", "parts": PARTS, "weights": WEIGHTS, **changes})


def build() -> Joint:
    torch.manual_seed(0)
    return config().build().train()


def pack(row: int, layout: Layout) -> Pack:
    items = []
    for number, one in enumerate(ROWS[row]):
        parts: tuple[Part, ...]
        if isinstance(one, str):
            parts = (Text(one),)
        elif isinstance(one, int):
            parts = (Media("audio", wav(10 * row + number, samples(one)), "wav"),)
        else:
            parts = Media("image", picture(one[0]), "png"), Text(one[1])
        items.append((f"{row}/{number}", f"of {row}", make_segment(parts, layout, "test", Limits())))
    return join_segments(items) if items else EMPTY


def batch(rows: list[int], layout: Layout | None = None, training: bool = True) -> PackedBatch:
    """Some of the rows, with the keys that they have in any batch."""
    layout = layout or config().layout()
    draws = [(5, row) for row in rows] if training else None
    return collate([pack(row, layout) for row in rows], layout, ROW, draws=draws)


Found = tuple[dict[str, float], dict[str, Tensor]]


def step(system: System, batches: list[PackedBatch]) -> Found:
    """Sums of the objectives, and the gradients of the weighted sum of their means, as the trainer has them."""
    system.zero_grad()
    counts = {name: sum(int(system.counts(one)[name]) for one in batches) for name in system.weights}
    outputs = [system(one) for one in batches]
    assert counts == {name: sum(int(output.counts[name]) for output in outputs) for name in system.weights}
    sums = {name: torch.stack([output.losses[name] for output in outputs]).sum() for name in system.weights}
    terms = [weight * sums[name] / max(counts[name], 1) for name, weight in system.weights.items()]
    torch.stack(terms).sum().backward()
    grads = {name: p.grad.clone() for name, p in system.named_parameters() if p.grad is not None}
    return {name: float(value.detach()) for name, value in sums.items()}, grads


def assert_alike(found: Found, expected: Found) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys() and found[1]
    most = max(float(grad.norm()) for grad in expected[1].values())
    for name, grad in expected[1].items():
        # The gradient of a key's bias is zero but for rounding.
        assert float((found[1][name] - grad).norm()) < 1e-5 * max(float(grad.norm()), 1e-3 * most), name


def of_parts(system: Joint) -> Found:
    """Of each part by itself, on a batch of its rows laid out for it alone."""
    sums, grads = {}, {}
    for name, section in config().parts.items():
        part = system.part(name)
        losses, its = step(part, [batch(OF[name], section.layout())])
        sums |= {f"{name}/{objective}": loss for objective, loss in losses.items()}
        grads |= {f"{name}.{parameter}": WEIGHTS.get(name, 1) * grad for parameter, grad in its.items()}
    return sums, grads


def test_parts_learn_what_they_learn_alone() -> None:
    """In training: masks and noises, which are drawn by rows, are the same."""
    system = build()
    expected = of_parts(system)
    assert {name.partition("/")[0] for name in expected[0]} == {"vlm", "music"}
    assert_alike(step(system, [batch(list(range(6)))]), expected)
    # Micro-batches of one kind, of one row, and of padding.
    for split in ([[0, 2, 5, 3], [1, 4]], [[0], [1], [2], [3], [4], [5]], [[4, 2, 1], [3, 5, 0]]):
        assert_alike(step(system, [batch(rows) for rows in split]), expected)
    layout = config().layout()
    assert_alike(step(system, [with_dummies(batch(rows), layout) for rows in ([1, 4], [0, 2, 3, 5])]), expected)


def test_every_part_has_a_gradient_in_every_batch() -> None:
    """As ranks with other rows have it; of zero where it has no rows."""
    system = build()
    whole = step(system, [batch(list(range(6)))])[1]
    for rows, idle in ((OF["vlm"], "music"), (OF["music"], "vlm"), ([3], "vlm"), ([3], "music")):
        losses, grads = step(system, [batch(rows)])
        assert grads.keys() == whole.keys()
        assert all(loss == 0 for name, loss in losses.items() if name.startswith(idle))
        assert not any(bool(grad.any()) for name, grad in grads.items() if name.startswith(f"{idle}."))


def test_it_can_be_made_without_memory() -> None:
    """As `mm estimate` makes it."""
    with torch.device("meta"):
        system = config().build(weights=False)
    assert {p.device.type for p in system.parameters()} == {"meta"}
    assert system.counts(batch([3]))["vlm/next_token"] == 0


def test_rows_of_losses_and_what_counts_as_learned() -> None:
    system = build().eval()
    packed = batch(list(range(6)), training=False)
    output = system(packed)
    assert list(output.losses) == list(system.weights) == list(system.counts(packed))
    assert system.learned == ("vlm/next_token", "music/codes")
    assert system.rows(packed) == OF
    # Each row has the first objective of its part, and counts of that.
    (rows,), counts = output.rows.values(), system.row_counts(packed)
    for name, some in OF.items():
        first = next(key for key in system.weights if key.startswith(f"{name}/"))
        torch.testing.assert_close(rows[some].sum(), output.losses[first].detach())
        assert counts[some].sum() == output.counts[first]
    assert [row for row in range(6) if rows[row]] == [row for row in range(6) if counts[row]]
    assert next(iter(output.rows)) == next(iter(system.weights))


def tensors(media: MediaBatch | PackedBatch) -> dict[str, Any]:
    return {field.name: getattr(media, field.name) for field in fields(media)}


@pytest.mark.parametrize("rows", [[1, 4], [0, 2, 3], [5, 1, 0], [3], [0, 1, 2, 3, 4, 5]])
def test_selected_rows_are_a_batch_of_those_rows(rows: list[int]) -> None:
    packed = batch(list(range(6)))
    audio = packed.media["audio"]
    codes = torch.arange(3 * audio.positions, dtype=torch.int32).view(-1, 3)
    media = {**packed.media, "audio": replace(audio, codes=codes)}
    coded = replace(packed, media=media, bad=(("1/0", "b"), ("9", "c")))
    found, expected = select_rows(coded, rows), batch(rows)
    for name, value in tensors(expected).items():
        if isinstance(value, Tensor):
            assert torch.equal(getattr(found, name), value), name
        elif name not in ("media", "bad"):
            assert getattr(found, name) == value, name
    assert found.bad == ((("1/0", "b"),) if 1 in rows else ())
    assert found.media.keys() == expected.media.keys()
    for kind, media in expected.media.items():
        for name, value in tensors(media).items():
            if isinstance(value, Tensor):
                assert torch.equal(getattr(found.media[kind], name), value), (kind, name)
            elif name != "codes":
                assert getattr(found.media[kind], name) == value, (kind, name)
    if "audio" in found.media:
        items = list(zip(audio.row.tolist(), codes.split(audio.length.tolist()), strict=True))
        its = [part for row in rows for of, part in items if of == row]
        assert torch.equal(found.media["audio"].codes, torch.cat(its))
    assert not select_rows(with_dummies(batch([0, 3]), config().layout()), [0, 1]).media.keys() - {"image"}


def test_the_layout_is_that_of_the_part_with_text_and_all_media() -> None:
    layout, alone = config().layout(), SYSTEMS.resolve("open_qwen2vl").model_validate(TINY["model"]).layout()
    assert layout.media() == ("image", "audio") and layout.audio is not None and layout.audio.alone
    assert (layout.tokenizer.fingerprint(), layout.template, layout.image) == (
        alone.tokenizer.fingerprint(), alone.template, alone.image,
    )  # fmt: skip
    assert batch([1]).segment_ids[0].tolist() == [1] * 30 + [2] * 51 + [3] * 17 + [0] * 30
    music = SYSTEMS.resolve("mert").model_validate(MUSIC).layout()
    assert config(parts={"music": MUSIC}).layout().describe() == music.describe()


def test_parts_that_want_the_same_are_refused() -> None:
    words = {"kind": "text_lm", "language": TINY["model"]["language"]}
    tags = {"kind": "tagger", "encoder": MUSIC["encoder"], "labels": ["a", "b"]}
    with pytest.raises(ConfigError, match=r"model\.parts: vlm and words both read text"):
        config(parts={**PARTS, "words": words}).layout()
    with pytest.raises(ConfigError, match=r"model\.parts: music and tags both take audio"):
        config(parts={"music": MUSIC, "tags": tags}, weights={}).layout()
    for changes, message in (
        ({"weights": {"musik": 1}}, r"weights\.musik: there is no such part; did you mean 'music'"),
        ({"parts": {"a-b": MUSIC}, "weights": {}}, r"'a-b' is no name for a part"),
        ({"parts": {"a": {"kind": "joint", "parts": PARTS}}, "weights": {}}, r"unknown part kind 'joint'"),
    ):
        with pytest.raises(ValidationError, match=message):
            config(**changes)
    with pytest.raises(ConfigError, match=r"model\.parts\.train: a torch module has something else of that name"):
        config(parts={"train": MUSIC}, weights={}).build()


def test_a_row_for_two_parts_is_refused() -> None:
    system, layout = build(), config().layout()
    recording, dog = Media("audio", wav(1, samples(20)), "wav"), Media("image", picture(1), "png")
    for parts in ((recording, Text("a song")), (dog, recording), (recording, dog, Text("a song"))):
        segment = make_segment(parts, layout, "test", Limits())
        packed = collate([join_segments([("s/1", "s", segment)])], layout, ROW)
        with pytest.raises(DataError, match=r"s/1: its row is for music and vlm at once; in a joint run"):
            system.counts(packed)
