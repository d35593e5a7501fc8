"""K-means as a teacher: the nearest centroid of each frame's log-mel spectrum, and of its chroma as a second codebook.

Two codebooks of 300 and 200 say what MERT's k-means models predict as one of 60,000. A file of centroids holds, for
each spectrum, `NAME.centroids` [clusters, bins], and the `NAME.mean` and `NAME.std` [bins] by which frames are
normalised first.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mm.data.batch import collate
from mm.data.config import DataConfig
from mm.data.features import digest_tensors
from mm.data.layout import Layout
from mm.data.packed import PackedDataset
from mm.data.plan import Progress
from mm.data.prepare import open_splits
from mm.data.sample import keyed_rng
from mm.errors import ConfigError, DataError
from mm.files import atomic
from mm.models.spectra import chroma, log_mel
from mm.models.teachers import aligned, require_rate
from mm.models.teachers.config import FORMAT, FORMAT_VERSION, KMeansConfig

SPECTRA: dict[str, Callable[[Tensor, int, int], Tensor]] = {"mel": log_mel, "chroma": chroma}
"""(clip, sampling rate, hop) -> [frames, bins]."""
PARTS = ("mean", "std", "centroids")
AT_ONCE = 1 << 16  # frames whose distances to all centroids are held
BATCH = 10_000  # frames of a step of the fit
STEPS, PASSES = 1000, 100  # of the fit, at most


@dataclass(frozen=True, slots=True)
class Codebook:
    """`centroids` [clusters, bins] of frames that were normalised by `mean` and `std` [bins]; float32."""

    mean: Tensor
    std: Tensor
    centroids: Tensor

    def nearest(self, frames: Tensor) -> Tensor:
        """int64 [N]: of frames [N, bins] the centroid at the least distance, the first of several."""
        normal = (frames - self.mean) / self.std
        lengths = self.centroids.square().sum(1)  # |x - c|^2 without |x|^2, which is the same for all centroids
        return torch.cat([(lengths - 2 * some @ self.centroids.T).argmin(1) for some in normal.split(AT_ONCE)])

    def to(self, device: torch.device) -> "Codebook":
        return Codebook(self.mean.to(device), self.std.to(device), self.centroids.to(device))


class KMeans:
    """See `Teacher`. Raises `ConfigError` where the file is none of centroids."""

    medium = "audio"

    def __init__(self, config: KMeansConfig) -> None:
        about = config.about()
        self.sizes = config.sizes()
        self.sampling_rate, self.hop = int(about["sampling_rate"]), int(about["hop"])
        try:
            self._tensors = load_file(config.path.expanduser())
            self._books = {
                name: Codebook(*(self._tensors[f"{name}.{part}"] for part in PARTS))
                for name in (book["name"] for book in about["codebooks"])
            }
        except (SafetensorError, LookupError) as error:
            raise ConfigError(
                f"model.teacher.path {config.path}: damaged ({error}); make it again with `mm data kmeans`"
            ) from None

    def check(self, layout: Layout) -> None:
        """See `Teacher`."""
        require_rate(layout, self.sampling_rate)

    @torch.no_grad()
    def codes(self, items: list[Tensor], lengths: list[int], layout: Layout) -> Tensor:
        """See `Teacher`."""
        assert layout.audio is not None
        device, columns = items[0].device, []
        with torch.autocast(device.type, enabled=False):
            for name, book in self._books.items():
                spectra = [
                    aligned(SPECTRA[name](clip, self.sampling_rate, self.hop), count, layout.audio.hop, self.hop)
                    for clip, count in zip(items, lengths, strict=True)
                ]
                columns.append(book.to(device).nearest(torch.cat(spectra)))
        return torch.stack(columns, dim=1)

    def describe(self) -> dict[str, Any]:
        """See `Teacher`."""
        weights = digest_tensors(self._tensors)
        return {"kind": "kmeans", "sampling_rate": self.sampling_rate, "hop": self.hop, "weights": weights}


def fit(
    data: DataConfig,
    layout: Layout,
    run_seed: int,
    out: Path,
    clusters: dict[str, int],
    frames: int,
    seed: int,
    progress: Progress = lambda what, n: None,
) -> dict[str, Any]:
    """Fit centroids to frames of a config's training split, and write them to a file.

    Args:
        run_seed: the config's, which names the packed set.
        clusters: by spectrum, `mel` and `chroma`; 0 leaves one out.
        frames: so many, of packs in an order drawn by `seed`, whole recordings; fewer where there are not as many.
        seed: of all that is drawn here; the same gives the same file.

    Returns:
        What the file says of itself: `frames`, and of each of `codebooks` its `clusters`, `bins`, `inertia` (mean
        squared distance of a normalised frame to its centroid), `empty` clusters and `entropy` of their use, in bits.

    Raises:
        ConfigError: the model takes no recordings, or scikit-learn is missing.
        DataError: there are fewer frames than clusters.
    """
    wanted = {name: count for name, count in clusters.items() if count > 0}
    if layout.audio is None:
        raise ConfigError("mm data kmeans: the model takes no audio")
    if not wanted:
        raise ConfigError("mm data kmeans: give --mel or --chroma, or both")
    if out.is_dir():
        raise ConfigError(f"{out}: is a folder; give the name of a file, such as {out / 'kmeans.safetensors'}")
    fitted = _scikit_learn()
    out.parent.mkdir(parents=True, exist_ok=True)
    dataset = open_splits(data, layout, run_seed, progress)["train"]
    rate, hop = layout.audio.sampling_rate, layout.audio.hop
    found: dict[str, list[Tensor]] = {name: [] for name in wanted}
    count = 0
    for clip in _clips(dataset, layout, seed):
        for name in wanted:
            found[name].append(SPECTRA[name](clip, rate, hop)[: frames - count])
        count += len(next(iter(found.values()))[-1])
        progress("spectra of frames", count)
        if count == frames:
            break
    if count < max(wanted.values()):
        raise DataError(
            f"{dataset.folder}: {count:,} readable frames are fewer than the {max(wanted.values()):,} clusters; ask "
            "for fewer (--mel, --chroma), or give more audio"
        )
    books: dict[str, Codebook] = {}
    described = []
    for name in wanted:
        books[name], one = _fit(torch.cat(found.pop(name)), name, wanted[name], seed, fitted, progress)
        described.append(one)
    about = {"sampling_rate": rate, "hop": hop, "frames": count, "seed": seed, "codebooks": described}
    write(out, books, about)
    return about


def write(out: Path, books: dict[str, Codebook], about: dict[str, Any]) -> None:
    """A file of centroids, whole or not at all. `about`: `sampling_rate`, `hop`, and of each of `codebooks`, in order,
    at least its `name` and `clusters`."""
    tensors = {f"{name}.{part}": getattr(book, part).contiguous() for name, book in books.items() for part in PARTS}
    with atomic(out) as file:
        file.write(save(tensors, {FORMAT: json.dumps({"format_version": FORMAT_VERSION, **about})}))


def _scikit_learn() -> Any:
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError as error:
        raise ConfigError(f'mm data kmeans: needs scikit-learn ({error}); pip install "mm-pretrain[audio]"') from None
    return MiniBatchKMeans


def _clips(dataset: PackedDataset, layout: Layout, seed: int) -> Iterator[Tensor]:
    """The readable recordings of the packs of one visit, in an order of packs that is drawn."""
    packs = np.flatnonzero(dataset.index["visit"].to_numpy() == 0)
    for pack in keyed_rng("kmeans", seed).permutation(packs).tolist():
        read = dataset.kept(pack, layout.pad)
        read = replace(read, media=tuple(one for one in read.media if one.kind == "audio"))
        batch = collate([read], layout, None, quarantine=True)
        if (media := batch.media.get("audio")) is not None:
            yield from (clip for clip, bad in zip(media.items(), media.unreadable.tolist(), strict=True) if not bad)


def _fit(
    frames: Tensor, name: str, clusters: int, seed: int, fitted: Any, progress: Progress
) -> tuple[Codebook, dict[str, Any]]:
    """A codebook of frames [N, bins], and what is to be said of it."""
    std, mean = torch.std_mean(frames, dim=0, correction=0)
    std[std < 1e-5] = 1  # a bin that never changes
    normal = ((frames - mean) / std).numpy()
    rng = keyed_rng("kmeans", seed, name)
    batch = max(BATCH, 3 * clusters)
    model = fitted(clusters, batch_size=batch, n_init=1, random_state=int(rng.integers(1 << 32)))
    steps = min(STEPS, PASSES * max(1, len(normal) // batch))
    for step, some in zip(range(1, steps + 1), _batches(len(normal), batch, rng), strict=False):
        model.partial_fit(normal[some])
        progress(f"steps of fitting {clusters} clusters of {name}", step)
    book = Codebook(mean, std, torch.from_numpy(np.asarray(model.cluster_centers_, dtype=np.float32)))
    labels = book.nearest(frames)
    use = torch.bincount(labels, minlength=clusters).double() / len(labels)
    distance = (torch.from_numpy(normal) - book.centroids[labels]).square().sum(1).mean(dtype=torch.float64)
    return book, {
        "name": name,
        "clusters": clusters,
        "bins": frames.shape[1],
        "inertia": float(distance),
        "empty": int((use == 0).sum()),
        "entropy": float(torch.special.entr(use).sum()) / math.log(2),
    }


def _batches(count: int, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Endlessly: batches of one shuffled pass after the other, without what remains of a pass."""
    while True:
        order = rng.permutation(count)
        yield from (order[at : at + size] for at in range(0, max(1, count - size + 1), size))
