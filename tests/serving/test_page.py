"""The web page of the server: its file and headers, and what it does in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from threading import Thread
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest

from psannlm.serving.page import load_page

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the content of its scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline: dict[str, list[str]] = {"script": [], "style": []}
        self._tag = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._tag = tag

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""

    def handle_data(self, data: str) -> None:
        if self._tag in self.inline:
            self.inline[self._tag].append(data)


PAGE = load_page()
ELEMENTS = Elements(PAGE.content.decode("utf-8"))


def test_page_policy_allows_its_one_script_and_style() -> None:
    policy = PAGE.headers["Content-Security-Policy"]
    for kind, contents in ELEMENTS.inline.items():
        (content,) = contents
        digest = base64.b64encode(hashlib.sha256(content.encode("utf-8")).digest()).decode("ascii")
        assert re.findall(rf"{kind}-src ([^;]*)", policy) == [f"'sha256-{digest}'"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy


def test_page_refers_to_nothing_outside_itself() -> None:
    """No address of another host or file, no handler or style in an attribute, which the policy would block."""
    for tag, attributes in ELEMENTS.elements:
        assert not {"src", "srcset", "action", "formaction", "style"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")], tag
        assert (attributes.get("href") or "data:").startswith("data:"), tag
    (script,), (style,) = ELEMENTS.inline["script"], ELEMENTS.inline["style"]
    assert not re.search(r"url\(|@import", style)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|localStorage", script)


def test_page_fields_have_names_and_errors() -> None:
    named = {attributes.get("for") for tag, attributes in ELEMENTS.elements if tag == "label"}
    ids = {attributes.get("id") for _, attributes in ELEMENTS.elements}
    fields = [
        attributes
        for tag, attributes in ELEMENTS.elements
        if tag in ("input", "textarea") and attributes.get("type") not in ("range", "checkbox")
    ]
    assert len(fields) >= 10
    for attributes in fields:
        assert attributes["id"] in named
        assert set((attributes.get("aria-describedby") or "").split()) <= ids
        if "readonly" not in attributes:
            assert f"{attributes['id']}-error" in (attributes["aria-describedby"] or "").split()


# ---- A server that speaks the protocol, with the text of a script in the place of a model ----

WORDS = [
    " the",
    " value",
    " of",
    " an",
    " object",
    " is",
    "n instance",
    ", which",
    ".\n",
    " The",
    " class",
    " may",
    " be",
]
HOSTILE = [
    "<img src=x onerror=\"document.title='owned'\">",
    "<script>document.title='owned'</script>",
    " \x1b[31mred\x1b[0m",
    "\u202eevil\u202c",
    " שלום",
    "é",
    "🌊",
]
KEY = "0123-secret"


class Script(BaseHTTPRequestHandler):
    """Completions of random words, one per event; words of HOSTILE among them for a prompt that starts with h."""

    protocol_version = "HTTP/1.1"
    server: Site

    def log_message(self, *arguments: object) -> None:
        """Nothing goes to standard error."""

    def do_GET(self) -> None:
        if self.path == "/":
            self.answer(200, PAGE.content, PAGE.headers)
        elif self.path == "/health":
            self.answer(200, b"{}")
        elif not self.is_refused():
            model = {"id": "tide <b>model</b>", "object": "model", "max_model_len": 4096}
            self.answer(200, json.dumps({"object": "list", "data": [model]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.is_refused():
            return
        if body["max_tokens"] > 4096:
            self.refuse(400, f"max_tokens {body['max_tokens']} is over the limit of 4096", "max_tokens")
        elif body["prompt"] == "busy":
            self.refuse(429, "64 requests are waiting already")
        else:
            self.server.n_running += 1
            try:
                self.stream(body)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                self.server.n_running -= 1

    def stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        random = Random(body["seed"])
        offset = len(body["prompt"])
        for number in range(body["max_tokens"]):
            if body["prompt"] == "cut" and number == 5:
                self.close_connection = True
                return
            is_hostile = body["prompt"].startswith("h") and random.random() < 0.3
            words = random.sample(WORDS, 5)
            text = words[0] if not is_hostile else random.choice(HOSTILE)
            top = {word: math.log(p) for word, p in zip(words, sorted(random.sample(range(1, 20), 5)), strict=True)}
            top = {word: value - math.log(100) for word, value in top.items()}
            logprob = top.get(text, -4.5)
            tokens = [text] if text != "é" else ["bytes:\\xc3", "bytes:\\xa9"]
            logprobs = {
                "tokens": tokens,
                "token_logprobs": [logprob] * len(tokens),
                "top_logprobs": [top] * len(tokens),
                "text_offset": [offset] * len(tokens),
            }
            offset += len(text)
            self.event({"choices": [{"index": 0, "text": text, "logprobs": logprobs, "finish_reason": None}]})
            time.sleep(0.01)
        self.event({"choices": [{"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}]})
        usage = {"prompt_tokens": 3, "completion_tokens": body["max_tokens"], "total_tokens": 3 + body["max_tokens"]}
        self.event({"choices": [], "usage": usage})
        self.chunk(b"data: [DONE]\r\n\r\n")
        self.chunk(b"")

    def event(self, content: object) -> None:
        self.chunk(f": ping\r\n\r\ndata: {json.dumps(content)}\r\n\r\n".encode())

    def chunk(self, content: bytes) -> None:
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")

    def is_refused(self) -> bool:
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self.refuse(401, "the API key is missing or wrong")
            return True
        return False

    def refuse(self, status: int, message: str, param: str | None = None) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": param, "code": None}
        self.answer(status, json.dumps({"error": error}).encode(), {"Retry-After": "3"} if status == 429 else {})

    def answer(self, status: int, content: bytes, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class Site(ThreadingHTTPServer):
    """The scripted server on a free port of loopback."""

    daemon_threads = True

    def __init__(self, key: str = "") -> None:
        super().__init__(("127.0.0.1", 0), Script)
        self.key, self.n_running = key, 0
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def wait_until_idle(self) -> None:
        for _ in range(300):
            if not self.n_running:
                return
            time.sleep(0.01)
        raise AssertionError("the request still runs")


@contextmanager
def running(site: Site) -> Iterator[Site]:
    thread = Thread(target=site.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.shutdown()
        site.server_close()
        thread.join()


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with running(Site()) as site:
        yield site


# ---- In a browser ----

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


# What the browser logs of the attempt of a test to write HTML into the page.
EXPECTED_FAILURES = ("This document requires 'TrustedHTML' assignment. The action has been blocked.",)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium: install chromium or google-chrome to test the page")
    playwright_api = pytest.importorskip("playwright.sync_api")
    with playwright_api.sync_playwright() as playwright:
        # Without the sandbox it also runs as root, as in a container; it visits nothing but this machine's server.
        with playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser:
            yield browser


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Return an opener of the page in a context of its own; nothing may fail in its script or against its policy."""
    contexts: list[BrowserContext] = []
    failures: list[str] = []

    def note(line: ConsoleMessage) -> None:
        # The browser logs every answer of 400 and above.
        if "Failed to load resource" not in line.text:
            failures.append(line.text)

    def open_page(url: str, *, until: str = ".state.ready", viewport: Any = WIDE, **settings: Any) -> Page:
        context = browser.new_context(viewport=viewport, **settings)
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.on("console", note)
        page.goto(url)
        page.wait_for_selector(until)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [text for text in failures if text not in EXPECTED_FAILURES] == []


