"""The command line: one function a command, no logic of its own.

Results go to stdout, progress and errors to stderr. With `--json` the last line of stdout is one JSON object. Status: 0
done; 2 something that the user can put right, in one line; 130 stopped by Ctrl-C and 75 by SIGTERM, all saved: a
scheduler can queue the same command again; 1 a bug.
"""

import argparse
import errno
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn, get_args

from mm import __version__
from mm.errors import ConfigError, MMError

Result = dict[str, Any]
STOPPED: dict[int | None, int] = {signal.SIGINT: 130, signal.SIGTERM: os.EX_TEMPFAIL}
"""Status by the signal that a run was stopped and saved by."""


def train(args: argparse.Namespace) -> Result:
    from mm.config import load_config
    from mm.display import Display
    from mm.train.trainer import Trainer, Unwatched

    config = load_config(args.config, args.overrides)
    if int(os.environ.get("RANK", "0")):
        return Trainer(config, Unwatched()).run(resume=args.resume)
    with Display() as display:
        result = Trainer(config, display).run(resume=args.resume)
    say(args, f"run: {config.out}")
    for name, value in result.items():
        say(args, f"  {name}: {value:.4f}" if isinstance(value, float) else f"  {name}: {value}")
    say(args, f"next: mm report {config.out}")
    return {"run": str(config.out), **result}


def estimate(args: argparse.Namespace) -> Result:
    from rich.console import Console

    from mm.config import load_config
    from mm.train.estimate import estimate as estimated
    from mm.train.estimate import show

    config = load_config(args.config, args.overrides)
    names = [stage.name for stage in config.stages] or [""]
    stages = [
        {"name": name, **estimated(run, args.ranks, args.utilisation)}
        for name, run in zip(names, config.stage_runs(), strict=True)
    ]
    if not args.json:
        for stage in stages:
            Console().print(*([f"stage {stage['name']}"] if stage["name"] else []), show(stage))
    return {"stages": stages}


def pack(args: argparse.Namespace) -> Result:
    from mm.config import load_config
    from mm.data.packed import PackedDataset
    from mm.data.prepare import SPLITS, Workers, cores, pack_split
    from mm.display import Display
    from mm.page import duration as lasts

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
            sound = f", {lasts(seconds)} of audio" if seconds else ""
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


def slice_of(text: str) -> tuple[int, int]:
    """`3/16`: the items 3, 19, 35, …"""
    which, _, of = text.partition("/")
    if not (which.isdigit() and of.isdigit() and int(which) < int(of)):
        raise argparse.ArgumentTypeError(f"{text!r} is no slice; expected I/N with I from 0 to N - 1, such as 3/16")
    return int(which), int(of)


