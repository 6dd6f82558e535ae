"""A real Chromium without a window, driven through its own debugging pipe: no driver, no port, no package.

    python tests/browser.py report.html trace-1-chunk-2 "#trace-1" picture.png

opens a page at a fragment and takes a picture of an element, such as docs/trace.png.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest


_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = [
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
# Chromium reads commands from file descriptor 3 and answers on 4.
_LAUNCHER = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
_KEYS = {"Tab": 9, "Enter": 13, " ": 32, "ArrowUp": 38, "ArrowDown": 40}
_TEXTS = {"Enter": {"text": "\r"}, " ": {"text": " "}}


class Browser:
    """One page in one browser; a context manager.

    Attributes:
        events: what the page reported so far, as `(method, params)` of the DevTools protocol.
    """

    def __init__(self, profile: Path, timeout: float = 60) -> None:
        program = next(filter(None, map(shutil.which, _NAMES)), None)
        if program is None:
            pytest.fail(
                f"This test needs Chromium, but none of {', '.join(_NAMES)} is on the PATH. Install it, on Debian with "
                "`apt-get install chromium`."
            )
        self.events: list[tuple[str, dict]] = []
        self._timeout, self._buffer, self._number, self._session = timeout, b"", 0, None
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (*os.pipe(), *os.pipe())]
        its_input, self._input, self._output, its_output = ends
        command = [program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCHER, str(its_input), str(its_output), *command],
            pass_fds=(its_input, its_output),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(its_input)
        os.close(its_output)
        page = next(target for target in self.call("Target.getTargets")["targetInfos"] if target["type"] == "page")[
            "targetId"
        ]
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: Any) -> None:
        self._process.terminate()
        self._process.wait(self._timeout)
        os.close(self._input)
        os.close(self._output)

    def call(self, method: str, **params: Any) -> dict:
        """One command of the DevTools protocol, and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None and not method.startswith("Target."):
            message["sessionId"] = self._session
        os.write(self._input, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + self._timeout
        while True:
            answer = self._receive(deadline)
            if answer.get("id") != self._number:
                self.events.append((answer.get("method", ""), answer.get("params", {})))
            elif "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']}")
            else:
                return answer["result"]

    def _receive(self, deadline: float) -> dict:
        while b"\0" not in self._buffer:
            if not select.select([self._output], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"Chromium did not answer within {self._timeout} seconds.")
            content = os.read(self._output, 1 << 16)
            if not content:
                raise RuntimeError(f"Chromium ended with exit code {self._process.wait()}.")
            self._buffer += content
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(
        self, page: Path | str, fragment: str = "", *, width: int = 1280, scale: float = 1, dark: bool = False
    ) -> None:
        """Load a file or an address, at `#fragment`, in a window of that width and pixel ratio, and wait until it is complete."""
        address = page if isinstance(page, str) else page.resolve().as_uri()
        sizes = {"width": width, "height": 900, "deviceScaleFactor": scale}
        self.call("Emulation.setDeviceMetricsOverride", mobile=False, **sizes)
        self.call("Emulation.setScrollbarsHidden", hidden=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url="about:blank")  # another fragment alone would not load the page again
        self.call("Page.navigate", url=f"{address}#{fragment}" if fragment else address)
        deadline = time.monotonic() + self._timeout
        while self.evaluate("document.readyState + location.protocol") in ("completeabout:", "loadingabout:") or (
            self.evaluate("document.readyState") != "complete"
        ):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{page} did not load within {self._timeout} seconds.")
            time.sleep(0.05)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def click(self, selector: str) -> None:
        """Press and release the mouse on the middle of the first element that matches."""
        place = self.evaluate(
            f"""(() => {{
              const element = document.querySelector({json.dumps(selector)});
              element.scrollIntoView({{block: "center", behavior: "instant"}});
              const box = element.getBoundingClientRect();
              return {{x: box.x + box.width / 2, y: box.y + box.height / 2}};
            }})()"""
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def press(self, key: str) -> None:
        """Press and release a key."""
        common = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS[key]}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **_TEXTS.get(key, {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def screenshot(self, path: Path, selector: str = "html") -> None:
        """The first element that matches, as a PNG."""
        box = self.evaluate(
            f"""(() => {{
              const box = document.querySelector({json.dumps(selector)}).getBoundingClientRect();
              return {{x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: box.height, scale: 1}};
            }})()"""
        )
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=box)
        path.write_bytes(base64.b64decode(picture["data"]))


if __name__ == "__main__":
    page, fragment, selector, picture = sys.argv[1:]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, Browser(Path(folder)) as browser:
        browser.open(Path(page), fragment, width=900, scale=1.25)
        browser.screenshot(Path(picture), selector)
