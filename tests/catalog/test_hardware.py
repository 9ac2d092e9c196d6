"""GPUs and memories: that every figure follows from its parts and has a source, and how they are named."""

import json
import subprocess
import sys

import pytest

from minimoe import catalog
from minimoe.catalog import CatalogError, UnknownDevice

GIB = 1 << 30
# Bandwidths that manufacturers print, for those whose peak is worked out here from bus width and data rate.
PRINTED = {"rtx-3060": 360, "rtx-3090": 936, "rtx-4090": 1008, "rtx-5090": 1792, "rtx-4080": 717, "rtx-2080-ti": 616,
           "arc-b580": 456, "t4": 320, "a100-40gb": 1555, "a100-80gb": 2039, "strix-halo": 256, "rx-7900-xtx": 960}  # fmt: skip


@pytest.fixture
def own(tmp_path, monkeypatch):
    def write(**sections):
        path = tmp_path / "own.json"
        path.write_text(json.dumps(sections), encoding="utf-8")
        monkeypatch.setenv("MINIMOE_CATALOG", str(path))
        return path

    return write


@pytest.mark.parametrize("name", catalog.devices())
def test_every_device_has_its_figures_and_a_source(name):
    device = catalog.device(name)
    assert device.name == name and device.origin == "published peak"
    assert 8 * GIB <= device.memory_bytes <= 512 * GIB and 1e11 < device.bytes_per_second < 1e13
    assert len(device.source) > 20 and (":" in device.source or "," in device.source)
    assert (device.bus_bits is None) == (device.gigabits_per_pin is None)
    if device.bus_bits:
        assert device.bytes_per_second == device.bus_bits / 8 * device.gigabits_per_pin * 1e9


@pytest.mark.parametrize("name", PRINTED)
def test_peaks_are_those_on_the_box(name):
    assert catalog.device(name).bytes_per_second / 1e9 == pytest.approx(PRINTED[name], rel=1e-3)


def test_the_reference_card_is_first_and_the_usual_ones_are_there():
    names = catalog.devices()
    assert names[0] == "rtx-3060" and len(names) == len(set(names)) >= 40
    assert {"rtx-4070", "rtx-5070", "t4", "l4", "a100-80gb", "h100-sxm", "h200-sxm", "dgx-spark", "strix-halo", "m4-max"} <= set(names)
    assert {name for name in names if catalog.device(name).unified} == {
        "dgx-spark", "strix-halo", "m4", "m4-pro", "m4-max", "m3-ultra", "m2-ultra"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("RTX 3060", "rtx-3060"), ("NVIDIA GeForce RTX 3060", "rtx-3060"), ("rtx3060ti", "rtx-3060-ti"), ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "rtx-4070-ti-super"), ("DGX Spark", "dgx-spark"),
        ("AMD Radeon RX 7900 XTX", "rx-7900-xtx"),
    ],
)  # fmt: skip
def test_names_as_drivers_and_people_write_them(name, found):
    assert catalog.device(name).name == found


def test_host_memory_is_arithmetic():
    memory = catalog.host_memory("DDR4-3200")
    assert memory.bytes_per_second == 2 * 8 * 3200e6 == 51.2e9
    assert memory.source == "2 channels x 8 bytes x 3,200 million transfers/s"
    assert catalog.host_memory("ddr5-6000").bytes_per_second == 96e9
    assert all(catalog.host_memory(name).channels == 2 for name in catalog.host_memories())


def test_unknown_names_have_the_nearest():
    with pytest.raises(UnknownDevice, match="unknown GPU 'rtx-3061'; the nearest are rtx-3060, ") as error:
        catalog.device("rtx-3061")
    assert "\n" not in str(error.value)
    with pytest.raises(UnknownDevice, match="unknown memory 'ddr4-3201'; the nearest are ddr4-3200"):
        catalog.host_memory("ddr4-3201")
    with pytest.raises(UnknownDevice, match="unknown GPU '%%'; the catalogue has rtx-3060, "):
        catalog.device("%%")


def test_a_reader_s_own_card(own):
    own(devices={"my-card": {"memory_gib": 10.5, "bus_bits": 128, "gigabits_per_pin": 16, "source": "box"},
                 "rtx-3060": {"memory_gib": 12, "gb_per_second": 333, "source": "measured"}},
        host_memories={"server": {"channels": 8, "megatransfers_per_second": 4800}}, sources={"box": "what is on its box"})  # fmt: skip
    mine = catalog.device("My Card")
    assert (mine.memory_bytes, mine.bytes_per_second, mine.source) == (int(10.5 * GIB), 256e9, "what is on its box")
    assert catalog.device("rtx-3060").bytes_per_second == 333e9  # the reader's own entry wins
    assert catalog.host_memory("server").bytes_per_second == 8 * 8 * 4800e6
    assert catalog.devices()[-1] == "my-card" and catalog.device("rtx-4090").memory_bytes == 24 * GIB


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"memory_gib": 12, "source": "x"}, "give bus_bits and gigabits_per_pin, or gb_per_second"),
        ({"memory_gib": 12, "source": "x", "bus_bits": 192}, "give bus_bits and gigabits_per_pin, or gb_per_second"),
        ({"memory_gib": 12, "source": "x", "bus_bits": 192, "gigabits_per_pin": 15, "gb_per_second": 1}, "or gb_per_second"),
        ({"memory_gib": 12, "gb_per_second": 360}, "source is missing"),
        ({"memory_gib": "12", "gb_per_second": 360, "source": "x"}, 'memory_gib must be a number, not "12"'),
        ({"memory_gib": 0, "gb_per_second": 360, "source": "x"}, "memory_gib must be a number above 0, not 0"),
        ({"memory_gib": 12, "gb_per_second": True, "source": "x"}, "gb_per_second must be a number, not true"),
        ({"memory_gib": 12, "gb_per_secnd": 360, "source": "x"}, "unknown key 'gb_per_secnd'; did you mean gb_per_second?"),
        ([], "must be an object, this is a list"),
    ],
)
def test_mistakes_in_a_reader_s_card(own, entry, message):
    path = own(devices={"mine": entry})
    with pytest.raises(CatalogError) as error:
        catalog.device("mine")
    assert str(error.value).startswith(f"{path}: devices.mine: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_sources_are_texts(own):
    own(devices={}, sources={"box": 3})
    with pytest.raises(CatalogError, match="sources.box: must be a text"):
        catalog.devices()


def test_the_catalogue_answers_without_torch():
    code = (
        "import sys; from minimoe import catalog; catalog.device('t4'); catalog.host_memory('ddr4-3200'); catalog.files(); "
        "print({'torch', 'numpy'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
