"""MERT: losses and gradients against each clip alone through stock `HubertModel`, whatever shares a row or a batch."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from music_run import HUBERT, RATE, ROW, ROWS, Loudness, batch, model, samples, wave
from torch import Tensor
from transformers import HubertConfig, HubertModel
from transformers.models.hubert.modeling_hubert import _compute_mask_indices

from mm.data.batch import PackedBatch, collate, with_dummies
from mm.data.loader import EMPTY
from mm.data.sample import keyed_rng
from mm.errors import ConfigError
from mm.models.masking import draw_noises, mix, span_mask
from mm.models.objectives import code_losses
from mm.models.spectra import CQT
from mm.models.systems.mert.config import MertConfig
from mm.models.systems.mert.model import Mert
from mm.train.blocks import checkpoint_activations, find_blocks
from mm.train.config import CheckpointingConfig, TrainConfig

PRE_NORM = {"encoder": {"config": {**HUBERT, "do_stable_layer_norm": True}}}
DROPPED = {"encoder": {"config": {**HUBERT, "layerdrop": 0.4}}}
ALL = list(range(len(ROWS)))


def build(**changes: Any) -> Mert:
    torch.manual_seed(0)
    return model(**changes).build()


Found = tuple[dict[str, float], dict[str, Tensor]]


def step(system: Mert, batches: list[PackedBatch]) -> Found:
    """Means of the objectives, and the gradients of their weighted sum, as the trainer has them."""
    system.zero_grad()
    counts = {name: sum(int(system.counts(one)[name]) for one in batches) for name in system.weights}
    outputs = [system(one) for one in batches]
    sums = {name: torch.stack([output.losses[name] for output in outputs]).sum() for name in system.weights}
    for output, one in zip(outputs, batches, strict=True):
        assert {name: int(count) for name, count in output.counts.items()} == {
            name: int(count) for name, count in system.counts(one).items()
        }
    means = {name: value / max(counts[name], 1) for name, value in sums.items()}
    torch.stack([weight * means[name] for name, weight in system.weights.items()]).sum().backward()
    grads = {name: p.grad.clone() for name, p in system.named_parameters() if p.grad is not None}
    return {name: float(mean.detach()) for name, mean in means.items()}, grads


def assert_alike(found: Found, expected: Found, tolerance: float = 1e-5) -> None:
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1].keys() == expected[1].keys() and found[1]
    most = max(float(grad.norm()) for grad in expected[1].values())
    for name, grad in expected[1].items():
        # The gradient of a key's bias is zero but for rounding.
        assert float((found[1][name] - grad).norm()) < tolerance * max(float(grad.norm()), 1e-3 * most), name


def by_brute_force(system: Mert, rows: list[int], keys: list[int]) -> Found:
    """The same by a loop over clips, frames and codebooks."""
    theirs = HubertModel(HubertConfig(**{**system.config.encoder.values, "attn_implementation": "eager"})).eval()
    theirs.load_state_dict(system.encoder.hubert.state_dict())
    heads = {
        name: p.detach().clone().requires_grad_()
        for name, p in system.named_parameters()
        if not name.startswith("encoder.")
    }
    terms: dict[str, list[Tensor]] = {"codes": [], "cqt": [], "feature_penalty": []}
    for row, key in zip(rows, keys, strict=True):
        for number, frames in enumerate(ROWS[row]):
            clip = torch.from_numpy(wave(10 * row + number, samples(frames)))
            mask = torch.from_numpy(span_mask(frames, 0.8, 5, 2, keyed_rng("mask", key, number)))
            features = theirs.feature_extractor(clip[None])[0].T
            hidden = theirs(clip[None], mask_time_indices=mask[None]).last_hidden_state[0]
            codes = Loudness().codes([clip], [frames], model().layout())
            (spectrum,) = CQT(RATE, 320, 200, 24, 6)([clip])
            for frame in range(frames):
                terms["feature_penalty"].append(features[frame].square().sum() / features.shape[1])
                if not mask[frame]:
                    continue
                first, losses = 0, []
                for book, size in enumerate((6, 4)):
                    queries = F.linear(
                        hidden[frame], heads["code_head.projection.weight"], heads["code_head.projection.bias"]
                    )
                    embeddings = heads["code_head.embeddings"][first : first + size]
                    cosines = F.cosine_similarity(queries[8 * book : 8 * (book + 1)], embeddings, dim=-1)
                    losses.append(-torch.log_softmax(cosines / 0.1, 0)[codes[frame, book]])
                    first += size
                terms["codes"].append(torch.stack(losses).sum())
                predicted = F.linear(hidden[frame], heads["cqt_head.weight"], heads["cqt_head.bias"])
                terms["cqt"].append((predicted - spectrum[frame]).square().sum() / 24)
    means = {name: torch.stack(each).mean() for name, each in terms.items()}
    (means["codes"] + means["cqt"] + 10 * means["feature_penalty"]).backward()
    grads = {name: head.grad for name, head in heads.items() if head.grad is not None}
    for name, p in theirs.named_parameters():
        assert p.grad is not None, name
        grads[f"encoder.hubert.{name}"] = p.grad * (0.1 if name.startswith("feature_extractor") else 1)
    return {name: float(mean.detach()) for name, mean in means.items()}, grads


@pytest.mark.parametrize("changes", [{}, PRE_NORM], ids=["post-norm", "pre-norm"])
def test_losses_and_gradients_are_those_of_clips_alone(changes: dict[str, Any]) -> None:
    system = build(**changes).eval()
    packed = batch(ALL)
    assert_alike(step(system, [packed]), by_brute_force(system, ALL, packed.draws.tolist()), 2e-5)


def test_counts_are_masked_and_all_frames() -> None:
    system, packed = build(), batch(ALL)
    masked = [
        span_mask(frames, 0.8, 5, 2, keyed_rng("mask", int(packed.draws[row]), number)).sum()
        for row in ALL
        for number, frames in enumerate(ROWS[row])
    ]
    counts = {name: int(count) for name, count in system.counts(packed).items()}
    assert counts == {"codes": sum(masked), "cqt": sum(masked), "feature_penalty": sum(map(sum, ROWS))}
    assert system.learned == ("codes",)


@pytest.mark.parametrize("changes", [{}, DROPPED], ids=["", "layer drop"])
def test_however_rows_are_split_the_numbers_are_the_same(changes: dict[str, Any]) -> None:
    """In training, with masks, noises and dropped layers; a batch of one row of padding too."""
    system = build(**changes).train()
    together = step(system, [batch(ALL)])
    for split in ([[0], [1], [2], [3]], [[3, 1], [2, 0]]):
        assert_alike(step(system, [batch(rows) for rows in split]), together)
    others = step(system.eval(), [batch(ALL)])
    assert others[0]["codes"] != pytest.approx(together[0]["codes"], rel=1e-4), "noises are drawn in training alone"


def test_rows_hold_the_first_objective() -> None:
    system, packed = build(), batch(ALL)
    output = system(packed)
    assert list(output.rows) == ["codes"]
    torch.testing.assert_close(output.rows["codes"].sum(), output.losses["codes"].detach())
    assert system.row_counts(packed).sum() == output.counts["codes"]
    for row in ALL:
        assert system.row_counts(packed)[row] == system.counts(batch([row]))["codes"]
        torch.testing.assert_close(output.rows["codes"][row], system(batch([row])).losses["codes"].detach())


def loudened(packed: PackedBatch, clip: int) -> PackedBatch:
    """With another recording in the place of one."""
    media = packed.media["audio"]
    values = media.values.clone()
    values[media.offsets[clip] : media.offsets[clip + 1]] = values[media.offsets[clip] : media.offsets[clip + 1]].flip(
        0
    )
    return replace(packed, media={"audio": replace(media, values=values)})


def test_noises_come_from_the_same_row_alone() -> None:
    """Codes are given, so that a clip's targets stay when another is put in its place."""
    system = build(mixture={"prob": 1, "seconds": [0.05, 0.1]}, weights={"cqt": 0}).train()
    packed = batch(ALL)
    media = packed.media["audio"]
    codes = system.teacher.codes(media.items(), media.length.tolist(), model().layout()).int()
    packed = replace(packed, media={"audio": replace(media, codes=codes)})
    before = system(packed)
    assert float(before.metrics["mixed_clips"]) == pytest.approx(7 / 8), "all but the one that is alone in its row"
    for clip, row in ((1, 0), (3, 1), (5, 3)):
        changed = (system(loudened(packed, clip)).rows["codes"] - before.rows["codes"]).abs() > 1e-4
        assert changed.nonzero().flatten().tolist() == [row]
    # What is heard in a row of two: its other clip, and no third.
    two = [torch.full((9000,), 1.0), torch.full((9000,), 100.0)]
    noises = draw_noises(9000, 9000, (1, 3), (1200, 2400), keyed_rng(0))
    assert set((mix(two[0], two[1:], noises, 0.5) - two[0]).tolist()) <= {0.0, 50.0, 100.0, 150.0}


