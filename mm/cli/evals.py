"""`mm eval`, `embed`, `probe`, `pcfg` and `ensemble`."""

import argparse
from pathlib import Path

from mm.cli.parsing import (
    Commands,
    Result,
    add_encoder,
    add_model,
    add_precision,
    add_search,
    add_windows,
    positive,
    say,
    search_of,
)


def add(commands: Commands) -> None:
    sub = commands.add(evaluate, "run a model on published benchmarks (docs/evaluation.md)", name="eval")
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
    sub = commands.add(embed, "write what an audio encoder makes of recordings (docs/audio.md)")
    add_encoder(sub)
    help = "a folder, files or shards of recordings, such as music/ or music-*.tar"
    sub.add_argument("--audio", required=True, metavar="PATH", help=help)
    sub.add_argument("--out", required=True, help="folder for the embeddings; appears when it is whole")
    help = "hidden states: all, the last, or the number of one (all)"
    sub.add_argument("--layers", default="all", metavar="all|last|N", help=help)
    help = "a row a frame, or their mean a clip (clip)"
    sub.add_argument("--level", choices=("clip", "frame"), default="clip", help=help)
    add_windows(sub)
    sub = commands.add(probe, "read labels off a frozen audio encoder by small probes (docs/audio.md)")
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
    sub = commands.add(pcfg, "hold a model of `mm data build pcfg` against exact inference (docs/pcfg.md)")
    sub.add_argument("path", help="a run or a checkpoint")
    sub.add_argument("--data", required=True, metavar="DIR", help="the corpus that it was trained on")
    sub.add_argument("--told", type=int, metavar="K", help="latents that are told where some are (as trained)")
    sub.add_argument("--documents", type=positive, default=2000, metavar="N", help="of the test split (2,000)")
    sub.add_argument("--samples", type=positive, default=500, metavar="N", help="beginnings to go on with (500)")
    sub.add_argument("--seed", type=int, default=0, help="of what is sampled (0)")
    sub.add_argument("--device", default="auto", help="where the model runs (auto)")
    sub.add_argument("--out", help="folder for the numbers and the page (pcfg-NAME)")
    sub = commands.add(ensemble, "what several runs of one kind say together: losses of ensembles of 1 to all of them")
    sub.add_argument(
        "runs", nargs="+", metavar="run", help="a run or a checkpoint; behind the first one also a published model"
    )
    sub.add_argument("--split", choices=("validation", "test"), default="test", help="of the first run's data (test)")
    sub.add_argument("--device", default="auto", help="where the models run (auto)")
    sub.add_argument("--out", metavar="CSV", help="the losses as a table, for mm fit")


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
    from mm.page import duration

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
