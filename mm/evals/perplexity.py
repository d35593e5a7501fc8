"""Perplexity of a language model on files of text: `mm eval MODEL --task perplexity=FILES`.

Texts are read, spelt and packed as in training, in rows as long as the run's, so a number is that of the same text in
`data.test`; longer documents are cut, and each piece begins without the one before. Up to 50 files are told apart.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mm.data.config import DataConfig
from mm.data.layout import Layout
from mm.data.loader import one_pass
from mm.data.packed import PackedDataset
from mm.data.prepare import pack_split
from mm.data.shards import expand, stem
from mm.data.sources import TextConfig
from mm.errors import ConfigError, DataError
from mm.evals.results import Progress, Result, claim, prepared, write
from mm.models.prompts import Precision, autocast
from mm.models.system import GenerativeSystem
from mm.train.evaluate import Means, learned_bytes, text_results

FILES = 50


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Per token, and bits per byte, which models with other tokenizers can be compared by."""

    context_length: int = 2048
    """Tokens in a row."""
    isolate_segments: bool = True
    name = "perplexity"
    version = 1

    @classmethod
    def of(cls, config: Any, system: GenerativeSystem) -> "Perplexity":
        """As a model was trained; of a release, rows of up to 4,096 tokens, if it has so many positions."""
        if (data := getattr(config, "data", None)) is not None:
            return cls(data.context_length, data.isolate_segments)
        return cls(min(4096, getattr(system.language.config, "max_position_embeddings", None) or 2048))


def sources_of(path: str) -> list[TextConfig]:
    """A source a file, named by what tells files apart; one for all, where they are more than 50."""
    files = expand(path)
    if len(files) > FILES:
        return [TextConfig(path=path, name="all")]
    names = [stem(file) for file in files]
    if len({*names}) < len(names):
        names = [f"{Path(file).parent.name}-{name}" for file, name in zip(files, names, strict=True)]
    return [TextConfig(path=file, name=name) for file, name in zip(files, names, strict=True)]


@torch.no_grad()
def run_perplexity(
    system: GenerativeSystem,
    layout: Layout,
    task: Perplexity,
    path: str,
    precision: Precision,
    out: Path,
    about: dict[str, Any],
    batch: int = 8,
    progress: Progress = lambda what, count: None,
) -> Result:
    """The numbers of some files, written to `out` too, where the packed text stays.

    Raises:
        ConfigError: the model takes media, or `out` holds results of other settings.
        DataError: a file cannot be read, or there is no text in them.
    """
    if layout.media():
        raise ConfigError(f"perplexity is of models of text alone; this one takes {', '.join(layout.media())}")
    asked = {
        **about,
        "task": task.name,
        "task_version": task.version,
        "files": path,
        "context_length": task.context_length,
        "isolate_segments": task.isolate_segments,
        "precision": precision,
    }
    start = time.perf_counter()
    result, packed = prepared(out, path) / "perplexity.json", out / "perplexity.packed"
    claim(result, asked, packed.exists())
    data = DataConfig(test=sources_of(path), context_length=task.context_length, too_long="split")
    pack_split(data, "test", layout, 0, packed, progress)
    dataset = PackedDataset(packed)
    device = next(system.parameters()).device
    sums: dict[str, list[float]] = {name: [0.0, 0] for name in dataset.about["ledger"]}
    with autocast(system, precision):
        for rows in one_pass(dataset, layout, batch, task.isolate_segments):
            rows, learned = rows.to(device), system.row_counts(rows)
            routing = system.routing(rows)  # not the whole objective, which teachers may belong to
            losses = system.output(rows, system.token_losses(rows, routing), routing).rows["next_token"].double()
            for name, loss, number in zip(rows.sources, losses.tolist(), learned.tolist(), strict=True):
                sums[name][0] += loss
                sums[name][1] += number
            progress("perplexity: tokens", int(sum(number for _, number in sums.values())))
    tokens = sum(number for _, number in sums.values())
    if not tokens:
        raise DataError(f"{path}: no text in it that a model could be asked to predict")
    loss = sum(loss for loss, _ in sums.values()) / tokens
    of_files = {name: (total / number, int(number)) for name, (total, number) in sums.items() if number}
    found = text_results(Means(loss, {"next_token": loss}, {}, of_files), learned_bytes(dataset, layout.tokenizer))
    content = {
        **asked,
        "n": sum(counts["samples"] for counts in dataset.about["ledger"].values()),
        "tokens": int(tokens),
        "metric": "perplexity",
        "metrics": {"perplexity": found["perplexity"], "loss": loss, "bits_per_byte": found["bits_per_byte"]},
        "scored": {"likelihood": int(tokens)},
        "by": {
            "file": {
                name: {
                    "n": number,
                    "loss": mean,
                    **{key: found[f"{key}/{name}"] for key in ("perplexity", "bits_per_byte") if len(of_files) > 1},
                }
                for name, (mean, number) in of_files.items()
            }
        },
        "seconds": round(time.perf_counter() - start, 3),
    }
    write(result, content)
    return content
