"""The command line: a file for each family of commands, one function a command, no logic of its own.

Results go to stdout, progress and errors to stderr. With `--json` the last line of stdout is one JSON object. Status: 0
done; 2 something that the user can put right, in one line; 130 stopped by Ctrl-C and 75 by SIGTERM, all saved: a
scheduler can queue the same command again; 1 a bug.
"""

import argparse
import errno
import json
import math
import os
import signal
import sys
from typing import Any

from mm import __version__
from mm.cli import data, evals, models, runs
from mm.cli.parsing import Commands, Parser
from mm.errors import MMError

STOPPED: dict[int | None, int] = {signal.SIGINT: 130, signal.SIGTERM: os.EX_TEMPFAIL}
"""Status by the signal that a run was stopped and saved by."""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="mm", description="Train multimodal models from configs; pack data sets; look at both.")
    parser.add_argument("--version", action="version", version=f"mm {__version__}")
    commands = Commands(parser)
    for family in (runs, data, models, evals):
        family.add(commands)
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
        return fail(args, "interrupted; what is finished is kept, and the same command goes on from there", 130)
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
        return fail(args, explain_os_error(error, args.command), 2)
    except Exception as error:
        if args.debug:
            raise
        text = (str(error).strip() or repr(error)).splitlines()[0]
        return fail(args, f"unexpected {type(error).__name__}: {text} (a bug? --debug shows where)", 1)
    if args.json:
        print(json.dumps(_finite(result), ensure_ascii=False))
    return int(args.status)


def _finite(value: Any) -> Any:
    """With null for what JSON has no word for: the loss of a run that diverged."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def explain_os_error(error: OSError, command: str) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        train = "checkpoints saved before are whole: free some space and go on with --resume"
        return f"{where}the disk is full; {train if command == 'train' else 'free some space and run this again'}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where}no permission to write or read there; choose another folder (out=DIR, data.cache=DIR)"
    return f"{where}{error.strerror or error}"


def fail(args: argparse.Namespace, text: str, status: int) -> int:
    print("\n".join(f"mm: {line}" for line in text.splitlines()), file=sys.stderr)
    if args.json:
        print(json.dumps({"error": text, "status": status}, ensure_ascii=False))
    return status
