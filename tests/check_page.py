"""The report page in a real browser: nothing it complains of, and the verdict seen without scrolling.

    python -m tests.check_page [--screenshots DIR] [PAGE ...]

Without pages, reports of every verdict are made up and looked at. Exit code 0 if all is well or there is no browser.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.fidelity.page import render_report
from tests.pipeline.test_page import REPORTS, gallery

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = (
    "--headless", "--no-sandbox",  # which containers often cannot make, and the page is our own
    "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
    "--remote-debugging-pipe", "--disable-extensions", "--hide-scrollbars",
)  # fmt: skip
DESKTOP, PHONE, PAPER = (1280, 800), (390, 844), (718, 1047)  # the last: A4 within margins of a centimetre
FACTS = """(() => {
  const inside = element => {
    const box = element.getBoundingClientRect();
    return box.height > 0 && box.top >= 0 && box.left >= 0 && box.bottom <= innerHeight && box.right <= innerWidth;
  };
  const problems = [];
  const need = (good, words) => { if (!good) problems.push(words); };
  const all = selector => [...document.querySelectorAll(selector)];
  need(document.querySelectorAll('h1').length === 1, 'there is not one h1');
  need(inside(document.querySelector('h1')), 'the verdict is not seen without scrolling');
  need(inside(document.querySelector('h1 + p')), 'the sentence of the verdict is not seen without scrolling');
  need(document.documentElement.scrollWidth <= innerWidth,
    `the page is ${document.documentElement.scrollWidth} wide in a window of ${innerWidth}`);
  for (const plot of all('svg')) need(plot.getAttribute('role') === 'img' &&
    (plot.getAttribute('aria-label') || '').length > 20, 'a plot has no text');
  for (const picture of all('img')) {
    need((picture.alt || '').length > 5, 'a picture has no text');
    need(picture.complete && picture.naturalWidth > 0, `a picture is broken: ${picture.alt}`);
  }
  for (const heading of all('th')) need(heading.scope, `a table heading has no scope: ${heading.textContent}`);
  for (const table of all('main table.stack')) need(table.caption, 'a table has no caption');
  for (const section of all('section')) need(
    document.getElementById(section.getAttribute('aria-labelledby')), 'a section has no name');
  for (const landmark of ['main', 'nav', 'header', 'footer']) need(
    document.querySelector(landmark), `there is no ${landmark}`);
  for (const text of all('svg text')) {
    const box = text.getBoundingClientRect();
    need(box.left >= -1 && box.right <= innerWidth + 1, `words of a plot leave the page: ${text.textContent}`);
  }
  return problems;
})()"""
FOCUSED = "document.activeElement.className + ' ' + (document.activeElement.getBoundingClientRect().left >= 0)"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"


@dataclass
class Browser:
    """A browser driven over the pipe of its debugging protocol."""

    to: Any
    source: Any
    number: int = 0
    session: str | None = None
    complaints: list[str] = field(default_factory=list)
    loaded: bool = False

    def call(self, method: str, **parameters: Any) -> Any:
        """One request, and its answer."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.to.write(json.dumps(message).encode() + b"\0")
        self.to.flush()
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"the browser refused {method}: {answer['error']}")
                return answer["result"]

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"the page cannot be examined: {result['exceptionDetails']}")
        return result["result"].get("value")

    def open(self, page: Path, size: tuple[int, int], scheme: str) -> None:
        """Show a page in a window of some size, light or dark."""
        width, height = size
        phone = size == PHONE
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call(
            "Emulation.setEmulatedMedia", media="screen", features=[{"name": "prefers-color-scheme", "value": scheme}]
        )
        self.complaints, self.loaded = [], False
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not self.loaded:
            self._next()

    def _next(self) -> dict[str, Any]:
        received = bytearray()
        while not received.endswith(b"\0"):
            part = self.source.read(1)
            if not part:
                raise RuntimeError("the browser ended; run it by hand to see why")
            received += part
        message: dict[str, Any] = json.loads(received[:-1])
        self._heed(message.get("method", ""), message.get("params", {}))
        return message

    def _heed(self, event: str, told: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self.loaded = True
        elif event == "Runtime.exceptionThrown" or (
            event == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert")
        ):
            self.complaints.append(json.dumps(told)[:300])
        elif event == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(told["entry"]["text"])
        elif event == "Network.requestWillBeSent" and not told["request"]["url"].startswith(("file:", "data:")):
            self.complaints.append(f"asks the network for {told['request']['url']}")


@contextmanager
def browser(program: str) -> Iterator[Browser]:
    """A running browser with one tab."""
    our_read, its_write = os.pipe()
    its_read, our_write = os.pipe()
    with tempfile.TemporaryDirectory() as profile:
        # The protocol's pipe is what the browser has as files 3 and 4.
        command = f'exec "$0" "$@" 3<&{its_read} 4>&{its_write}'
        process = subprocess.Popen(
            ["sh", "-c", command, program, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(its_read, its_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(its_read)
        os.close(its_write)
        try:
            with os.fdopen(our_write, "wb") as to, os.fdopen(our_read, "rb") as source:
                running = Browser(to, source)
                target = running.call("Target.createTarget", url="about:blank")["targetId"]
                running.session = running.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
                for domain in ("Page", "Runtime", "Log", "Network"):
                    running.call(f"{domain}.enable")
                yield running
        finally:
            process.terminate()
            process.wait()


def examine(running: Browser, page: Path, screenshots: Path | None) -> list[str]:
    """What is wrong with a page, in windows of both sizes, light and dark, by keyboard and printed."""
    problems = []
    backgrounds = set()
    for size, scheme in ((DESKTOP, "light"), (DESKTOP, "dark"), (PHONE, "light"), (PHONE, "dark")):
        where = f"{page.name}, {size[0]}x{size[1]}, {scheme}"
        running.open(page, size, scheme)
        problems += [f"{where}: {problem}" for problem in running.evaluate(FACTS)]
        backgrounds.add(running.evaluate(BACKGROUND))
        for kind in ("keyDown", "keyUp"):
            running.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        if running.evaluate(FOCUSED) != "skip true":
            problems.append(f"{where}: the first Tab does not reach a visible link to the evidence")
        problems += [f"{where}: {complaint}" for complaint in running.complaints]
        if screenshots is not None:
            running.evaluate("document.activeElement.blur()")
            _save(running, screenshots / f"{page.stem}-{size[0]}-{scheme}.png")
    if len(backgrounds) != 2:
        problems.append(f"{page.name}: light and dark have the backgrounds {backgrounds}")
    running.open(page, PAPER, "dark")
    running.call("Emulation.setEmulatedMedia", media="print")
    if (width := running.evaluate("document.documentElement.scrollWidth")) > PAPER[0]:
        problems.append(f"{page.name}: printed, it is {width} wide on a page of {PAPER[0]}")
    if screenshots is not None:
        _save(running, screenshots / f"{page.stem}-printed.png")
    printed = base64.b64decode(running.call("Page.printToPDF", preferCSSPageSize=True)["data"])
    if not printed.startswith(b"%PDF"):
        problems.append(f"{page.name}: it cannot be printed")
    elif screenshots is not None:
        (screenshots / f"{page.stem}.pdf").write_bytes(printed)
    return problems


def _save(running: Browser, path: Path) -> None:
    shot = running.call("Page.captureScreenshot", captureBeyondViewport=True)
    path.write_bytes(base64.b64decode(shot["data"]))


def invented_pages(folder: Path) -> list[Path]:
    """Pages of every verdict."""
    pages = []
    for name, make in REPORTS.items():
        path = folder / f"{name.replace(' ', '-')}.html"
        path.write_text(render_report(make(), gallery()), encoding="utf-8")
        pages.append(path)
    return pages


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE")
    parser.add_argument("--screenshots", type=Path, metavar="DIR", help="keep pictures and a print of each page")
    options = parser.parse_args()
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        print("=== NO CHROMIUM: the report page is not opened in a browser (apt-get install chromium) ===")
        return 0
    if options.screenshots:
        options.screenshots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, browser(program) as running:
        pages = [*options.pages, *invented_pages(Path(folder))]
        problems = [problem for page in pages for problem in examine(running, page, options.screenshots)]
    for problem in problems:
        print(problem)
    print(f"{len(pages)} pages in a browser, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
