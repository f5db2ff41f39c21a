import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
NEEDING_A_MODEL = ("HuggingFaceTB/", "Session(model")  # the second: tests/streaming/test_session.py
OFFLINE = [example for example in EXAMPLES if not any(words in example for words in NEEDING_A_MODEL)]


@pytest.mark.parametrize("example", OFFLINE, ids=lambda example: re.findall(r"import (\w+)\n", example)[-1])
def test_the_readmes_examples_run_as_they_stand(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where some leave what they made
    exec(compile(example, str(README), "exec"), {})


def test_the_readme_has_examples() -> None:
    assert len(OFFLINE) >= 2
