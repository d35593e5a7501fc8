"""Sets whose pictures are targets, between tokens of their own, before or behind their captions: counts are the same
whoever counts, and nothing takes a target that is a placeholder for padding."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mm.data.batch import IGNORE, MODALITIES, collate
from mm.data.check import check
from mm.data.features import describe
from mm.data.inspect import summary
from mm.data.layout import Layout
from mm.data.loader import PackedLoader, one_pass
from mm.data.packed import Pack, PackedDataset
from mm.data.takedown import take_down
from mm.errors import DataError
from mm.train.evaluate import learned_tokens

AROUND, BEGIN, END = ("<|im_start|>", "<|endofchunk|>"), 1, 3
SOURCE = {"prompt": "{language}: ", "text_first": 0.5}
GONE = {f"pictures/000/{n:06d}" for n in (3, 11)}


@pytest.fixture(scope="module")
def drawing(make_layout: Callable[..., Layout]) -> Layout:
    return make_layout(around_image=AROUND, learned=True)


@pytest.fixture(scope="module")
def dataset(
    raw: Path, tmp_path_factory: pytest.TempPathFactory, drawing: Layout, pack: Callable[..., PackedDataset]
) -> PackedDataset:
    out = tmp_path_factory.mktemp("drawing") / "train"
    return pack("{root}/*.tar", out, drawing, SOURCE, root=str(raw), budgets={"image": 3}, visits=3)


def packs(dataset: PackedDataset) -> list[Pack]:
    return [dataset.read(number) for number in range(len(dataset))]


def test_the_ledger_closes_and_the_set_is_whole(dataset: PackedDataset) -> None:
    assert summary(dataset)["ledger_open"] == [] and list(check(dataset)) == []
    ledger = dataset.about["ledger"]["pictures"]
    assert ledger["segments"] == ledger["image"] == 180
    assert ledger["inserted_tokens"] == (2 + 2) * 180
    prompts = sum(len(pack.tokens) for pack in packs(dataset)) - ledger["loss_tokens"] - 180  # less every bos
    assert ledger["masked_tokens"] == prompts + 180


def test_pictures_are_whole_and_learned_on_either_side_of_their_text(dataset: PackedDataset) -> None:
    first = 0
    for pack in packs(dataset):
        for one in pack.media:
            assert pack.tokens[[one.position - 1, one.position + one.length]].tolist() == [BEGIN, END]
            assert not pack.tokens[one.position : one.position + one.length].any(), "the pad id is 0 here"
            segment = pack.segments[one.segment]
            run = range(one.position - 1, one.position + one.length + 1)
            assert any(a <= run[0] and run[-1] < b for a, b in segment.loss)
            text_first = one.position > segment.start + 2
            first += text_first
            end = segment.start + segment.length
            assert text_first == (one.position + one.length + 1 == end - 1) and segment.loss[-1][1] == end
    assert 60 < first < 120, "about half of 180"


def test_labels_at_placeholders_are_the_pad_id_and_counted(dataset: PackedDataset, drawing: Layout) -> None:
    learned = dataset.index["loss_tokens"].to_pylist()
    for number, (batch, pack) in enumerate(zip(one_pass(dataset, drawing, 1), packs(dataset), strict=True)):
        assert batch.targets == len(batch.learned()) == learned[number]
        run = {t for one in pack.media for t in range(one.position, one.position + one.length)}
        kinds = torch.zeros(64, dtype=torch.uint8)
        kinds[[*run, *(t - 1 for t in run), *(t + 1 for t in run)]] = MODALITIES["image"]
        assert torch.equal(batch.modality[0], kinds)
        shown = (batch.labels[0] == drawing.pad).nonzero()[:, 0].tolist()
        assert shown == sorted(t - 1 for t in run)
        assert (
            dataset.modality_costs()[number].tolist()
            == np.bincount(batch.modality[batch.segment_ids > 0], minlength=4).tolist()
        )


def test_a_picture_that_cannot_be_read_loses_its_loss_in_place(dataset: PackedDataset, drawing: Layout) -> None:
    pack = dataset.read(0)
    broken = replace(pack, media=(replace(pack.media[0], data=b"nothing"), *pack.media[1:]))
    whole, batch = (collate([one], drawing, 64, quarantine=True) for one in (pack, broken))
    segment = pack.segments[pack.media[0].segment]
    inside = torch.zeros(64, dtype=torch.bool)
    inside[segment.start : segment.start + segment.length] = True
    assert (batch.labels[0, inside] == IGNORE).all() and torch.equal(batch.labels[0, ~inside], whole.labels[0, ~inside])
    assert torch.equal(batch.modality, whole.modality) and batch.media["image"].unreadable.tolist()[0]


def test_what_is_taken_down_takes_its_tokens_and_targets_with_it(
    dataset: PackedDataset, drawing: Layout, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(dataset.folder, tmp_path / "train"))
    assert take_down(folder, GONE)["segments"] == 6
    after = PackedDataset(folder)
    assert list(check(after)) == []
    for whole, batch in zip(one_pass(dataset, drawing, 4), one_pass(after, drawing, 4), strict=True):
        kept = batch.segment_ids > 0
        assert (batch.labels[~kept] == IGNORE).all() and not batch.modality[~kept].any()
        for name in ("input_ids", "modality"):
            assert torch.equal(getattr(batch, name)[kept], getattr(whole, name)[kept])
        gone = (whole.segment_ids > 0) & ~kept
        assert torch.equal(batch.labels[~gone], whole.labels[~gone])


def test_such_a_set_is_for_models_that_spell_it_so(
    dataset: PackedDataset, drawing: Layout, make_layout: Callable[..., Layout]
) -> None:
    dataset.require(drawing, 64, {"image": 3})
    for other, words in ((make_layout(around_image=AROUND), "image"), (make_layout(learned=True), "template")):
        with pytest.raises(DataError, match=f"packed for another model: {words} "):
            dataset.require(other, 64)


def test_codes_do_not_depend_on_what_is_learned_of_them(drawing: Layout, make_layout: Callable[..., Layout]) -> None:
    plain = make_layout()
    assert describe(drawing, "image", "exact", {}, "w") == describe(plain, "image", "exact", {}, "w")


def test_evaluation_counts_no_placeholder_as_a_token(dataset: PackedDataset) -> None:
    targets = learned_tokens(dataset, range(len(dataset)))
    ledger = dataset.about["ledger"]["pictures"]
    assert len(targets) == ledger["loss_tokens"] - ledger["image_tokens"] and targets.all()


def test_visits_differ_in_order_and_loading_is_as_ever(dataset: PackedDataset, drawing: Layout) -> None:
    """Of a sample's three visits any number may have the text first, and every pack comes in its epoch."""
    orders: dict[str, int] = {}
    for pack in packs(dataset):
        for one in pack.media:
            segment = pack.segments[one.segment]
            orders[segment.id] = orders.get(segment.id, 0) + (one.position > segment.start + 2)
    assert set(orders.values()) == {0, 1, 2, 3}
    epoch = int((dataset.index["visit"].to_numpy() == 0).sum())
    seen = [id for batch in PackedLoader(dataset, drawing, 1, seed=1).batches(epoch) for ids in batch.ids for id in ids]
    assert len(seen) == len(set(seen)) == 60