def test_noises_are_within_their_bounds() -> None:
    counts, lengths = [], []
    for number in range(400):
        noises = draw_noises(24_000, 60_000, (1, 3), (1200, 2400), keyed_rng(number))
        counts.append(len(noises))
        lengths += noises[:, 2].tolist()
        assert (noises >= 0).all() and (noises[:, 0] + noises[:, 2] <= 60_000).all()
        assert (noises[:, 1] + noises[:, 2] <= 24_000).all()
    assert {*counts} == {1, 2, 3} and 1200 <= min(lengths) < 1250 and 2350 < max(lengths) <= 2400
    assert draw_noises(700, 500, (2, 2), (1200, 2400), keyed_rng(0))[:, 2].tolist() == [500, 500]
    clip, others = torch.zeros(50), [torch.arange(1.0, 31.0), torch.arange(31.0, 61.0)]
    mixed = mix(clip, others, np.array([[25, 3, 10], [0, 8, 4]]), 2.0)
    expected = np.zeros(50)
    expected[3:13] += 2 * np.arange(26, 36)
    expected[8:12] += 2 * np.arange(1, 5)
    np.testing.assert_array_equal(mixed.numpy(), expected)


def test_masks_are_those_of_fairseq() -> None:
    """In number and in length of their runs, as transformers' port has them; 58.2 % of 374 frames."""

    def runs(mask: np.ndarray) -> list[int]:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
        return (edges[1::2] - edges[::2]).tolist()

    ours = np.stack([span_mask(374, 0.8, 5, 2, keyed_rng("mask", number)) for number in range(1500)])
    np.random.seed(0)
    theirs = np.concatenate([_compute_mask_indices((1, 374), 0.8, 5, min_masks=2) for _ in range(1500)])
    assert ours.mean() == pytest.approx(theirs.mean(), abs=0.003) and ours.mean() == pytest.approx(0.582, abs=0.003)
    lengths = [np.concatenate([runs(mask) for mask in masks]) for masks in (ours, theirs)]
    assert min(lengths[0]) == 5 and lengths[0].mean() == pytest.approx(lengths[1].mean(), rel=0.02)
    # Everywhere alike but at the ends.
    assert np.abs(ours.mean(0) - theirs.mean(0))[5:-6].max() < 0.08
    for frames in range(1, 40):
        masks = np.stack([span_mask(frames, 0.8, 5, 2, keyed_rng(number)) for number in range(30)])
        assert masks.shape == (30, frames) and (frames == 1 or masks.any(1).all())


