"""Headless Chromium for tests of pages, driven over a pipe by the Chrome DevTools Protocol: no driver, no port, no network."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--disable-dev-shm-usage", "--force-device-scale-factor=1", "--remote-debugging-pipe",
)  # fmt: skip
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "End": 35}
SECONDS = 60  # for an answer


def find() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def browser(directory: Path):
    """A `Browser` with an empty profile in a directory; skips where no Chromium is installed."""
    binary = find()
    if binary is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the path (apt-get install chromium)")
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]  # clear of 3 and 4, where it expects them

    def place():
        os.dup2(high[0], 3)
        os.dup2(high[1], 4)

    command = [binary, *FLAGS, f"--user-data-dir={directory}", "about:blank"]
    process = subprocess.Popen(command, pass_fds=(3, 4), preexec_fn=place, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    for fd in (theirs_in, theirs_out, *high):
        os.close(fd)
    made = Browser(ours_in, ours_out)
    try:
        yield made
    finally:
        with contextlib.suppress(OSError, TimeoutError, EOFError):
            made.call("Browser.close", session=None)
        for fd in (ours_in, ours_out):
            os.close(fd)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Browser:
    """One tab. events: what it told, in order, as (method, params)."""

    def __init__(self, read: int, write: int):
        self._read, self._write, self._buffer, self._number = read, write, b"", 0
        self.events: list[tuple[str, dict]] = []
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "Accessibility"):
            self.call(f"{domain}.enable")

    def _message(self, until: float) -> dict:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError(f"the browser said nothing for {SECONDS} seconds")
            got = os.read(self._read, 1 << 20)
            if not got:
                raise EOFError("the browser is gone")
            self._buffer += got
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method: str, session: str | None = "", **params) -> dict:
        self._number += 1
        request = {"id": self._number, "method": method, "params": params}
        session = self._session if session == "" else session
        os.write(self._write, json.dumps(request | ({"sessionId": session} if session else {})).encode() + b"\0")
        until = time.monotonic() + SECONDS
        while True:
            message = self._message(until)
            if message.get("id") == self._number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            if "method" in message:
                self.events.append((message["method"], message.get("params", {})))

    def open(self, path: Path, width: int = 1440, height: int = 900, dark: bool = False) -> None:
        """Shows a file in a window of that size, as somebody who likes it light or dark sees it; returns when it is drawn."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        until = time.monotonic() + SECONDS
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            message = self._message(until)
            self.events.append((message.get("method", ""), message.get("params", {})))
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def evaluate(self, script: str):
        """The value of an expression in the page; raises RuntimeError for one that throws."""
        got = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in got:
            raise RuntimeError(got["exceptionDetails"]["exception"].get("description", "an error in the page"))
        return got["result"].get("value")

    def press(self, key: str) -> None:
        more = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]} | ({"text": "\r"} if key == "Enter" else {})
        self.call("Input.dispatchKeyEvent", type="keyDown", **more)
        self.call("Input.dispatchKeyEvent", type="keyUp", **{k: v for k, v in more.items() if k != "text"})

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def point(self, selector: str) -> None:
        """Moves the mouse to the middle of an element."""
        x, y = self.evaluate(
            f"(n => {{ n.scrollIntoView({{block: 'center'}}); const r = n.getBoundingClientRect(); "
            f"return [r.x + r.width / 2, r.y + r.height / 2] }})(document.querySelector({json.dumps(selector)}))"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def names(self, role: str) -> list[str]:
        """What a screen reader calls the elements of a role."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        wanted = [n for n in nodes if not n.get("ignored") and n.get("role", {}).get("value") == role]
        return [n.get("name", {}).get("value", "") for n in wanted]

    def faults(self) -> list[str]:
        """Errors and warnings of the page since it was opened, and what it loaded beside itself."""
        found = []
        for method, params in self.events:
            if method == "Runtime.exceptionThrown":
                found.append(params["exceptionDetails"].get("exception", {}).get("description", "exception"))
            elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"]["text"])
            elif method == "Runtime.consoleAPICalled":
                found.append(f"console.{params['type']}")
            elif method == "Network.requestWillBeSent" and params["type"] != "Document":
                found.append(f"request: {params['request']['url']}")
            elif method == "Page.javascriptDialogOpening":
                found.append(f"dialog: {params['message']}")
        return found

    def screenshot(self, path: Path, whole: bool = True) -> Path:
        got = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(got["data"]))
        return Path(path)
