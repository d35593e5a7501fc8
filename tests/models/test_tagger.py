"""Taggers: losses and gradients against each recording alone through stock `HubertModel` and a head by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from music_run import HUBERT, ROW, samples, wav, wave
from pydantic import ValidationError
from torch import Tensor
from transformers import HubertConfig, HubertModel

from mm.data.batch import PackedBatch, collate, with_dummies
from mm.data.limits import Limits
from mm.data.loader import EMPTY
from mm.data.packed import Pack, join_segments
from mm.data.sample import Media, Special
from mm.data.tokens import make_segment
from mm.errors import ConfigError, DataError
from mm.models import released
from mm.models.released.mert import write
from mm.models.systems.tagger.config import TaggerConfig
from mm.models.systems.tagger.model import Tagger

LABELS = ("rock", "jazz", "live", "slow")
Row = list[tuple[int, tuple[str, ...]]]
"""Frames and labels of its recordings."""
CLIPS: list[Row] = [
    [(30, ("jazz",)), (51, ()), (17, ("rock",))], [(90, ("slow",))], [], [(17, ("jazz",)), (23, ("live",))],
]  # fmt: skip
TAGS: list[Row] = [
    [(30, ("jazz", "live")), (51, ()), (17, LABELS)], [(90, ("slow",))], [], [(17, ("jazz",)), (23, ("live", "rock"))],
]  # fmt: skip


def config(**changes: Any) -> TaggerConfig:
    values = {"kind": "tagger", "encoder": {"config": HUBERT}, "labels": list(LABELS), "hidden": 12, **changes}
    return TaggerConfig.model_validate(values)


def build(**changes: Any) -> Tagger:
    torch.manual_seed(0)
    system = config(**changes).build().eval()
    if system.layers == "all":
        torch.nn.init.normal_(system.layer_weights)
    return system


def pack(row: int, clips: Row) -> Pack:
    items = []
    for number, (frames, labels) in enumerate(clips):
        one = Media("audio", wav(10 * row + number, samples(frames)), "wav")
        parts = one, *(Special(label, loss=True) for label in labels)
        items.append((f"{row}/{number}", "s", make_segment(parts, config().layout(), "test", Limits())))
    return join_segments(items) if items else EMPTY


def batch(rows: list[Row]) -> PackedBatch:
    return collate([pack(row, clips) for row, clips in enumerate(rows)], config().layout(), ROW)


Found = tuple[float, dict[str, Tensor]]


def found(system: Tagger, batches: list[PackedBatch]) -> Found:
    system.zero_grad()
    loss = torch.stack([system(one).losses["tags"] for one in batches]).sum()
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in system.named_parameters() if p.grad is not None}


def assert_alike(ours: Found, expected: Found) -> None:
    assert ours[0] == pytest.approx(expected[0], rel=1e-5)
    assert ours[1].keys() == expected[1].keys()
    most = max(float(grad.norm()) for grad in expected[1].values())
    for name, grad in expected[1].items():
        # The gradient of a key's bias is zero but for rounding.
        assert float((ours[1][name] - grad).norm()) < 2e-5 * max(float(grad.norm()), 1e-3 * most), name


def by_hand(system: Tagger, rows: list[Row]) -> Found:
    """The same by a loop over recordings."""
    theirs = HubertModel(HubertConfig(**{**config().encoder.values, "attn_implementation": "eager"})).eval()
    theirs.load_state_dict(system.encoder.hubert.state_dict())
    own = {
        name: p.detach().clone().requires_grad_()
        for name, p in system.named_parameters()
        if not name.startswith("encoder.")
    }
    loss = torch.zeros(())
    for row, clips in enumerate(rows):
        for number, (frames, labels) in enumerate(clips):
            if not labels:
                continue
            clip = torch.from_numpy(wave(10 * row + number, samples(frames)))
            states = theirs(clip[None], output_hidden_states=True).hidden_states
            means = [state[0].sum(0) / frames for state in states]
            if system.layers == "all":
                shares = own["layer_weights"].exp() / own["layer_weights"].exp().sum()
                hidden = sum((share * mean for share, mean in zip(shares, means, strict=True)), torch.zeros(()))
            else:
                hidden = means[system.layers]
            *first, last = sorted({name.rpartition(".")[0] for name in own if name.startswith("head.")})
            for layer in first:
                hidden = F.linear(hidden, own[f"{layer}.weight"], own[f"{layer}.bias"]).clamp(min=0)
            logits = F.linear(hidden, own[f"{last}.weight"], own[f"{last}.bias"])
            if system.task == "class":
                loss = loss - logits[LABELS.index(labels[0])] + logits.exp().sum().log()
            else:
                has = torch.tensor([label in labels for label in LABELS])
                loss = loss - torch.where(has, torch.sigmoid(logits), 1 - torch.sigmoid(logits)).log().mean()
    loss.backward()
    grads = {name: p.grad for name, p in own.items() if p.grad is not None}
    grads |= {f"encoder.hubert.{name}": p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    return float(loss.detach()), grads


@pytest.mark.parametrize(
    ("changes", "rows"),
    [({}, CLIPS), ({"layers": 1, "hidden": 0}, CLIPS), ({"task": "tags"}, TAGS), ({"task": "tags", "layers": 0}, TAGS)],
    ids=["class", "class, one layer, linear", "tags", "tags, one layer"],
)
def test_losses_and_gradients_are_those_of_recordings_alone(changes: dict[str, Any], rows: list[Row]) -> None:
    """However rows are split, in one batch and with one of padding."""
    system = build(**changes)
    expected = by_hand(system, rows)
    assert_alike(found(system, [batch(rows)]), expected)
    apart = [collate([pack(row, clips)], config().layout(), ROW) for row, clips in enumerate(rows)]
    assert_alike(found(system, apart), expected)
    counts = [int(system.counts(one)["tags"]) for one in apart]
    assert counts == [2, 1, 0, 2] == [int(system(one).counts["tags"]) for one in apart]


def test_targets_are_the_labels_of_the_recording() -> None:
    expected = [[label in labels for label in LABELS] for clips in TAGS for _, labels in clips]
    assert build(task="tags").targets(batch(TAGS)).tolist() == np.array(expected, dtype=float).tolist()


def test_what_could_not_be_read_has_no_loss() -> None:
    whole, layout = pack(0, TAGS[0]), config().layout()
    broken = replace(whole, media=(*whole.media[:2], replace(whole.media[2], data=b"nothing")))
    packed = collate([broken], layout, ROW, quarantine=True)
    system = build(task="tags")
    assert packed.media["audio"].unreadable.tolist() == [False, False, True]
    assert int(system.counts(packed)["tags"]) == 1
    assert_alike(found(system, [packed]), found(system, [batch([TAGS[0][:1]])]))


def test_dummies_have_no_loss_and_keep_all_weights_in_the_graph() -> None:
    system, layout = build(), config().layout()
    padding = collate([EMPTY], layout, ROW)
    assert int(system.counts(padding)["tags"]) == 0
    loss, grads = found(system, [with_dummies(padding, layout)])
    used = {name for name, _ in system.named_parameters() if "masked_spec_embed" not in name}
    assert loss == 0 and grads.keys() == used and not any(grad.any() for grad in grads.values())
    loss, grads = found(system, [padding])
    assert loss == 0 and grads, "of one process, whose batches need no dummy"


def test_a_class_is_one_label() -> None:
    with pytest.raises(DataError, match=r"0/2: has several labels; set model\.task=tags, or give it one"):
        build().counts(batch([[(30, ("jazz",)), (51, ()), (17, ("rock", "live"))]]))


def test_hits_are_labels_among_as_many_most_likely() -> None:
    system, packed = build(task="tags"), batch(TAGS)
    logits, hits = system.logits(packed).detach(), []
    for row, (_, labels) in enumerate(clip for clips in TAGS for clip in clips):
        if labels:
            likely = sorted(range(4), key=lambda tag: -float(logits[row, tag]))[: len(labels)]
            hits.append(sum(LABELS[tag] in labels for tag in likely) / len(labels))
    assert float(system(packed).metrics["hits"]) == pytest.approx(np.mean(hits))
    system = build()
    each = zip(system.logits(batch(CLIPS)), (labels for clips in CLIPS for _, labels in clips), strict=True)
    right = [LABELS[int(one.argmax())] == labels[0] for one, labels in each if labels]
    assert float(system(batch(CLIPS)).metrics["accuracy"]) == pytest.approx(np.mean(right))


def test_scores_are_over_all_recordings_with_labels() -> None:
    """By pairs: how often one with a tag is above one without it."""
    system = build(task="tags")
    outputs = [system(batch([row])) for row in TAGS]
    predictions = {name: torch.cat([one.predictions[name] for one in outputs]) for name in ("logits", "targets")}
    logits, targets = predictions["logits"], predictions["targets"] > 0
    assert len(targets) == 5 and bool(targets.any(1).all())
    areas = []
    for tag in range(4):
        having, lacking = logits[targets[:, tag], tag], logits[~targets[:, tag], tag]
        areas.append(float((having[:, None] > lacking).double().mean()))
    assert system.scores(predictions)["roc_auc"] == pytest.approx(np.mean(areas))
    assert not build().scores({}) and not build(task="tags").train()(batch(TAGS)).predictions


def test_a_release_gives_the_encoder(tmp_path: Path) -> None:
    first = build(encoder={"config": HUBERT, "normalize": True})
    write(first, tmp_path)
    section = TaggerConfig.model_validate({"kind": "tagger", "released": str(tmp_path), "labels": ["a", "b"]})
    assert section.encoder.normalize and section.encoder.values["hidden_size"] == HUBERT["hidden_size"]
    torch.manual_seed(7)
    second = section.build()
    for name, tensor in first.encoder.state_dict().items():
        assert torch.equal(second.encoder.state_dict()[name], tensor), name
    assert second.head[-1].weight.shape == (2, 512)
    again = TaggerConfig.model_validate(section.model_dump())  # asks no release
    assert again == section and not torch.equal(
        again.build(weights=False).encoder.hubert.masked_spec_embed, second.encoder.hubert.masked_spec_embed
    )
    assert "tagger" in released.FORMATS["hf"]


def test_labels_are_a_list_a_file_or_a_column(tmp_path: Path) -> None:
    text, table = tmp_path / "labels.txt", tmp_path / "labels.csv"
    text.write_text("rock\n\n jazz \n", encoding="utf-8")
    table.write_text("file,genre\na.wav,rock;live\nb.wav,\nc.wav,jazz\n", encoding="utf-8-sig")
    assert config(labels=str(text)).labels == ("rock", "jazz")
    assert config(labels=f"{table}:genre").labels == ("jazz", "live", "rock")
    assert config(labels=f"{table}:genre").layout().tokenizer.id("live") == 2
    for labels, message in (
        (f"{table}:gender", "no column 'gender'; did you mean 'genre'"),
        (str(tmp_path / "nothing.txt"), "nothing.txt: cannot be read"),
        (["a", "b", "a"], "'a': a label is given once"),
        (["<pad>"], "'<pad>': a label is given once"),
        ([], "at least 1 item"),
    ):
        with pytest.raises(ValidationError, match=message):
            config(labels=labels)
    with pytest.raises(ConfigError, match=r"model\.layers 3: the encoder has the states 0 to 2"):
        config(layers=3).build()
