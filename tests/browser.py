"""A real headless browser for tests of pages, controlled through its debugging pipe; it opens no port."""

import base64
import json
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --remote-debugging-pipe"
).split()


class Browser:
    """One tab: `open` a file at a width and in a theme, then `evaluate` JavaScript or take a `screenshot`."""

    def __init__(self, commands: int, replies: int):
        self.commands, self.replies = commands, os.fdopen(replies, "rb")
        self.count, self.session, self.events = 0, {}, []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def open(self, page: Path, width: int, theme: str) -> None:
        """Load a page in a window of `width` CSS pixels, `theme` light or dark, and forget earlier events."""
        self.events.clear()
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **metrics)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.send("Page.navigate", url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def evaluate(self, expression: str):
        return self.send("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def complaints(self) -> list[str]:
        """The messages of the console, and the addresses of all requests to a network."""
        self.evaluate("0")  # when this returns, all earlier events have arrived
        said = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Network.loadingFailed")
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        heard = [json.dumps(event["params"]) for event in self.events if event["method"] in said]
        return heard + [url for url in asked if not url.startswith(("file:", "data:"))]

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        image = self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(image))

    def send(self, method: str, **params) -> dict:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params, **self.session}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (reply := self._read()).get("id") != self.count:
            self.events.append(reply)
        assert "error" not in reply, reply
        return reply["result"]

    def _read(self) -> dict:
        message = bytearray()
        while (byte := self.replies.read(1)) != b"\0":
            assert byte, "the browser has gone"
            message += byte
        return json.loads(message)


@contextmanager
def browser(profile: Path):
    """A browser with a new profile in the folder `profile`."""
    to_read, commands = os.pipe()
    replies, to_write = os.pipe()
    command = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'  # it reads commands from descriptor 3 and replies on 4
    process = subprocess.Popen(
        ["bash", "-c", command, "bash", str(to_read), str(to_write), BINARY, *FLAGS, f"--user-data-dir={profile}"],
        pass_fds=(to_read, to_write),
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(to_write)
    try:
        tab = Browser(commands, replies)
        yield tab
        tab.replies.close()
    finally:
        os.close(commands)
        process.terminate()
        process.wait()
