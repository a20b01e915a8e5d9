"""Datapoints: what is refused and why, what a measurement becomes, and what it must not tell."""

from __future__ import annotations

import copy
import datetime
import getpass
import json
import math
import platform
import re
import socket
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from flashmoe.errors import FlashMoEError
from harness import check as whole_check
from harness.__main__ import main
from harness.datapoints import check, files, machine, measure
from harness.report import provenance, report
from harness.runs import ssd
from harness.tables import full_scale, speedups

PLAIN_ROW = {
    "system": "flashmoe", "cap_share": 0.4, "outcome": "ok", "rounds": 2,
    "tokens_per_second": 7.0, "tokens_per_second_min": 6.5, "tokens_per_second_max": 7.5,
    "first_token_seconds": 2.0, "hit_rate": 0.37, "roofline_tokens_per_second": 10.0,
    "share_of_roofline": 0.7, "disturbed": False,
}  # fmt: skip
UNCOUNTED = dict.fromkeys(("hit_rate", "roofline_tokens_per_second", "share_of_roofline"))
KILLED = dict.fromkeys(PLAIN_ROW) | {
    "system": "os-paging", "cap_share": 0.4, "outcome": "out of memory",
}  # fmt: skip
PLAIN = {
    "schema": 1, "date": "2026-11-29", "flashmoe": "0.1.0", "torch": "2.13.0+cpu",
    "commit": "0123456789abcdef0123456789abcdef01234567", "uncommitted_changes": False,
    "machine": {
        "cpu": "AMD EPYC", "cores": 2, "memory_bytes": 24 << 30, "instruction_sets": ["avx2"],
        "virtual": True, "accelerator": None,
    },
    "drive": {
        "class": "nvme", "class_by": "kernel", "block_bytes": 3 << 20,
        "random_read_bytes_per_second": 2.2e9, "sequential_read_bytes_per_second": 2.5e9,
    },
    "speed": {"memory_read_bytes_per_second": 2e10, "product_flop_per_second": 1.5e11},
    "disturbance": {
        "others_share": 0.02, "stolen_share": 0.01, "waiting_share": None,
        "involuntary_switches_per_second": 12.5, "product_slowdown": 1.1,
    },
    "model": "olmoe-quarter",
    "rows": [
        PLAIN_ROW,
        PLAIN_ROW | UNCOUNTED | {"system": "in-memory", "cap_share": None},
        KILLED,
    ],
}  # fmt: skip


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    """Where nothing is committed yet."""
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    return report.RESULTS


def changed(**places: object) -> dict[str, object]:
    """A datapoint but for these values, `a__0__b` being the place a, 0, b."""
    datapoint = copy.deepcopy(PLAIN)
    for place, value in places.items():
        *way, last = [int(word) if word.isdigit() else word for word in place.split("__")]
        inner = datapoint
        for word in way:
            inner = inner[word]
        inner[last] = value
    return datapoint


def test_the_schema_is_one_and_allows_no_other_names():
    schema = json.loads(files.SCHEMA_PATH.read_text())
    Draft202012Validator.check_schema(schema)
    for part in _objects(schema):
        assert part["additionalProperties"] is False
        assert set(part["required"]) == set(part["properties"])
    systems = schema["$defs"]["row"]["properties"]["system"]["enum"]
    assert set(systems) == {*full_scale.QUICK.systems, speedups.REFERENCE}


def _objects(schema):
    """The parts of a schema that are of type object."""
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield schema
        for value in schema.values():
            yield from _objects(value)


def test_a_plain_one_is_accepted_under_its_own_name_only(tmp_path):
    path = files.write(PLAIN, tmp_path)
    assert path.name.startswith("2026-11-29-amd-epyc-")
    check.check([path])
    other = path.rename(tmp_path / "mine.json")
    with pytest.raises(FlashMoEError, match=rf"must be called {path.name}"):
        check.check([other])


