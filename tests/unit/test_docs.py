"""The documentation says what the code does."""

import re
import runpy
from pathlib import Path

import pytest

from potstill.recipes import packaged

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_generated_pages_are_fresh() -> None:
    assert runpy.run_path(str(ROOT / "tools" / "docs.py"))["stale"]() == [], "run: python tools/docs.py"


def test_check_notices_a_page_that_is_stale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "docs.py"))
    tool["main"].__globals__["DOCS"] = tmp_path
    assert tool["main"](["--check"]) == 1
    tool["main"]([])
    assert tool["main"](["--check"]) == 0
    page = tmp_path / "methods.md"
    page.write_text(page.read_text(encoding="utf-8").replace("Eq. 8", "Eq. 9"), encoding="utf-8")
    assert tool["main"](["--check"]) == 1
    assert "stale: methods.md" in capsys.readouterr().err


def test_a_table_shows_choices_limits_and_defaults() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "docs.py"))
    shown = tool["table"](tool["config"].Learner)
    assert "| `lr` | number, > 0 | `0.001` |" in shown
    assert '| `schedule` | `"constant"` or `"linear"` or `"cosine"` | `"constant"` |' in shown


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    links = re.findall(r"(?<!!)\[[^\]]+\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def test_recipe_in_the_readme_is_the_packaged_one() -> None:
    shown = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert packaged()["demo-omniopd"].read_text(encoding="utf-8") in shown
