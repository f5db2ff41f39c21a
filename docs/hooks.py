"""What mkdocs does beside its plugins: the report of results/ is a page, and equations become MathML.

A block that begins with ```math is an equation of its own, $`x`$ one within a line, as on GitHub. MathML
needs no script and no font from elsewhere.
"""

from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert, convert_to_element
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from infini_attention.evaluation.report import report
from infini_attention.evaluation.report_page import page

RESULTS = Path(__file__).parent.parent / "results"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Have equations understood."""
    fence = {"name": "math", "class": "math", "format": _block}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    config.markdown_extensions.append(_Inline())
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add report.html, made of the results as they are."""
    files.append(File.generated(config, "report.html", content=page(report(RESULTS))))
    return files


def _block(source: str, *_: Any, **__: Any) -> str:
    return f'<div class="equation">{convert(source, display="block")}</div>'


class _Inline(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.inlinePatterns.register(_InlineProcessor(r"\$`([^`]+)`\$"), "math", 200)  # before code


class _InlineProcessor(InlineProcessor):
    def handleMatch(self, m: Any, data: str) -> tuple[Element, int, int]:  # type: ignore[override]
        return convert_to_element(m.group(1)), m.start(0), m.end(0)
