import re
import subprocess
import sys
from pathlib import Path

from transformers import AutoConfig

import infini_attention

# Hides packages from imports as if they were not installed, then imports and uses what must do without them.
WITHOUT_EXTRAS = """
import sys
from importlib.machinery import PathFinder

absent = {"accelerate", "gguf", "matplotlib", "peft", "psutil", "triton"}

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding

from infini_attention.cli import main

main(["doctor"])
assert not absent & set(sys.modules), absent & set(sys.modules)
"""


def test_importing_needs_neither_triton_nor_an_extra() -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_public_name_is_there() -> None:
    for name in infini_attention.__all__:
        assert getattr(infini_attention, name).__name__ == name


def test_transformers_knows_the_model_types() -> None:
    for name in infini_attention.__all__:
        if name.endswith("Config"):
            config = getattr(infini_attention, name)
            assert type(AutoConfig.for_model(config.model_type)) is config


def test_a_folder_imports_from_those_above_it_alone() -> None:
    order = ["ops", "layers", "models", "baselines", "data", "training", "evaluation", "streaming"]
    package = Path(infini_attention.__file__).parent
    for place, folder in enumerate(order):
        below = "|".join([*order[place + 1 :], "cli"])
        wrong = re.compile(rf"^\s*(?:from|import) infini_attention\.({below})\b", re.MULTILINE)
        for path in [package / f"{folder}.py", *(package / folder).rglob("*.py")]:
            found = wrong.search(path.read_text()) if path.is_file() else None
            assert found is None, f"{path.relative_to(package)} imports from {found and found[1]}"
