"""The native core's threads: their number, life across fork, and the probes that run on them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from helexa_engine.ops.registry import native_core

_native = native_core()
pytestmark = pytest.mark.skipif(_native is None, reason="the native core is not built")


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    yield
    _native.set_num_threads(0)
    _native.pin_threads(False)


def _dequantized() -> np.ndarray:
    """A computation long enough to be shared among threads."""
    source = np.arange(1 << 20, dtype=np.float16)
    out = np.full(source.size, np.nan, dtype=np.float32)
    _native.dequantize(1, source.ctypes.data, source.size, out.ctypes.data)
    return out


def test_the_default_is_at_most_the_cores_we_may_use() -> None:
    assert 1 <= _native.num_threads() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_every_number_of_threads_covers_the_work(threads: int) -> None:
    _native.set_num_threads(threads)
    assert _native.num_threads() == threads
    with np.errstate(over="ignore"):
        expected = np.arange(1 << 20, dtype=np.float16).astype(np.float32)
    np.testing.assert_array_equal(_dequantized(), expected)


def _machine(root: Path, siblings: dict[int, str], files: dict[str, str], *, name: str = "core_cpus_list") -> str:
    """A tree like /sys and /proc with the processors' siblings and other files; returns its root."""
    files = files | {f"sys/devices/system/cpu/cpu{cpu}/topology/{name}": text for cpu, text in siblings.items()}
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text + "\n")
    return str(root)


_HYPERTHREADS = {0: "0,4", 1: "1,5", 2: "2,6", 3: "3,7", 4: "0,4", 5: "1,5", 6: "2,6", 7: "3,7"}


def test_hardware_threads_of_a_core_count_once(tmp_path: Path) -> None:
    root = _machine(tmp_path, _HYPERTHREADS, {})
    assert _native.threads_for(root, list(range(8))) == 4


def test_older_kernels_name_the_siblings_otherwise(tmp_path: Path) -> None:
    root = _machine(tmp_path, _HYPERTHREADS, {}, name="thread_siblings_list")
    assert _native.threads_for(root, list(range(8))) == 4


def test_the_affinity_mask_bounds_the_cores(tmp_path: Path) -> None:
    root = _machine(tmp_path, _HYPERTHREADS, {})
    assert _native.threads_for(root, [1, 5]) == 1  # both of one core
    assert _native.threads_for(root, [1, 2, 5]) == 2


def test_processors_without_siblings_in_sight_are_cores(tmp_path: Path) -> None:
    assert _native.threads_for(str(tmp_path), [0, 1, 2]) == 3


def test_an_unreadable_machine_has_room_for_one_thread_at_least(tmp_path: Path) -> None:
    assert _native.threads_for(str(tmp_path), []) >= 1


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"sys/fs/cgroup/cpu.max": "max 100000"}, 4),
        ({"sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
        ({"sys/fs/cgroup/cpu.max": "260000 100000"}, 3),
        ({"sys/fs/cgroup/cpu.max": "10000 100000"}, 1),
        ({"sys/fs/cgroup/cpu.max": "900000 100000"}, 4),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "200000 100000"}, 2),
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/cpu.max": "300000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "100000 100000",
            },
            1,
        ),
        ({"proc/self/cgroup": "0::/../outside"}, 4),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 4),
        (
            {
                "proc/self/cgroup": "9:memory:/m\n4:cpu,cpuacct:/c",
                "sys/fs/cgroup/cpu/c/cpu.cfs_quota_us": "150000",
                "sys/fs/cgroup/cpu/c/cpu.cfs_period_us": "50000",
            },
            3,
        ),
    ],
    ids=["none", "two", "rounded", "a tenth", "more than cores", "above", "least", "outside", "v1 none", "v1 three"],
)
def test_the_quota_of_the_control_groups_bounds_the_threads(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    root = _machine(tmp_path, _HYPERTHREADS, files)
    assert _native.threads_for(root, list(range(8))) == expected


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs affinity masks")
def test_pinned_workers_stay_on_one_processor_each() -> None:
    def masks() -> list[int]:
        return [len(os.sched_getaffinity(int(task))) for task in os.listdir("/proc/self/task")]

    allowed = len(os.sched_getaffinity(0))
    if allowed < 2:
        pytest.skip("one processor")
    _native.set_num_threads(3)
    _native.pin_threads(True)
    _dequantized()
    assert masks().count(1) == 2
    assert len(os.sched_getaffinity(0)) == allowed  # the caller's is left alone
    _native.pin_threads(False)
    _dequantized()
    assert masks().count(1) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_gets_threads_of_its_own() -> None:
    _native.set_num_threads(2)
    expected = _dequantized()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a hang ends as a failure
        os._exit(0 if np.array_equal(_dequantized(), expected, equal_nan=True) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_probes_give_positive_rates() -> None:
    assert _native.read_bandwidth(8 << 20, 1, 1) > 1e8
    assert _native.int8_rate() > 1e8 and _native.float_rate() > 1e8
    with pytest.raises(ValueError, match="read_bandwidth: nbytes: expected at least 1 MiB, got 1"):
        _native.read_bandwidth(1)
