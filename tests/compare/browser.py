"""A headless Chromium that renders a page from disk; it has no network access."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NARROWEST = 500
"""Smallest width of a window in pixels; a narrower page is rendered inside a frame."""

# Reports the page's width, the texts that leave their chart or overlap, and the displayed charts, to the surrounding
# frame or in the title. The page's policy forbids scripts, so the measured copy has no policy.
_MEASURE = """<script>
const shown = [...document.querySelectorAll('svg.chart')].filter(svg => svg.getClientRects().length);
const cut = shown.flatMap(svg => [...svg.querySelectorAll('text')].filter(text => {
  const box = text.getBBox(), view = svg.viewBox.baseVal;
  return box.x < 0 || box.x + box.width > view.width || box.y < 0 || box.y + box.height > view.height;
}).map(text => text.textContent));
const overlapping = shown.flatMap(svg => [...svg.querySelectorAll('text.label, text.title, text.axis')].filter((a, i, all) =>
  all.slice(i + 1).some(b => {
    const p = a.getBBox(), q = b.getBBox();
    return p.x < q.x + q.width && q.x < p.x + p.width && p.y + 3 < q.y + q.height && q.y + 3 < p.y + p.height;
  })).map(text => text.textContent));
const said = JSON.stringify({
  width: document.documentElement.scrollWidth, window: innerWidth, cut, overlapping,
  shown: shown.map(svg => svg.closest('figure').className),
  fetched: performance.getEntriesByType('resource').map(entry => entry.name),
});
if (window === top) document.title = said; else parent.postMessage(said, '*');
</script></body>"""
_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


@dataclass(frozen=True)
class Browser:
    """Chromium with a temporary profile.

    Attributes:
        folder: folder for the profile and the pictures.
    """

    folder: Path

    def screenshot(self, page: Path, width: int, height: int, *, dark: bool = False) -> Path:
        """A picture of a page, rendered from the unchanged file."""
        shot = self.folder / f"{page.stem}-{width}{'-dark' if dark else ''}.png"
        self._run(self._framed(page, width, height, ""), width, height, dark, f"--screenshot={shot}")
        return shot

    def measure(self, page: Path, width: int, height: int) -> str:
        """JSON with the measurements of `_MEASURE`, from a copy of the page that contains it."""
        copy = self.folder / f"{page.stem}-measured.html"
        copy.write_text(_POLICY.sub("", page.read_text(encoding="utf-8")).replace("</body>", _MEASURE))
        listen = "<script>addEventListener('message', event => { document.title = event.data })</script>"
        dom = self._run(self._framed(copy, width, height, listen), width, height, False, "--dump-dom")
        found = re.search(r"<title>(\{.*?\})</title>", dom, re.DOTALL)
        assert found is not None, dom[:2000]
        return found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")

    def _framed(self, page: Path, width: int, height: int, script: str) -> Path:
        """The page, or a page that contains it in a frame of a phone's width."""
        if width >= NARROWEST:
            return page
        frame = self.folder / f"{page.stem}-frame.html"
        style = f"border:0;width:{width}px;height:{height}px"
        frame.write_text(
            f'<!doctype html><title></title><body style="margin:0">{script}<iframe src="{page.as_uri()}" style="{style}"></iframe>'
        )
        return frame

    def _run(self, page: Path, width: int, height: int, dark: bool, *task: str) -> str:
        words = [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--window-size={max(width, NARROWEST)},{height}",
            f"--user-data-dir={self.folder / 'profile'}", "--virtual-time-budget=2000", *task,
        ]  # fmt: skip
        if dark:
            words.append("--blink-settings=preferredColorScheme=0")
        done = subprocess.run([*words, page.as_uri()], check=True, capture_output=True, timeout=120, text=True)
        return done.stdout
