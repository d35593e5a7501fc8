"""What was learned, measured on held-out data.

- of a system that writes no text: the mean of each of its objectives, and of its metrics;
- of objectives over all items of a step: the loss over all items of the split (a contrastive one is higher, the more
  there are), with recalls;
- of a model of text alone: loss in nats per learned token, perplexity and bits per byte, over all and by source,
  against the unigram baseline;
- caption loss: nats per learned token of text, against the unigram baseline and the same model with pictures swapped;
- matching: is the true caption the best of 32 for a picture, by log p(caption | picture), plain and less
  log p(caption | other pictures), which takes away that some captions are likely for any picture.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.data.batch import IGNORE, MODALITIES, MediaBatch, PackedBatch, collate, with_dummies
from mm.data.layout import Layout
from mm.data.loader import one_pass
from mm.data.packed import Pack, PackedDataset, PackedMedia, PackedSegment
from mm.data.sample import Media, keyed_rng
from mm.data.tokenizer import Tokenizer
from mm.data.tokens import Segment, SegmentMedia
from mm.errors import DataError
from mm.models.decode import decode, draws
from mm.models.generate import generate
from mm.models.prompts import Decoding
from mm.models.system import GenerativeSystem, PooledSystem
from mm.train.engines.single import SingleEngine
from mm.train.step import gather_items

UNIGRAM_PACKS = 2000
POOLED = 1024
"""Items of a split whose part of a pooled loss is worked out at a time."""


@dataclass(frozen=True, slots=True)
class Means:
    """Over held-out data: of each objective, of each metric, and the weighted sum of all objectives, which is what
    training lowers. Among the metrics are the system's scores, which are no means. Of what has no terms there is none.
    """

    loss: float
    losses: dict[str, float]
    metrics: dict[str, float]
    sources: dict[str, tuple[float, int]]
    """Of the first objective, by source: its mean, and the number of its terms. Empty where it cannot be told apart."""


@torch.no_grad()
def means(engine: SingleEngine, layout: Layout, batches: Iterable[PackedBatch], sources: Sequence[str] = ()) -> Means:
    """Over the batches of all ranks, which have to be equally many on each. `sources`: those of the split."""
    system, world = engine.system, engine.world
    by_source = {name: [0.0, 0.0] for name in sources}
    first = next(iter(system.weights))
    pooled: dict[str, list[Tensor]] = defaultdict(list)
    sums, counts = dict.fromkeys(system.weights, 0.0), dict.fromkeys(system.weights, 0.0)
    metrics: dict[str, float] = defaultdict(float)
    weighed: dict[str, float] = defaultdict(float)
    seen: list[dict[str, Tensor]] = []
    for batch in batches:
        if world.ranks > 1:
            batch = with_dummies(batch, layout)
        output = engine.forward(batch.to(engine.device))
        for name, value in output.losses.items():
            sums[name] += float(value)
        for name in system.weights:
            counts[name] += float(output.counts[name])
        if by_source and (rows := output.rows.get(first)) is not None:
            numbers = system.row_counts(batch).tolist()
            for name, loss, number in zip(batch.sources, rows.tolist(), numbers, strict=True):
                if name:  # a row of padding has none
                    by_source[name][0] += loss
                    by_source[name][1] += number
        for name, value in output.features.items():
            pooled[name].append(value.float())
        for name, value in output.metrics.items():
            number = output.metric_counts.get(name)
            weight = float(output.counts[system.counted_by(name)] if number is None else number)
            metrics[name] += float(value) * weight
            weighed[name] += weight
        seen.append({name: value.float().cpu() for name, value in output.predictions.items()})
    found = iter(world.sum([*sums.values(), *counts.values(), *metrics.values(), *weighed.values()]))
    losses, counts, metrics, weighed = (
        {name: next(found) for name in names} for names in (sums, counts, metrics, weighed)
    )
    metrics = {name: total / weighed[name] for name, total in metrics.items() if weighed[name]}
    if isinstance(system, PooledSystem):
        features, _ = gather_items(world, {name: torch.cat(values) for name, values in pooled.items()})
        items = len(next(iter(features.values())))
        for start in range(0, max(items, 1), POOLED):  # what all items give at once may be large
            part = system.pooled_losses(features, slice(start, start + POOLED))
            losses |= {name: losses[name] + float(value) for name, value in part.items()}
        metrics |= system.pooled_scores({name: value.cpu() for name, value in features.items()})
    losses = {name: total / counts[name] for name, total in losses.items() if counts[name]}
    everyone = [one for rank in world.gather(seen) for one in rank]
    predictions = {name: torch.cat([one[name] for one in everyone]) for name in everyone[0]}
    loss = sum(system.weights[name] * mean for name, mean in losses.items())
    parts = iter(world.sum([number for pair in by_source.values() for number in pair]))
    apart = {name: (next(parts), int(next(parts))) for name in by_source}
    told = {name: (total / number, number) for name, (total, number) in apart.items() if number}
    return Means(loss, losses, metrics | system.scores(predictions), told)


@torch.no_grad()
def caption_loss(engine: SingleEngine, layout: Layout, batches: Iterable[PackedBatch], shuffled: bool = False) -> float:
    """Mean loss per learned token of text over the batches of all ranks, which have to be equally many on each.

    `shuffled`: each picture's pixels go to the next one's place; of a batch with one alone, those of the batch before
    come there.
    """
    name = "text" if "text" in engine.system.weights else "next_token"
    total = count = 0.0
    before: dict[str, MediaBatch] = {}
    for batch in batches:
        if engine.world.ranks > 1:
            batch = with_dummies(batch, layout)
        if shuffled:
            own = batch.media
            batch = replace(batch, media={kind: _swapped(media, before.get(kind)) for kind, media in own.items()})
            before |= {kind: media for kind, media in own.items() if len(media) and not media.dummy}
        output = engine.forward(batch.to(engine.device))
        total += float(output.losses[name])
        count += int(output.counts[name])
    total, count = engine.world.sum([total, count])
    return total / max(count, 1)


def _swapped(media: MediaBatch, before: MediaBatch | None) -> MediaBatch:
    """Every picture with its neighbour's content, resized where that has another size; one alone with the last's of the
    batch before."""
    if not len(media):
        return media
    last = before if before is not None and len(media) == 1 else media
    if media.features is not None:
        features = _features(media)
        moved = zip(features, [_features(last)[-1], *features[:-1]], strict=True)
        return replace(media, features=torch.cat([_as_long(there, len(here)) for here, there in moved]))
    if media.codes is not None:  # of squares of one size
        assert last.codes is not None
        one = media.positions // len(media)
        return replace(media, codes=torch.cat([last.codes[-one:], media.codes[:-one]]))
    items = media.items()
    pictures = zip(items, [last.items()[-1], *items[:-1]], strict=True)
    return replace(media, values=torch.cat([_resized(there, here.shape[1:]).flatten() for here, there in pictures]))


def _features(media: MediaBatch) -> tuple[Tensor, ...]:
    assert media.features is not None
    return media.features.split(media.feature_rows(media.features))


def _as_long(features: Tensor, length: int) -> Tensor:
    """[T, D] to [length, D]."""
    if len(features) == length:
        return features
    return F.interpolate(features.T[None].float(), length, mode="linear")[0].T.to(features.dtype)


def _resized(picture: Tensor, size: torch.Size) -> Tensor:
    """[C, H, W] to [C, *size]."""
    if picture.shape[1:] == size:
        return picture
    return F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0]


def learned_tokens(dataset: PackedDataset, packs: Iterable[int]) -> np.ndarray:
    """The targets in some packs, [n] int32, but for those in pictures, which only the model has ids of."""
    found = [np.empty(0, dtype=np.int32)]
    for number in packs:
        pack = dataset.text(number)
        learned = np.zeros(len(pack.tokens), dtype=bool)
        for segment in pack.segments:
            for a, b in segment.loss:
                learned[max(a, segment.start + 1) : b] = True
        for one in pack.media:
            learned[one.position : one.position + one.length] = False
        found.append(pack.tokens[learned])
    return np.concatenate(found)


def learned_bytes(dataset: PackedDataset, tokenizer: Tokenizer) -> dict[str, int]:
    """UTF-8 bytes of the text that a split of text alone learns, by source; special tokens are no text."""
    found: dict[str, int] = defaultdict(int)
    for pack in map(dataset.text, range(len(dataset))):
        for segment in pack.segments:
            # As one: between the tokens of a character there may be a meta-token.
            learned = [id for a, b in segment.loss for id in pack.tokens[max(a, segment.start + 1) : b].tolist()]
            found[segment.source] += len(tokenizer.decode(learned).encode())
    return dict(found)


def text_results(found: Means, bytes_of: dict[str, int]) -> dict[str, float]:
    """Perplexity (per token) and bits per byte over all text, and with the loss by source, where there are several.

    Bits are those of all learned tokens, the end of a text included, and bytes those of the text alone.
    """

    def bits(names: Iterable[str]) -> float:
        nats = sum(loss * number for loss, number in (found.sources[name] for name in names))
        return nats / math.log(2) / max(1, sum(bytes_of[name] for name in names))

    several = len(found.sources) > 1

    def perplexity(loss: float) -> float:
        return math.exp(loss) if loss < 700 else math.inf

    return {
        "perplexity": perplexity(found.losses.get("next_token", 0.0)),
        "bits_per_byte": bits(found.sources),
        **{f"test_loss/{name}": loss for name, (loss, _) in found.sources.items() if several},
        **{f"perplexity/{name}": perplexity(loss) for name, (loss, _) in found.sources.items() if several},
        **{f"bits_per_byte/{name}": bits([name]) for name in found.sources if several},
    }


def unigram_loss(train: PackedDataset, held_out: PackedDataset, vocabulary: int) -> float:
    """Nats per learned token of the best model without context: token frequencies of (up to 2,000 packs of) the
    training set, one added to each count."""
    step = max(1, math.ceil(len(train) / UNIGRAM_PACKS))
    counts = np.bincount(learned_tokens(train, range(0, len(train), step)), minlength=vocabulary) + 1.0
    logs = np.log(counts / counts.sum())
    return float(-logs[learned_tokens(held_out, range(len(held_out)))].mean())


@dataclass(frozen=True, slots=True)
class Captioned:
    """A test picture with one caption: what precedes the caption, and its tokens."""

    id: str
    media: PackedMedia
    before: np.ndarray
    """int32: everything up to the caption, placeholders included."""
    caption: np.ndarray


def captioned_pictures(dataset: PackedDataset, layout: Layout, seed: int) -> dict[bytes, list[Captioned]]:
    """Every picture of a split that text follows once, by prompt (so by language).

    Where a picture has captions under several prompts, pictures are dealt to the prompts in turn in a seeded order.
    """
    by_picture: dict[str, dict[bytes, Captioned]] = defaultdict(dict)
    for number in range(len(dataset)):
        pack = dataset.kept(number)
        media = defaultdict(list)
        for one in pack.media:
            media[one.segment].append(one)
        for index, segment in enumerate(pack.segments):
            if len(media[index]) != 1 or media[index][0].kind != "image":
                continue
            (one,) = media[index]
            around = layout.span(one.kind, one.position, one.length)
            # A picture may be learned, too. Of text that stands in front of one it says nothing.
            learned = [(max(a, around.stop), b) for a, b in segment.loss if b > around.stop]
            if len(learned) != 1 or any(a < around.start for a, _ in segment.loss):
                continue
            start, stop = learned[0]
            tokens = pack.tokens[segment.start : segment.start + segment.length]
            before, caption = (
                tokens[: start - segment.start],
                tokens[start - segment.start : stop - segment.start],
            )
            one = replace(one, position=one.position - segment.start)
            picture = segment.id.split("#")[0]
            prompt = np.delete(before, range(one.position, one.position + one.length)).tobytes()
            by_picture[picture][prompt] = Captioned(segment.id, one, before, caption)
    prompts = sorted({prompt for options in by_picture.values() for prompt in options})
    dealt: dict[bytes, list[Captioned]] = {prompt: [] for prompt in prompts}
    pictures = sorted(by_picture)
    for place, index in enumerate(keyed_rng(seed, "matching").permutation(len(pictures)).tolist()):
        options = by_picture[pictures[index]]
        turn = [prompts[(place + k) % len(prompts)] for k in range(len(prompts))]
        prompt = next(prompt for prompt in turn if prompt in options)
        dealt[prompt].append(options[prompt])
    return dealt


def blocks(dealt: dict[bytes, list[Captioned]], candidates: int) -> Iterator[list[Captioned]]:
    """Pictures in blocks of one prompt, all pairs of which are scored: at least 2 x `candidates`, if there are.

    So the cost grows with the number of pictures, not with its square. A picture alone under its prompt is left out.
    """
    for items in dealt.values():
        count = max(1, len(items) // (2 * candidates))
        for places in np.array_split(np.arange(len(items)), count):
            if len(places) > 1:
                yield [items[place] for place in places]


@torch.no_grad()
def encode_pictures(engine: SingleEngine, layout: Layout, items: list[Captioned], chunk: int = 64) -> list[Tensor]:
    """[rows, D] features of each item's picture, on every rank."""
    assert isinstance(engine.system, GenerativeSystem)
    features: list[Tensor] = []
    for start in range(0, len(items), chunk):
        batch = _shown(items[start : start + chunk], layout).to(engine.device)
        image = batch.media["image"]
        found = engine.call(engine.system.features, "image", image) if image.features is None else image.features
        features += found.float().split(image.feature_rows(found))
    return features