def generate(page: Page, prompt: str, **settings: object) -> str:
    """Fill in the form, generate and return the text of the continuation."""
    page.fill("#prompt", prompt)
    for name, value in settings.items():
        page.fill(f"#{name}", str(value))
    page.keyboard.press("Control+Enter")
    finished(page)
    return continuation(page)


def finished(page: Page) -> None:
    page.wait_for_selector("#generate:enabled")


def continuation(page: Page) -> str:
    return "".join(page.locator("#text .token").all_text_contents())


def test_page_shows_text_while_it_streams(visit: Callable[..., Page], site: Site) -> None:
    page = visit(site.url)
    page.fill("#prompt", "The tide")
    page.fill("#max_tokens", "100")
    page.press("#prompt", "Control+Enter")
    page.wait_for_selector("#text .token >> nth=3")
    assert page.locator("#stop-button").is_enabled()
    n_seen = page.locator("#text .token").count()
    assert n_seen < 100
    finished(page)
    assert page.locator("#text .token").count() > n_seen
    assert "limit of new tokens" in page.inner_text("#status")
    assert re.search(r"\d+ tokens/s\s+\d+ m?s to first token\s+100 tokens", page.inner_text("#figures"))


def test_page_stop_ends_text_and_keeps_it(visit: Callable[..., Page], site: Site) -> None:
    page = visit(site.url)
    page.fill("#prompt", "The tide")
    page.fill("#max_tokens", "100")
    page.press("#prompt", "Control+Enter")
    page.wait_for_selector("#text .token >> nth=3")
    page.click("#stop-button")
    finished(page)
    assert re.search(r"Stopped by you after \d+ tokens", page.inner_text("#status"))
    assert 4 <= page.locator("#text .token").count() < 100
    site.wait_until_idle()


