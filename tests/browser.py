"""A headless Chromium of a test's own, driven over the pipes of its DevTools protocol."""

import asyncio
import base64
import contextlib
import json
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from services.common.channel import cancel_and_wait

_TIMEOUT_S = 60.0
_KEYS = {
    "Enter": (13, "\r"),
    "Escape": (27, ""),
    "Tab": (9, ""),
    "ArrowRight": (39, ""),
    "End": (35, ""),
}
_OPTIONS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # root may not use it
    "--no-first-run",
    "--no-proxy-server",
    "--disable-gpu",
    "--disable-dev-shm-usage",  # containers have little of it
    "--disable-background-networking",
    "--disable-extensions",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
)
# The protocol wants descriptors 3 and 4, whatever ours are.
_WITH_PIPES = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'


def chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("google-chrome")


@contextlib.asynccontextmanager
async def running_browser(folder: Path) -> AsyncIterator["Browser"]:
    """One tab of a browser that keeps everything in this folder."""
    binary = chromium()
    assert binary is not None, "there is no chromium here: install Debian's"
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    command = ("bash", "-c", _WITH_PIPES, "bash", str(theirs_in), str(theirs_out), binary, *_OPTIONS)
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(
        *command,
        f"--user-data-dir={folder}",
        "about:blank",
        pass_fds=(theirs_in, theirs_out),
        stdout=quiet,
        stderr=quiet,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    browser = Browser(ours_out)
    reading = asyncio.create_task(browser.read(ours_in))
    try:
        await browser.attach()
        yield browser
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await cancel_and_wait([reading])
        os.close(ours_out)


class Browser:
    """What a person does with a page, and sees of it."""

    def __init__(self, out: int) -> None:
        self._out = out
        self._calls: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._session: str | None = None
        self._loaded = asyncio.Event()
        # What the page, or the browser about the page, complains of.
        self.complaints: list[str] = []
        self.requested: list[str] = []

    async def attach(self) -> None:
        targets = (await self.call("Target.getTargets"))["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        attached = await self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            await self.call(f"{domain}.enable")

    async def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """A command of the protocol, and its answer."""
        number = len(self._calls) + 1
        message: dict[str, object] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._calls[number] = asyncio.get_running_loop().create_future()
        os.write(self._out, json.dumps(message).encode() + b"\0")
        async with asyncio.timeout(_TIMEOUT_S):
            answer = await self._calls[number]
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    async def open(self, url: str) -> None:
        """Returns when the page and its modules have loaded."""
        self._loaded.clear()
        answer = await self.call("Page.navigate", url=url)
        assert "errorText" not in answer, answer
        async with asyncio.timeout(_TIMEOUT_S):
            await self._loaded.wait()

    async def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page, awaited if it is a promise."""
        answer = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def wait_for(self, expression: str) -> None:
        """Returns once an expression is true, or an element."""
        pause = "await new Promise((resolve) => setTimeout(resolve, 20))"
        await self.evaluate(f"(async () => {{ while (!({expression})) {pause}; }})()")

    async def text(self, selector: str) -> str:
        """What a person reads there, without the lines' ends; empty where there is nothing."""
        read = await self.evaluate(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")
        return " ".join(str(read).split())

    async def click(self, selector: str) -> None:
        """With the pointer, in the middle of an element that can be seen."""
        await self.hover(selector)
        x, y = await self._middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def hover(self, selector: str) -> None:
        x, y = await self._middle(selector)
        await self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    async def type(self, text: str) -> None:
        """Into what has the focus."""
        await self.call("Input.insertText", text=text)

    async def fill(self, selector: str, text: str) -> None:
        """Types over what is in a field."""
        await self.click(selector)
        await self.evaluate("document.activeElement.select()")
        await self.type(text)

    async def press(self, key: str, *, shift: bool = False) -> None:
        code, text = _KEYS[key]
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        await self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    async def resize(self, width: int, height: int) -> None:
        """CSS pixels."""
        size = {"width": width, "height": height}
        await self.call("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=False)

    async def prefer(self, **features: str) -> None:
        """Media features, such as prefers_color_scheme='dark'."""
        told = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        await self.call("Emulation.setEmulatedMedia", features=told)

    async def screenshot(self) -> bytes:
        """A PNG."""
        return base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"])

    async def read(self, source: int) -> None:
        """Takes in what the browser says, until it ends."""
        reader = asyncio.StreamReader(limit=1 << 26)  # a screenshot is one message
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(source, "rb")
        )
        with contextlib.closing(transport), contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                self._hear(json.loads((await reader.readuntil(b"\0"))[:-1]))

    def _hear(self, message: dict[str, Any]) -> None:
        if "id" in message:
            self._calls[message["id"]].set_result(message)
        elif message["method"] == "Page.loadEventFired":
            self._loaded.set()
        elif message["method"] == "Network.requestWillBeSent":
            self.requested.append(message["params"]["request"]["url"])
        elif complaint := _COMPLAINTS.get(message["method"], lambda _: None)(message["params"]):
            self.complaints.append(complaint)

    async def _middle(self, selector: str) -> tuple[float, float]:
        """Where an element is, once it stands still and nothing covers it."""
        x, y = await self.evaluate(f"({_STILL})({json.dumps(selector)})")
        return x, y


_STILL = """async (selector) => {
  for (let before = ""; ; await new Promise(requestAnimationFrame)) {
    const found = document.querySelector(selector);
    found.scrollIntoView({ block: "nearest" });
    const box = found.getClientRects()[0];
    if (!box) continue;
    const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
    if (before === `${x} ${y}` && found.contains(document.elementFromPoint(x, y))) return [x, y];
    before = `${x} ${y}`;
  }
}"""

_COMPLAINTS: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "Runtime.consoleAPICalled": lambda told: str(told["args"]) if told["type"] in ("error", "warning") else None,
    "Runtime.exceptionThrown": lambda told: str(told["exceptionDetails"]),
    "Log.entryAdded": lambda told: str(told["entry"]) if told["entry"]["level"] in ("error", "warning") else None,
    "Audits.issueAdded": lambda told: str(told["issue"]),
}
