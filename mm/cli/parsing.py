"""How commands are added to the command line, what arguments several of them have, and what they say."""

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn, get_args

Result = dict[str, Any]
"""What a command gives: one JSON object with `--json`."""
Command = Callable[[argparse.Namespace], Result]
"""It may set `args.status`, its exit status."""


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"mm: {message}; see `{self.prog} --help`\n")


class Commands:
    """Where commands are added: to `mm`, or to a group of them such as `mm data`."""

    def __init__(self, parser: argparse.ArgumentParser, dest: str = "command") -> None:
        self.parsers = parser.add_subparsers(dest=dest, required=True, metavar="COMMAND")
        self.shared = Parser(add_help=False)
        help = "end with one JSON object on the last line of stdout"
        self.shared.add_argument("--json", action="store_true", help=help)
        self.shared.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def add(self, function: Command, help: str, config: bool = False, name: str = "") -> argparse.ArgumentParser:
        """A command, for its arguments; `config`: the first are a config and what overrides it."""
        sub: argparse.ArgumentParser = self.parsers.add_parser(
            name or function.__name__, help=help, description=help, parents=[self.shared]
        )
        sub.set_defaults(function=function, status=0)
        if config:
            sub.add_argument("config", help="a YAML file")
            sub.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that override the file's")
        return sub

    def group(self, name: str, help: str) -> "Commands":
        return Commands(self.parsers.add_parser(name, help=help, description=help), "action")


def say(args: argparse.Namespace, text: str) -> None:
    """For people: to stdout, or out of the way of `--json`."""
    print(text, file=sys.stderr if args.json else sys.stdout)


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