def test_page_seed_decides_text(visit: Callable[..., Page], site: Site) -> None:
    page = visit(site.url)
    seed = 2**62 + 1  # more than the numbers of JavaScript hold
    first = generate(page, "The tide", max_tokens=12, temperature=1.5, top_p=1, seed=seed)
    assert generate(page, "The tide", seed=seed + 1) != first
    assert generate(page, "The tide", seed=seed) == first
    page.uncheck("#keep")
    page.press("#prompt", "Control+Enter")
    finished(page)
    assert page.input_value("#seed") != str(seed)


def test_page_explains_server_error_at_field(visit: Callable[..., Page], site: Site) -> None:
    page = visit(site.url)
    page.fill("#prompt", "The tide")
    page.fill("#max_tokens", "99999")
    page.press("#prompt", "Control+Enter")
    error = page.locator("#max_tokens-error")
    error.wait_for()
    assert "99999" in error.inner_text()
    field = page.locator("#max_tokens")
    assert field.get_attribute("aria-invalid") == "true"
    assert field.evaluate("field => field === document.activeElement")
    page.keyboard.type("8")
    assert not error.is_visible()


def test_page_explains_wrong_values_before_sending(visit: Callable[..., Page], site: Site) -> None:
    page = visit(site.url)
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url))
    wrong = {"top_p": "1.5", "temperature": "-1", "max_tokens": "2.5", "seed": "x", "stop": "a\nb\nc\nd\ne"}
    for field, value in wrong.items():
        page.fill(f"#{field}", value)
    page.press("#prompt", "Control+Enter")
    for field in wrong:
        assert page.locator(f"#{field}-error").inner_text()
        assert page.locator(f"#{field}").get_attribute("aria-invalid") == "true"
    assert page.evaluate("() => document.activeElement.id") == "max_tokens"
    assert sent == []


def test_page_link_restores_settings_unsent(visit: Callable[..., Page], site: Site) -> None:
    page = visit(site.url, permissions=["clipboard-read", "clipboard-write"])
    settings = {"prompt": "L'été &\n#1 ✓", "max_tokens": "9", "temperature": "1.25", "top_k": "40", "seed": str(2**62)}
    for name, value in settings.items():
        page.fill(f"#{name}", value)
    page.fill("#stop", "\\n\nfin\\\\")
    page.click("#copy-link")
    link = page.evaluate("() => navigator.clipboard.readText()")
    requested: list[str] = []
    other = visit("about:blank", until="html")
    other.on("request", lambda request: requested.append(request.url))
    other.goto(link)
    other.wait_for_selector(".state.ready")
    assert {name: other.input_value(f"#{name}") for name in settings} == settings
    assert other.input_value("#stop") == "\\n\nfin\\\\"
    assert other.is_checked("#keep")
    assert requested
    assert not [url for url in requested if str(2**62) in url]


