"""Downloading from the hub into its cache: what is needed, whether it fits the disk, and a transfer that goes on where it stopped.

huggingface-hub starts a file again when a process was stopped in the middle of it. Here the bytes go to
``blobs/<etag>.incomplete``, which the next attempt continues with a Range request, in this process or another; a finished
file is checked against its SHA-256 where the hub states it, and huggingface-hub then links it into the snapshot. Requests go
through huggingface-hub's own HTTP client, so proxies, tokens and offline mode are its.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import env
from ..errors import DownloadFailed, HelexaError, ModelNotFound
from ..version import __version__
from . import hub_cache
from .hub import HubId, OnTransfer, Transfer, Variant, choose, format_bytes, variants

log = logging.getLogger(__name__)

#: The hub serves larger files over its Xet protocol only; huggingface-hub speaks that, without resuming.
MAX_HTTP_BYTES = 50 * 10**9
#: Attempts in a row that brought no byte before a download is given up.
MAX_ATTEMPTS = 5
#: Wait before the first new attempt; each further one waits that much longer.
RETRY_SECONDS = 1.0
#: Room that must stay free on the disk.
SPARE_BYTES = 64 * 2**20

_REPORT_BYTES = 2**20
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r"[0-9A-Za-z][\w-]{0,127}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Plan:
    """A download that was found possible.

    Attributes:
        commit: what the revision is now.
        variant: the model, its files all present on the hub.
        sizes: bytes of each of its files.
        needed_bytes: what has yet to come.
    """

    wanted: HubId
    commit: str
    variant: Variant
    sizes: dict[str, int]
    needed_bytes: int

    @property
    def path(self) -> Path:
        """What will be opened."""
        snapshot = hub_cache.repo_folder(self.wanted.repo) / "snapshots" / self.commit
        return snapshot if self.variant.is_folder else snapshot / self.variant.files[0]


def plan(wanted: HubId, *, needs_room: bool = True) -> Plan:
    """Asks the hub what ``wanted`` is; downloads nothing. Without ``needs_room`` the disk may be too small for it.

    Raises:
        ModelNotFound: no such repository, revision or quant, with what there is.
        DownloadFailed: the hub does not answer or refuses, or the disk has too little room.
    """
    from huggingface_hub import HfApi

    endpoint = env.hub_endpoint()
    with explained(wanted, endpoint):
        info = HfApi(endpoint=endpoint, library_name="helexa", library_version=__version__).model_info(
            wanted.repo, revision=wanted.revision, files_metadata=True, timeout=30.0
        )
        commit, siblings = info.sha, info.siblings
        if commit is None or siblings is None or not _COMMIT.fullmatch(commit):
            raise ValueError(f"no commit or no list of files in its answer about {wanted.whole}")
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in siblings}
    place = f"{endpoint}/{wanted.repo}"
    variant = choose(variants(sizes), wanted, place, sizes)
    if variant.missing:
        raise ModelNotFound(str(wanted), f"{place} lacks {variant.missing[0]}; the upload is not complete")
    blobs = {sibling.rfilename: sibling.lfs.sha256 if sibling.lfs else sibling.blob_id for sibling in siblings}
    folder = hub_cache.repo_folder(wanted.repo)
    needed_bytes = 0
    for name in variant.files:
        blob = folder / "blobs" / str(blobs[name])
        if not (folder / "snapshots" / commit / name).exists() and not blob.exists():
            needed_bytes += max(0, sizes[name] - _size(blob.with_name(f"{blob.name}.incomplete")))
    if needs_room:
        _check_room(wanted, needed_bytes)
    return Plan(wanted, commit, variant, {name: sizes[name] for name in variant.files}, needed_bytes)


def _check_room(wanted: HubId, needed_bytes: int) -> None:
    cache = env.hub_cache()
    place = next((path for path in (cache, *cache.parents) if path.exists()), Path("/"))
    free = shutil.disk_usage(place).free
    if needed_bytes and needed_bytes + SPARE_BYTES > free:
        raise DownloadFailed(
            f"{wanted} needs {format_bytes(needed_bytes)} on disk and {cache} has {format_bytes(free)} free; make room (`helexa "
            "list`, `helexa rm`), take a smaller quant, or set HF_HUB_CACHE to a larger disk",
            needed_bytes=needed_bytes,
            free_bytes=free,
        )


def download(plan: Plan, on_transfer: OnTransfer | None = None) -> Path:
    """Brings every file of a plan into the cache, small ones first; returns the path to open.

    Raises:
        DownloadFailed: with the file and the reason. What has come stays, and the next attempt goes on from there.
    """
    total = sum(plan.sizes.values())
    before = 0
    for name in sorted(plan.variant.files, key=lambda name: plan.sizes[name]):
        size = plan.sizes[name]

        def report(done: int, name: str = name, size: int = size, before: int = before) -> None:
            if on_transfer is not None:
                on_transfer(Transfer(name, done, size, before + done, total))

        _bring(plan, name, size, report)
        before += size
    try:
        hub_cache.write_ref(plan.wanted.repo, plan.wanted.revision or "main", plan.commit)
    except OSError as error:
        raise DownloadFailed(f"{plan.wanted}: the cache cannot be written: {error}") from None
    return plan.path


def _bring(plan: Plan, name: str, size: int, report: Callable[[int], None]) -> None:
    """One file into the snapshot."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]

    repo, endpoint = plan.wanted.repo, env.hub_endpoint()
    folder = hub_cache.repo_folder(repo)
    if (folder / "snapshots" / plan.commit / name).exists():
        report(size)
        return
    headers = build_hf_headers(library_name="helexa", library_version=__version__)
    url = hf_hub_url(repo, name, revision=plan.commit, endpoint=endpoint)
    what = f"{repo}: {name}"
    with explained(plan.wanted, endpoint, name):
        if size <= MAX_HTTP_BYTES:
            facts = get_hf_file_metadata(url, headers=headers, timeout=30.0, retry_on_errors=True)
            etag, size = facts.etag, size if facts.size is None else facts.size
            if etag is None or not _ETAG.fullmatch(etag):
                raise ValueError(f"the ETag of {name} is {etag!r}")
            blob = folder / "blobs" / etag
            lock = env.hub_cache() / ".locks" / folder.name / f"{etag}.lock"
            for directory in (blob.parent, lock.parent):
                directory.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(lock):  # two processes would append to one file
                if not blob.exists():
                    log.info("%s: downloading %s", what, format_bytes(size))
                    fetch(url, blob, size, headers, report, what)
        path = hf_hub_download(
            repo,
            name,
            revision=plan.commit,
            cache_dir=env.hub_cache(),
            endpoint=endpoint,
            library_name="helexa",
            library_version=__version__,
        )
    if not Path(path).exists():
        raise DownloadFailed(f"{what}: it was downloaded, but {path} is not there")
    report(size)


