"""The playground in a real browser, before a real gateway whose worker does as the test says."""

import asyncio
import json
import os

import pytest

from headrace.v1.scheduler_pb2 import DescribeFleetResponse, FleetWorker
from tests.browser import Browser, chromium
from tests.relay import CuttableRelay
from tests.services.gateway.fakes import FakeWorker, says
from tests.services.gateway.http.test_cluster_api import seen
from tests.services.gateway.keys_for_tests import make_key
from tests.services.gateway.stack import TEXT, Stack, eventually, running_stack

pytestmark = pytest.mark.skipif(not chromium() and not os.environ.get("CI"), reason="there is no chromium here")

SETTINGS = {
    "temperature": "0.5",
    "top_p": "0.9",
    "top_k": "40",
    "min_p": "0.05",
    "max_tokens": "99",
    "seed": "7",
    "frequency_penalty": "0.25",
    "presence_penalty": "-0.5",
    "repetition_penalty": "1.5",
}
ANSWERED = "document.querySelector('.answer[aria-busy=false]')"

# The texts of the page that have less than the 4.5 : 1 of WCAG's AA with what is painted beneath them.
FAINT = """
(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const luminance = (...colors) => {
    for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
    const [red, green, blue] = [...canvas.getImageData(0, 0, 1, 1).data].map((part) => part / 255)
      .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const beneath = (node) => (node ? [...beneath(node.parentElement), getComputedStyle(node).backgroundColor] : []);
  const contrast = (node) => {
    const [one, other] = [luminance(...beneath(node), getComputedStyle(node).color), luminance(...beneath(node))];
    return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  };
  const speaks = (node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
  return [...document.body.querySelectorAll("*")]
    .filter((node) => node.checkVisibility() && speaks(node) && contrast(node) < 4.5)
    .map((node) => `${node.className} ${node.textContent}: ${contrast(node).toFixed(2)}`);
})()
"""


async def opened(browser: Browser, url: str) -> None:
    """The page is there and knows the model."""
    await browser.open(url)
    await browser.wait_for("document.querySelector('[name=model]').value")


async def asked(browser: Browser, question: str = "Tell me a story.") -> None:
    await browser.fill("#prompt", question)
    await browser.press("Enter")


async def said(browser: Browser) -> str:
    """The newest answer's text, without what ends it."""
    shown: str = await browser.evaluate(
        "[...[...document.querySelectorAll('.answer')].at(-1).querySelectorAll('.token:not(.beyond)')]"
        ".map((token) => token.textContent).join('')"
    )
    return shown


async def test_a_chat_streams_and_nothing_is_complained_of_or_loaded_from_elsewhere(
    browser: Browser, stack: Stack
) -> None:
    stack.scheduler.fleet.workers.append(seen("w0"))
    await opened(browser, stack.base_url)
    await asked(browser)
    await browser.wait_for(ANSWERED)
    assert await said(browser) == TEXT
    stats = await browser.text(".stats")
    assert "first token" in stats and "tokens/s" in stats and "finish stop" in stats
    await browser.wait_for("document.querySelector('.worker')")
    assert browser.complaints == []
    assert {url for url in browser.requested if not url.startswith(stack.base_url)} == set()


async def test_every_knob_is_sent_and_an_empty_one_is_not(browser: Browser, stack: Stack) -> None:
    await opened(browser, stack.base_url)
    await asked(browser)
    await browser.wait_for(ANSWERED)
    for name, value in SETTINGS.items():
        await browser.fill(f"[name={name}]", value)
    await browser.fill("[name=system]", "Be brief.")
    await browser.fill("[name=stop]", "one\ntwo")
    await browser.click("[name=logprobs]")
    await asked(browser, "Go on.")
    await browser.wait_for(f"document.querySelectorAll('.answer').length === 2 && {ANSWERED}")
    await browser.wait_for("!document.querySelector('[aria-busy=true]')")
    plain, knobs = stack.workers[0].starts
    assert not plain.sampling.HasField("temperature") and plain.sampling.logprobs == 5
    sampling = knobs.sampling
    told = [getattr(sampling, name) for name in SETTINGS if name not in ("max_tokens", "seed")]
    assert told == pytest.approx([float(SETTINGS[name]) for name in SETTINGS if name not in ("max_tokens", "seed")])
    assert (sampling.seed, knobs.stopping.max_tokens) == (7, 99)
    assert not sampling.HasField("logprobs")
    assert TEXT in await browser.text(".answer:last-child .text")


