"""``helexa pull org/name[@revision][:quant]``: brings a model into the hub's cache; a second call goes on where the first stopped."""

from __future__ import annotations

import argparse
import sys

from .. import env
from ..errors import DownloadFailed
from ..weights.hub import HubId, format_bytes
from .downloads import bars
from .options import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        metavar="ID",
        nargs="+",
        help="org/name, org/name:Q4_K_M (a quant of a GGUF repository), org/name:FILE or org/name:'*glob*.gguf', "
        "org/name@REVISION",
    )


def run(arguments: argparse.Namespace) -> int:
    wanted = [hub_id(text) for text in arguments.models]
    if env.offline():
        raise DownloadFailed("offline mode is on (HELEXA_OFFLINE or HF_HUB_OFFLINE); unset it to download")
    for one in wanted:
        pull(one)
    return 0


def hub_id(text: str) -> HubId:
    """Raises :class:`UsageError`."""
    wanted = HubId.parse(text)
    if wanted is None:
        raise UsageError(f"expected a hub id such as org/name or org/name:Q4_K_M, got {text!r}")
    return wanted


def pull(wanted: HubId) -> None:
    from ..weights import hub_download

    plan = hub_download.plan(wanted)
    total = format_bytes(sum(plan.sizes.values()))
    label = "" if plan.variant.is_folder else f":{plan.variant.label}"
    if wanted.tag is None and not plan.variant.is_folder:
        print(f"{wanted}: no quant named, taking {plan.variant.label}", file=sys.stderr)
    try:
        with bars() as on_transfer:
            path = hub_download.download(plan, on_transfer)
    except KeyboardInterrupt:
        print(f"stopped; `helexa pull {wanted}` goes on from here", file=sys.stderr)
        raise
    verb = "was complete already" if plan.needed_bytes == 0 else "is complete"
    print(f"{wanted.whole}{label} {verb}: {total} in {path}")
