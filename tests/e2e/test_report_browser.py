"""The report in a real browser: it draws, it opens, it asks for nothing, and hostile text stays text."""

import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections import Counter
from html import unescape
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from test_report import HOSTILE, make_run, make_summary  # pyright: ignore[reportMissingImports]

from potstill import report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
QUIET = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser on PATH (looked for {', '.join(NAMES)})")


def browse(page: str, profile: Path, *options: str) -> str:
    """Open `page` in a headless browser and return what it prints."""
    assert BROWSER
    command = [BROWSER, *QUIET, f"--user-data-dir={profile}", "--window-size=640,480", *options, page]
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
    assert details
    assert "open" in details[0].split(f'id="{chunk}"')[1]
    shown = re.findall(r'<div class="kept" data-step="(\d+)"(?: hidden="")?>', dom)
    hidden = re.findall(r'<div class="kept" data-step="(\d+)" hidden="">', dom)
    assert (shown, hidden) == (["1", "10", "60"] * 2, ["10", "60", "1", "10"])


def colours(png: bytes) -> Counter[bytes]:
    """How often each colour occurs in a PNG as browsers write them: 8 bits, RGB or RGBA, not interlaced."""
    width, height, bits, kind, *_, interlaced = struct.unpack(">IIBBBBB", png[16:29])
    assert (bits, interlaced) == (8, 0)
    size = {2: 3, 6: 4}[kind]
    data, at = b"", 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : at + 8 + length]
        at += 12 + length
    raw, stride, above = zlib.decompress(data), width * size, bytearray(width * size)
    seen: Counter[bytes] = Counter()
    for row in range(height):
        start = row * (stride + 1)
        above = unfilter(raw[start], bytearray(raw[start + 1 : start + 1 + stride]), above, size)
        seen.update(bytes(above[i : i + 3]) for i in range(0, stride, size))
    return seen


def unfilter(how: int, line: bytearray, above: bytearray, size: int) -> bytearray:
    """Undo the prediction of one line of pixels (PNG specification, section 9.2)."""
    for i in range(len(line)):
        a, b, c = (line[i - size], above[i], above[i - size]) if i >= size else (0, above[i], 0)
        nearest = min((a, b, c), key=lambda v: abs(a + b - c - v)) if how == 4 else 0
        line[i] = (line[i] + (0, a, b, (a + b) // 2, nearest)[how]) % 256
    return line


def test_the_page_has_a_face_by_day_and_by_night(page: Path, tmp_path: Path) -> None:
    brightness: list[int] = []
    for scheme in (1, 0):
        picture = tmp_path / f"{scheme}.png"
        setting = f"--blink-settings=preferredColorScheme={scheme}"
        browse(f"{page.as_uri()}#result", tmp_path / "profile", setting, f"--screenshot={picture}")
        seen = colours(picture.read_bytes())
        assert len(seen) > 50, "text, bars and dots, not a blank page"
        brightness.append(sum(seen.most_common(1)[0][0]))
    assert brightness[0] > 600 > 150 > brightness[1], "light paper by day, dark paper by night"
