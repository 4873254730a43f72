"""The report in a real browser: it draws, it opens, it asks for nothing, and hostile text stays text."""

import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from test_report import HOSTILE, make_run, make_summary

from potstill import report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
).split()

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser on PATH (looked for {', '.join(NAMES)})")


def browse(page: str, profile: Path, *options: str) -> str:
    """Open `page` in a headless browser and return what it prints."""
    assert BROWSER
    command = [BROWSER, *QUIET, f"--user-data-dir={profile}", "--window-size=1280,3000", *options, page]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    runs = [make_run(folder / "opd", "opd"), make_run(folder / "omniopd", "omniopd", odd=HOSTILE)]
    return report.write(folder / "report.html", runs, make_summary(["opd", "omniopd"]))


@pytest.fixture(scope="module")
def dom(page: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The document after its scripts ran, opened at a chunk of the last step."""
    [*_, chunk] = re.findall(r'<details class="chunk \w+" id="(r1s60n\dc1)"', page.read_text(encoding="utf-8"))
    return browse(f"{page.as_uri()}#{chunk}", tmp_path_factory.mktemp("profile"), "--dump-dom") + f"<!--{chunk}-->"


def test_the_pages_own_script_ran_and_no_other(dom: str) -> None:
    assert re.search(r'<html[^>]* data-ready="yes"', dom)
    assert "<title>What the student learned</title>" in dom
    assert dom.count("<script") == 1
    assert "<img" not in dom


def test_charts_are_drawn(dom: str) -> None:
    paths = re.findall(r'<path class="(line|line dashed|band s\d)" d="([^"]*)"', dom)
    lines = [d for kind, d in paths if kind != "band"]
    assert sum(d.count("L") >= 5 for d in lines) >= 12, "four accuracy curves against two axes, and the training curves"
    for d in lines:
        assert re.fullmatch(r"M-?[\d.]+ -?[\d.]+(L-?[\d.]+ -?[\d.]+)*Z?|M1 4H25", d), d
    charts = re.findall(r"<svg class=\"chart\".*?</svg>", dom, flags=re.S)
    assert len(charts) >= 8
    assert not [chart for chart in charts if re.search(r"\b(nan|inf|none|undefined)\b", unescape(chart), re.I)]


def test_nothing_comes_from_the_network(dom: str) -> None:
    links = re.findall(r"""(?:src|href|srcset|action)\s*=\s*["']([^"'#]+)""", re.sub(r">[^<]*<", "><", dom))
    assert {link for link in links if not link.startswith("data:")} == set()
    assert "@import" not in dom
    assert "url(" not in dom


def test_a_link_to_a_chunk_opens_its_step_and_the_chunk(dom: str) -> None:
    chunk = re.findall(r"<!--(\w+)-->", dom)[-1]
    details = re.search(rf'<details[^>]*id="{chunk}"[^>]*>', dom)
    assert details and "open" in details[0].split(f'id="{chunk}"')[1]
    shown = re.findall(r'<div class="kept" data-step="(\d+)"(?: hidden="")?>', dom)
    hidden = re.findall(r'<div class="kept" data-step="(\d+)" hidden="">', dom)
    assert (shown, hidden) == (["1", "10", "60"] * 2, ["10", "60", "1", "10"])


def test_the_page_has_a_face(page: Path, tmp_path: Path) -> None:
    from PIL import Image  # comes with matplotlib

    seen: list[int] = []
    for scheme in ("light", "dark"):
        picture = tmp_path / f"{scheme}.png"
        setting = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
        browse(page.as_uri(), tmp_path / "profile", setting, f"--screenshot={picture}")
        with Image.open(picture) as image:
            small = image.convert("RGB").resize((320, 750))
            assert len(small.getcolors(maxcolors=320 * 750) or []) > 50, "a page of text and charts, not a blank one"
            pixel = image.convert("RGB").getpixel((3, 2000))
            assert isinstance(pixel, tuple)
            seen.append(sum(pixel))
    assert seen[0] > 600 > 150 > seen[1], "light paper in the light, dark paper in the dark"
