"""``helexa completion SHELL``: a script that completes commands, flags and their choices.

The words are taken from the parser itself when the script is printed, so completing a word starts no Python.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=sorted(SCRIPTS), help='for example: eval "$(helexa completion bash)"')


def run(arguments: argparse.Namespace) -> int:
    print(SCRIPTS[arguments.shell]())
    return 0


@dataclass(frozen=True, slots=True)
class Flag:
    names: tuple[str, ...]
    help: str
    takes_value: bool
    choices: tuple[str, ...]


def command_flags() -> dict[str, list[Flag]]:
    """Flags and, as a flag without names, the positional choices of every command."""
    from . import COMMANDS, build_parser

    parser = build_parser(*COMMANDS)
    subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    found: dict[str, list[Flag]] = {}
    for name, sub in subparsers.choices.items():
        found[name] = [
            Flag(
                names=tuple(action.option_strings),
                help=(action.help or "").replace("%%", "%"),
                takes_value=action.nargs != 0,
                choices=tuple(map(str, action.choices or ())),
            )
            for action in sub._actions
        ]
    return found


def _bash() -> str:
    from . import COMMANDS

    cases, values = [], []
    for command, flags in command_flags().items():
        words = [name for flag in flags for name in flag.names] + [c for f in flags if not f.names for c in f.choices]
        cases.append(f"    {command}) words={shlex.quote(' '.join(words))} ;;")
        for flag in flags:
            if flag.names and flag.choices:
                pattern = "|".join(f"{command}:{name}" for name in flag.names)
                values.append(f"    {pattern}) words={shlex.quote(' '.join(flag.choices))} ;;")
    newline = "\n"
    return f"""_helexa() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} words=
  case ${{COMP_WORDS[1]}} in
{newline.join(cases)}
  esac
  case ${{COMP_WORDS[1]}}:$previous in
{newline.join(values)}
  esac
  [ "$COMP_CWORD" = 1 ] && words={shlex.quote(" ".join([*COMMANDS, "--help", "--version"]))}
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _helexa helexa"""


def _zsh() -> str:
    return "autoload -U +X bashcompinit && bashcompinit\n" + _bash()


def _fish() -> str:
    from . import COMMANDS

    lines = [
        f"complete -c helexa -n __fish_use_subcommand -f -a {name} -d {shlex.quote(summary)}"
        for name, summary in COMMANDS.items()
    ]
    for command, flags in command_flags().items():
        condition = f"-n '__fish_seen_subcommand_from {command}'"
        for flag in flags:
            if not flag.names:
                if flag.choices:
                    lines.append(f"complete -c helexa {condition} -f -a {shlex.quote(' '.join(flag.choices))}")
                continue
            names = " ".join(f"-l {n[2:]}" if n.startswith("--") else f"-s {n[1:]}" for n in flag.names)
            value = f" -x -a {shlex.quote(' '.join(flag.choices))}" if flag.choices else " -r" * flag.takes_value
            lines.append(f"complete -c helexa {condition} {names}{value} -d {shlex.quote(flag.help)}")
    return "\n".join(lines)


SCRIPTS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
