"""The report in a real browser: no error, nothing cut off, nothing wider than the screen, light and dark."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from test_report_page import RUNS, every

from edgecompress.report_page import render_html

CHROMIUM = next((path for path in ("/usr/bin/chromium", "/usr/bin/chromium-browser") if os.path.exists(path)), None)
CHROMIUM = CHROMIUM or shutil.which("google-chrome") or shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (apt install chromium)")
QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--enable-logging=stderr",
)  # fmt: skip
SCHEMES = {"dark": 0, "light": 1}  # Blink's mojom::PreferredColorScheme
# The page in a frame of the wanted width (a window has a smallest one). What is measured is what a reader loses: text
# that an element cuts off, or that lies outside of the screen and of everything that can be scrolled sideways.
WRAPPER = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe id="page" style="border:0;width:{width}px;height:900px"></iframe><pre id="result"></pre>
<script>
const frame = document.getElementById('page'), result = {{errors: []}};
frame.onload = () => {{
  const view = frame.contentWindow, page = view.document, root = page.documentElement;
  const cuts = style => style === 'hidden' || style === 'clip', scrolls = style => style === 'auto' || style === 'scroll';
  const sideways = element => {{
    for (let e = element; e && e !== page.body; e = e.parentElement)
      if (scrolls(view.getComputedStyle(e).overflowX)) return true;
    return false;
  }};
  const clipped = [], outside = [];
  const walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {{
    const parent = node.parentElement, text = node.textContent.trim();
    if (!text || parent.closest('title, style, script, desc')) continue;
    const range = page.createRange();
    range.selectNodeContents(node);
    for (const box of range.getClientRects()) {{
      if (!box.width || !box.height) continue;
      if ((box.right > root.clientWidth + 1 || box.left < -1) && !sideways(parent)) outside.push(text);
      for (let e = parent; e && e !== page.body; e = e.parentElement) {{
        const style = view.getComputedStyle(e), edge = e.getBoundingClientRect();
        if (scrolls(style.overflowX)) break;
        const wide = cuts(style.overflowX) && (box.right > edge.right + 1 || box.left < edge.left - 1);
        const high = cuts(style.overflowY) && (box.bottom > edge.bottom + 1 || box.top < edge.top - 1);
        if (wide || high) clipped.push(text);
      }}
    }}
  }}
  Object.assign(result, {{
    clipped, outside, width: root.clientWidth, scroll: root.scrollWidth, texts: page.body.innerText.length,
    dark: view.matchMedia('(prefers-color-scheme: dark)').matches,
    ink: view.getComputedStyle(page.body).color, paper: view.getComputedStyle(page.body).backgroundColor,
  }});
  document.getElementById('result').textContent = JSON.stringify(result);
}};
frame.srcdoc = {page};
</script>"""


def measured(html: str, width: int, scheme: str, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What the browser measured of the page, and what it wrote to its console."""
    wrapper = folder / "wrapper.html"
    wrapper.write_text(WRAPPER.format(width=width, page=json.dumps(html).replace("</", "<\\/")), encoding="utf-8")
    done = subprocess.run(
        [str(CHROMIUM), *QUIET, f"--user-data-dir={folder / 'profile'}", "--window-size=1600,1000",
         f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", "--virtual-time-budget=8000", "--dump-dom",
         wrapper.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found and found[1], f"the page was not measured: {done.stderr[-2000:]}"
    return json.loads(unescape(found[1])), re.findall(r".*CONSOLE.*", done.stderr)


def brightness(colour: str) -> float:
    """Of ``rgb(r, g, b)``, in [0, 255]."""
    return sum(float(number) for number in re.findall(r"[\d.]+", colour)[:3]) / 3


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_cut_off_or_wider_than_the_screen(name: str, width: int, scheme: str, tmp_path: Path) -> None:
    found, console = measured(render_html(*every(name)), width, scheme, tmp_path)
    assert console == []
    assert found["width"] == width and found["scroll"] <= width and found["texts"] > 1000
    assert found["outside"] == [] and found["clipped"] == []
    assert found["dark"] == (scheme == "dark")
    assert (brightness(found["ink"]) > brightness(found["paper"])) == (scheme == "dark")


def test_the_measurement_sees_what_is_wrong(tmp_path: Path) -> None:
    wrong = """<!doctype html><meta charset="utf-8"><body style="margin:0">
        <p style="width:40px;overflow:hidden;white-space:nowrap">cut off at its right side</p>
        <p style="position:absolute;left:380px;white-space:nowrap">beyond the screen</p>
        <div style="overflow-x:auto"><p style="width:900px;white-space:nowrap">may be scrolled to</p></div>
        <script>console.error("an error of the page")</script>"""
    found, console = measured(wrong, 360, "light", tmp_path)
    assert found["clipped"] == ["cut off at its right side"] and found["outside"] == ["beyond the screen"]
    assert found["scroll"] > 360 and "an error of the page" in "".join(console)
