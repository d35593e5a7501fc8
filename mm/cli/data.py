"""`mm pack`, `inspect` and `data`."""

import argparse
from pathlib import Path
from typing import Any

from mm.cli.parsing import Commands, Result, positive, say, slice_of
from mm.errors import ConfigError


def add(commands: Commands) -> None:
    sub = commands.add(pack, "pack a config's data set offline", config=True)
    sub.add_argument("--out", help="folder for the packed splits (default: the cache that mm train uses)")
    sub.add_argument("--workers", type=int, help="processes (as many as there are cores)")
    sub.add_argument(
        "--slice", type=slice_of, default=(0, 1), metavar="I/N", help="do every N-th part, from the I-th on"
    )
    sub.add_argument("--executor", choices=("local", "ray"), default="local", help="who runs the processes (local)")
    sub.add_argument("--drop-ids", metavar="FILE", help="erase these samples (ids, one a line) from the packed set")
    sub = commands.add(inspect, "draw packed rows as an HTML page")
    sub.add_argument("data", help="a packed split: a folder with dataset.json")
    sub.add_argument("--rows", type=int, default=16, help="rows to draw (16)")
    sub.add_argument("--check", action="store_true", help="instead of a page: verify every checksum, layout and sum")
    sub.add_argument("--tokenizer", help="to show text: a folder, hub name or builtin:emoji, or the model's config")
    sub.add_argument("--out", help="the page (inspect-NAME.html)")
    data = commands.group(
        "data", "build data sets out of Debian and PyPI packages, convert published ones, compute features"
    )
    data.add(data_list, "list the corpora that can be built", name="list")
    sub = data.add(data_build, "build a corpus into a folder", name="build")
    sub.add_argument("name", help="its name in `mm data list`")
    sub.add_argument("--out", required=True, help="folder for the shards; appears whole or not at all")
    sub.add_argument("--cache", default="~/.cache/mm/packages", help="folder of packages (~/.cache/mm/packages)")
    sub.add_argument("--languages", type=lambda text: text.split(","), metavar="en,de", help="of gimp-help (en)")
    sub.add_argument("--count", type=int, help="clips of music (200), documents of pcfg to train on (50,000)")
    sub.add_argument("--seed", type=int, help="of what is drawn for music and pcfg (0)")
    sub.add_argument("--seconds", type=float, help="of a clip of music (5)")
    sub.add_argument("--depth", type=int, help="levels of the grammar of pcfg, each with a latent (3)")
    sub.add_argument("--symbols", type=int, help="on each level of it (4)")
    sub.add_argument("--rules", type=int, help="of each of its symbols (3)")
    sub.add_argument("--conditioned", type=float, help="share of pcfg documents that tell their latents (0.5)")
    sub = data.add(data_convert, "pack the pickles of Open-Qwen2VL anew; none is run", config=True, name="convert")
    sub.add_argument("--from", dest="folders", nargs="+", required=True, metavar="FOLDER", help="folders of .pkl files")
    sub.add_argument("--out", required=True, help="folder for the packed set")
    sub.add_argument("--workers", type=int, help="processes (as many as there are cores)")
    sub.add_argument(
        "--slice", type=slice_of, default=(0, 1), metavar="I/N", help="do every N-th part, from the I-th on"
    )
    help = "compute what a frozen tower or a teacher says, once, for runs with data.features or data.codes"
    sub = data.add(data_encode, help, config=True, name="encode")
    splits = ("train", "validation", "test")
    sub.add_argument("--split", action="append", default=[], choices=splits, help="only this one; again for more")
    sub.add_argument("--device", help="where it runs (train.device)")
    sub.add_argument("--teacher", metavar="KIND", help="codes of a teacher of this kind, with data.codes=true")
    sub.add_argument("--slice", type=slice_of, default=(0, 1), metavar="I/N", help="every N-th shard, from the I-th on")
    help = "fit the centroids of a k-means teacher to the recordings of a config"
    sub = data.add(data_kmeans, help, config=True, name="kmeans")
    sub.add_argument("--out", required=True, help="the file, such as kmeans.safetensors; appears whole or not at all")
    sub.add_argument("--mel", type=int, default=300, help="clusters of log-mel spectra; 0 for none (300)")
    sub.add_argument("--chroma", type=int, default=200, help="clusters of chroma; 0 for none (200)")
    sub.add_argument("--frames", type=positive, default=500_000, help="frames to fit them to, at most (500,000)")
    sub.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")


