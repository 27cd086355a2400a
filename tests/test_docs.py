"""The documentation's Python runs, its links lead somewhere, and its lists are those of the program."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import compress_uq as cuq

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))


def run(code: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_python_in_the_documentation_runs(page, tmp_path):
    run(blocks(page), tmp_path)


def test_the_quickstart_example_runs(tmp_path):
    run((ROOT / "examples" / "quickstart.py").read_text(), tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://|mailto:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_command_line_page_names_every_option():
    import typer.main

    from compress_uq_cli.main import app

    text = (ROOT / "docs" / "cli.md").read_text()
    for name, command in typer.main.get_command(app).commands.items():
        assert f"`{name}" in text or f"## {name}" in text, name
        for parameter in command.params:
            for option in getattr(parameter, "opts", []):
                if option.startswith("--"):
                    assert option in text, (name, option)


def test_the_report_card_page_defines_every_metric():
    text = (ROOT / "docs" / "report-card.md").read_text()
    for entry in cuq.catalogue()["metrics"]:
        assert entry["name"] in text, entry["name"]


def test_the_changelog_has_a_place_for_what_is_not_released():
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


def test_no_page_names_a_machine():
    for page in PAGES:
        assert not re.search(r"/(home|root|work|tmp|Users)/", page.read_text()), page.name
