"""The published form of asking, against Open-Qwen2VL built by hand: `<s>`, the text around its pictures, greedy tokens
up to a stop."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from benchmark_samples import WRITERS
from PIL import Image
from tiny_release import IMAGE, Prismatic, write_release
from torch import Tensor

from mm import hub
from mm.data.sample import Media
from mm.evals import TASKS
from mm.evals.run import Settings, Source, run_task


def pixels(media: tuple[Media, ...]) -> Tensor:
    """[N, 3, 384, 384]: resized whatever the shape, -1 to 1."""
    pictures = [Image.open(io.BytesIO(one.read())).convert("RGB") for one in media]
    squares = [np.asarray(one.resize((384, 384), Image.Resampling.BICUBIC)) for one in pictures]
    return torch.stack([torch.tensor(one).permute(2, 0, 1) / 127.5 - 1 for one in squares])


def test_raw_answers_are_those_of_the_published_code(tmp_path: Path) -> None:
    model = Prismatic(144)
    (tmp_path / "mmmu").mkdir()
    path = str(WRITERS["mmmu"](tmp_path / "mmmu"))
    system, layout, _ = hub.load(write_release(tmp_path / "release", model), "cpu")
    run_task(system, layout, Source(TASKS["mmmu"](), path), Settings(), tmp_path / "out", {}, limit=2)
    encode, token = layout.tokenizer.encode, layout.tokenizer.id
    ends = [*(encode(stop)[0] for stop in ".,\n"), token("<|endofchunk|>"), token("<|im_end|>")]
    records = map(json.loads, (tmp_path / "out" / "mmmu.items.jsonl").read_text().splitlines())
    for record, item in zip(records, TASKS["mmmu"]().items(path), strict=False):
        first, *rest = record["prompt"].split("<image>")
        assert len(rest) == len(item.media) in (1, 3)
        ids = [token("<s>"), *encode(first)]
        for chunk in rest:
            ids += [IMAGE, *encode(chunk)]
        written = model.greedy(ids, pixels(item.media), 16, -1)
        cut = next((n for n, one in enumerate(written) if one in ends), len(written))
        assert record["output"] == layout.tokenizer.decode(written[:cut]).strip()
