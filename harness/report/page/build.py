"""results/index.html: one file with every result, which needs no network."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from flashmoe.disk import files
from harness.report import report
from harness.report.charts import theme
from harness.report.page import datapoints, verdicts
from harness.report.page.advice import advice
from harness.report.page.behind import faster_rows
from harness.report.page.figures import kinds
from harness.report.page.filters import BANDS, machine_name

NAME = "index.html"
_HERE = Path(__file__).parent
_SCRIPTS = ("sortable/sortable.min.js", "sortable/sortable.a11y.min.js", "page.js")


def write() -> Path:
    """Build the page anew. Returns its path."""
    path = report.RESULTS / NAME
    whole = text().encode()
    files.replace(path, lambda file: file.write(whole))
    return path


def text() -> str:
    """The whole page. The same results give the same text."""
    rivals, own = faster_rows()
    all_kinds = kinds()
    all_advice = advice()
    points = datapoints.section(datapoints.load())
    figures = [figure for kind in all_kinds for figure in kind.figures]
    specs: dict[str, Any] = {}
    for figure in figures:
        specs |= figure.charts
    specs |= {f"datapoints--{number}": cap["chart"] for number, cap in enumerate(points["caps"])}
    scripts = [_inline(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))]
    scripts += [_inline((_HERE / name).read_text()) for name in _SCRIPTS]
    machines = {figure.marks["machine"] for figure in figures}
    return _environment().get_template("page.html").render(
        glance=verdicts.of_glance([verdict for each in all_advice for verdict in each.verdicts]),
        advice=[(each, verdicts.of_advice(each.verdicts)) for each in all_advice],
        kinds=all_kinds,
        datapoints=points,
        rivals=verdicts.of_faster(rivals),
        own=verdicts.of_faster(own),
        policies=verdicts.of_policies(),
        reads=verdicts.of_reads(),
        machines={name: machine_name(name) for name in sorted(machines)},
        models=sorted({figure.marks["model"] for figure in figures} - {""}),
        bands=BANDS,
        colours=theme.COLOURS,
        charts={"config": theme.config(), "specs": {k: _packed(v) for k, v in specs.items()}},
        css=Markup((_HERE / "style.css").read_text()),
        scripts=scripts,
        hashes=[_hash(script) for script in scripts],
        licences=(_HERE / "licences.txt").read_text(),
        digest=digest(),
    )  # fmt: skip


def digest() -> str:
    """Of everything that the page is built from under results/: tells whether it is fresh."""
    whole = hashlib.sha256()
    inputs = (
        *report.RESULTS.glob("*/*.csv"),
        *report.RESULTS.glob(f"*/{report.RECORDS}"),
        *report.RESULTS.glob(f"{datapoints.FOLDER}/*.json"),
    )
    for path in sorted(inputs):
        whole.update(str(path.relative_to(report.RESULTS)).encode())
        whole.update(path.read_bytes())
    return whole.hexdigest()


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("harness.report", "page"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["code"] = _code
    return environment


def _code(markdown: str) -> Markup:
    """The notes' only markup: what stands between backticks is code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(markdown))))


def _packed(spec: dict[str, Any]) -> dict[str, Any]:
    """Rows as lists under one list of names: half the size. page.js makes them whole again."""
    packed = {
        name: {"names": list(rows[0]), "rows": [list(row.values()) for row in rows]}
        for name, rows in spec["datasets"].items()
    }
    return spec | {"datasets": packed}


def _inline(script: str) -> Markup:
    """A script as it may stand in HTML, where these would end it or its parsing."""
    if re.search(r"</script|<!--", script, re.IGNORECASE):
        raise ValueError("a script holds `</script` or `<!--`")
    return Markup(script.replace("\r", ""))


def _hash(script: str) -> str:
    """For the page's policy, under which no other script runs, whatever a table holds."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
