"""Energy counters, read from files and programs that look like the real ones: this machine has none."""

import sys
import time
import types

import pytest

from minimoe.bench import energy


@pytest.fixture
def powercap(tmp_path, monkeypatch):
    """RAPL's folder with two packages and a part of one."""
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    monkeypatch.setattr(energy, "LEAST_S", 0.0)
    for zone, name in (("intel-rapl:0", "package-0"), ("intel-rapl:1", "package-1"), ("intel-rapl:0:0", "core")):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(name + "\n")
        (tmp_path / zone / "energy_uj").write_text("1000000\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("5000000\n")
    return tmp_path


def test_packages_are_added_and_their_parts_are_not(powercap):
    assert energy.available("cpu") is None
    with energy.metered("cpu") as reading:
        for zone, now in (("intel-rapl:0", 3_000_000), ("intel-rapl:1", 1_500_000), ("intel-rapl:0:0", 2_000_000)):
            (powercap / zone / "energy_uj").write_text(f"{now}\n")
    assert (reading.source, reading.joules, reading.missing) == ("rapl", 2.5, None)


def test_a_counter_that_starts_again(powercap):
    (powercap / "intel-rapl:0" / "energy_uj").write_text("4500000")
    with energy.metered("cpu") as reading:
        (powercap / "intel-rapl:0" / "energy_uj").write_text("500000")
    assert reading.joules == pytest.approx(1.0)


def test_a_window_that_is_too_short(powercap, monkeypatch):
    monkeypatch.setattr(energy, "LEAST_S", 1.0)
    with energy.metered("cpu") as reading:
        pass
    assert reading.joules is None and "too short" in reading.missing


def test_no_counter_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    assert "virtual machines have none" in energy.available("cpu")
    with energy.metered("cpu") as reading:
        pass
    assert reading.joules is None and reading.missing == energy.available("cpu")


def test_a_counter_for_root_only(powercap, monkeypatch):
    real = energy.Path.read_text

    def denied(path, *arguments, **options):
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(energy.Path, "read_text", denied)  # root may read everything, so chmod proves nothing
    assert "readable by root only" in energy.available("cpu")


def test_an_error_inside_is_not_swallowed(powercap):
    with pytest.raises(ZeroDivisionError), energy.metered("cpu"):
        1 / 0  # noqa: B018


@pytest.fixture
def smi(tmp_path, monkeypatch):
    if sys.platform == "win32":
        pytest.skip("needs a shell script on PATH")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(energy, "SAMPLE_S", 0.01)
    monkeypatch.setattr(energy, "LEAST_S", 0.0)

    def write(answer, code=0):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\necho \"$@\" >> {tmp_path}/asked\necho '{answer}'\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    write.asked = tmp_path / "asked"
    return write


def test_power_of_the_right_card_times_seconds(smi):
    smi("120.5")
    with energy.metered("cuda", "GPU-1234") as reading:
        time.sleep(0.3)
    assert reading.source == "nvidia-smi"
    assert reading.joules == pytest.approx(120.5 * reading.seconds, rel=0.05)
    assert all("-i GPU-1234" in line for line in smi.asked.read_text().splitlines())


@pytest.mark.parametrize(("answer", "code"), [("[N/A]", 0), ("Failed to initialize NVML", 18)])
def test_a_card_without_a_meter(smi, answer, code):
    smi(answer, code)
    assert energy.available("cuda", "GPU-1") == "nvidia-smi does not tell this card's power"


def test_too_few_samples(smi, monkeypatch):
    smi("50")
    monkeypatch.setattr(energy, "SAMPLE_S", 10.0)
    with energy.metered("cuda", "GPU-1") as reading:
        pass
    assert "too few for a mean" in reading.missing


def test_no_driver_and_no_card(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "nor nvidia-smi" in energy.available("cuda", "GPU-1")
    assert "could not be found out" in energy.available("cuda", None)


def test_the_cards_own_counter_where_the_package_is_there(monkeypatch):
    """NVML counts millijoules. No card is here: the package is stood in for, its names are NVIDIA's."""
    counter = iter([5_000, 5_000, 12_500])
    nvml = types.ModuleType("pynvml")
    nvml.NVMLError = type("NVMLError", (Exception,), {})
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda card: next(counter)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(energy, "LEAST_S", 0.0)
    with energy.metered("cuda", "GPU-1") as reading:
        pass
    assert (reading.source, reading.joules) == ("nvml", 7.5)

    def refuses(uuid):
        raise nvml.NVMLError("Not Supported")

    nvml.nvmlDeviceGetHandleByUUID = refuses
    assert energy.available("cuda", "GPU-1") == "NVML: Not Supported"
