"""The command ``helexa``: one module a command, imported only when that command runs.

Exit codes: 0 done, 1 a :class:`HelexaError`, 2 wrong usage or configuration, 130 stopped by Ctrl-C. An error is one line on
stderr; tracebacks are for our own faults.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Protocol, cast

from ..errors import HelexaError
from ..version import __version__
from .options import UsageError

#: Every command and its one-line help; the module of the same name (but see MODULES) beside this file implements it.
COMMANDS = {
    "run": "chat with a model in the terminal",
    "serve": "answer OpenAI clients over HTTP",
    "ps": "list the models of the server that runs, and what they do",
    "load": "have the server that runs load a model",
    "unload": "have the server that runs unload a model",
    "status": "say how the server that runs is doing",
    "launch": "run Claude Code, opencode, Codex or Qwen Code on a model of this machine",
    "pull": "download a model from the hub, or go on with it",
    "list": "list the models on this machine",
    "rm": "delete a model from the hub's cache",
    "quantize": "write a model as a quantised GGUF file",
    "info": "say what a model file holds, without loading it",
    "plan": "say what loading a model would take and give, without loading it",
    "config": "show every setting and where its value comes from",
    "doctor": "check this machine and this installation",
    "bench": "measure prefill and decode speed against the memory's limit",
    "completion": "print a completion script for bash, zsh or fish",
}

#: Commands that start another program: what follows ``--`` is for that, and not parsed here.
STARTERS = {"launch"}


class Command(Protocol):
    """What a command's module offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, arguments: argparse.Namespace) -> int: ...


#: Modules whose name is not the command's: a submodule ``list`` would hide the built-in of that name here, and ``config`` the leaf.
MODULES = {"list": "list_models", "config": "config_show"}


def command_module(name: str) -> Command:
    return cast(Command, importlib.import_module(f".{MODULES.get(name, name)}", __name__))


def build_parser(*configured: str) -> argparse.ArgumentParser:
    """The parser of ``helexa``. Only the commands named in ``configured`` are imported and get their own arguments."""
    parser = argparse.ArgumentParser(
        prog="helexa",
        description="Run open language models on hardware you own.",
        epilog="MODEL is a .gguf file, a HuggingFace folder, a hub id such as org/name or org/name:Q4_K_M, or demo (the small "
        "model that ships with helexa).",
    )
    parser.add_argument("--version", action="version", version=f"helexa {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name in configured:
            command_module(name).add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code. ``argv`` without the program's name, default ``sys.argv[1:]``."""
    argv = sys.argv[1:] if argv is None else list(argv)
    command = next((word for word in argv if not word.startswith("-")), None)
    handed_on: list[str] = []
    if command in STARTERS and "--" in argv:
        argv, handed_on = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    parser = build_parser(*([command] if command in COMMANDS else []))
    try:
        arguments = parser.parse_args(argv, argparse.Namespace(handed_on=handed_on))
        return command_module(arguments.command).run(arguments)
    except UsageError as error:
        return _fail(str(error), 2)
    except HelexaError as error:
        return _fail(error.message, 1)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("helexa"):
            raise
        return _fail(f"the Python package {error.name!r} is not installed; `helexa doctor` lists what is missing", 1)
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return 130
    except BrokenPipeError:
        # The reader of our output went away. Nothing may be flushed into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _fail(message: str, code: int) -> int:
    """One line on stderr, whatever line breaks and control characters the message carries from a file or a template."""
    printable = "".join(c if c.isprintable() else " " for c in message)
    sys.stderr.write(f"helexa: error: {' '.join(printable.split())}\n")
    return code
