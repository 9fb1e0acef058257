"""A page in a real browser: headless Chromium, driven by the DevTools protocol over two pipes.

Nothing but the browser is needed for it, which is found by its name (Debian's package `chromium`, or `CHROMIUM`).
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_EXEC = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 5) for end in sys.argv[1:3]]  # neither is 3 or 4
os.dup2(ends[0], 3), os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Becomes the browser, which reads from descriptor 3 and writes to 4."""


class PageError(RuntimeError):
    """The browser, or a script in the page, refused."""


class Page:
    """A page, `events` being what the browser reported of it since it was opened: (method, parameters)."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._to, self._from, self._buffer, self._last, self._session = to_browser, from_browser, b"", 0, ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def open(self, file: Path, *, width: int, height: int = 900) -> None:
        """Load an HTML file in a window of a width in CSS pixels, and wait until it is drawn."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 720
        )
        self.events.clear()
        self.call("Page.navigate", url=file.resolve().as_uri())
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            self._receive()
        self.evaluate("document.fonts.ready.then(() => new Promise(requestAnimationFrame))")

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression, a promise's result. Raises PageError if it throws."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise PageError(f"the page's script failed: {found['exceptionDetails']}")
        return found["result"].get("value")

    def screenshot(self, *, height: int | None = None) -> bytes:
        """The page as PNG, down to `height` in CSS pixels, all of it by default."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(height or size["height"], size["height"])}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip | {"scale": 1})
        return base64.b64decode(shot["data"])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command of the DevTools protocol. Raises PageError if it is refused."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise PageError(f"{method} failed: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._from, 1 << 16)
            if not part:
                raise PageError("the browser ended. Start it by hand to see why: chromium --headless about:blank")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        if "method" in found:
            self.events.append((found["method"], found["params"]))
        return found


@contextmanager
def browser() -> Iterator[Page]:
    """An empty page of a new browser that reaches no network and keeps nothing.

    Raises FileNotFoundError where there is no Chromium.
    """
    name = os.environ.get("CHROMIUM", "chromium")
    program = shutil.which(name)
    if program is None:
        raise FileNotFoundError(f"there is no {name} here. Install Debian's package chromium, or name one in CHROMIUM")
    flags = ["--headless", "--remote-debugging-pipe", "--host-resolver-rules=MAP * ~NOTFOUND", "--hide-scrollbars"]
    flags += ["--disable-gpu", "--no-first-run", "--disable-background-networking", "--force-color-profile=srgb"]
    if os.geteuid() == 0:
        flags.append("--no-sandbox")  # which root cannot have
    (browser_reads, we_write), (we_read, browser_writes) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(prefix="osft-browser-", ignore_cleanup_errors=True) as profile:
        flags.append(f"--user-data-dir={profile}")
        process = subprocess.Popen(
            [sys.executable, "-ISc", _EXEC, str(browser_reads), str(browser_writes), program, *flags, "about:blank"],
            pass_fds=(browser_reads, browser_writes),
            stderr=subprocess.DEVNULL,
        )
        os.close(browser_reads)
        os.close(browser_writes)
        try:
            yield Page(we_write, we_read)
        finally:
            os.close(we_write)
            os.close(we_read)
            process.terminate()
            process.wait(timeout=30)
