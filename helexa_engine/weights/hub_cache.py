"""The hub's cache on this disk: finding, listing and deleting models in it. Reads directories and headers only; no network.

Layout (huggingface-hub, "Understand caching"): ``models--org--name/`` with ``refs/<revision>`` (a commit), ``snapshots/<commit>/``
(the files, as links) and ``blobs/<etag>`` (their bytes; ``.incomplete`` while they come in).
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import env
from ..architectures import ARCHITECTURES
from ..errors import HelexaError, InvalidRequest, ModelNotFound
from . import checkpoint, gguf
from .hub import INDEX, TOKENIZER_FILES, HubId, Variant, choose, format_bytes, variants

if TYPE_CHECKING:
    from huggingface_hub import DeleteCacheStrategy

_COMMIT = re.compile(r"[0-9a-f]{40}")


def repo_folder(repo: str) -> Path:
    return env.hub_cache() / f"models--{repo.replace('/', '--')}"


def find(wanted: HubId) -> Path | str:
    """The path to open when the model is complete on disk; else words that say what is missing.

    Raises:
        ModelNotFound: several models on disk answer to ``wanted``.
    """
    folder = repo_folder(wanted.repo)
    reason = f"nothing of it is in {env.hub_cache()}"
    for snapshot in snapshots(folder, wanted.revision):
        found = on_disk(snapshot)
        if not found:
            continue
        try:
            variant = choose(found, wanted, f"the copy of {wanted.repo} on disk")
        except ModelNotFound as error:
            if wanted.tag is None:
                raise
            reason = error.message.partition("not found: ")[2]
            continue
        if not variant.missing:
            return snapshot if variant.is_folder else snapshot / variant.files[0]
        reason = f"it is only half there: {variant.missing[0]} is missing from {snapshot}"
    partial = max(folder.glob("blobs/*.incomplete"), key=lambda blob: blob.stat().st_size, default=None)
    if partial is not None and "half there" not in reason:
        reason = f"it is only half there: {format_bytes(partial.stat().st_size)} of an unfinished file lie in {partial}"
    return reason


def snapshots(folder: Path, revision: str | None = None) -> list[Path]:
    """Snapshots of a repository: that of ``revision`` alone, or ``main``'s and then the others, newest first."""
    root = folder / "snapshots"
    name = revision or "main"
    commit = name if _COMMIT.fullmatch(name) else _read(folder / "refs" / name)
    named = [root / commit] if commit and _COMMIT.fullmatch(commit) and (root / commit).is_dir() else []
    if revision is not None or not root.is_dir():
        return named
    others = (path for path in root.iterdir() if path.is_dir() and path not in named)
    return named + sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def on_disk(snapshot: Path) -> list[Variant]:
    """The models of a snapshot; a link without its blob is no file."""
    names = [
        (Path(root) / name).relative_to(snapshot).as_posix()
        for root, _, files in os.walk(snapshot)
        for name in files
        if os.path.exists(os.path.join(root, name))
    ]
    found = variants(names)
    if "config.json" in names and not found:
        # The weights come last, so a download that stopped early has none.
        found = [Variant(None, ("config.json",), ("model.safetensors",))]
    if found and found[0].is_folder:
        found[0] = _checked(snapshot, found[0])
    return found


def _checked(snapshot: Path, folder: Variant) -> Variant:
    """``folder`` with what its index and its tokenizer still need."""
    missing = list(folder.missing)
    if INDEX in folder.files:
        try:
            shards = checkpoint.read_json(snapshot / INDEX).get("weight_map")
        except HelexaError:
            shards = None  # the reader of the folder says what is wrong with it
        expected = {str(name) for name in shards.values()} if isinstance(shards, dict) else set()
        missing += sorted(expected.difference(folder.files))
    if not any(name in folder.files for name in TOKENIZER_FILES):
        missing.append(TOKENIZER_FILES[0])
    return Variant(None, folder.files, tuple(missing))


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model in the cache.

    Attributes:
        id: what to call it on the command line.
        file: the GGUF file inside the repository; None for a folder.
        quant: tag of the GGUF file; None for a folder.
        nbytes: bytes on disk of its files.
        last_used: seconds since the epoch, as the file system notes reads (often once a day).
        path: what to open.
        missing: the first file that a half-downloaded model lacks, or None.
    """

    id: str
    repo: str
    file: str | None
    quant: str | None
    architecture: str
    nbytes: int
    last_used: float
    path: Path
    missing: str | None


def models() -> tuple[list[CachedModel], list[str]]:
    """The models helexa can load, by id, and the other model repositories in the cache."""
    found: list[CachedModel] = []
    others: list[str] = []
    root = env.hub_cache()
    for folder in sorted(root.glob("models--*--*")) if root.is_dir() else ():
        repo = folder.name.removeprefix("models--").replace("--", "/")
        loadable = list(_models_of(folder, repo))
        found += loadable
        if not loadable:
            others.append(repo)
    return found, others


def _models_of(folder: Path, repo: str) -> Iterator[CachedModel]:
    seen: set[str] = set()
    for snapshot in snapshots(folder):
        for variant in on_disk(snapshot):
            first = snapshot / variant.files[0]
            if variant.files[0] in seen:
                continue
            seen.add(variant.files[0])
            architecture = architecture_of(first)
            if architecture is None:
                continue
            stats = [(snapshot / name).stat() for name in variant.files if (snapshot / name).exists()]
            yield CachedModel(
                id=repo if variant.is_folder else f"{repo}:{variant.label}",
                repo=repo,
                file=None if variant.is_folder else variant.files[0],
                quant=variant.tag,
                architecture=architecture,
                nbytes=sum(stat.st_size for stat in stats),
                last_used=max((max(stat.st_atime, stat.st_mtime) for stat in stats), default=0.0),
                path=snapshot if variant.is_folder else first,
                missing=variant.missing[0] if variant.missing else None,
            )


def architecture_of(path: Path) -> str | None:
    """The architecture of a GGUF file or a ``config.json`` when helexa runs it, in GGUF's spelling; else None."""
    try:
        if path.name == "config.json":
            kind = checkpoint.FolderCheckpoint.MODEL_TYPES.get(str(checkpoint.read_json(path).get("model_type")))
        else:
            kind = gguf.read_architecture(path) if path.is_file() else None
    except HelexaError:
        return None
    return kind if kind in ARCHITECTURES else None