async def test_stop_frees_the_worker_and_regenerate_asks_again(browser: Browser, redis_url: str) -> None:
    worker = FakeWorker("w0", says(TEXT), pause_after=3)
    async with running_stack(redis_url, [worker]) as stack:
        await opened(browser, stack.base_url)
        await asked(browser)
        await browser.wait_for("document.querySelectorAll('.token').length === 3")
        await browser.click("#stop")
        await browser.wait_for(ANSWERED)
        await worker.cancelled.wait()
        worker.let_go()
        assert await browser.text(".answer .notice") == "Stopped."
        await browser.click(".actions button:last-child")
        await browser.wait_for(f"document.querySelectorAll('.answer').length === 1 && {ANSWERED}")
        assert await said(browser) == TEXT
        assert await browser.evaluate("document.getElementById('stop').hidden")


async def test_a_lost_connection_can_be_resumed(browser: Browser, redis_url: str) -> None:
    worker = FakeWorker("w0", says(TEXT), pause_after=3)
    async with running_stack(redis_url, [worker]) as stack, CuttableRelay(stack.base_url) as relay:
        await opened(browser, relay.url)
        await browser.click("[name=resumable]")
        await asked(browser)
        await browser.wait_for("document.querySelectorAll('.token').length === 3")
        relay.cut()
        await browser.wait_for(ANSWERED)
        assert await browser.text(".answer .notice") == "The connection was lost before the answer ended."
        worker.let_go()
        await browser.click(".actions button:nth-child(2)")
        await browser.wait_for(ANSWERED)
        assert await said(browser) == TEXT
        assert len(worker.starts) == 1


async def test_a_key_is_asked_for_kept_in_the_tab_and_sent(browser: Browser, stack: Stack) -> None:
    key = await make_key(stack.redis)

    async def closed() -> bool:
        return (await stack.http.get("/v1/models")).status_code == 401

    await eventually(closed)
    await browser.open(stack.base_url)
    # Two answers of the server say so, in either order.
    await browser.wait_for("document.querySelector('[name=key][aria-invalid=true]')")
    await browser.wait_for("document.querySelector('#cluster .notice:not([hidden])')")
    assert await browser.text("#key-note") == "This server needs one."
    assert await browser.text("#cluster .notice") == "The server needs an API key."
    await browser.fill("[name=key]", key.secret)
    await browser.press("Tab")
    await browser.wait_for("document.querySelector('[name=model]').value")
    await asked(browser)
    await browser.wait_for(ANSWERED)
    assert await said(browser) == TEXT
    assert await browser.evaluate("Object.keys(localStorage)") == []
    assert await browser.evaluate("Object.values(sessionStorage)") == [key.secret]


async def test_a_refusal_is_one_sentence(browser: Browser, redis_url: str) -> None:
    async with running_stack(redis_url, max_requests=1) as stack:
        await opened(browser, stack.base_url)
        stack.scheduler.go.clear()
        waiting = asyncio.create_task(stack.complete())
        await stack.scheduler.popped.wait()
        await asked(browser)
        await browser.wait_for(ANSWERED)
        assert await browser.text(".answer .notice") == "The server is busy: try again in 2 seconds."
        stack.scheduler.go.set()
        assert (await waiting).status_code == 200