def positive(text: str) -> int:
    """A number from 1 on."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)


def share(text: str) -> float:
    """`40%` or `0.4`."""
    from mm.settings import parse_number

    number = parse_number(text)
    if isinstance(number, str) or not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a share above 0, such as 40% or 0.4")
    return float(number)


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


def generate(args: argparse.Namespace) -> Result:
    from functools import partial

    from mm import hub
    from mm.display import Display
    from mm.models import answers
    from mm.models.prompts import Decoding
    from mm.models.system import GenerativeSystem, weights_digest

    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    sampling |= search_of(args)
    decoding = Decoding(args.max_new_tokens, **sampling, stop=tuple(args.stop), stop_ids=tuple(args.stop_id))
    drawing = answers.drawing_of(args.pictures, args.draw, args.guidance)
    metadata = hub.metadata_of(args.path).asked(args.metadata) if args.metadata else None
    if bool(args.prompts) == bool(args.prompt or args.image) and (args.prompts or not (args.draw or metadata)):
        raise ConfigError("give --prompt, --image or both, or --prompts FILE for many")
    if args.prompts:
        rows, folder = answers.read_rows(Path(args.prompts)), Path(args.prompts).parent
    else:
        rows, folder = [{"prompt": args.prompt, "images": args.image}], Path()
        answers.prompt_of(rows[0], "raw")  # what is wrong with it is said before a model is loaded
    system, layout, config = hub.load(args.path, template=args.template, tokens=args.tokens)
    if not isinstance(system, GenerativeSystem):
        raise ConfigError(f"{args.path}: a {config.model.kind} model does not write text")
    form = args.form or answers.form_of(config)
    after_media = layout.template.after_media
    prompt = partial(
        answers.prompt_of, form=form, folder=folder, system=args.system, after_media=after_media, metadata=metadata
    )
    live = sys.stdout.isatty() and not (args.json or args.prompts or decoding.beams > 1)
    stream = partial(print, end="", flush=True) if live else None
    answer = answers.answerer(system, layout, prompt, decoding, args.seed, stream, args.precision, drawing)
    if args.out:
        model = (args.path, weights_digest(system), args.template, args.tokens, args.precision)
        about = (*model, form, args.system, metadata, decoding, args.seed, drawing)
        with Display() as display:
            progress = partial(display.packing, "answering")
            answers.write_answers(Path(args.out), rows, answer, args.batch, about, progress)
        say(args, f"wrote {len(rows):,} answers to {args.out}")
        return {"form": form, "answers": len(rows), "out": args.out}
    found = []
    for row in (row for part in answers.answered(rows, answer, args.batch) for row in part):
        say(args, json.dumps(row, ensure_ascii=False) if args.prompts else "" if live else row["answer"])
        for picture in [] if args.prompts else row.get("pictures", []):
            say(args, f"drawn: {picture}")
        found.append(row)
    return {"form": form, "answers": found}


def evaluate(args: argparse.Namespace) -> Result:
    from rich.console import Console

    from mm.display import Display
    from mm.evals import run

    decoding = search_of(args) | ({"max_new_tokens": args.max_new_tokens} if args.max_new_tokens else {})
    shots = (args.shots, args.text_shots, args.fixed_shots)
    settings = run.Settings(args.prompt, args.scoring, *shots, args.seed, args.precision, decoding)
    tasks = run.sources(args.task, args.images, args.examples, args.example_images, args.classes, args.templates)
    out = Path(args.out) if args.out else None
    with Display() as display:
        watch = (args.limit, args.batch, display.packing)
        results = run.evaluate(args.path, tasks, settings, out, *watch, args.template, args.tokens)
    if not args.json:
        Console().print(run.table(results))
    return {"results": results}


def embed(args: argparse.Namespace) -> Result:
    from functools import partial

    from mm.display import Display
    from mm.evals import embed as embeddings

    embedder = embeddings.open_embedder(args.path, args.layers, args.device, args.precision)
    with Display() as display:
        watch = partial(display.packing, "embedding clips")
        cut = (args.level, args.seconds, args.batch_seconds)
        found = embeddings.embed(embedder, embeddings.source_of(args.audio), Path(args.out), *cut, watch)
    say(args, f"{len(found):,} clips, {duration(sum(clip['seconds'] for clip in found.clips))}: {args.out}")
    for one in found.bad[:10]:
        say(args, f"not read: {one['reason']}")
    if len(found.bad) > 10:
        say(args, f"{len(found.bad)} not read in all: {args.out}/bad.jsonl")
    return {"folder": args.out, **found.about}


def probe(args: argparse.Namespace) -> Result:
    from rich.console import Console

    from mm.display import Display
    from mm.evals import probe as probes

    data = probes.Data.open(args.data, Path(args.table) if args.table else None)
    splits = (args.group, args.split, args.split_seed)
    settings = probes.Settings(args.task, args.probe, args.layers, *splits, args.seeds)
    out, against = (Path(folder) if folder else None for folder in (args.out, args.against))
    cut = (args.seconds, args.batch_seconds)
    with Display() as display:
        results = probes.run(
            args.path, data, args.label, settings, out, *cut, args.device, args.precision, against, display.packing
        )
    if not args.json:
        Console(highlight=False).print(probes.tables(results), soft_wrap=True)
    return {"results": results}


def pcfg(args: argparse.Namespace) -> Result:
    from mm.display import Display
    from mm.evals import pcfg as bench

    out = Path(args.out) if args.out else None
    with Display() as display:
        counts = (args.told, args.documents, args.samples, args.seed)
        results = bench.run(args.path, Path(args.data), out, *counts, args.device, display.packing)
    for line in bench.summary(results):
        say(args, line)
    say(args, f"wrote {results['folder']}/pcfg.html: open it in a browser")
    return results


def export(args: argparse.Namespace) -> Result:
    from mm import hub

    note = hub.export(args.path, Path(args.out), args.to, args.template, args.tokens)
    say(args, f"wrote {args.out}")
    if note:
        say(args, f"note: {note}")
    return {"folder": args.out, "note": note}


def report(args: argparse.Namespace) -> Result:
    from mm.compare import compare_page
    from mm.report import report_page

    runs = [Path(run) for run in args.runs]
    skipped: dict[str, str] = {}
    if len(runs) == 1:
        page = Path(args.out) if args.out else runs[0] / "report.html"
        page.write_text(report_page(runs[0]))
    else:
        page = Path(args.out or "compare.html")
        text, skipped = compare_page(runs)
        page.write_text(text)
    for why in skipped.values():
        print(f"mm: left out: {why}", file=sys.stderr)
    say(args, f"wrote {page}: open it in a browser")
    return {"page": str(page), "skipped": skipped}


def ensemble(args: argparse.Namespace) -> Result:
    from functools import partial

    from mm.display import Display
    from mm.evals import ensemble as ensembles

    with Display() as display:
        found = ensembles.ensemble(args.runs, args.split, args.device, progress=partial(display.packing, "batches"))
    if args.out:
        ensembles.write_table(Path(args.out), found)
    for name, loss in found["members"]:
        say(args, f"{loss:.4f}  {name}")
    for row in found["sizes"]:
        say(args, f"K = {row['K']}: {row['loss']:.4f} (averaged probabilities: {row['probabilities']:.4f})")
    return found


def fit(args: argparse.Namespace) -> Result:
    from mm import fit as fits

    of = fits.parse_law(args.law)
    points = fits.points_of([Path(path) for path in args.points], of, args.metric)
    found = fits.fit_power([x for _, x, _ in points], [loss for _, _, loss in points])
    for name, x, loss in points:
        say(args, f"{of} = {x:<12,.0f} {args.metric} {loss:.4f}  {name}")
    over = "the seeds" if found.by_seeds else "what the law misses, for want of seeds at every point"
    say(args, f"{args.metric} = E + A / {of}^a; 95 % intervals over {over}")
    numbers = {"E": found.E, "A": found.A, "a": found.a, **{f"at {x:g}": found.at(x) for x in args.at}}
    for name, number in numbers.items():
        say(args, f"  {name}: {number}")
    if args.out:
        fits.draw(Path(args.out), points, found, of, args.metric)
        say(args, f"wrote {args.out}")
    return {name: [number.value, number.low, number.high] for name, number in numbers.items()}


def config(args: argparse.Namespace) -> Result:
    import yaml

    from mm.config import json_schema, load_config

    if args.schema:
        text = json.dumps(json_schema(), indent=2, ensure_ascii=False)
        say(args, text)
        return json_schema()
    if args.config is None:
        raise ConfigError("give a config file, or --schema")
    run = load_config(args.config, args.overrides)
    if args.plot:
        from mm.train.course import draw

        drawn = draw(run, Path(args.plot))
        say(args, f"drew {drawn['steps']:,} steps, {drawn['tokens']:,} tokens: {args.plot}")
        return drawn
    resolved = run.resolved()
    say(args, yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True).rstrip())
    return resolved


def doctor(args: argparse.Namespace) -> Result:
    from rich.console import Console
    from rich.table import Table

    from mm.doctor import diagnose

    found = diagnose()
    if not args.json:
        table = Table("", "", show_header=False, box=None, pad_edge=False)
        for name, value in {**found["machine"], **found["packages"]}.items():
            table.add_row(name, str(value) if value is not None else "not installed")
        console = Console()
        console.print(table)
        for problem in found["problems"]:
            console.print(f"problem: {problem}", style="red", markup=False, soft_wrap=True)
        console.print("everything fits together" if not found["problems"] else "", markup=False)
    args.status = 2 if found["problems"] else 0
    return found


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


def tokenizer_train(args: argparse.Namespace) -> Result:
    from functools import partial

    from rich.console import Console
    from rich.table import Table

    from mm.config import load_config
    from mm.data import train_tokenizer as tokenizers

    out, special = Path(args.out), args.special or tokenizers.SPECIAL
    if out.exists():
        raise ConfigError(f"{out}: is there already; choose another --out or remove it")
    if bool(args.files) == bool(args.config):
        raise ConfigError("give either the config of a run, whose training texts are learned from, or --files")
    read = partial(tokenizers.texts_of, args.files)
    if args.config:
        runs = load_config(args.config, args.overrides).stage_runs()
        read = partial(tokenizers.texts_in, tokenizers.text_sources(run.data for run in runs))
    trained = tokenizers.train((text for _, text in read()), args.vocab_size, special, args.kind, args.multiple)
    tokenizers.write(trained, out, special)
    found = tokenizers.compression(trained, read())
    if not args.json:
        table = Table("files", "characters", "tokens", "characters a token", "bytes a token", box=None, pad_edge=False)
        for kind, one in found.items():
            ratios = (f"{one[name]:.2f}" for name in ("characters_per_token", "bytes_per_token"))
            table.add_row(kind, f"{one['characters']:,}", f"{one['tokens']:,}", *ratios)
        Console().print(table)
    size = trained.get_vocab_size()
    say(args, f"{size:,} entries: {out}; name it as model.language.tokenizer")
    return {"folder": args.out, "entries": size, "compression": found}


def tokenizer_extend(args: argparse.Namespace) -> Result:
    from mm.models.vocabulary import extend

    words, learn = Path(args.add) if args.add else None, (args.train_on, args.rows)
    found = extend(args.model, Path(args.out), args.init, words, *learn, args.corpus, args.multiple, args.seed)
    seen = f", {found['found']:,} of them found in the corpus" if args.init == "contextual" else ""
    say(args, f"{found['tokens']:,} tokens more{seen}, {found['rows']:,} rows in all: {args.out}")
    if found["note"]:
        say(args, f"note: {found['note']}")
    return {"folder": args.out, **found}


def checkpoint_ls(args: argparse.Namespace) -> Result:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    from mm.train.checkpoint_tools import listing

    rows = listing(Path(args.run))
    if not args.json:
        table = Table("step", "size", "age", "", "ranks", "engine", box=None, pad_edge=False)
        for row in rows:
            marks = ", ".join(row["marks"]) if row["whole"] else "not whole"
            about = (str(row["ranks"] or "–"), row["engine"] or "–")
            table.add_row(f"{row['step']:,}", decimal(row["bytes"]), duration(row["age"]), marks, *about)
        Console().print(table)
    return {"run": args.run, "checkpoints": rows}


def checkpoint_verify(args: argparse.Namespace) -> Result:
    from mm.display import Display
    from mm.train.checkpoint_tools import verify

    with Display() as display:
        found = verify(Path(args.checkpoint), display.packing)
    for name, problems in found.items():
        say(args, f"{name}: " + ("; ".join(problems) if problems else "whole, all checksums right, all numbers finite"))
    args.status = 2 if any(found.values()) else 0
    return {"problems": found}


def checkpoint_merge(args: argparse.Namespace) -> Result:
    from mm.display import Display
    from mm.train.checkpoint_tools import merge

    with Display() as display:
        files = merge(Path(args.checkpoint), Path(args.out), args.ema, display.packing)
    for file in files:
        say(args, f"wrote {file}")
    return {"files": [str(file) for file in files]}


def duration(seconds: float) -> str:
    """Of one unit: `90 s`, `12 min`, `7 h`, `4 days`."""
    for unit, size, most in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800)):
        if seconds < most:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def say(args: argparse.Namespace, text: str) -> None:
    """For people: to stdout, or out of the way of `--json`."""
    print(text, file=sys.stderr if args.json else sys.stdout)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"mm: {message}; see `{self.prog} --help`\n")


def add_model(sub: argparse.ArgumentParser) -> None:
    """The arguments of `hub.load`."""
    from mm.data.sample import Chat

    sub.add_argument("path", help="a run, a checkpoint, a released folder or its name on the hub")
    sub.add_argument("--template", choices=get_args(Chat), help="another chat template than the model's")
    sub.add_argument("--tokens", type=positive, help="another number of positions of a picture: the same weights")


def add_encoder(sub: argparse.ArgumentParser) -> None:
    """The arguments of `open_embedder`."""
    help = "a run, checkpoint, release or hub name; untrained:CONFIG, builtin:log-mel or builtin:cqt"
    sub.add_argument("path", help=help)
    sub.add_argument("--device", default="auto", help="where the encoder runs (auto)")
    add_precision(sub)


def add_windows(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--seconds", type=positive, metavar="S", help="cut longer recordings into windows of S seconds")
    sub.add_argument("--batch-seconds", type=positive, default=60, metavar="N", help="seconds of sound at a time (60)")


def add_precision(sub: argparse.ArgumentParser) -> None:
    help = "bf16: autocast over the weights, which stay in float32 (fp32)"
    sub.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help=help)


def add_search(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--beams", type=positive, help="search with so many beams (1)")
    help = "with --beams: the best text has the largest log p / length^P; below 0 short ones are preferred (1)"
    sub.add_argument("--length-penalty", type=float, metavar="P", help=help)
    sub.add_argument("--min-new-tokens", type=positive, metavar="N", help="at least so many tokens (0)")


def search_of(args: argparse.Namespace) -> Result:
    """What was given of `add_search`, by the names of `Decoding`."""
    names = ("beams", "length_penalty", "min_new_tokens")
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="mm", description="Train multimodal models from configs; pack data sets; look at both.")
    parser.add_argument("--version", action="version", version=f"mm {__version__}")
    shared = Parser(add_help=False)
    shared.add_argument("--json", action="store_true", help="end with one JSON object on the last line of stdout")
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        function: Any, help: str, config: bool = False, under: Any = commands, name: str = ""
    ) -> argparse.ArgumentParser:
        sub = under.add_parser(name or function.__name__, help=help, description=help, parents=[shared])
        sub.set_defaults(function=function, status=0)
        if config:
            sub.add_argument("config", help="a YAML file")
            sub.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that override the file's")
        return sub

    sub = command(train, "train a model from a config; raw shards are packed first", config=True)
    sub.add_argument("--resume", action="store_true", help="go on with the run in its folder, if there is one")
    sub = command(estimate, "say what a run will take: FLOPs, memory, hours, and the GPUs it fits on", config=True)
    sub.add_argument("--ranks", type=positive, default=1, help="processes, a GPU each (1)")
    sub.add_argument("--utilisation", type=share, default=0.4, help="share of a GPU's peak that is reached (40%%)")
    sub = command(pack, "pack a config's data set offline", config=True)
    sub.add_argument("--out", help="folder for the packed splits (default: the cache that mm train uses)")
    sub.add_argument("--workers", type=int, help="processes (as many as there are cores)")
    sub.add_argument(
        "--slice", type=slice_of, default=(0, 1), metavar="I/N", help="do every N-th part, from the I-th on"
    )
    sub.add_argument("--executor", choices=("local", "ray"), default="local", help="who runs the processes (local)")
    sub.add_argument("--drop-ids", metavar="FILE", help="erase these samples (ids, one a line) from the packed set")
    sub = command(inspect, "draw packed rows as an HTML page")
    sub.add_argument("data", help="a packed split: a folder with dataset.json")
    sub.add_argument("--rows", type=int, default=16, help="rows to draw (16)")
    sub.add_argument("--check", action="store_true", help="instead of a page: verify every checksum, layout and sum")
    sub.add_argument("--tokenizer", help="to show text: a folder, hub name or builtin:emoji, or the model's config")
    sub.add_argument("--out", help="the page (inspect-NAME.html)")
    sub = command(generate, "let a trained model answer: prompts of text and pictures, one or a file of many")
    add_model(sub)
    sub.add_argument("--image", action="append", default=[], help="a picture of the prompt; give it again for more")
    sub.add_argument("--prompt", default="", help="the text; <image> in it marks a picture (else they stand in front)")
    sub.add_argument("--prompts", metavar="FILE", help='many: a JSONL file of {"prompt": "…", "images": ["a.jpg", …]}')
    sub.add_argument("--out", help="write the answers to this JSONL file")
    sub.add_argument("--batch", type=positive, default=8, help="with --prompts: so many at a time (8)")
    form = sub.add_mutually_exclusive_group()
    about = "(if the model was trained on conversations)"
    form.add_argument("--chat", dest="form", action="store_const", const="chat", help=f"ask in the chat form {about}")
    form.add_argument("--raw", dest="form", action="store_const", const="raw", help="go on with the text as it stands")
    sub.add_argument("--system", metavar="TEXT", help="the system turn of the chat form (the template's)")
    help = "where the text is from, real or invented, of a model that was trained on documents with metadata"
    sub.add_argument("--metadata", metavar="VALUE", help=help)
    sub.add_argument("--max-new-tokens", type=positive, default=64, help="at most so many tokens (64)")
    sub.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0 takes the likeliest token (0)")
    sub.add_argument("--top-p", type=float, help="sample among the tokens that hold this share of the probability")
    sub.add_argument("--top-k", type=positive, help="sample among so many of the likeliest tokens")
    add_search(sub)
    sub.add_argument("--seed", type=int, default=0, help="of sampling (0)")
    sub.add_argument("--stop", action="append", default=[], help="a text that ends the answer, cut off; repeatable")
    sub.add_argument("--stop-id", action="append", default=[], type=int, help="a token id that does; repeatable")
    help = "let the model draw, if its pictures are tokens: PNG files go to this folder"
    sub.add_argument("--pictures", metavar="FOLDER", help=help)
    sub.add_argument("--draw", action="store_true", help="with --pictures: begin with a picture")
    help = "with --pictures: above 1 the prompt counts for more in what is drawn (1)"
    sub.add_argument("--guidance", type=float, default=1.0, help=help)
    add_precision(sub)
    sub = command(evaluate, "run a model on published benchmarks (docs/evaluation.md)", name="eval")
    add_model(sub)
    help = "a benchmark and its file, folder or glob, such as pope=coco_pope_random.json; repeatable"
    sub.add_argument("--task", action="append", required=True, metavar="NAME=PATH", help=help)
    help = "where pictures lie that a task's file only names (beside it)"
    sub.add_argument("--images", action="append", default=[], metavar="NAME=DIR", help=help)
    help = "how questions are asked: as published, in the model's chat template, or as interleaved chunks (raw)"
    sub.add_argument("--prompt", choices=("raw", "chat", "flamingo"), default="raw", help=help)
    help = "generate an answer and parse it, or take the likeliest of the choices (generate)"
    sub.add_argument("--scoring", choices=("generate", "likelihood"), default="generate", help=help)
    sub.add_argument("--shots", type=int, default=0, metavar="K", help="solved examples before each question (0)")
    help = "more of them, without their pictures; two alone are what is published as 0-shot (0)"
    sub.add_argument("--text-shots", type=int, default=0, metavar="K", help=help)
    help = "where a task's examples come from (its own file, never the question itself)"
    sub.add_argument("--examples", action="append", default=[], metavar="NAME=PATH", help=help)
    help = "where pictures lie that a file of examples only names (where those of the task do)"
    sub.add_argument("--example-images", action="append", default=[], metavar="NAME=DIR", help=help)
    sub.add_argument("--fixed-shots", action="store_true", help="the same examples for every question")
    sub.add_argument("--seed", type=int, default=0, help="of the choice of examples (0)")
    add_search(sub)
    sub.add_argument("--max-new-tokens", type=positive, metavar="N", help="at most so many tokens (the task's number)")
    help = "of classify: what labels are called, a line each, or LABEL<tab>NAME; or imagenet (as they are)"
    sub.add_argument("--classes", metavar="FILE", help=help)
    help = "of classify: texts with {} for the name, a line each; or openai, simple (a photo of a {}.)"
    sub.add_argument("--templates", metavar="FILE", help=help)
    sub.add_argument("--limit", type=positive, metavar="N", help="only the first N items of each task")
    sub.add_argument("--batch", type=positive, default=8, help="prompts at a time (8)")
    add_precision(sub)
    sub.add_argument("--out", help="folder for results; what is there is not run again (eval-NAME)")
    sub = command(embed, "write what an audio encoder makes of recordings (docs/audio.md)")
    add_encoder(sub)
    help = "a folder, files or shards of recordings, such as music/ or music-*.tar"
    sub.add_argument("--audio", required=True, metavar="PATH", help=help)
    sub.add_argument("--out", required=True, help="folder for the embeddings; appears when it is whole")
    help = "hidden states: all, the last, or the number of one (all)"
    sub.add_argument("--layers", default="all", metavar="all|last|N", help=help)
    help = "a row a frame, or their mean a clip (clip)"
    sub.add_argument("--level", choices=("clip", "frame"), default="clip", help=help)
    add_windows(sub)
    sub = command(probe, "read labels off a frozen audio encoder by small probes (docs/audio.md)")
    add_encoder(sub)
    help = "recordings with JSON beside them (shards), or with --table a folder"
    sub.add_argument("--data", required=True, metavar="PATH", help=help)
    sub.add_argument("--table", metavar="CSV", help="labels: a column file, as seen from --data, and one a label")
    sub.add_argument("--label", action="append", required=True, metavar="FIELD", help="what to read off; repeatable")
    tasks = ("auto", "classes", "tags", "regression")
    sub.add_argument("--task", choices=tasks, default="auto", help="what labels are (auto: by their values)")
    help = "a linear map, or a hidden layer of 512 (mlp)"
    sub.add_argument("--probe", choices=("linear", "mlp"), default="mlp", help=help)
    help = "a learned sum of all, or the number of one (weighted)"
    sub.add_argument("--layers", default="weighted", metavar="weighted|N", help=help)
    sub.add_argument("--group", metavar="FIELD", help="what is in one split only, such as the piece (the recording)")
    help = "the field that says train, validation or test (split, or else by group)"
    sub.add_argument("--split", metavar="FIELD", help=help)
    sub.add_argument("--split-seed", type=int, default=0, metavar="N", help="another split by group (0)")
    sub.add_argument("--seeds", type=positive, default=3, help="probes trained with every learning rate (3)")
    help = "another --out: say the difference from what was probed there"
    sub.add_argument("--against", metavar="FOLDER", help=help)
    sub.add_argument("--out", help="folder for results, and embeddings for further calls (probe-NAME)")
    add_windows(sub)
    sub = command(pcfg, "hold a model of `mm data build pcfg` against exact inference (docs/pcfg.md)")
    sub.add_argument("path", help="a run or a checkpoint")
    sub.add_argument("--data", required=True, metavar="DIR", help="the corpus that it was trained on")
    sub.add_argument("--told", type=int, metavar="K", help="latents that are told where some are (as trained)")
    sub.add_argument("--documents", type=positive, default=2000, metavar="N", help="of the test split (2,000)")
    sub.add_argument("--samples", type=positive, default=500, metavar="N", help="beginnings to go on with (500)")
    sub.add_argument("--seed", type=int, default=0, help="of what is sampled (0)")
    sub.add_argument("--device", default="auto", help="where the model runs (auto)")
    sub.add_argument("--out", help="folder for the numbers and the page (pcfg-NAME)")
    sub = command(export, "write a model in a published format")
    add_model(sub)
    sub.add_argument("--out", required=True, help="the folder; appears whole or not at all")
    formats = ("transformers", "prismatic", "hf-llava", "hf", "janus-vq", "open_clip", "cosmo", "lavis")
    sub.add_argument("--to", choices=formats, help="the format, where several fit")
    sub = command(report, "make one HTML page of a run, or one that compares several")
    sub.add_argument("runs", nargs="+", metavar="run", help="a run folder")
    sub.add_argument("--out", help="the page (RUN/report.html; of several runs compare.html)")
    sub = command(ensemble, "what several runs of one kind say together: losses of ensembles of 1 to all of them")
    sub.add_argument("runs", nargs="+", metavar="run", help="a run, a checkpoint or a published model")
    sub.add_argument("--split", choices=("validation", "test"), default="test", help="of the first run's data (test)")
    sub.add_argument("--device", default="auto", help="where the models run (auto)")
    sub.add_argument("--out", metavar="CSV", help="the losses as a table, for mm fit")
    sub = command(fit, "fit a power law to runs, with intervals")
    help = "run folders, or a table (CSV) with columns for the number and the loss"
    sub.add_argument("points", nargs="+", metavar="run", help=help)
    help = "N trained parameters, D tokens, S steps, K members of an ensemble (E+A/N^a)"
    sub.add_argument("--law", default="E+A/N^a", help=help)
    sub.add_argument(
        "--metric", default="test_loss", help="the loss: a number of eval.json or metrics.jsonl (test_loss)"
    )
    sub.add_argument("--at", action="append", type=float, default=[], metavar="X", help="also what the law says there")
    sub.add_argument("--out", metavar="PNG", help="a chart")
    sub = command(config, "print the resolved, checked config without touching data")
    sub.add_argument("config", nargs="?", help="a YAML file")
    sub.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that override the file's")
    sub.add_argument("--schema", action="store_true", help="print the JSON schema of config files instead")
    sub.add_argument("--plot", metavar="FILE", help="draw rate, batch and mixture over all stages instead (.png, .svg)")
    help = "build data sets out of Debian and PyPI packages, convert published ones, compute features"
    data = commands.add_parser("data", help=help, description=help)
    corpora = data.add_subparsers(dest="action", required=True, metavar="COMMAND")
    command(data_list, "list the corpora that can be built", under=corpora, name="list")
    sub = command(data_build, "build a corpus into a folder", under=corpora, name="build")
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
    sub = command(
        data_convert, "pack the pickles of Open-Qwen2VL anew; none is run", config=True, under=corpora, name="convert"
    )
    sub.add_argument("--from", dest="folders", nargs="+", required=True, metavar="FOLDER", help="folders of .pkl files")
    sub.add_argument("--out", required=True, help="folder for the packed set")
    sub.add_argument("--workers", type=int, help="processes (as many as there are cores)")
    sub.add_argument(
        "--slice", type=slice_of, default=(0, 1), metavar="I/N", help="do every N-th part, from the I-th on"
    )
    help = "compute what a frozen tower or a teacher says, once, for runs with data.features or data.codes"
    sub = command(data_encode, help, config=True, under=corpora, name="encode")
    splits = ("train", "validation", "test")
    sub.add_argument("--split", action="append", default=[], choices=splits, help="only this one; again for more")
    sub.add_argument("--device", help="where it runs (train.device)")
    sub.add_argument("--teacher", metavar="KIND", help="codes of a teacher of this kind, with data.codes=true")
    sub.add_argument("--slice", type=slice_of, default=(0, 1), metavar="I/N", help="every N-th shard, from the I-th on")
    help = "fit the centroids of a k-means teacher to the recordings of a config"
    sub = command(data_kmeans, help, config=True, under=corpora, name="kmeans")
    sub.add_argument("--out", required=True, help="the file, such as kmeans.safetensors; appears whole or not at all")
    sub.add_argument("--mel", type=int, default=300, help="clusters of log-mel spectra; 0 for none (300)")
    sub.add_argument("--chroma", type=int, default=200, help="clusters of chroma; 0 for none (200)")
    sub.add_argument("--frames", type=positive, default=500_000, help="frames to fit them to, at most (500,000)")
    sub.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    help = "train a tokenizer, or give a model more tokens (docs/text_lm.md)"
    tokenizer = commands.add_parser("tokenizer", help=help, description=help)
    actions = tokenizer.add_subparsers(dest="action", required=True, metavar="COMMAND")
    help = "train a byte-level tokenizer on the texts of a run's data.sources, or on files"
    sub = command(tokenizer_train, help, under=actions, name="train")
    sub.add_argument("config", nargs="?", help="a YAML file: filters and parts of its training sources apply")
    sub.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that override the file's")
    help = "instead of a config: .txt, .md, jsonl, parquet or tars, as a source of kind text reads them"
    sub.add_argument("--files", nargs="+", default=[], metavar="PATH", help=help)
    sub.add_argument("--vocab-size", type=positive, required=True, metavar="N", help="entries, special tokens included")
    sub.add_argument("--kind", choices=("bpe", "unigram"), default="bpe", help="of its pieces (bpe)")
    help = "special tokens, the first being 0; by default those that templates name"
    sub.add_argument("--special", nargs="+", metavar="TOKEN", help=help)
    sub.add_argument("--multiple", type=positive, default=1, metavar="M", help="round the size up to this, such as 64")
    sub.add_argument("--out", required=True, help="the folder")
    help = "give a model more tokens, with rows in its embeddings and head"
    sub = command(tokenizer_extend, help, under=actions, name="extend")
    sub.add_argument("model", help="a folder of transformers, such as mm export writes, or a name on the hub")
    sub.add_argument("--add", metavar="FILE", help="new tokens, one a line: words that stand alone")
    help = "or learn them from these files of text, as BPE goes on"
    sub.add_argument("--train-on", nargs="+", default=[], metavar="PATH", help=help)
    sub.add_argument("--rows", type=positive, default=0, metavar="N", help="with --train-on: so many new tokens")
    inits = ("mean", "normal", "subtokens", "contextual")
    help = "what new rows begin as: the mean of all, drawn around it, the mean of their pieces, or their pieces in text"
    sub.add_argument("--init", choices=inits, default="subtokens", help=f"{help} (subtokens)")
    help = "with --init contextual: text that has the new tokens (what is trained on)"
    sub.add_argument("--corpus", nargs="+", default=[], metavar="PATH", help=help)
    sub.add_argument("--multiple", type=positive, default=1, metavar="M", help="round the rows up to this, such as 64")
    sub.add_argument("--seed", type=int, default=0, help="of --init normal (0)")
    sub.add_argument("--out", required=True, help="the folder; appears whole or not at all")
    help = "list, verify and merge the checkpoints of a run"
    checkpoint = commands.add_parser("checkpoint", help=help, description=help)
    actions = checkpoint.add_subparsers(dest="action", required=True, metavar="COMMAND")
    sub = command(checkpoint_ls, "list a run's checkpoints", under=actions, name="ls")
    sub.add_argument("run", help="a run folder")
    sub = command(checkpoint_verify, "read every tensor and compare every checksum", under=actions, name="verify")
    sub.add_argument("checkpoint", help="a checkpoint, or a run: then all of its checkpoints")
    sub = command(checkpoint_merge, "write the model as plain safetensors", under=actions, name="merge")
    sub.add_argument("checkpoint", help="a checkpoint, or a run: then its newest")
    sub.add_argument("--out", required=True, help="NAME.safetensors, or a folder for files of at most 5 GB")
    sub.add_argument("--ema", action="store_true", help="the moving average of the weights instead of the weights")
    command(doctor, "say what is installed and which accelerator and attention would be used")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args, unknown = build_parser().parse_known_args(argv)
    # Options may stand between overrides, which argparse then leaves over.
    if unknown:
        flags = [text for text in unknown if text.startswith("-") or not hasattr(args, "overrides")]
        if flags:
            print(f"mm: unknown argument {flags[0]!r}; see `mm {args.command} --help`", file=sys.stderr)
            return 2
        args.overrides += unknown
    try:
        result = args.function(args)
    except KeyboardInterrupt:
        return fail(args, "interrupted; what is done is kept, and the same command goes on", 130)
    except MMError as error:
        if args.debug:
            raise
        status = STOPPED.get(getattr(error, "signal", None), 2)
        if status != 2 and os.environ.get("RANK", "0") != "0":
            return status  # every rank stops, and the first says so
        return fail(args, str(error), status)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if args.debug:
            raise
        return fail(args, explain_os_error(error), 2)
    except Exception as error:
        if args.debug:
            raise
        text = (str(error).strip() or repr(error)).splitlines()[0]
        return fail(args, f"unexpected {type(error).__name__}: {text} (a bug? --debug shows where)", 1)
    if args.json:
        print(json.dumps(result, ensure_ascii=False))
    return int(args.status)


def explain_os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}the disk is full; checkpoints saved before are whole: free some space and go on with --resume"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where}no permission to write or read there; choose another folder (out=DIR, data.cache=DIR)"
    return f"{where}{error.strerror or error}"


def fail(args: argparse.Namespace, text: str, status: int) -> int:
    print("\n".join(f"mm: {line}" for line in text.splitlines()), file=sys.stderr)
    if args.json:
        print(json.dumps({"error": text, "status": status}, ensure_ascii=False))
    return status