def test_evaluation_draws_from_the_samples() -> None:
    """Twice the same, masks and all, in whatever mode of keys; another key, other masks."""
    system = build(**DROPPED).eval()
    first, again = (step(system, [batch(ALL, training=False)]) for _ in range(2))
    assert first[0] == again[0]
    assert float(system(batch(ALL, training=False)).metrics["mixed_clips"]) == 0
    assert step(system, [batch(ALL)])[0]["codes"] != first[0]["codes"]


def test_dummies_and_padding_change_nothing() -> None:
    system, layout = build().train(), model().layout()
    expected = step(system, [batch(ALL)])
    nothing = collate([EMPTY], layout, ROW)
    for empty in (nothing, with_dummies(nothing, layout)):
        assert_alike(step(system, [batch(ALL), empty]), expected)
        losses, grads = step(system, [empty])
        assert set(losses.values()) == {0.0} and all(not grad.any() for grad in grads.values())
        assert grads.keys() == expected[1].keys(), "every weight is in the graph"


def test_no_loss_depends_on_what_could_not_be_read() -> None:
    """As if the clip were not there; not even as a noise in another."""
    system = build(mixture={"prob": 1, "seconds": [0.05, 0.1]}).train()
    packed = batch([3])  # four clips
    media = packed.media["audio"]
    values = media.values.clone()
    values[media.offsets[3] :] = 0
    unreadable = torch.tensor([False, False, False, True])
    without = replace(packed, media={"audio": replace(media, values=values, unreadable=unreadable)})
    found = step(system, [without])
    short = replace(
        packed,
        media={"audio": replace(
            media, values=media.values[: media.offsets[3]], shapes=media.shapes[:3], offsets=media.offsets[:4],
            row=media.row[:3], position=media.position[:3], length=media.length[:3], cost=media.cost[:3],
            unreadable=media.unreadable[:3], positions=-1,
        )},
    )  # fmt: skip
    assert_alike(found, step(system, [short]))