async def test_what_the_server_says_of_a_bad_request_is_shown(browser: Browser, stack: Stack) -> None:
    await opened(browser, stack.base_url)
    await browser.fill("[name=max_tokens]", "100000")
    await asked(browser)
    await browser.wait_for(ANSWERED)
    assert "max_tokens" in await browser.text(".answer .notice")


async def test_a_token_tells_its_rivals_to_pointer_and_keys(browser: Browser, stack: Stack) -> None:
    await opened(browser, stack.base_url)
    await asked(browser)
    await browser.wait_for(ANSWERED)
    await browser.hover(".token")
    rows = "[...document.querySelectorAll('#tooltip .candidate')].map((row) => row.innerText)"
    assert len(await browser.evaluate(rows)) == 5
    assert "100 %" in await browser.text("#tooltip .chosen")
    await browser.press("Escape")
    assert await browser.evaluate("document.getElementById('tooltip').hidden")
    await browser.evaluate("document.querySelector('.token').focus()")
    await browser.press("ArrowRight")
    assert await browser.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tooltip"
    assert "88.2 %" in await browser.text("#tooltip .chosen")  # e to the -1/8


@pytest.mark.parametrize(
    ("tokens", "text", "found"),
    [
        (["<s>", "Hel", "lo", "</s>"], "Hello", ["Hel", "lo"]),
        (["Hel", "lo", " there"], "Hello", ["Hel", "lo"]),
        (["Hel", "lo"], "Hell", ["Hel"]),
        (["<s>", "</s>"], "", []),
    ],
)
async def test_tokens_that_are_no_part_of_the_text_are_told_apart(
    browser: Browser, stack: Stack, tokens: list[str], text: str, found: list[str]
) -> None:
    await browser.open(stack.base_url)
    entries = [{"token": token, "bytes": list(token.encode()), "logprob": 0, "top_logprobs": []} for token in tokens]
    assert found == await browser.evaluate(
        "import('/playground/tokens.js').then(({ Tokens }) => { const tokens = new Tokens();"
        f" tokens.add({json.dumps(entries)}); tokens.find({json.dumps(text)});"
        " return [...tokens.node.children].filter((token) => !token.matches('.beyond')).map((it) => it.textContent); })"
    )


async def test_the_keyboard_alone_does_it(browser: Browser, stack: Stack) -> None:
    await opened(browser, stack.base_url)
    await browser.press("Tab")
    assert await browser.evaluate("document.activeElement.className") == "skip"
    await browser.press("Enter")
    assert await browser.evaluate("document.activeElement.id") == "prompt"
    await browser.type("Tell me")
    await browser.press("Enter", shift=True)
    await browser.type("a story.")
    await browser.press("Enter")
    await browser.wait_for(ANSWERED)
    assert await browser.evaluate("document.querySelector('.question').innerText") == "Tell me\na story."
    reached = set()
    for _ in range(60):
        await browser.press("Tab")
        reached.add(await browser.evaluate("document.activeElement.innerText || document.activeElement.name"))
    assert {"temperature", "stop", "Reset", "Copy", "Regenerate", "New chat", "Send", "Dark", "API"} <= reached


async def test_a_time_budget_is_a_bar_of_whatever_phases_come(browser: Browser, stack: Stack) -> None:
    await opened(browser, stack.base_url)
    shown = await browser.evaluate(
        "import('/playground/answer.js').then(({ Answer }) => { const answer = new Answer('m');"
        " const timings = { total_ms: 2002, queue_ms: 0, prefill_ms: 500, decode_ms: 1500, thinking_ms: 2 };"
        " answer.add({ choices: [], timings });"
        " return [[...answer.budget.querySelectorAll('li')].map((part) => part.textContent),"
        " [...answer.budget.querySelectorAll('.stack span')].map((part) => Number(part.style.flexGrow).toFixed(2))]; })"
    )
    assert shown == [["prefill 500 ms", "decode 1.50 s", "thinking 2.0 ms"], ["0.25", "0.75", "0.00"]]


