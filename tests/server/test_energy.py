"""Joules: what the kernel counts, through its wraps, and nothing where nothing can be read."""

from __future__ import annotations

from pathlib import Path

from helexa_engine.testing.fake_engine import FakeEngine
from helexa_server.energy import EnergyMeter

from .live import Serve


def zone(folder: Path, path: str, name: str, microjoules: str, most: int = 1_000_000) -> Path:
    place = folder / path
    place.mkdir()
    (place / "name").write_text(f"{name}\n")
    (place / "max_energy_range_uj").write_text(f"{most}\n")
    (place / "energy_uj").write_text(f"{microjoules}\n")
    return place / "energy_uj"


def test_packages_are_counted_through_wraps_and_their_parts_are_not(tmp_path: Path) -> None:
    counter = zone(tmp_path, "intel-rapl:0", "package-0", "900000")
    zone(tmp_path, "intel-rapl:1", "package-1", "5")
    zone(tmp_path, "intel-rapl:0:0", "core", "900000")
    zone(tmp_path, "intel-rapl:2", "package-2", "no number")
    meter = EnergyMeter(tmp_path)
    assert meter.joules() == {"package-0": 0.9, "package-1": 5e-6}
    for microjoules, joules in ((950_000, 0.95), (100_000, 1.1), (100_000, 1.1), (0, 2.0)):
        counter.write_text(str(microjoules))
        assert meter.joules()["package-0"] == joules
    counter.unlink()
    assert list(meter.joules()) == ["package-1"]


def test_what_cannot_be_read_is_no_zero(serve: Serve, tmp_path: Path) -> None:
    """contracts.md 4: joules; hazard 54: absent and zero are different."""
    live = serve(FakeEngine([]))
    live.app.state.energy = EnergyMeter(tmp_path / "nothing")
    with live.http() as http:
        assert "joules" not in http.get("/metrics").text
        zone(tmp_path, "intel-rapl:0", "package-0", "0")
        live.app.state.energy = EnergyMeter(tmp_path)
        page = http.get("/metrics").text
    assert '# TYPE helexa_joules_total counter\nhelexa_joules_total{zone="package-0"} 0.0\n' in page
