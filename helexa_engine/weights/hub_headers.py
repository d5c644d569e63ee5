"""The headers of a model on the hub without its weights: sparse files of the real ones' sizes, filled as far as their headers go."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import env
from ..errors import DownloadFailed, ModelNotFound
from ..version import __version__
from . import hub_cache, hub_download
from .hub import FOLDER_FILES, INDEX, HubId
from .hub_download import Plan, explained

#: What is fetched of a GGUF file. The vocabulary is in its header: 5 MB for 150,000 tokens, 12 for 250,000.
GGUF_HEAD_BYTES = 32 * 2**20
#: And of its further parts, which repeat none of that.
GGUF_PART_BYTES = 2**20
#: More than any header of a safetensors file; a length beyond it is none.
MAX_SAFETENSORS_HEADER_BYTES = 100 * 2**20

_TEXT = {"tokenizer.json", "vocab.json", "merges.txt"}  # only the tokenizer reads them


@contextmanager
def located(wanted: HubId, *, offline: bool = False) -> Iterator[Path]:
    """A path that ``open_checkpoint`` can open: the model itself when it is complete on disk, else its headers, while this lasts.

    Raises:
        ModelNotFound: there is no such model; or it is not on disk and ``offline`` is set.
        DownloadFailed: the hub cannot be reached or refuses.
    """
    found = hub_cache.find(wanted)
    if isinstance(found, Path):
        yield found
        return
    if offline:
        raise ModelNotFound(
            str(wanted), f"{found}; offline mode is on, so nothing is fetched: run `helexa pull {wanted}` while online"
        )
    plan = hub_download.plan(wanted, needs_room=False)
    with tempfile.TemporaryDirectory(prefix="helexa-headers-") as name:
        folder = Path(name)
        for file in plan.variant.files:
            if file not in _TEXT:
                _bring(plan, file, folder / file)
        yield folder if plan.variant.is_folder else folder / plan.variant.files[0]


def _bring(plan: Plan, name: str, path: Path) -> None:
    """The file ``name`` of the hub at ``path``, with a hole in place of the weights."""
    size = plan.sizes[name]
    if name in FOLDER_FILES or name == INDEX:
        head = _read(plan, name, size)
    elif name.endswith(".safetensors"):
        (length,) = struct.unpack("<Q", _read(plan, name, 8))
        head = _read(plan, name, 8 + min(length, MAX_SAFETENSORS_HEADER_BYTES))
    else:
        head = _read(plan, name, GGUF_HEAD_BYTES if name == plan.variant.files[0] else GGUF_PART_BYTES)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(head)
        os.truncate(file.fileno(), max(size, len(head)))


def _read(plan: Plan, name: str, nbytes: int) -> bytes:
    """The first ``nbytes`` bytes of a file, or all of a shorter one. Raises what :func:`located` raises."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    nbytes = min(nbytes, plan.sizes[name])
    endpoint = env.hub_endpoint()
    headers = build_hf_headers(library_name="helexa", library_version=__version__)
    headers |= {"Accept-Encoding": "identity", "Range": f"bytes=0-{max(nbytes, 1) - 1}"}
    url = hf_hub_url(plan.wanted.repo, name, revision=plan.commit, endpoint=endpoint)
    head = bytearray()
    with (
        explained(plan.wanted, endpoint, name),
        get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=30.0) as response,
    ):
        hf_raise_for_status(response)
        for chunk in response.iter_bytes():
            head += chunk
            if len(head) >= nbytes:  # a server that knows no ranges would send everything
                break
    if len(head) < nbytes:
        raise DownloadFailed(f"{plan.wanted.repo}: {name}: {len(head)} bytes came instead of {nbytes}; try again")
    return bytes(head[:nbytes])
