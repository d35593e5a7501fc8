"""`mm generate`, `export` and `tokenizer`."""

import argparse
import json
import sys
from pathlib import Path

from mm.cli.parsing import Commands, Result, add_model, add_precision, add_search, positive, say, search_of
from mm.errors import ConfigError


def add(commands: Commands) -> None:
    sub = commands.add(generate, "let a trained model answer: prompts of text and pictures, one or a file of many")
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
    sub = commands.add(export, "write a model in a published format")
    add_model(sub)
    sub.add_argument("--out", required=True, help="the folder; appears whole or not at all")
    formats = ("transformers", "prismatic", "hf-llava", "hf", "janus-vq", "open_clip", "cosmo", "lavis")
    sub.add_argument("--to", choices=formats, help="the format, where several fit")
    tokenizer = commands.group("tokenizer", "train a tokenizer, or give a model more tokens (docs/text_lm.md)")
    help = "train a byte-level tokenizer on the texts of a run's data.sources, or on files"
    sub = tokenizer.add(tokenizer_train, help, name="train")
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
    sub = tokenizer.add(tokenizer_extend, help, name="extend")
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


def export(args: argparse.Namespace) -> Result:
    from mm import hub

    note = hub.export(args.path, Path(args.out), args.to, args.template, args.tokens)
    say(args, f"wrote {args.out}")
    if note:
        say(args, f"note: {note}")
    return {"folder": args.out, "note": note}


def tokenizer_train(args: argparse.Namespace) -> Result:
    from functools import partial

    from rich.console import Console
    from rich.table import Table

    from mm.config import load_config
    from mm.data import train_tokenizer as tokenizers
    from mm.data.remote import RemoteCache

    out, special = Path(args.out), args.special or tokenizers.SPECIAL
    if out.exists():
        raise ConfigError(f"{out}: is there already; choose another --out or remove it")
    if bool(args.files) == bool(args.config):
        raise ConfigError("give either the config of a run, whose training texts are learned from, or --files")
    read = partial(tokenizers.texts_of, args.files)
    if args.config:
        runs = load_config(args.config, args.overrides).stage_runs()
        data = runs[0].data
        cache = RemoteCache(data.cache.expanduser() / "remote", data.remote_cache)
        read = partial(tokenizers.texts_in, tokenizers.text_sources(run.data for run in runs), cache)
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
