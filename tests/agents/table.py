"""The compatibility table: what a run found, client by feature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

FEATURES = (
    "chat",
    "stream",
    "tools",
    "parse",
    "completions",
    "responses",
    "messages",
    "errors",
    "tool round trip",
)
PASS, NOT_RUN = "pass", "not run"


@dataclass
class Row:
    """One client.

    Attributes:
        outcomes: feature to ``pass``, ``pass (n tests)``, ``FAIL: why`` or ``not run: why``; a feature that the client has no word
            for is absent.
        note: what else the run found, a sentence.
    """

    client: str
    version: str
    backend: str
    outcomes: dict[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether everything that was asked of the client came out well, and something was."""
        return bool(self.outcomes) and all(outcome.startswith(PASS) for outcome in self.outcomes.values())


def not_run(client: str, backend: str, features: Sequence[str], why: str) -> Row:
    """The row of a client that could not be had."""
    return Row(client, "-", backend, dict.fromkeys(features, f"{NOT_RUN}: {why}"))


HEAD = """\
# Which clients work

Written by `scripts/test_agents`, which installs each client in the version named here and runs it against helexa {version}; do not
edit. *demo* is the model that ships with helexa, in `helexa serve demo`. *scripted* is the same server over an engine that answers
from a script, in the tests of the wire formats, where each event is asked for by name. In brackets: how many tests of helexa's own
asked it of that client. An empty cell: the client has no such feature, or nothing here asks for it.

An agent, started by `helexa launch` as it is installed, passes a tool round trip when it reads a file by a tool of its own and what
stood in the file comes back to the server. Over the script it must also print the answer that the script makes of it. On the demo the
grammar forces the call and its arguments, and the model's answer to the result is its own, and noise: the agents' prompts are longer
than the 2048 tokens that the demo was trained on, so it runs from a copy of its file that declares a context of 131072.
"""


def render(rows: Sequence[Row], version: str) -> str:
    """The page, in Markdown."""
    lines = [
        HEAD.format(version=version),
        "| " + " | ".join(("client", "version", "against", *FEATURES)) + " |",
        "|" + "---|" * (3 + len(FEATURES)),
    ]
    notes: list[str] = []
    for row in rows:
        cells = []
        for feature in FEATURES:
            kind, _, why = row.outcomes.get(feature, "").partition(": ")
            cells.append(f"**{kind}**" if kind == "FAIL" else kind)
            if why and (line := f"- {row.client}, {feature}: {kind}: {why}") not in notes:
                notes.append(line)
        lines.append("| " + " | ".join((row.client, row.version, row.backend, *cells)) + " |")
    if notes:
        lines += ["", "What did not pass:", "", *notes]
    if found := [f"- {row.client}: {row.note}" for row in rows if row.note]:
        lines += ["", *found]
    return "\n".join(lines) + "\n"