def fetch(url: str, blob: Path, size: int, headers: dict[str, str], report: Callable[[int], None], what: str) -> None:
    """``url`` into ``blob`` by way of ``blob.incomplete``, going on where an earlier attempt stopped.

    Raises:
        DownloadFailed: the contents are not what the hub says they are.
        OSError, httpx2.HTTPError: as they come, after :data:`MAX_ATTEMPTS` attempts that brought nothing.
    """
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    partial = blob.with_name(f"{blob.name}.incomplete")
    attempts = 0
    trusted = not partial.exists()  # what another process left is trusted once its hash was right
    while True:
        have = _size(partial)
        if have > size:
            partial.unlink()
            have = 0
        report(have)
        failure: Exception | None = None
        if have < size or not partial.exists():
            try:
                _append(url, partial, have, headers, report)
            except (httpx2.TransportError, ConnectionError) as error:
                failure = error
            except HfHubHTTPError as error:
                if error.response.status_code != 429 and error.response.status_code < 500:
                    raise
                failure = error
        came, have = _size(partial) - have, _size(partial)
        if failure is not None or have < size:
            attempts = 1 if came > 0 else attempts + 1
            if attempts >= MAX_ATTEMPTS:
                raise failure or DownloadFailed(f"{what}: the hub sends {have} bytes instead of {size}; try again")
            log.warning("%s: %s; going on at byte %d", what, _words(failure) if failure else "cut short", have)
            time.sleep(RETRY_SECONDS * attempts)
        elif have == size and (not _SHA256.fullmatch(blob.name) or _sha256(partial) == blob.name):
            partial.replace(blob)
            return
        else:
            partial.unlink()
            why = f"{have} bytes came instead of {size}" if have != size else "its SHA-256 is not what the hub states"
            if trusted:
                raise DownloadFailed(f"{what}: {why}; the download was thrown away, try again")
            log.warning("%s: %s; starting again", what, why)
            trusted = True


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _append(url: str, partial: Path, have: int, headers: dict[str, str], report: Callable[[int], None]) -> None:
    """Bytes from ``have`` on, to the end of ``partial``; from the beginning when the server knows no ranges."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    headers = {**headers, "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    # A redirect to another host loses the token on the way: the client sees to that.
    with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=30.0) as response:
        if response.status_code == 416:
            partial.unlink(missing_ok=True)
            return
        hf_raise_for_status(response)
        if response.status_code != 206:
            have = 0
        with partial.open("r+b" if have else "wb") as file:
            file.seek(have)
            reported = have
            for (
                chunk
            ) in response.iter_bytes():  # as they come: a chunk size would hold back what a broken connection sent
                file.write(chunk)
                have += len(chunk)
                if have - reported >= _REPORT_BYTES:
                    report(have)
                    reported = have


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def explained(wanted: HubId, endpoint: str, name: str | None = None) -> Iterator[None]:
    """Whatever goes wrong inside becomes one of our errors, with the place and the way out."""
    import httpx2
    from huggingface_hub import errors

    what = wanted.repo if name is None else f"{wanted.repo}: {name}"
    page = f"{endpoint}/{wanted.repo}"
    try:
        yield
    except HelexaError:
        raise
    except errors.OfflineModeIsEnabled:
        raise DownloadFailed(f"{what}: offline mode is on (HF_HUB_OFFLINE); unset it to download") from None
    except errors.GatedRepoError:
        raise DownloadFailed(
            f"{what}: the repository is gated; accept its terms at {page}, then log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelNotFound(str(wanted), f"{page} has no branch, tag or commit {wanted.revision or 'main'!r}") from None
    except errors.RepositoryNotFoundError:
        raise _unknown(wanted, page) from None
    except errors.HFValidationError as error:
        raise ModelNotFound(str(wanted), f"not a hub id: {error}") from None
    except errors.HfHubHTTPError as error:
        raise _refused(wanted, what, page, error) from None
    except errors.LocalEntryNotFoundError as error:
        cause = error.__cause__ or error
        raise DownloadFailed(f"{what}: {endpoint} stopped answering ({_words(cause)}); try again") from None
    except (httpx2.HTTPError, httpx2.InvalidURL, ConnectionError) as error:
        raise DownloadFailed(
            f"{what}: {endpoint} cannot be reached ({_words(error)}); check the network, or HF_ENDPOINT if it is set"
        ) from None
    except OSError as error:
        place = error.filename or env.hub_cache()
        raise DownloadFailed(
            f"{what}: {place}: {error.strerror or error}; make room or set HF_HUB_CACHE to a place that can be written, and try "
            "again: what has come is kept"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DownloadFailed(f"{what}: {endpoint} answers, but not as a hub does: {_words(error)}") from None


def _unknown(wanted: HubId, page: str) -> ModelNotFound:
    return ModelNotFound(
        str(wanted),
        f"no file or folder of this name here, and no public repository at {page}; check the spelling, or if it is private log "
        "in with `hf auth login` or set HF_TOKEN",
    )


def _refused(wanted: HubId, what: str, page: str, error: Any) -> HelexaError:
    status = error.response.status_code
    if status == 404:
        return _unknown(wanted, page)
    fixes = {
        401: "the token is not valid: log in with `hf auth login` or set HF_TOKEN",
        403: "the token may not read it: check its permissions",
        429: "too many requests: try again in a few minutes, or log in with `hf auth login`",
    }
    fix = fixes.get(
        status, "try again later" if status >= 500 else "this is not expected of a hub; is HF_ENDPOINT right?"
    )
    return DownloadFailed(f"{what}: the hub answers {status}; {fix}", status=status)


def _words(error: BaseException) -> str:
    lines = (str(error) or type(error).__name__).strip().splitlines()
    return lines[0] if lines else type(error).__name__