def test_page_works_by_keyboard(visit: Callable[..., Page], site: Site) -> None:
    page = visit(site.url)
    focused = lambda: page.evaluate("() => document.activeElement.id")  # noqa: E731
    order = []
    for _ in range(14):
        page.keyboard.press("Tab")
        order.append(focused())
    assert order[0] == "prompt"
    assert order.index("temperature") < order.index("seed") < order.index("generate")
    page.focus("#prompt")
    page.keyboard.type("The tide")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#text .token >> nth=3")
    page.keyboard.press("Escape")
    finished(page)
    assert "Stopped by you" in page.inner_text("#status")
    page.focus("#text .token >> nth=0")
    page.keyboard.press("ArrowRight")
    chosen = page.locator("#text .token >> nth=1")
    assert chosen.evaluate("token => token === document.activeElement")
    assert chosen.evaluate("token => getComputedStyle(token).outlineStyle") == "solid"
    assert page.locator("#card").is_visible()
    assert chosen.get_attribute("aria-describedby") == "card"
    page.keyboard.press("Escape")
    assert not page.locator("#card").is_visible()


def test_page_card_lists_alternatives_of_token(visit: Callable[..., Page], site: Site) -> None:
    page = visit(site.url)
    generate(page, "The tide", max_tokens=8, seed=1)
    page.hover("#text .token >> nth=2")
    rows = page.locator("#card li").all_inner_texts()
    assert 5 <= len(rows) <= 6
    assert page.locator("#card li.chosen").count() == 1
    percents = [float(re.search(r"([\d.]+) %", row)[1]) for row in rows[:5]]
    assert percents == sorted(percents, reverse=True)
    page.hover("#prompt")
    page.wait_for_selector("#card", state="hidden")


@pytest.mark.parametrize("viewport", [NARROW, WIDE], ids=["390", "1280"])
def test_page_never_scrolls_sideways(visit: Callable[..., Page], site: Site, viewport: Any) -> None:
    page = visit(site.url, viewport=viewport)
    overflow = "() => document.documentElement.scrollWidth - innerWidth"
    assert page.evaluate(overflow) <= 0
    if page.locator("#unfold").is_visible():
        page.click("#unfold")
    generate(page, "m" * 300, max_tokens=8, temperature=9)
    for at in (0, 3, -1):
        page.hover(f"#text .token >> nth={at}")
        assert page.locator("#card").is_visible()
        assert page.evaluate(overflow) <= 0
    page.fill("#top_p", "7")
    page.press("#prompt", "Control+Enter")
    assert page.evaluate(overflow) <= 0


CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3]));
  const ground = (node) => {
    const under = node.parentElement ? ground(node.parentElement) : rgba("Canvas").slice(0, 3);
    return over(rgba(getComputedStyle(node).backgroundColor), under);
  };
  const light = (color) => {
    const [r, g, b] = color.map((v) => (v / 255 <= 0.04045 ? v / 3294.6 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (color, under) => {
    const [a, b] = [light(over(rgba(color), under)), light(under)];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  };
  const found = [];
  for (const node of document.body.querySelectorAll("*")) {
    const hasText = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    const isField = node.matches("input:not([type=range], [type=checkbox]), textarea");
    if (!(hasText || isField) || !node.checkVisibility() || node.closest("script, :disabled, .unseen")) continue;
    const under = ground(node);
    found.push([node.id || node.className || node.tagName, contrast(getComputedStyle(node).color, under)]);
    if (isField) found.push([`${node.id} placeholder`, contrast(getComputedStyle(node, "::placeholder").color, under)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_text_has_contrast(visit: Callable[..., Page], site: Site, scheme: Any) -> None:
    page = visit(site.url, color_scheme=scheme)
    ground = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    generate(page, "The tide", max_tokens=30, temperature=3, top_p=1, seed=1)
    page.fill("#top_p", "7")
    page.press("#prompt", "Control+Enter")
    page.hover("#text .token >> nth=2")
    measured = page.evaluate(CONTRASTS)
    assert len(measured) > 60
    assert [(name, ratio) for name, ratio in measured if ratio < 4.5] == []


def test_page_moves_nothing_where_motion_is_unwanted(visit: Callable[..., Page], site: Site) -> None:
    page = visit(site.url, reduced_motion="reduce")
    page.fill("#prompt", "The tide")
    page.press("#prompt", "Control+Enter")
    page.wait_for_selector("#text .caret")
    assert page.evaluate("() => document.getAnimations().length") == 0
    page.keyboard.press("Escape")


def test_page_never_runs_text_of_the_model(visit: Callable[..., Page], site: Site) -> None:
    page = visit(site.url)
    title = page.title()
    text = generate(page, f"h {HOSTILE[0]}", max_tokens=120, seed=1)
    assert HOSTILE[0] in text
    assert HOSTILE[1] in text
    assert "é" in text
    assert "\\x1b" in text
    assert "\\u202e" in text
    assert not re.search("[\x00-\x08\x0e-\x1f\u202e]", page.inner_text("#text"))
    page.hover(".token:has-text('img') >> nth=0")
    assert page.locator("main, header").locator("img, script, a, b:not(#model, #figures b), iframe").count() == 0
    assert page.title() == title
    assert "tide <b>model</b>" in title


def test_page_refuses_text_as_html(visit: Callable[..., Page], site: Site) -> None:
    """Even if its own script had a fault that put text of others into the page as HTML."""
    page = visit(site.url)
    with pytest.raises(Exception, match="TrustedHTML"):
        page.evaluate("() => { document.body.innerHTML = '<img src=x onerror=alert(1)>'; }")


def test_page_announces_states_and_not_tokens(visit: Callable[..., Page], site: Site) -> None:
    page = visit(site.url)
    generate(page, "The tide", max_tokens=4)
    live = page.locator("[role=status], [role=alert], [aria-live]")
    assert set(live.evaluate_all("nodes => nodes.map((node) => node.id)")) == {"state", "status", "failure"}
    assert page.locator("#text [role], #text [aria-live]").count() == 0
    for label in ("Prompt", "Max new tokens", "Temperature", "Top-p", "Top-k", "Min-p", "Repetition penalty", "Seed"):
        assert page.get_by_label(label, exact=True).count() == 1


def test_page_stretches_are_tokens_or_whole_characters(visit: Callable[..., Page], site: Site) -> None:
    """Bytes of a character are one stretch, with both in its card; offsets count characters, of any plane."""
    page = visit(site.url)
    generate(page, "h", max_tokens=60, seed=1)
    stretches = page.locator("#text .token").all_text_contents()
    assert "🌊" in stretches
    assert set(stretches) <= {re.sub("[\x1b\u202c\u202e]", lambda c: ascii(c[0])[1:-1], w) for w in WORDS + HOSTILE}
    page.locator("#text .token", has_text=re.compile("^é$")).first.hover()
    assert page.locator("#card > p").all_inner_texts() == ["bytes:\\xc3\n1.1 %", "bytes:\\xa9\n1.1 %"]


def test_page_asks_for_key_only_where_needed(visit: Callable[..., Page], site: Site) -> None:
    assert not visit(site.url).locator("#key").is_visible()
    with running(Site(KEY)) as locked:
        page = visit(locked.url, until="#key:visible")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        page.wait_for_selector("#key-error:visible")
        assert page.evaluate("() => document.activeElement.id") == "key"
        page.fill("#key", KEY)
        page.press("#key", "Enter")
        page.wait_for_selector(".state.ready")
        assert not page.locator("#key").is_visible()
        assert len(generate(page, "The tide", max_tokens=3)) > 3
        assert page.evaluate("() => [localStorage.length, document.cookie]") == [0, ""]
        page.reload()
        page.wait_for_selector(".state.ready")


def test_page_keeps_text_when_connection_breaks(visit: Callable[..., Page], site: Site) -> None:
    page = visit(site.url)
    text = generate(page, "cut", max_tokens=60)
    assert "connection ended before the text" in page.inner_text("#failure")
    assert len(page.locator("#text .token").all()) == 5
    generate(page, "busy")
    assert "Try again in 3 seconds" in page.inner_text("#failure")
    assert continuation(page) == text
    assert "connection" not in page.inner_text("#failure")