@torch.no_grad()
def fuse_pictures(engine: SingleEngine, layout: Layout, items: list[Captioned], chunk: int = 64) -> list[Captioned]:
    """The items with token ids for their pictures, of a model whose pictures are tokens, on every rank."""
    system: Any = engine.system
    fused: list[Captioned] = []
    for start in range(0, len(items), chunk):
        part = items[start : start + chunk]
        batch = engine.call(system.fused, _shown(part, layout).to(engine.device))
        ids = batch.input_ids.int().cpu().numpy()
        fused += [replace(item, before=row[: len(item.before)]) for item, row in zip(part, ids, strict=True)]
    return fused


def _shown(items: list[Captioned], layout: Layout) -> PackedBatch:
    """A row for each item, up to its caption."""
    packs = [
        Pack(item.before, (PackedSegment(item.id, "", 0, len(item.before), ()),), (replace(item.media, segment=0),))
        for item in items
    ]
    return collate(packs, layout, row_length=max(len(pack.tokens) for pack in packs))


@torch.no_grad()
def caption_scores(
    engine: SingleEngine,
    layout: Layout,
    items: list[Captioned],
    features: list[Tensor] | None,
    row_tokens: int = 8192,
    stop: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """float64 [N, N]: log p(caption j | picture i, prompt). All items must have one prompt.

    `features`: of the pictures; None, where these are tokens (`fuse_pictures`). Scored in packed rows; of several ranks
    each scores its share of them.
    """
    assert isinstance(engine.system, GenerativeSystem)
    rank, ranks = engine.world.rank, engine.world.ranks
    scores = np.zeros((len(items), len(items)))
    longest = max(len(item.before) + len(item.caption) for item in items)
    chunk = max(1, row_tokens // longest)
    pairs = [(i, j) for i in range(len(items)) for j in range(len(items))]
    for start in range(rank * chunk, -(-len(pairs) // (chunk * ranks)) * chunk * ranks, chunk * ranks):
        stop()
        part = pairs[start : start + chunk]
        batch = _pair_batch(layout, items, features, part or pairs[:1])  # all ranks have to come as often
        losses = engine.call(engine.system.token_losses, batch.to(engine.device)).double()
        if not part:
            continue
        segment = (batch.segment_ids[batch.labels != IGNORE] - 1).long()
        sums = torch.zeros(len(part), dtype=torch.float64).index_add_(0, segment, losses.cpu())
        for (i, j), loss in zip(part, sums.tolist(), strict=True):
            scores[i, j] = -loss
    return np.array(engine.world.sum(scores.flatten().tolist())).reshape(scores.shape)


def _pair_batch(
    layout: Layout, items: list[Captioned], features: list[Tensor] | None, pairs: list[tuple[int, int]]
) -> PackedBatch:
    """One row with a segment per (picture i, caption j); picture features are given, so no tower runs."""
    texts = [np.concatenate([items[i].before, items[j].caption]) for i, j in pairs]
    lengths = np.array([len(text) for text in texts])
    starts = np.cumsum(lengths) - lengths
    ids = np.concatenate(texts).astype(np.int64)
    segments = np.repeat(np.arange(1, len(pairs) + 1), lengths)
    positions = np.arange(len(ids)) - np.repeat(starts, lengths)
    before = np.array([len(items[i].before) for i, _ in pairs])
    learned = positions >= np.repeat(before, lengths)
    labels = np.full(len(ids), IGNORE, dtype=np.int64)
    labels[:-1] = np.where(learned[1:], ids[1:], IGNORE)
    modality = np.full(len(ids), MODALITIES["text"], dtype=np.uint8)
    media = [items[i].media for i, _ in pairs]
    for start, one in zip(starts.tolist(), media, strict=True):
        modality[layout.span("image", start + one.position, one.length)] = MODALITIES["image"]
    image = None if features is None else MediaBatch(
        values=torch.empty(0),
        shapes=torch.empty(len(pairs), 3, dtype=torch.int64),
        offsets=torch.zeros(len(pairs) + 1, dtype=torch.int64),
        row=torch.zeros(len(pairs), dtype=torch.int64),
        position=torch.from_numpy(starts + [one.position for one in media]),
        length=torch.tensor([one.length for one in media]),
        cost=torch.tensor([one.cost for one in media]),
        features=torch.cat([features[i] for i, _ in pairs]),
    )  # fmt: skip

    def row(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values)[None]

    return PackedBatch(
        input_ids=row(ids),
        labels=row(labels),
        segment_ids=row(segments.astype(np.int32)),
        position_ids=row(positions),
        modality=row(modality),
        media={} if image is None else {"image": image},
        ids=[],
    )


def match(scores: np.ndarray, items: list[Captioned], candidates: int) -> tuple[float, float]:
    """How many pictures pick their own caption among candidates: (plain, less the captions' prior).

    scores: [N, N] log p(caption j | picture i). The prior of caption j for picture i is its mean probability under all
    other pictures. Captions equal to the true one are never its rivals. A picture counts with its chance of success
    over all draws of its rivals: that is what drawing them again and again tends to, without the noise of one draw.
    """
    plain = calibrated = 0.0
    for i, item in enumerate(items):
        rivals = [j for j, other in enumerate(items) if not np.array_equal(other.caption, item.caption)]
        among = np.array([i, *rivals], dtype=int)
        others = np.delete(scores[:, among], i, axis=0)
        prior = np.logaddexp.reduce(others, axis=0) - math.log(len(others))
        plain += _chance_to_win(scores[i, among], candidates)
        calibrated += _chance_to_win(scores[i, among] - prior, candidates)
    return plain, calibrated


def _chance_to_win(scores: np.ndarray, candidates: int) -> float:
    """That scores[0] beats `candidates` - 1 of the others, drawn without replacement (all, if they are fewer)."""
    rivals = len(scores) - 1
    drawn = min(candidates - 1, rivals)
    beaten = int((scores[1:] < scores[0]).sum())
    return math.comb(beaten, drawn) / math.comb(rivals, drawn)


def final_evaluation(
    engine: SingleEngine,
    layout: Layout,
    train: PackedDataset,
    test: PackedDataset,
    *,
    micro_batch: int,
    candidates: int,
    isolate_segments: bool,
    quarantine: bool,
    seed: int,
    stop: Callable[[], None],
) -> dict[str, Any]:
    """Everything that `eval.json` holds, on every rank. `stop` is called between batches and may raise on all."""
    engine.system.eval()
    rank, ranks = engine.world.rank, engine.world.ranks

    def batches() -> Iterable[PackedBatch]:
        for batch in one_pass(test, layout, micro_batch, isolate_segments, quarantine, rank, ranks):
            stop()
            yield batch

    if not isinstance(engine.system, GenerativeSystem):
        found = means(engine, layout, batches())
        engine.system.train()
        return {"test_loss": found.loss, **{f"test_{name}": v for name, v in {**found.losses, **found.metrics}.items()}}
    together: dict[str, float] = {}
    if not layout.media():
        found = means(engine, layout, batches(), list(test.about["ledger"]))
        together = text_results(found, learned_bytes(test, layout.tokenizer))
        loss = found.losses.get("next_token", 0.0)
    elif isinstance(engine.system, PooledSystem):
        found = means(engine, layout, batches())
        together = {f"test_{name}": value for name, value in {**found.losses, **found.metrics}.items()}
        loss = found.losses.get("next_token", 0.0)
    else:
        loss = caption_loss(engine, layout, batches())
    result: dict[str, Any] = {
        **together,
        "unigram_loss": unigram_loss(train, test, len(layout.tokenizer)),
        "test_tokens": len(learned_tokens(test, range(len(test)))),
    }
    if not layout.media():
        engine.system.train()
        return {"test_loss": loss, **result}
    result |= {"caption_loss": loss, "shuffled_loss": caption_loss(engine, layout, batches(), shuffled=True)}
    if candidates and "image" in layout.media():
        groups = list(blocks(captioned_pictures(test, layout, seed), candidates))
        if not groups:
            raise DataError(
                f"matching needs at least 2 test pictures with one caption under one prompt, in {test.folder}; "
                "set evaluation.candidates=0"
            )
        candidates = min(candidates, *(len(items) for items in groups), len(groups[0]))
        plain, calibrated, total = 0.0, 0.0, 0
        for items in groups:
            features = None
            if draws(engine.system):
                items = fuse_pictures(engine, layout, items)
            else:
                features = encode_pictures(engine, layout, items)
            hits = match(caption_scores(engine, layout, items, features, stop=stop), items, candidates)
            plain, calibrated, total = plain + hits[0], calibrated + hits[1], total + len(items)
        result |= {
            "match_accuracy": calibrated / total,
            "match_accuracy_plain": plain / total,
            "match_candidates": candidates,
            "match_chance": 1 / candidates,
            "test_items": total,
        }
    engine.system.train()
    return result


def caption_samples(
    engine: SingleEngine, layout: Layout, test: PackedDataset, count: int, seed: int
) -> list[tuple[dict[str, str], Media, np.ndarray | None]]:
    """Generated captions of some test pictures, with the true ones; all ranks generate the same.

    Of a model that draws, also a picture that it draws after the true caption, uint8 [H, W, 3].
    """
    groups = captioned_pictures(test, layout, seed)
    shares = {prompt: items[: math.ceil(count / max(1, len(groups)))] for prompt, items in groups.items()}
    items = [item for share in shares.values() for item in share][:count]
    if not items:
        return []
    pictures = [Media("image", item.media.data, item.media.ext) for item in items]
    prompts = [
        Segment(item.before, (), (SegmentMedia("image", one.position, one.length, one.cost, picture, one.plan),))
        for item, picture, one in zip(items, pictures, (item.media for item in items), strict=True)
    ]
    decoding = Decoding(max_new_tokens=48)
    written = engine.call(generate, engine.system, layout, prompts, decoding, synced=engine.world.ranks > 1)
    drawn: list[Any] = [None] * len(items)
    system: Any = engine.system
    if draws(system) and system.teacher.decodes:
        drawn = _drawn(engine, layout, items, seed)
    found = []
    for item, picture, caption, own in zip(items, pictures, written, drawn, strict=True):
        after = layout.tokenizer.decode(item.before[item.media.position + item.media.length :].tolist())
        prompt = after.removeprefix(layout.template.after_media).strip()
        true = layout.tokenizer.decode(item.caption.tolist())
        found.append(({"id": item.id, "prompt": prompt, "true": true, "generated": caption}, picture, own))
    return found


def _drawn(engine: SingleEngine, layout: Layout, items: list[Captioned], seed: int) -> list[np.ndarray]:
    """What the model draws after each caption, sampled."""
    around, eos = layout.template.around_image, layout.template.eos
    assert around is not None
    begin, end = layout.tokenizer.id(around[0]), None if eos is None else layout.tokenizer.id(eos)
    prompts = []
    for item in items:
        before = np.delete(item.before, layout.span("image", item.media.position, item.media.length))
        said = [*before.tolist(), *(id for id in item.caption.tolist() if id != end), begin]
        prompts.append(Segment(np.array(said, dtype=np.int32), (), ()))
    decoding = Decoding(max_new_tokens=1, temperature=1.0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        call = {"synced": engine.world.ranks > 1, "pictures": True}
        written = engine.call(decode, engine.system, layout, prompts, decoding, **call)
    return [one.pictures[0] for one in written]
