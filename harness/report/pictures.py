"""The pictures of tables that README.md and docs/ show: the only ones in git, each beside its CSV.

Nothing lists them but those documents. To show another one, link results/FOLDER/TABLE.png from a
document; after a new run, or with a new link, `python -m harness report --pictures` draws all of
them, and they are committed with the CSV.
"""

from __future__ import annotations

import re
from pathlib import Path

from flashmoe.errors import FlashMoEError
from harness.report import charts, report
from harness.report.charts import theme

_LINK = re.compile(r"\]\((?:\.\./)?results/([\w.-]+)/([\w.-]+)\.png\)")


def shown() -> list[Path]:
    """Paths of the pictures that the documents link."""
    root = report.RESULTS.parent
    documents = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    links = {link for path in documents for link in _LINK.findall(path.read_text())}
    return [report.RESULTS / folder / f"{name}.png" for folder, name in sorted(links)]


def draw() -> list[Path]:
    """Draw them all from the CSV. Raises FlashMoEError for a link that has no table or chart."""
    paths = shown()
    for path in paths:
        table = path.with_suffix(".csv")
        panels = charts.of(path.parent, path.stem) if table.exists() else []
        if not panels:
            raise FlashMoEError(f"a document shows {path.name}, which cannot be drawn: see {table}")
        theme.png(panels, path)
    return paths
