"""Models by their hub id, ``org/name[@revision][:quant-or-file-glob]``: which files those are, on disk or on the hub.

What is complete in the cache is used without asking the network; only :func:`plan` asks. The cache is huggingface-hub's own, so
that other programs share it; :mod:`.hub_cache` reads it and :mod:`.hub_download` fills it.
"""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import DownloadFailed, ModelNotFound

log = logging.getLogger(__name__)

#: Which file of a GGUF repository is taken when no quant is named: llama.cpp's habit first, then what comes close to it.
DEFAULT_ORDER = (
    "Q4_K_M", "Q8_0", "Q5_K_M", "Q6_K", "Q4_K_S", "UD-Q4_K_XL", "IQ4_XS", "Q4_0", "Q5_K_S", "Q3_K_M", "BF16", "F16", "F32",
)  # fmt: skip

#: Files of a safetensors repository that helexa reads, beside the weights.
FOLDER_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")

_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[^\s:@]+))?(?::(?P<tag>\S+))?", re.ASCII
)
_TAG = re.compile(
    r"(?<![A-Za-z0-9])((?:UD-)?(?:I?Q[1-8](?:_[A-Z0-9]+)+|TQ[12]_0|MXFP4(?:_MOE)?|NVFP4|BF16|FP?16|FP?32))(?![A-Za-z0-9])",
    re.IGNORECASE,
)
_SPLIT = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_WEIGHTS = re.compile(r"model[^/]*\.safetensors")
_MAX_PARTS = 10_000


@dataclass(frozen=True, slots=True)
class HubId:
    """``org/name``, optionally a revision (branch, tag or commit; default ``main``) and a quant tag, file name or glob."""

    repo: str
    revision: str | None = None
    tag: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """None when ``text`` is no hub id. A name that ends in ``.gguf`` is a path."""
        match = _ID.fullmatch(text)
        if match is None or match["repo"].lower().endswith(".gguf") or ".." in (match["revision"] or ""):
            return None
        return cls(match["repo"], match["revision"], match["tag"])

    @property
    def whole(self) -> str:
        """The id without its tag."""
        return self.repo + (f"@{self.revision}" if self.revision else "")

    def __str__(self) -> str:
        return self.whole + (f":{self.tag}" if self.tag else "")


@dataclass(frozen=True, slots=True)
class Variant:
    """One loadable model of a repository: a GGUF file with its parts, or the safetensors folder.

    Attributes:
        tag: quant tag in its usual spelling; None for the folder, and for a GGUF file that has none in its name.
        files: paths inside the repository, the one to open first.
        missing: parts that must be there by their names and are not.
    """

    tag: str | None
    files: tuple[str, ...]
    missing: tuple[str, ...] = ()

    @property
    def is_folder(self) -> bool:
        return not self.files[0].lower().endswith(".gguf")

    @property
    def label(self) -> str:
        """What a user writes after the colon."""
        return self.tag or self.files[0]


def file_tag(name: str) -> str | None:
    """The quant tag in a GGUF file's name, in capitals, or else of the folder it lies in: ``x-q4_k_m.gguf`` is ``Q4_K_M``."""
    path = PurePosixPath(name)
    for text in (path.name.removesuffix(path.suffix), path.parent.name):
        found = _TAG.findall(text)
        if found:
            return str(found[-1]).upper()
    return None


