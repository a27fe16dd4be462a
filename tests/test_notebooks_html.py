"""The notebooks as a reader sees them: exported to HTML, and opened in a headless Chromium of a laptop's width."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from nbconvert import HTMLExporter

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTH = 1280
# Of a figure's pixels, which are 160 an inch: its smallest letters, 6 points, are 8 pixels high then.
SMALLEST = 0.6
# What the page says of itself when it is laid out.
REPORT = """
<script>
window.addEventListener("load", () => {
  const width = document.documentElement.clientWidth;
  const wide = [...document.querySelectorAll(".jp-Cell *")].filter((e) => {
    const scrolls = e.clientWidth && getComputedStyle(e).overflowX !== "visible" && e.scrollWidth > e.clientWidth + 1;
    return scrolls || e.getBoundingClientRect().right > width + 1;
  });
  const errors = '[data-mime-type$="stderr"], [data-mime-type$="error"]';
  const report = document.createElement("pre");
  report.id = "report";
  report.textContent = JSON.stringify({
    width,
    page: document.documentElement.scrollWidth,
    cells: document.querySelectorAll(".jp-Cell").length,
    errors: document.querySelectorAll(errors).length,
    wide: wide.map((e) => `${e.tagName} ${e.className}: ${e.textContent.slice(0, 80)}`),
    images: [...document.images].map((e) => [e.alt, e.getBoundingClientRect().width, e.naturalWidth]),
  });
  document.body.append(report);
});
</script>
"""


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_in_a_browser(path, tmp_path):
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    body, _ = HTMLExporter().from_filename(str(path))
    page = tmp_path / "page.html"
    page.write_text(body.replace("</body>", f"{REPORT}</body>"))
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=20000")
    where = (f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={WIDTH},900", f"file://{page}")
    done = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", *where], capture_output=True, text=True, timeout=180, check=True
    )
    found = re.search(r'<pre id="report">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    report = json.loads(html.unescape(found[1]))
    assert report["width"] == WIDTH
    assert report["cells"] == len(json.loads(path.read_text())["cells"])
    assert report["errors"] == 0
    assert report["page"] <= WIDTH
    assert report["wide"] == []
    assert report["images"]
    for alt, shown, pixels in report["images"]:
        assert pixels, f"{alt}: not drawn"
        assert shown >= SMALLEST * pixels, f"{alt}: {shown:.0f} of {pixels} pixels"