async def test_the_cluster_is_followed(browser: Browser, stack: Stack) -> None:
    worker = seen("w0", step=3)
    worker.registration.price_per_hour = 1.25
    stack.scheduler.fleet.workers.append(worker)
    await opened(browser, stack.base_url)
    await browser.wait_for("document.querySelector('.worker')")
    card = await browser.text(".worker")
    for part in (
        "w0 decode healthy",
        "Batch 3 of 8, 1 waiting",
        "KV blocks 3 of 100",
        "Prefix hits 75.0 %",
        "1.25/h",
    ):
        assert part in card
    totals = await browser.text(".totals")
    for part in ("workers 1 healthy", "queued 0 high, 0 normal, 0 low", "cost per hour 1.25"):
        assert part in totals
    stack.scheduler.fleet = DescribeFleetResponse(scheduler_id="s", workers=[seen("w1")])
    await browser.wait_for("document.querySelector('.worker h3')?.textContent === 'w1'")
    assert await browser.evaluate("document.querySelectorAll('.worker').length") == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_the_theme_follows_the_system_until_it_is_chosen(browser: Browser, stack: Stack, scheme: str) -> None:
    other = "dark" if scheme == "light" else "light"
    await browser.prefer(prefers_color_scheme=scheme)
    await opened(browser, stack.base_url)
    theme = "document.documentElement.dataset.theme"
    assert await browser.evaluate(theme) == scheme
    await browser.click("#theme")
    assert await browser.evaluate(theme) == other
    await opened(browser, stack.base_url)
    assert await browser.evaluate(theme) == other


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_text_stands_out_from_what_it_lies_on(browser: Browser, stack: Stack, scheme: str) -> None:
    for number, condition in enumerate(FleetWorker.Condition.values()[1:]):
        stack.scheduler.fleet.workers.append(seen(f"w{number}", condition=condition))
    await browser.prefer(prefers_color_scheme=scheme)
    await opened(browser, stack.base_url)
    await browser.wait_for("document.querySelector('.worker')")
    assert await browser.evaluate(FAINT) == []
    await asked(browser)
    await browser.wait_for(ANSWERED)
    await browser.hover(".token")
    await browser.fill("[name=max_tokens]", "100000")
    await asked(browser)
    await browser.wait_for("document.querySelector('.answer:last-child .notice:not([hidden])')")
    assert await browser.evaluate(FAINT) == []


async def test_nothing_moves_for_who_wants_less_motion(browser: Browser, stack: Stack) -> None:
    stack.scheduler.fleet.workers.append(seen("w0"))
    await opened(browser, stack.base_url)
    await browser.wait_for("document.querySelector('.bar')")
    moves = "getComputedStyle(document.querySelector('.bar'), '::before').transitionProperty"
    assert await browser.evaluate(moves) == "width"
    await browser.prefer(prefers_reduced_motion="reduce")
    assert await browser.evaluate(moves) == "none"


async def test_a_narrow_screen_has_one_pane_at_a_time_and_never_scrolls_sideways(
    browser: Browser, stack: Stack
) -> None:
    stack.scheduler.fleet.workers.append(seen("a-worker-with-a-name-that-is-longer-than-a-phone-is-wide-in-any-font"))
    await browser.resize(360, 740)
    await opened(browser, stack.base_url)
    await asked(browser, "W" * 200)
    await browser.wait_for(ANSWERED)
    for pane in ("settings", "cluster", "chat"):
        await browser.click(f"[data-show={pane}]")
        visible = "[...document.querySelectorAll('.pane')].filter((pane) => pane.checkVisibility()).length"
        assert await browser.evaluate(visible) == 1
        if pane == "cluster":
            await browser.wait_for("document.querySelector('.worker')?.checkVisibility()")
        assert await browser.evaluate("document.scrollingElement.scrollWidth") == 360
        wider = "[...document.querySelectorAll('.pane, #turns')].filter((it) => it.scrollWidth > it.clientWidth).length"
        assert await browser.evaluate(wider) == 0