def pack(args: argparse.Namespace) -> Result:
    from mm.config import load_config
    from mm.data.packed import PackedDataset
    from mm.data.prepare import SPLITS, Workers, cores, pack_split
    from mm.display import Display
    from mm.page import duration

    if Path(args.config).is_dir():
        folders = [path.parent for path in sorted(Path(args.config).glob("**/dataset.json"))]
        if not args.drop_ids or not folders:
            raise ConfigError(f"{args.config}: a folder; give a config, or a packed set with --drop-ids")
        return {str(folder): drop(args, folder) for folder in folders}
    config = load_config(args.config, args.overrides)
    if config.data.packed is not None:
        raise ConfigError(
            f"{args.config}: data.packed is set: this config reads a packed set; give data.sources to pack"
        )
    workers = Workers(args.workers or cores(), args.executor, args.slice)
    layout = config.model.layout()
    packed: Result = {}
    for split in SPLITS:
        if config.data.split(split):
            out = Path(args.out) / split if args.out else None
            with Display() as display:
                folder = pack_split(config.data, split, layout, config.seed, out, display.packing, workers)
            if folder is None:
                say(args, f"{split}: this slice is done as far as it can be; run the others, then all of them again")
                packed[split] = None
                continue
            if args.drop_ids:
                drop(args, folder)
            dataset = PackedDataset(folder)
            about, seconds = dataset.about, dataset.audio_seconds
            counts = {k: about[k] for k in ("packs", "tokens", "fill")}
            packed[split] = {"folder": str(folder), **counts, "audio_seconds": round(seconds, 1)}
            sound = f", {duration(seconds)} of audio" if seconds else ""
            full = f"{about['packs']} packs, {about['tokens']:,} tokens, {about['fill']:.2%} full{sound}"
            say(args, f"{split}: {full}: {folder}")
    return packed


def drop(args: argparse.Namespace, folder: Path) -> Result:
    """`mm pack --drop-ids`, in one packed split."""
    from mm.data.packed import read_ids
    from mm.data.takedown import take_down
    from mm.display import Display

    with Display() as display:
        counts = take_down(folder, read_ids(Path(args.drop_ids)), display.packing)
    say(args, f"{folder}: {counts['samples']} samples taken down, {counts['unknown']} ids not found")
    return dict(counts)


def inspect(args: argparse.Namespace) -> Result:
    from mm.config import load_config
    from mm.data.inspect import inspect_page, summary
    from mm.data.packed import PackedDataset
    from mm.data.tokenizer import Tokenizer

    dataset = PackedDataset(Path(args.data))
    if args.check:
        return check(args, dataset)
    tokenizer = None
    if args.tokenizer:
        a_config = Path(args.tokenizer).suffix in (".yaml", ".yml")
        tokenizer = load_config(args.tokenizer).model.layout().tokenizer if a_config else Tokenizer.load(args.tokenizer)
    page = Path(args.out) if args.out else Path(f"inspect-{Path(args.data).resolve().name}.html")
    page.write_text(inspect_page(dataset, tokenizer, args.rows))
    say(args, f"wrote {page}: open it in a browser")
    return {"page": str(page), **summary(dataset)}


def check(args: argparse.Namespace, dataset: Any) -> Result:
    """`mm inspect --check`."""
    from mm.data.check import check as problems_of
    from mm.data.inspect import summary
    from mm.display import Display

    with Display() as display:
        problems = [*problems_of(dataset, display.packing), *summary(dataset)["ledger_open"]]
    for line in problems:
        say(args, line)
    say(args, f"{len(dataset)} packs: " + (f"{len(problems)} problems" if problems else "all whole, all sums close"))
    args.status = 2 if problems else 0
    return {"packs": len(dataset), "problems": problems}


