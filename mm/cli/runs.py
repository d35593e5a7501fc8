"""`mm train`, `estimate`, `config`, `report`, `fit`, `checkpoint` and `doctor`."""

import argparse
import json
import os
import sys
from pathlib import Path

from mm.cli.parsing import Commands, Result, positive, say, share
from mm.errors import ConfigError


def add(commands: Commands) -> None:
    sub = commands.add(train, "train a model from a config; raw shards are packed first", config=True)
    sub.add_argument("--resume", action="store_true", help="go on with the run in its folder, if there is one")
    sub = commands.add(estimate, "say what a run will take: FLOPs, memory, hours, and the GPUs it fits on", config=True)
    sub.add_argument("--ranks", type=positive, default=1, help="processes, a GPU each (1)")
    sub.add_argument("--utilisation", type=share, default=0.4, help="share of a GPU's peak that is reached (40%%)")
    sub = commands.add(config, "print the resolved, checked config without touching data")
    sub.add_argument("config", nargs="?", help="a YAML file")
    sub.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that override the file's")
    sub.add_argument("--schema", action="store_true", help="print the JSON schema of config files instead")
    sub.add_argument("--plot", metavar="FILE", help="draw rate, batch and mixture over all stages instead (.png, .svg)")
    sub = commands.add(report, "make one HTML page of a run, or one that compares several")
    sub.add_argument("runs", nargs="+", metavar="run", help="a run folder")
    sub.add_argument("--out", help="the page (RUN/report.html; of several runs compare.html)")
    sub = commands.add(fit, "fit a power law to runs, with intervals")
    help = "run folders, or a table (CSV) with columns for the number and the loss"
    sub.add_argument("points", nargs="+", metavar="run", help=help)
    help = "N trained parameters, D tokens, S steps, K members of an ensemble (E+A/N^a)"
    sub.add_argument("--law", default="E+A/N^a", help=help)
    sub.add_argument(
        "--metric", default="test_loss", help="the loss: a number of eval.json or metrics.jsonl (test_loss)"
    )
    sub.add_argument("--at", action="append", type=float, default=[], metavar="X", help="also what the law says there")
    sub.add_argument("--out", metavar="PNG", help="a chart")
    checkpoint = commands.group("checkpoint", "list, verify and merge the checkpoints of a run")
    sub = checkpoint.add(checkpoint_ls, "list a run's checkpoints", name="ls")
    sub.add_argument("run", help="a run folder")
    sub = checkpoint.add(checkpoint_verify, "read every tensor and compare every checksum", name="verify")
    sub.add_argument("checkpoint", help="a checkpoint, or a run: then all of its checkpoints")
    sub = checkpoint.add(checkpoint_merge, "write the model as plain safetensors", name="merge")
    sub.add_argument("checkpoint", help="a checkpoint, or a run: then its newest")
    sub.add_argument("--out", required=True, help="NAME.safetensors, or a folder for files of at most 5 GB")
    sub.add_argument("--ema", action="store_true", help="the moving average of the weights instead of the weights")
    commands.add(doctor, "say what is installed and which accelerator and attention would be used")


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


def fit(args: argparse.Namespace) -> Result:
    from mm import fit as fits

    of = fits.parse_law(args.law)
    points = fits.points_of([Path(path) for path in args.points], of, args.metric)
    found = fits.fit_power([x for _, x, _ in points], [loss for _, _, loss in points])
    for name, x, loss in points:
        say(args, f"{of} = {x:<12,.0f} {args.metric} {loss:.4f}  {name}")
    over = "the seeds" if found.by_seeds else "what the law misses, for want of seeds at every point"
    only = "; of these members, not of others" if of == "K" else ""
    say(args, f"{args.metric} = E + A / {of}^a; 95 % intervals over {over}{only}")
    numbers = {"E": found.E, "A": found.A, "a": found.a, **{f"at {x:g}": found.at(x) for x in args.at}}
    for name, number in numbers.items():
        say(args, f"  {name}: {number}")
    if not found.settled:
        tried = f"{fits.EXPONENTS[0]:g} to {fits.EXPONENTS[-1]:g}"
        say(args, f"these points show no such law: they do not fall, or best with an exponent at the end of {tried}")
    if args.out:
        fits.draw(Path(args.out), points, found, of, args.metric)
        say(args, f"wrote {args.out}")
    estimates = {name: [number.value, number.low, number.high] for name, number in numbers.items()}
    return {**estimates, "settled": found.settled}


def checkpoint_ls(args: argparse.Namespace) -> Result:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    from mm.page import duration
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
