"""The page at ``/``: what the server does right now, and a box to talk to its models.

The server renders every figure; the script asks for the same page again now and then and puts its figures in place of the old ones.
With keys set, a caller without one gets a page that has no figure in it and asks for the key.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from helexa_engine.version import __version__

from ..auth import IS_LOCKED
from ..served_model import ServedModel

CONTENT_TYPE = "text/html; charset=utf-8"

_FOLDER = Path(__file__).parent
STYLE, SCRIPT = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


HEADERS = {
    "content-type": CONTENT_TYPE,
    "cache-control": "no-store",
    # Nothing from elsewhere, no script but ours, in nobody's frame: should escaping ever fail, this holds.
    "content-security-policy": f"default-src 'none'; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}; connect-src 'self'; "
    "img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


async def status_page(request: Request) -> Response:
    """A page for people: the models, what they are doing, and a box to talk to them."""
    locked = request.scope.get(IS_LOCKED, False)
    return Response(page([] if locked else request.app.state.models, locked=locked), headers=HEADERS)


def page(models: Iterable[ServedModel], *, locked: bool) -> str:
    """The document. ``locked`` leaves out everything that a key is needed for."""
    models = list(models)
    rows = "".join(_row(model) for model in models)
    options = "".join(f"<option>{escape(model.id)}</option>" for model in models)
    status = (
        "<p>This server asks for an API key.</p>"
        if locked
        else "<table><thead><tr><th>Model<th>State<th>Context<th>Memory<th>Running<th>Waiting<th>KV pages<th>Tokens/s"
        f"</tr></thead><tbody>{rows}</tbody></table>"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>helexa</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<header><h1>helexa</h1> <span>{escape(__version__)}</span></header>
<section id="status" data-locked="{"yes" if locked else "no"}">{status}</section>
<form id="unlock" {"" if locked else "hidden"}>
<label>API key <input id="key" type="password" autocomplete="off" required></label> <button>Unlock</button>
<span id="refused" role="alert"></span>
</form>
<section id="chat" {"hidden" if locked else ""}>
<div id="conversation" aria-live="polite"></div>
<form id="ask">
<label>Model <select id="model">{options}</select></label>
<textarea id="question" rows="3" placeholder="Say something" required></textarea>
<button id="send">Send</button> <button id="stop" type="button" hidden>Stop</button> <button id="clear" type="button">Clear</button>
</form>
</section>
<noscript><p>Without JavaScript this page shows the figures of the moment it was loaded, and the chat box does nothing.</p></noscript>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _row(model: ServedModel) -> str:
    """A model's line. The script makes the rate of the last cell from its counter."""
    name = f"<th scope='row'>{escape(model.id)}"
    if model.engine is None:
        return f"<tr>{name}<td>{_state(model)}<td><td><td><td><td><td></tr>"
    stats, info = model.engine.stats(), model.engine.model_info
    cells: list[Any] = [
        f"{info.max_model_len:,}",
        _size(info.weight_bytes + info.kv_bytes + info.state_bytes + info.snapshot_bytes),
        stats.num_running,
        stats.num_waiting,
        f"{stats.kv_cache_usage:.0%}",
    ]
    total = stats.generation_tokens_total
    shown = f"<td>{_state(model)}" + "".join(f"<td>{escape(str(cell))}" for cell in cells)
    return f"<tr>{name}{shown}<td data-model='{escape(model.id)}' data-tokens='{total}'></tr>"


def _state(model: ServedModel) -> str:
    """Its status, or how far its load is; and the button that changes it. Markup."""
    life = model.life
    stage, fraction = life.progress
    text = f"{stage}, {fraction:.0%}" if life.status in ("loading", "recovering") else life.status
    if life.is_unloaded and life.error is not None:
        text += f": {life.error.message}"
    act = "load" if life.status in ("unloaded", "failed") else "unload"
    if not life.can_load or life.status == "unloading":
        return escape(text)
    return f"{escape(text)} <button type='button' data-act='{act}' data-of='{escape(model.id)}'>{act.title()}</button>"


def _size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
