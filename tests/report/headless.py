"""A real browser without a window, where one is installed: one process for a module, spoken to through a
pipe.
"""

import base64
import json
import os
import pathlib
import select
import shutil
import subprocess
import tempfile
import time
from typing import Any

from waiting import HANG

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--remote-debugging-pipe",
)


def installed() -> str | None:
    """The path of a Chromium."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """A Chromium with one tab. What the page logs and which dialogs it opens is kept."""

    def __init__(self) -> None:
        program = installed()
        assert program is not None
        self.profile = tempfile.mkdtemp()
        to_read, self.to = os.pipe()
        self.of, to_write = os.pipe()

        def pipes() -> None:
            first, second = os.dup(to_read), os.dup(to_write)
            os.dup2(first, 3)
            os.dup2(second, 4)

        words = [program, *FLAGS, f"--user-data-dir={self.profile}"]
        environment = {**os.environ, "HOME": self.profile}
        nowhere = subprocess.DEVNULL
        self.process = subprocess.Popen(
            words,
            preexec_fn=pipes,
            close_fds=False,
            env=environment,
            stdout=nowhere,
            stderr=nowhere,
            stdin=nowhere,
        )
        os.close(to_read)
        os.close(to_write)
        self.left, self.number, self.session = b"", 0, ""
        self.said: list[str] = []
        self.dialogs: list[str] = []
        self.requests: list[str] = []
        self.loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.of)
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol and its answer."""
        self.number += 1
        own = self.number
        message = {"id": own, "method": method, "params": parameters} | (
            {"sessionId": self.session} if self.session else {}
        )
        os.write(self.to, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + HANG
        while True:
            answer = self._next(end)
            if answer.get("id") == own:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _next(self, end: float) -> dict[str, Any]:
        while b"\0" not in self.left:
            ready, _, _ = select.select([self.of], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            piece = os.read(self.of, 1 << 20)
            assert piece, "the browser has gone"
            self.left += piece
        line, _, self.left = self.left.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, parameters: dict[str, Any]) -> None:
        if event == "Log.entryAdded":
            self.said.append(parameters["entry"]["text"])
        elif event == "Runtime.consoleAPICalled":
            self.said.append(" ".join(str(each.get("value")) for each in parameters["args"]))
        elif event == "Runtime.exceptionThrown":
            self.said.append(parameters["exceptionDetails"]["text"])
        elif event == "Page.javascriptDialogOpening":
            self.dialogs.append(parameters["message"])
        elif event == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif event == "Page.loadEventFired":
            self.loaded = True

    def open(self, page: pathlib.Path) -> "Browser":
        """Opens a page and waits until it is loaded and its scripts have run."""
        self.said, self.dialogs, self.requests, self.loaded = [], [], [], False
        self.call("Page.navigate", url=page.resolve().as_uri())
        end = time.monotonic() + HANG
        while not self.loaded:
            self._next(end)
        return self

    def ask(self, expression: str) -> Any:
        """What an expression in the page gives, as JSON."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def document(self) -> str:
        """The document as it is now, as HTML."""
        return str(self.ask("document.documentElement.outerHTML"))

    def press(self, key: str) -> None:
        """A key on the element that has the focus."""
        codes = {
            "Enter": 13,
            "Tab": 9,
            "ArrowDown": 40,
            "ArrowRight": 39,
            "ArrowUp": 38,
            "ArrowLeft": 37,
            "Escape": 27,
            " ": 32,
        }
        named = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
        typed = {"Enter": {"text": "\r"}, " ": {"text": " "}}.get(key, {})
        self.call("Input.dispatchKeyEvent", type="keyDown", **named, **typed)
        self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    def screen(self, width: int, height: int = 900, *, scheme: str = "light", media: str = "screen") -> None:
        """Size of the window, colour scheme and medium."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        self.call(
            "Emulation.setEmulatedMedia",
            media=media,
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )

    def picture(self, *, whole: bool = True, clip: dict[str, float | int] | None = None) -> bytes:
        """A screenshot as PNG."""
        more = {"clip": {"scale": 1, **clip}} if clip else {}
        return base64.b64decode(
            self.call("Page.captureScreenshot", captureBeyondViewport=whole, **more)["data"]
        )
