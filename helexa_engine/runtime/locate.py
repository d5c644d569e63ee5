"""Where a model is, and what it is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import env
from ..errors import ModelNotFound
from ..weights import hub, hub_headers
from .model_info import Progress


def locate_model(model: str | Path, *, offline: bool = False, progress: Progress | None = None) -> Path:
    """The file or folder of a model. A hub id is downloaded unless it is complete on disk.

    Raises:
        ModelNotFound, DownloadFailed.
    """
    if model == "demo":
        from .. import demo

        path = demo.path()
        if not path.is_file():
            raise ModelNotFound("demo", f"the demo model is missing from this installation ({path})")
        return path
    if not str(model):  # as a path it would be this folder
        raise ModelNotFound("", "give a .gguf file, a HuggingFace folder, a hub id org/name, or demo")
    path = Path(model).expanduser()
    if path.is_dir() or path.is_file():
        return path
    hub_id = hub.HubId.parse(model) if isinstance(model, str) else None
    if hub_id is None:
        raise ModelNotFound(
            str(model), "no such file or folder; give a .gguf file, a HuggingFace folder, a hub id org/name, or demo"
        )

    def report(transfer: hub.Transfer) -> None:
        if progress is not None:
            share = transfer.all_done_bytes / max(1, transfer.all_total_bytes)
            progress(f"downloading {transfer.file}", share)

    return hub.locate(hub_id, offline=offline or env.offline(), on_transfer=report)


@contextmanager
def located_headers(model: str | Path, *, offline: bool = False) -> Iterator[Path]:
    """As :func:`locate_model`, but of a hub id that is not on disk only what stands before the weights, for as long as this lasts."""
    exists = model == "demo" or Path(model).expanduser().exists()
    hub_id = None if exists or not isinstance(model, str) else hub.HubId.parse(model)
    if hub_id is None:
        yield locate_model(model)
    else:
        with hub_headers.located(hub_id, offline=offline or env.offline()) as path:
            yield path


def model_name(model: str | Path, path: Path) -> str:
    """What the loaded model is called: a file's stem, a folder's name, and ``demo`` or a hub id as it was given."""
    if model == "demo" or not Path(model).expanduser().exists():
        return str(model)
    return path.stem if path.suffix == ".gguf" else path.resolve().name