def data_list(args: argparse.Namespace) -> Result:
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from mm.data.corpora import CORPORA

    if not args.json:
        table = Table("name", "what it is", "download", "on disk", "licence", "needs", box=None, pad_edge=False)
        for name, corpus in CORPORA.items():
            sizes = (f"{corpus.download} MB", f"{corpus.disk} MB")
            table.add_row(name, corpus.about, *sizes, corpus.licence, corpus.needs or "–")
        Console().print(table)
    return {"corpora": {name: asdict(corpus) for name, corpus in CORPORA.items()}}


def data_build(args: argparse.Namespace) -> Result:
    from mm.data.corpora.build import build_corpus
    from mm.display import Display

    names = ("languages", "count", "seed", "seconds", "depth", "symbols", "rules", "conditioned")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    with Display() as display:
        about = build_corpus(args.name, Path(args.out), options, Path(args.cache), display.packing)
    files = about["files"].values()
    samples, size = sum(file["samples"] for file in files), sum(file["bytes"] for file in files)
    state = "already built" if about["already"] else f"built in {about['seconds']:.0f} s"
    say(args, f"{about['name']}: {samples:,} samples, {size / 1e6:.1f} MB, {state}: {args.out}")
    for what, count in about["counts"].items():
        say(args, f"  {what}: {count:,}")
    return {"folder": args.out, **about}


def data_convert(args: argparse.Namespace) -> Result:
    from mm.config import load_config
    from mm.data.convert import convert
    from mm.data.prepare import Workers, cores
    from mm.display import Display

    config = load_config(args.config, args.overrides)
    workers = Workers(args.workers or cores(), slice=args.slice)
    folders = [Path(folder) for folder in args.folders]
    with Display() as display:
        about = convert(
            config.data, config.model.layout(), config.seed, folders, Path(args.out), display.packing, workers
        )
    if about is None:
        say(args, "this slice is done as far as it can be; run the others, then all of them again")
        return {"folder": None}
    counts = f"{about['samples']:,} samples, {about['packs']:,} packs, {about['fill']:.2%} full"
    say(args, f"{counts}: {about['folder']}; train on it with data.packed={args.out}")
    for reason in about["refused"][:10]:
        say(args, f"refused: {reason}")
    if about["refused"]:
        say(args, f"{len(about['refused'])} refused in all: {about['folder']}/quarantine.jsonl")
    return about


def data_encode(args: argparse.Namespace) -> Result:
    from mm.config import load_config
    from mm.display import Display
    from mm.train.features import encode

    named = [f"model.teacher={{kind: {args.teacher}}}", "data.codes=true"] if args.teacher else []
    config = load_config(args.config, [*args.overrides, *named])
    with Display() as display:
        found = encode(config, args.split, args.device, args.slice, display)
    for folder, one in found.items():
        left = "" if one["finished"] else "; other slices have shards left: run them, then all of them again"
        bad = f", {one['unreadable']:,} of them unreadable" if one["unreadable"] else ""
        what = f"{one['role']} of {one['items']:,} items{bad}, {one['bytes']:,} bytes"
        say(args, f"{one['split']}: {what}: {folder}{left}")
    return {"encoded": found}


def data_kmeans(args: argparse.Namespace) -> Result:
    from mm.config import load_config
    from mm.display import Display
    from mm.models.teachers.kmeans import fit

    config, clusters = load_config(args.config, args.overrides), {"mel": args.mel, "chroma": args.chroma}
    with Display() as display:
        about = fit(
            config.data, config.model.layout(), config.seed, Path(args.out), clusters, args.frames, args.seed,
            display.packing,
        )  # fmt: skip
    say(args, f"{about['frames']:,} frames: {args.out}")
    for book in about["codebooks"]:
        say(
            args,
            f"  {book['name']}: {book['clusters']} clusters, {book['empty']} of them empty, inertia "
            f"{book['inertia']:.4f} a frame of {book['bins']} bins, {book['entropy']:.2f} bits of use",
        )
    return {"file": args.out, **about}