def variants(names: Iterable[str]) -> list[Variant]:
    """The models among a repository's files: the folder first, then GGUF files by name. Projectors and imatrix files are none."""
    names = sorted(names)
    folder: list[Variant] = []
    weights = [name for name in names if _WEIGHTS.fullmatch(name)]
    if "config.json" in names and (weights or INDEX in names):
        if INDEX in names:  # model.safetensors beside shards would be a second copy
            weights = [name for name in weights if name != "model.safetensors"]
        rest = [name for name in (*FOLDER_FILES[1:], INDEX) if name in names]
        folder.append(Variant(None, ("config.json", *rest, *weights)))
    ggufs: list[Variant] = []
    parts: dict[tuple[str, int], set[str]] = {}
    for name in names:
        base = PurePosixPath(name).name.lower()
        if not base.endswith(".gguf") or "mmproj" in base or "imatrix" in base or base.startswith("ggml-vocab"):
            continue
        split = _SPLIT.fullmatch(name)
        if split and 1 <= int(split["count"]) <= _MAX_PARTS:
            parts.setdefault((split["stem"], int(split["count"])), set()).add(name)
        else:
            ggufs.append(Variant(file_tag(name), (name,)))
    for (stem, count), present in parts.items():
        expected = [f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
        missing = tuple(name for name in expected if name not in present)
        ggufs.append(Variant(file_tag(f"{stem}.gguf"), tuple(expected), missing))
    return folder + sorted(ggufs, key=lambda variant: variant.files[0])


def choose(found: Sequence[Variant], wanted: HubId, place: str, sizes: Mapping[str, int] | None = None) -> Variant:
    """The variant that ``wanted`` names.

    Args:
        found: what there is.
        place: where that is, for messages.
        sizes: bytes of files, for messages.

    Raises:
        ModelNotFound: no such variant, or several; the message lists what there is.
    """

    def listing(some: Collection[Variant]) -> str:
        return ", ".join(_with_size(v, sizes or {}) for v in some)

    if not found:
        raise ModelNotFound(str(wanted), f"{place} holds neither GGUF files nor config.json with safetensors")
    ggufs = [v for v in found if not v.is_folder]
    tag = wanted.tag
    if tag is None:
        return _default(found, wanted, place, listing)
    if not ggufs:
        raise ModelNotFound(
            str(wanted),
            f"{place} is a safetensors folder without GGUF files; take {wanted.whole!r}, and quantise it while loading with "
            f"--quant {tag.upper()}",
        )
    by_name = [v for v in ggufs if tag in (v.files[0], PurePosixPath(v.files[0]).name)]
    by_tag = [v for v in ggufs if v.tag == tag.upper()] or [v for v in ggufs if v.tag == f"UD-{tag.upper()}"]
    by_glob = [
        v for v in ggufs if any(fnmatch.fnmatchcase(f, tag) or fnmatch.fnmatchcase(f, f"*/{tag}") for f in v.files)
    ]
    matches = by_name or by_tag or by_glob
    if not matches:
        raise ModelNotFound(str(wanted), f"{place} has no {tag!r}; there is {listing(ggufs)}")
    if len(matches) > 1:
        names = ", ".join(v.files[0] for v in matches)
        raise ModelNotFound(str(wanted), f"{tag!r} names {len(matches)} models of {place}; name one file: {names}")
    return matches[0]


def _default(
    found: Sequence[Variant], wanted: HubId, place: str, listing: Callable[[Collection[Variant]], str]
) -> Variant:
    if found[0].is_folder or len(found) == 1:
        return found[0]
    for tag in DEFAULT_ORDER:
        of_tag = [v for v in found if v.tag == tag]
        if len(of_tag) == 1:
            log.info("%s: no quant named; taking %s of %s", wanted, tag, ", ".join(v.label for v in found))
            return of_tag[0]
        if of_tag:
            break
    raise ModelNotFound(
        str(wanted), f"name one of the models of {place}, as {wanted.whole}:{found[0].label}; there is {listing(found)}"
    )


def _with_size(variant: Variant, sizes: Mapping[str, int]) -> str:
    total = sum(sizes.get(name, 0) for name in variant.files)
    return f"{variant.label} ({format_bytes(total)})" if total else variant.label


def format_bytes(count: int) -> str:
    """``4.7 GB``: powers of ten, as disks and downloads are measured."""
    for scale, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


@dataclass(frozen=True, slots=True)
class Transfer:
    """How far a download is: of the file under way, and of all files together, in bytes."""

    file: str
    done_bytes: int
    total_bytes: int
    all_done_bytes: int
    all_total_bytes: int


#: Called when a file begins, as its bytes come in, and when it is complete.
OnTransfer = Callable[[Transfer], None]


def locate(wanted: HubId, *, offline: bool = False, on_transfer: OnTransfer | None = None) -> Path:
    """The file or folder to open for ``wanted``: from the cache when it is complete there, else downloaded.

    Raises:
        ModelNotFound: there is no such repository, revision or quant; or it is not (wholly) on disk and ``offline`` is set.
        DownloadFailed: the hub cannot be reached, refuses, or the disk is full.
    """
    from . import hub_cache

    found = hub_cache.find(wanted)
    if isinstance(found, Path):
        return found
    if offline:
        raise ModelNotFound(
            str(wanted), f"{found}; offline mode is on, so nothing is fetched: run `helexa pull {wanted}` while online"
        )
    from . import hub_download

    try:
        return hub_download.download(hub_download.plan(wanted), on_transfer)
    except DownloadFailed as error:
        raise DownloadFailed(f"{error.message} ({found})", **error.facts) from error