@dataclass(frozen=True, slots=True)
class Removal:
    """What a deletion would take.

    Attributes:
        what: the id it was asked for by.
        nbytes: what it frees; less than the files' size where other snapshots or repositories share their bytes.
        strategy: huggingface-hub's, which knows what is shared; None for a repository that it calls corrupt.
        folder: the repository, when nothing of it is to stay.
    """

    what: str
    nbytes: int
    strategy: DeleteCacheStrategy | None
    folder: Path | None


def plan_removal(wanted: HubId) -> Removal:
    """What deleting ``wanted`` takes: one GGUF model in every snapshot, or without a tag the whole repository.

    Raises:
        ModelNotFound: nothing of it is on disk; the message lists what there is.
        InvalidRequest: a revision is named.
    """
    if wanted.revision is not None:
        raise InvalidRequest(
            "model", f"a model is deleted in all its revisions; give {HubId(wanted.repo, tag=wanted.tag)}"
        )
    folder = repo_folder(wanted.repo)
    if not folder.is_dir():
        raise ModelNotFound(str(wanted), f"nothing of it is in {env.hub_cache()}; `helexa list` shows what is")
    links = None if wanted.tag is None else _links(folder, wanted)

    from huggingface_hub import scan_cache_dir

    scan = scan_cache_dir(env.hub_cache())
    repo = next((r for r in scan.repos if r.repo_type == "model" and r.repo_id == wanted.repo), None)
    if repo is None:
        return Removal(str(wanted), _tree_bytes(folder), None, folder)
    files = [file for revision in repo.revisions for file in revision.files]
    doomed = files if links is None else [file for file in files if file.file_path in links]
    if len(doomed) < len(files):
        strategy = scan.delete_files(*doomed)
        return Removal(str(wanted), strategy.expected_freed_size, strategy, None)
    strategy = scan.delete_revisions(*(revision.commit_hash for revision in repo.revisions))
    partial = sum(path.stat().st_size for path in folder.glob("blobs/*.incomplete"))
    return Removal(str(wanted), strategy.expected_freed_size + partial, strategy, folder)


def _links(folder: Path, wanted: HubId) -> set[Path]:
    """The files of one model in every snapshot, as huggingface-hub's scan names them. Raises :class:`ModelNotFound`."""
    links: set[Path] = set()
    reason: ModelNotFound | None = None
    for snapshot in snapshots(folder):
        try:
            variant = choose(on_disk(snapshot), wanted, f"the copy of {wanted.repo} on disk")
        except ModelNotFound as error:
            reason = reason or error
            continue
        links.update(snapshot.resolve() / name for name in variant.files if name not in variant.missing)
    if not links:
        raise reason or ModelNotFound(
            str(wanted), f"{folder} has no snapshot; without the tag the rest of it is deleted"
        )
    return links


def _tree_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def remove(removal: Removal) -> None:
    """Carries a :class:`Removal` out. Raises :class:`HelexaError` naming what the system refused."""
    try:
        if removal.strategy is not None:
            removal.strategy.execute()
        if removal.folder is not None and removal.folder.exists():
            shutil.rmtree(removal.folder)
    except OSError as error:
        raise HelexaError(f"{removal.what} could not be deleted whole: {error}") from None


def write_ref(repo: str, revision: str, commit: str) -> None:
    """Notes that ``revision`` is ``commit``, in one step, so that a reader never sees half a commit. Raises OSError."""
    if _COMMIT.fullmatch(revision):
        return
    path = repo_folder(repo) / "refs" / revision
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    temporary.write_text(commit, encoding="utf-8")
    os.replace(temporary, path)
