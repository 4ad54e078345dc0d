"""A headless Chromium that a test drives over its DevTools protocol, through two pipes."""

import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--remote-debugging-pipe"),
)
SECONDS = 60  # until an answer is late


def found() -> str | None:
    """The browser's program, where there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A page of the browser, what it logged, and what it asked the network for."""

    def __init__(self, write: int, read: int) -> None:
        self.write, self.read, self.buffer, self.count = write, read, b"", 0
        self.session = ""
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.loaded = False
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def open(self, url: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a page at a width, in a color scheme, and wait until it is whole."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 800}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self._load("about:blank")  # or else another place of the same page would not be loaded
        self.errors.clear()
        self.requests.clear()
        self._load(url)

    def _load(self, url: str) -> None:
        self.loaded = False
        self.send("Page.navigate", url=url)
        while not self.loaded:
            self._take(self._message())

    def run(self, code: str) -> Any:
        """The value of an expression on the page; what it throws is an error here."""
        answer = self.send("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def type(self, text: str) -> None:
        """Give keys to whatever has the focus."""
        for letter in text:
            key = {"key": letter, "text": letter}
            self.send("Input.dispatchKeyEvent", type="keyDown", **key)
            self.send("Input.dispatchKeyEvent", type="keyUp", key=letter)

    def press(self, key: str, text: str = "") -> None:
        """Press a named key: Enter, Tab, Escape."""
        code = {"Enter": 13, "Tab": 9, "Escape": 27}[key]
        given = {"key": key, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **given)
        self.send("Input.dispatchKeyEvent", type="keyUp", **given)

    def picture(self) -> str:
        """What is seen now: PNG in base64."""
        data: str = self.send("Page.captureScreenshot", format="png")["data"]
        return data

    def send(self, method: str, **given: object) -> dict[str, Any]:
        """Call a method and give its answer; what happens meanwhile is noted."""
        self.count += 1
        number = self.count
        call: dict[str, object] = {"id": number, "method": method, "params": given}
        if self.session:
            call["sessionId"] = self.session
        os.write(self.write, json.dumps(call).encode() + b"\0")
        while True:
            message = self._message()
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                answer: dict[str, Any] = message["result"]
                return answer
            self._take(message)

    def _message(self) -> dict[str, Any]:
        late = time.monotonic() + SECONDS
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read], [], [], max(0, late - time.monotonic()))
            assert ready, "the browser does not answer"
            part = os.read(self.read, 1 << 16)
            assert part, "the browser is gone"
            self.buffer += part
        text, _, self.buffer = self.buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message

    def _take(self, message: dict[str, Any]) -> None:
        given = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self.loaded = True
            case "Runtime.exceptionThrown":
                self.errors.append(str(given["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if given["type"] in ("error", "warning", "assert"):
                self.errors.append(str(given["args"]))
            case "Log.entryAdded" if given["entry"]["level"] in ("error", "warning"):
                self.errors.append(str(given["entry"]))
            case "Network.requestWillBeSent":
                self.requests.append(given["request"]["url"])


@contextlib.contextmanager
def browser(program: str, profile: Path) -> Iterator[Page]:
    """A page of a new browser with an empty profile."""
    to_read, write = os.pipe()
    read, to_write = os.pipe()

    def pipes() -> None:  # which the browser takes as its descriptors 3 and 4
        a, b = os.dup(to_read), os.dup(to_write)
        os.dup2(a, 3)
        os.dup2(b, 4)

    command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    child = subprocess.Popen(
        command,
        preexec_fn=pipes,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(to_write)
    try:
        yield Page(write, read)
    finally:
        os.close(write)  # upon which the browser ends
        os.close(read)
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
