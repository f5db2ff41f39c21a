"""What `infini report` shows: one HTML page that needs nothing else, neither network nor scripts."""

import re
from base64 import b64encode
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from infini_attention.evaluation.report import Report

TYPES = {".png": "image/png", ".svg": "image/svg+xml"}
OPEN_ROWS = 12  # of a table that is not folded beside pictures or other tables


def page(report: Report) -> str:
    """The whole page, pictures within it."""
    environment = Environment(
        loader=PackageLoader("infini_attention.evaluation"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"anchor": _anchor, "data_uri": _data_uri, "size": _size}
    return environment.get_template("report.html").render(report=report, open_rows=OPEN_ROWS)


def _anchor(title: str) -> str:
    """What a link names a heading by."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _data_uri(picture: Path) -> str:
    return f"data:{TYPES[picture.suffix]};base64,{b64encode(picture.read_bytes()).decode()}"


def _size(text: str) -> str:
    return f"{len(text.splitlines()):,} lines"