TOMORROW = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=2)).date().isoformat()
IMPOSSIBLE = {
    "too fast": (
        {"rows__0__tokens_per_second": 13.0, "rows__0__tokens_per_second_max": 14.0},
        "more than 1.25 times the roofline",
    ),
    "too fast for arithmetic": (
        {"rows__1__tokens_per_second": 13.0, "rows__1__tokens_per_second_max": 14.0},
        "13 token/s are more than any roofline here allows, 10",
    ),
    "no roofline": (
        {"rows__0__roofline_tokens_per_second": None, "rows__0__share_of_roofline": None},
        "a row of flashmoe has a roofline",
    ),
    "another share": ({"rows__0__share_of_roofline": 0.1}, "7 token/s are not 10% of 10"),
    "share": ({"rows__0__share_of_roofline": 1.3}, "roofline"),
    "half a roofline": ({"rows__0__share_of_roofline": None}, "both or neither"),
    "min": ({"rows__0__tokens_per_second_min": 7.2}, "is not between 7.2 and 7.5"),
    "max": ({"rows__0__tokens_per_second_max": 6.9}, "is not between"),
    "negative": ({"rows__0__tokens_per_second": -1}, "rows.0..tokens_per_second"),
    "no cores": ({"machine__cores": 0}, "machine.cores: 0 is less"),
    "hit rate": ({"rows__0__hit_rate": 1.01}, "hit_rate: 1.01 is greater"),
    "future": ({"date": TOMORROW}, "in the future"),
    "no day": ({"date": "2026-02-30"}, "is not a 'date'"),
    "nvme": ({"drive__random_read_bytes_per_second": 4e10}, "GB/s of random reads"),
    "sata": ({"drive__class": "sata"}, "class sata can give, 0.6 GB/s"),
    "unknown by whom": ({"drive__class": "unknown"}, "class_by must be null"),
    "uncommitted": ({"uncommitted_changes": True}, "never committed"),
    "other name": ({"machine__host": "x"}, "'host' was unexpected"),
    "path": ({"machine__cpu": "a\\b"}, "does not match"),
    "another path": ({"machine__cpu": "/home/me"}, "does not match"),
    "a host": ({"machine__accelerator": "me@laptop.lan"}, "is not valid|does not match"),
    "a line's end": ({"torch": "2.13.0\n"}, "does not match"),
    "version": ({"schema": 2}, "1 was expected"),
    "no figure": ({"rows__0__tokens_per_second": None}, "is not of type 'number'"),
    "killed, with a speed": ({"rows__2__tokens_per_second": 1.0}, "'null'"),
    "twice": ({"rows__1__system": "flashmoe", "rows__1__cap_share": 0.4}, "two rows at one cap"),
    "no list": ({"rows": 7}, "not of type 'array'"),
}  # fmt: skip


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_be_is_refused_in_one_sentence(tmp_path, case):
    places, why = IMPOSSIBLE[case]
    path = files.write(changed(**places), tmp_path)
    (said,) = check.refused([path])
    assert said.startswith(f"{path.name}: ")
    with pytest.raises(FlashMoEError, match=why):
        check.check([path])
    assert "\n" not in said


def deep(levels: int) -> list[object]:
    found: list[object] = []
    for _ in range(levels):
        found = [found]
    return found


