"""README and docs/: examples run as they stand, and what is named is there. `make test` builds the site."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from infini_attention.cli import SUBCOMMANDS

ROOT = Path(__file__).parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
NEEDING_A_MODEL = ("HuggingFaceTB/", "Session(model.eval()")  # the second: tests/streaming/test_session.py
MADE = {DOCS / "report.html"}  # by docs/hooks.py


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


EXAMPLES = [
    pytest.param(example, id=f"{name_of(page)}-{number}")
    for page in PAGES
    for number, example in enumerate(blocks(page, "python"))
    if not any(words in example for words in NEEDING_A_MODEL)
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run_as_they_stand(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where some leave what they made
    exec(compile(example, "an example", "exec"), {})


def test_the_readme_and_the_guide_have_examples() -> None:
    pages = [str(example.id).rpartition("-")[0] for example in EXAMPLES]
    assert pages.count("README.md") >= 2
    assert sum(page.startswith("docs/guide/") for page in pages) >= 5


def test_the_quickstarts_key_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    exec(blocks(DOCS / "guide" / "quickstart.md", "python")[0], {})
    assert capsys.readouterr().out.startswith("8655\n")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_that_are_shown_exist(page: Path) -> None:
    lines = [line for block in blocks(page, "") for line in block.splitlines()]
    shown = [line.split()[1] for line in lines if line.startswith("infini ")]
    assert {*shown} <= {*SUBCOMMANDS}
    recipes = re.findall(r"recipes/[\w/.-]+\.yaml", page.read_text(encoding="utf-8"))
    assert [recipe for recipe in recipes if not (ROOT / recipe).is_file()] == []


def test_the_sites_navigation_has_every_page_once() -> None:
    assert sorted(pages_of(settings()["nav"])) == sorted(str(page.relative_to(DOCS)) for page in PAGES[1:])


def pages_of(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for each in (nav.values() if isinstance(nav, dict) else nav) for page in pages_of(each)]


def settings() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    return read


def test_files_that_the_site_is_made_with_are_there() -> None:
    for style in settings()["extra_css"]:
        assert (DOCS / style).is_file()
    for hook in settings()["hooks"]:
        assert (ROOT / hook).is_file()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    if not (ROOT / "results").is_dir():
        pytest.skip("a source distribution has no results")
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("https://")]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target in MADE or target.exists(), link
        assert not anchor or anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    """What headings are linked to by, those of a page that is shown in this one, too."""
    text = page.read_text(encoding="utf-8")
    for shown in re.findall(r'^--8<-- "([^:"]+)', text, re.MULTILINE):
        text += (ROOT / shown).read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_every_name_of_the_api_page_is_public_and_says_what_it_is() -> None:
    names = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(names) >= 15
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert getattr(import_module(module), attribute).__doc__, name


def test_the_api_page_has_every_public_name_that_is_of_no_single_family() -> None:
    import infini_attention

    page = (DOCS / "api.md").read_text(encoding="utf-8")
    families = re.compile(r"Infini\w+(Config|ForCausalLM|Model)$")
    for name in infini_attention.__all__:
        assert families.match(name) or f"::: infini_attention.{name}\n" in page, name


def test_the_findings_that_the_site_shows_are_marked_and_each_has_a_name() -> None:
    findings = ROOT / "results" / "README.md"
    if not findings.exists():
        pytest.skip("a source distribution has no results")
    text = findings.read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert len({*headings}) == len(headings) > 20
    files = [path.name for path in findings.parent.iterdir()]
    for name in re.findall(r"`([^`]+)`", "".join(headings)):
        assert any(name in file for file in files), name
    assert "--8<-- [start:findings]" in text and "--8<-- [end:findings]" in text
    assert '--8<-- "results/README.md:findings"' in (DOCS / "results.md").read_text(encoding="utf-8")
