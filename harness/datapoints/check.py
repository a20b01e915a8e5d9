"""Which datapoints are malformed, impossible or sent twice: a sentence for each."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from flashmoe.errors import FlashMoEError
from harness.datapoints import files
from harness.datapoints.files import Datapoint
from harness.datapoints.machine import BUS_BYTES_PER_SECOND

# A speed may be so many times its roofline: a shared drive is at times faster than fio found it.
ROOFLINE_BAND = 1.25
_SHARE_BAND = 1.5  # speed, roofline and share of it are medians, each of its own round
_LARGEST_BYTES = 64 << 10
_LONGEST_MESSAGE = 160
_LARGEST_NUMBER = 1 << 63


def check(paths: Sequence[Path]) -> None:
    """Raises FlashMoEError with a sentence for each file of `paths` that is refused."""
    if wrong := list(refused(paths)):
        raise FlashMoEError(
            f"{len(wrong)} of {len(paths)} datapoints are refused:\n  " + "\n  ".join(wrong)
        )


def refused(paths: Sequence[Path]) -> Iterator[str]:
    """A sentence for each file of `paths` that is wrong, or repeats one of them or of results/."""
    seen: dict[str, Path] = {}
    given = {path.resolve() for path in paths}
    for path in (*(p for p in files.committed() if p.resolve() not in given), *paths):
        try:
            datapoint = _read(path)
            why = next(faults(datapoint), None)
            expected = "" if why else files.name_of(datapoint)
        except FlashMoEError as error:
            why = str(error)
        except RecursionError:
            why = "its lists are too deep"
        if not why and path.name != expected:
            why = f"by its content it must be called {expected}"
        if not why:
            figures = _figures(datapoint)
            if figures in seen:
                why = f"it has the figures of {seen[figures].name}"
            seen.setdefault(figures, path)
        if why and path.resolve() in given:
            yield f"{path.name}: {why}"


def faults(datapoint: Any) -> Iterator[str]:
    """What of a datapoint cannot be, the first that makes the rest meaningless first."""
    if error := best_match(_schema().iter_errors(datapoint)):
        message = error.message
        if len(message) > _LONGEST_MESSAGE:
            message = f"{message[:_LONGEST_MESSAGE]} ..."
        yield f"{error.json_path.removeprefix('$.')}: {message}"
        return
    if datetime.date.fromisoformat(datapoint["date"]) > datetime.datetime.now(datetime.UTC).date():
        yield f"its date {datapoint['date']} is in the future"
    if datapoint["uncommitted_changes"]:
        yield "it was measured by code that was never committed"
    yield from _drive_faults(datapoint["drive"])
    of_row = [(row["system"], row["cap_share"]) for row in datapoint["rows"]]
    if len(set(of_row)) < len(of_row):
        yield "a system has two rows at one cap"
    rooflines = [row["roofline_tokens_per_second"] or 0.0 for row in datapoint["rows"]]
    for row in datapoint["rows"]:
        cap = "no cap" if row["cap_share"] is None else f"a cap of {row['cap_share']:.0%}"
        for why in _row_faults(row, max(rooflines)):
            yield f"{row['system']} at {cap}: {why}"


def _drive_faults(drive: dict[str, Any]) -> Iterator[str]:
    bus = BUS_BYTES_PER_SECOND[drive["class"]]
    for pattern in ("random", "sequential"):
        speed = drive[f"{pattern}_read_bytes_per_second"]
        if speed > bus:
            yield (
                f"{speed / 1e9:.3g} GB/s of {pattern} reads are more than a drive of class "
                f"{drive['class']} can give, {bus / 1e9:g} GB/s"
            )
    if (drive["class"] == "unknown") != (drive["class_by"] is None):
        yield "class_by must be null for an unknown drive, and for no other"


def _row_faults(row: dict[str, Any], highest: float) -> Iterator[str]:
    """highest: of the datapoint's rooflines, where the least is read: arithmetic allows no more."""
    if row["outcome"] != "ok":
        return
    speed, least, most = (row[f"tokens_per_second{end}"] for end in ("", "_min", "_max"))
    if not least <= speed <= most:
        yield f"the median {speed:g} token/s is not between {least:g} and {most:g}"
    roofline, share = row["roofline_tokens_per_second"], row["share_of_roofline"]
    if (roofline is None) != (share is None):
        yield "of the roofline and the share of it there are both or neither"
    elif row["system"] == "flashmoe" and not roofline:
        yield "a row of flashmoe has a roofline"
    elif roofline and max(speed / roofline, share) > ROOFLINE_BAND:
        yield (
            f"{speed:g} token/s are more than {ROOFLINE_BAND:g} times the roofline of "
            f"{roofline:g}, or its share of that says so"
        )
    elif roofline and not 1 / _SHARE_BAND <= share * roofline / speed <= _SHARE_BAND:
        yield f"{speed:g} token/s are not {share:.0%} of {roofline:g}"
    elif not roofline and speed > ROOFLINE_BAND * highest:
        yield f"{speed:g} token/s are more than any roofline here allows, {highest:g}"


@cache
def _schema() -> Draft202012Validator:
    schema = json.loads(files.SCHEMA_PATH.read_text())
    return Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)


def _figures(datapoint: Datapoint) -> str:
    """What was measured: the same of two files is one measurement, sent twice."""
    measured = {key: datapoint[key] for key in ("drive", "speed", "disturbance", "rows")}
    return json.dumps(measured, sort_keys=True)


def _read(path: Path) -> Any:
    """Raises FlashMoEError where the file is no JSON of plain, finite, unambiguous values."""
    try:
        with open(path, "rb") as file:
            content = file.read(_LARGEST_BYTES + 1)
        if len(content) > _LARGEST_BYTES:
            raise FlashMoEError(f"it is larger than {_LARGEST_BYTES >> 10} KiB")
        return json.loads(
            content.decode(),
            parse_constant=_refuse_constant,
            parse_int=_whole,
            parse_float=_finite,
            object_pairs_hook=_unique,
        )
    except OSError as error:
        raise FlashMoEError(f"it cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise FlashMoEError(f"it is no JSON: {str(error).splitlines()[0]}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _whole(text: str) -> int:
    value = int(text)
    if abs(value) >= _LARGEST_NUMBER:
        raise ValueError(f"{text[:20]}... is too large a number")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large a number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a name twice")
    return found