BROKEN = {
    "no JSON": ("{", "it is no JSON"),
    "no object": ("7", "is not of type 'object'"),
    "no number": (json.dumps(changed(speed__product_flop_per_second=math.inf)), "is no number"),
    "endless": ('{"a": 1e999}', "too large a number"),
    "twice": ('{"a": 1, "a": 2}', "a name twice"),
    "deep": ("[" * 20_000, "it is no JSON"),
    "large": (json.dumps(changed(machine__memory_bytes=10**400)), "is too large a number"),
    "deep lists": (json.dumps(changed(machine__instruction_sets=[deep(400)] * 2)), "too deep"),
    "long": (" " * (65 << 10), "larger than 64 KiB"),
    "no text": (b"\xff\xfe", "it is no JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_json_is_refused_in_one_sentence(tmp_path, case):
    content, why = BROKEN[case]
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (said,) = check.refused([path])
    assert why in said
    assert "\n" not in said


@settings(max_examples=40)
@given(
    where=st.sampled_from(["machine", "drive", "speed", "disturbance", "rows"]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    ),
)
def test_no_part_of_another_shape_gets_through_or_breaks_the_check(where, value):
    assert next(check.faults(changed(**{where: value})), None)


def test_one_measurement_counts_once(tmp_path, results):
    first = files.write(PLAIN, files.folder())
    again = files.write(changed(date="2026-11-28"), tmp_path)
    assert list(check.refused([again])) == [f"{again.name}: it has the figures of {first.name}"]
    assert list(check.refused([first, again])) == [
        f"{again.name}: it has the figures of {first.name}"
    ]
    assert list(check.refused([first])) == []


def test_the_command_refuses_with_a_sentence_and_accepts_with_one(tmp_path, capsys, results):
    main(["datapoint", "--check"])
    assert "0 datapoints" in capsys.readouterr().out
    good, bad = files.write(PLAIN, tmp_path), tmp_path / "not-there.json"
    main(["datapoint", "--check", str(good)])
    assert "1 datapoints are well-formed" in capsys.readouterr().out
    with pytest.raises(FlashMoEError, match=r"1 of 2 .*\n  not-there.json: it cannot be read"):
        main(["datapoint", "--check", str(good), str(bad)])
    with pytest.raises(FlashMoEError, match="measures nothing"):
        main(["datapoint", "--check", "--minutes", "3"])
    with pytest.raises(FlashMoEError, match="is a file: name a folder"):
        main(["datapoint", "--out", str(good)])


def test_ci_refuses_what_lies_in_the_results(monkeypatch, results):
    for other in ("_hit_rates", "_full_scale", "_servers", "_engine"):
        monkeypatch.setattr(whole_check, other, lambda: [])
    path = files.write(PLAIN, files.folder())
    whole_check.check()
    path.rename(path.with_name("mine.json"))
    with pytest.raises(FlashMoEError, match=rf"\n  mine.json: .* must be called {path.name}"):
        whole_check.check()


def made_up_table() -> pd.DataFrame:
    """As `full_scale` writes it, with columns that a datapoint does not have."""
    of_runs = {
        "others_share": 0.01, "stolen_share": 0.0, "waiting_share": 0.2,
        "involuntary_switches_per_second": 30.0, "product_slowdown": 1.0, "model": "olmoe-quarter",
    }  # fmt: skip
    return pd.DataFrame(
        [
            PLAIN_ROW | of_runs | {"others_share": 0.4, "disturbed": True},
            PLAIN_ROW | UNCOUNTED | of_runs | {"system": "fiddler"},
            PLAIN_ROW | UNCOUNTED | of_runs | {"system": "in-memory", "cap_share": None},
            {"system": "os-paging", "cap_share": 0.4, "outcome": "out of memory"},
        ]
    )


def test_a_measurement_becomes_a_file_that_is_accepted(tmp_path, monkeypatch, results):
    """All is real but the runs of the systems: the drive, memory and product are measured."""
    ran = []

    def full(folder, command, comparison):
        ran.append(comparison)
        report.write(folder, "speedups-olmoe-quarter", made_up_table().to_dict("records"))

    monkeypatch.setattr(measure.full_scale, "full_scale", full)
    monkeypatch.setattr(measure, "_FIO_SECONDS", 0.1)
    small = partial(ssd.test_file, size_bytes=32 << 20)
    monkeypatch.setattr(measure.ssd, "test_file", small)
    as_gathered = provenance.gather("python -m harness datapoint", tmp_path)
    monkeypatch.setattr(measure.provenance, "gather", lambda *_: as_gathered)
    with pytest.raises(FlashMoEError, match="differs from its commit"):
        as_gathered["uncommitted_changes"] = True
        measure.measure("python -m harness datapoint", tmp_path)
    as_gathered["uncommitted_changes"] = False
    if measure.ssd.fio_path() is None:
        pytest.skip("fio is missing")
    try:
        measure.require_limits()
    except FlashMoEError as error:
        pytest.skip(str(error))
    path = measure.measure("python -m harness datapoint", tmp_path)
    assert list(check.refused([path])) == []
    assert [one.name for one in tmp_path.iterdir() if one.is_file()] == [path.name]
    datapoint = json.loads(path.read_text())
    assert datapoint["disturbance"]["others_share"] == 0.4
    assert [row["disturbed"] for row in datapoint["rows"]] == [True, False, False, None]
    assert ran[0].until is not None
    text = path.read_text()
    mine = socket.gethostname(), getpass.getuser(), str(tmp_path), str(Path.home())
    for personal in (*mine, platform.release()):
        assert not re.search(rf"(?<!\w){re.escape(personal)}(?!\w)", text, re.IGNORECASE)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/sys/devices/pci0000:00/0000:00:1d.0/0000:01:00.0/nvme/nvme0/nvme0n1", "nvme"),
        ("/sys/devices/pci0000:00/0000:00:17.0/ata3/host2/target2:0:0/2:0:0:0/block/sda", "sata"),
        ("/sys/devices/pci0000:00/0000:00:14.0/usb2/2-1/2-1:1.0/host4/4:0:0:0/block/sdb", "usb"),
        ("/sys/devices/platform/fe340000.mmc/mmc_host/mmc0/mmc0:aaaa/block/mmcblk0", "emmc"),
        ("/sys/devices/virtual/block/nbd0", "network"),
        ("/sys/devices/pci0000:00/0000:00:02.0/virtio1/block/vda", None),
    ],
)
def test_the_kernels_path_tells_what_a_drive_is(path, kind):
    assert machine._kind(Path(path)) == kind


def test_a_drive_that_is_faster_than_its_bus_is_of_no_known_class(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_told_class", lambda *given: ("sata", "kernel"))
    assert machine.drive_class(tmp_path, 0.55e9) == ("sata", "kernel")
    assert machine.drive_class(tmp_path, 2e9) == ("unknown", None)


def test_a_volume_is_what_lies_below_it(tmp_path):
    disk = tmp_path / "pci" / "nvme0n1"
    disk.mkdir(parents=True)
    for name in ("dm-0", "dm-1"):
        (tmp_path / name / "slaves").mkdir(parents=True)
    (tmp_path / "dm-1" / "slaves" / "dm-0").symlink_to(tmp_path / "dm-0")
    (tmp_path / "dm-0" / "slaves" / "nvme0n1").symlink_to(disk)
    assert machine._disks(tmp_path / "dm-1") == [disk]