def test_codes_that_are_given_are_taken() -> None:
    system, packed = build().eval(), batch(ALL)
    media = packed.media["audio"]
    codes = system.teacher.codes(media.items(), media.length.tolist(), model().layout())
    expected = step(system, [packed])
    del system.__dict__["teacher"]
    given = replace(packed, media={"audio": replace(media, codes=codes.int())})
    assert step(system, [given])[0] == expected[0] and "teacher" not in system.__dict__, "it is not even made"


def test_code_losses_are_cross_entropies_of_cosines() -> None:
    """Against torch's cosines and log-softmax, under autocast too; of fairseq's special codes none is a target."""
    rng = torch.Generator().manual_seed(0)
    queries = torch.randn(7, 2, 5, generator=rng, requires_grad=True)
    books = [torch.randn(size, 5, generator=rng, requires_grad=True) for size in (9, 4)]
    codes = torch.stack([torch.randint(0, size, (7,), generator=rng) for size in (9, 4)], dim=1)
    expected, right = torch.zeros(7), []
    for number, book in enumerate(books):
        logits = F.cosine_similarity(queries[:, number, None], book[None], dim=-1) / 0.1
        expected = expected - torch.log_softmax(logits, 1).gather(1, codes[:, number, None])[:, 0]
        right.append(logits.argmax(1) == codes[:, number])
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses, hits = code_losses(queries, books, codes, 0.1)
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(hits, torch.stack(right, 1))
        for a, b in zip(
            torch.autograd.grad(losses.sum(), [queries, *books]),
            torch.autograd.grad(expected.sum(), [queries, *books], retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    system = build(special_codes=4)
    assert system.code_head.embeddings.shape == (6 + 4 + 4 + 4, 8)
    hidden = torch.randn(5, 32)
    zeros = torch.zeros(5, 2, dtype=torch.int64)
    queries = system.code_head.projection(hidden).unflatten(1, (2, 8))
    books = [system.code_head.embeddings[:10], system.code_head.embeddings[10:]]
    torch.testing.assert_close(system.code_head(hidden, zeros)[0], code_losses(queries, books, zeros + 4, 0.1)[0])


def test_objectives_of_weight_zero_are_not_there() -> None:
    packed = batch([0])
    names = {"codes": "code_head", "cqt": "cqt_head"}
    for left_out, head in names.items():
        system = build(weights={left_out: 0})
        output = system(packed)
        assert left_out not in output.losses and not any(head in name for name, _ in system.named_parameters())
        assert list(output.rows) == [next(iter(system.weights))]
    with pytest.raises(ValueError, match="nothing is to be learned"):
        model(weights={"codes": 0, "cqt": 0})
    alone = model(teacher=None)
    with pytest.raises(ConfigError, match=r"model\.teacher is missing: .*set it, or model\.weights\.codes=0"):
        alone.build().counts(packed)


def test_layers_are_found_and_recomputed_bit_for_bit() -> None:
    plain, packed = build(**DROPPED).train(), batch(ALL)
    system = build(**DROPPED).train()
    blocks = find_blocks(system, TrainConfig.model_fields["blocks"].default)
    assert list(blocks) == [f"encoder.hubert.encoder.layers.{n}" for n in (0, 1)]
    checkpoint_activations(system, CheckpointingConfig(mode="full"), blocks)
    (losses, grads), expected = step(system, [packed]), step(plain, [packed])
    assert losses == expected[0] and all(torch.equal(grad, expected[1][name]) for name, grad in grads.items())


def test_the_layout_is_recordings_alone() -> None:
    config = MertConfig.model_validate({"kind": "mert"})
    layout = config.layout()
    assert layout.media() == ("audio",) and len(layout.tokenizer) == 1 and layout.pad == 0
    assert layout.audio is not None and layout.audio.count(120_000)[0] == 374 and layout.audio.alone
    assert batch([0]).segment_ids[0].tolist() == [1] * 30 + [2] * 51 + [3] * 17 + [0] * 30
    with pytest.raises(ValueError, match=r"seconds: expected two numbers above 0 in order, found 2\.0 and 1\.0"):
        model(mixture={"seconds": [2, 1]})


def test_precision_of_bf16_is_enough_for_the_losses() -> None:
    """Losses under autocast are float32 and near those without."""
    system, packed = build().eval(), batch(ALL)
    with torch.no_grad():
        plain = system(packed)
        with torch.autocast("cpu", torch.bfloat16):
            cast = system(packed)
    for name, loss in plain.losses.items():
        assert cast.losses[name].dtype == torch.float32
        assert float(cast.losses[name]) == pytest.approx(float(loss), rel=0.03)
