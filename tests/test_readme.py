"""The Python of README and docs runs as written, the commands name what exists, the floor plan is the floors tested."""

import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from tests.test_imports_go_down import FLOOR_OF

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]


def blocks(text: str, language: str) -> list[str]:
    """The fenced code of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


WITH_CODE = [page for page in PAGES if blocks((ROOT / page).read_text(), "python")]


@pytest.mark.parametrize(
    "page", [page if page == "README.md" else pytest.param(page, marks=pytest.mark.slow) for page in WITH_CODE]
)
def test_python_of_a_page_runs(page, tmp_path):
    """All blocks of a page in order, as a reader would paste them into one session; outputs go to an empty folder."""
    code = "\n".join(blocks((ROOT / page).read_text(), "python"))
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as in tests/conftest.py
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr


def test_two_commands_do_all_the_set_up():
    commands = blocks(README, "bash")
    assert len(commands) == 2
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for command, (extra, module) in zip(commands, [("recipes", "recipes.pretrain"), ("test", "pytest")], strict=True):
        assert command.startswith("python3 -m venv .venv && ") and command.count("\n") == 1
        assert f"'.[{extra}]'" in command and extra in extras
        assert f"-m {module}" in command


def test_floor_plan_is_the_tested_one():
    drawn = {room: int(floor) for floor, room in re.findall(r"^(\d+) +lowbit_jax/(\w+)", README, re.M)}
    assert drawn == FLOOR_OF


def test_links_lead_somewhere():
    for page in PAGES:
        text = (ROOT / page).read_text()
        for target in re.findall(r"\]\(((?!http)[^)#]+)", text):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_modules_named_in_commands_exist(page):
    for module in re.findall(r"python -m ((?:recipes|benchmarks|pallas_kernels)[\w.]*)", (ROOT / page).read_text()):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), module
