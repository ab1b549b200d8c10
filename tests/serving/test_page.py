"""The web page of the server: its file and headers, and what it does in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest

from psannlm.errors import GenerationError
from psannlm.generation.engine import Engine
from psannlm.serving.page import load_page
from psannlm.serving.scheduler import Scheduler
from psannlm.tokenizers.base import Tokenizer

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


# ---- A server of a tiny model whose vocabulary is words, some of them hostile ----

WORDS = [" the", " value", " of", " an", " object", " is", "n instance", ", which", ".\n", " class", " may", " be"]
HOSTILE = [
    "<img src=x onerror=\"document.title='owned'\">",
    "<script>document.title='owned'</script>",
    " \x1b[31mred\x1b[0m",
    "\u202eevil\u202c",
    " שלום",
    "🌊",
]
# The two bytes of é are tokens of their own, often enough to follow each other.
PIECES = [piece.encode() for piece in WORDS + HOSTILE] + [b"\xc3", b"\xa9"] * 4
MODEL = "tide <b>model</b>"
KEY = "0123456789-secret"
MAX_TOKENS = 300


class WordTokenizer(Tokenizer):
    """One id per piece; a prompt only steers the model, so that its characters are given ids without regard to them."""

    backend = "words"
    pad_id, bos_id, unk_id = range(3)
    # No token ends a text: tests decide how long it is.
    eos_id = -1
    vocab_size = 3 + len(PIECES)

    def encode(self, text: str) -> list[int]:
        return [3 + ord(character) % len(PIECES) for character in text]

    def encode_batch(self, texts: Sequence[str], threads: int = 0) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(PIECES[id - 3] for id in ids if id >= 3).decode("utf-8", errors="replace")

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [repr(PIECES[id - 3])[2:-1] if id >= 3 else f"<{id}>" for id in ids]

    def to_bytes(self) -> bytes:
        return b"words"


class SlowScheduler(Scheduler):
    """A scheduler with the speed of a larger model, so that a text can be stopped before its end."""

    def step(self) -> None:
        time.sleep(0.005)
        super().step()


@pytest.fixture(scope="module")
def start_site(build_tiny: Callable[..., Any], start_server: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Return a starter of servers of the model; its keywords are those of the server."""
    model = build_tiny(vocab_size=WordTokenizer.vocab_size, max_seq_len=400)
    servers = []

    def start(key: str | None = None, *, max_batch: int = 4, max_queue: int = 64) -> Any:
        scheduler = SlowScheduler(Engine(model), WordTokenizer(), max_batch=max_batch)
        server = start_server(scheduler, key=key, max_tokens=MAX_TOKENS, max_queue=max_queue)
        server.service.model = MODEL
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def site(start_site: Callable[..., Any]) -> Any:
    return start_site()


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


def wait_until_idle(site: Any) -> None:
    deadline = time.monotonic() + 10
    while site.scheduler.has_work:
        assert time.monotonic() < deadline, "a row is not free"
        time.sleep(0.01)


def continuation(page: Page) -> str:
    return "".join(page.locator("#text .token").all_text_contents())


@pytest.mark.slow
def test_page_shows_text_while_it_streams(visit: Callable[..., Page], site: Any) -> None:
    page = visit(site.url)
    page.fill("#prompt", "The tide")
    page.fill("#max_tokens", "60")
    page.press("#prompt", "Control+Enter")
    # One moment at which text is there and the request still runs.
    page.wait_for_selector("#form:has(#stop-button:enabled) #text .token >> nth=3")
    finished(page)
    assert "limit of new tokens" in page.inner_text("#status")
    assert re.search(r"\d+ tokens/s\s+[\d.]+ m?s to first token\s+60 tokens", page.inner_text("#figures"))


@pytest.mark.slow
def test_page_stop_ends_text_and_keeps_it(visit: Callable[..., Page], site: Any) -> None:
    n_generated = site.scheduler.counters.n_generated
    page = visit(site.url)
    page.fill("#prompt", "The tide")
    page.fill("#max_tokens", str(MAX_TOKENS))
    page.press("#prompt", "Control+Enter")
    page.wait_for_selector("#text .token >> nth=3")
    page.click("#stop-button")
    finished(page)
    assert re.search(r"Stopped by you after \d+ tokens", page.inner_text("#status"))
    assert 4 <= page.locator("#text .token").count() < MAX_TOKENS
    wait_until_idle(site)
    assert site.scheduler.counters.n_generated - n_generated < MAX_TOKENS


@pytest.mark.slow
def test_page_seed_decides_text(visit: Callable[..., Page], site: Any) -> None:
    page = visit(site.url)
    seed = 2**62 + 1  # more than the numbers of JavaScript hold
    first = generate(page, "The tide", max_tokens=12, temperature=1.5, top_p=1, seed=seed)
    assert generate(page, "The tide", seed=seed + 1) != first
    assert generate(page, "The tide", seed=seed) == first
    page.uncheck("#keep")
    page.press("#prompt", "Control+Enter")
    finished(page)
    assert page.input_value("#seed") != str(seed)


@pytest.mark.slow
def test_page_explains_server_error_at_field(visit: Callable[..., Page], site: Any) -> None:
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


@pytest.mark.slow
def test_page_explains_wrong_values_before_sending(visit: Callable[..., Page], site: Any) -> None:
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


@pytest.mark.slow
def test_page_link_restores_settings_unsent(visit: Callable[..., Page], site: Any) -> None:
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


@pytest.mark.slow
def test_page_works_by_keyboard(visit: Callable[..., Page], site: Any) -> None:
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


@pytest.mark.slow
def test_page_card_lists_alternatives_of_token(visit: Callable[..., Page], site: Any) -> None:
    page = visit(site.url)
    generate(page, "The tide", max_tokens=30, temperature=2, top_p=1, seed=1)
    at, word = next((at, text) for at, text in enumerate(page.locator(".token").all_text_contents()) if text in WORDS)
    page.hover(f"#text .token >> nth={at}")
    rows = page.locator("#card li").all_inner_texts()
    assert 2 <= len(rows) <= 6
    visible = word.replace(" ", "␣").replace("\n", "↵")
    assert page.locator("#card li.chosen code").all_text_contents() == [f"{visible} (chosen)"]
    percents = [float(number) for row in rows for number in re.findall(r"([\d.]+) %$", row)]
    assert len(percents) == len(rows)
    assert percents[:5] == sorted(percents[:5], reverse=True)
    page.hover("#prompt")
    page.wait_for_selector("#card", state="hidden")


@pytest.mark.slow
@pytest.mark.parametrize("viewport", [NARROW, WIDE], ids=["390", "1280"])
def test_page_never_scrolls_sideways(visit: Callable[..., Page], site: Any, viewport: Any) -> None:
    page = visit(site.url, viewport=viewport)
    overflow = "() => document.documentElement.scrollWidth - innerWidth"
    assert page.evaluate(overflow) <= 0
    if page.locator("#unfold").is_visible():
        page.click("#unfold")
    generate(page, "m" * 300, max_tokens=8, temperature=9, seed=1)
    for at in (0, 3, -1):
        page.hover(f"#text .token >> nth={at}")
        assert page.locator("#card").is_visible()
        assert page.evaluate(overflow) <= 0
        # It may lie over the next token.
        page.keyboard.press("Escape")
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


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_text_has_contrast(visit: Callable[..., Page], site: Any, scheme: Any) -> None:
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


@pytest.mark.slow
def test_page_moves_nothing_where_motion_is_unwanted(visit: Callable[..., Page], site: Any) -> None:
    page = visit(site.url, reduced_motion="reduce")
    page.fill("#prompt", "The tide")
    page.press("#prompt", "Control+Enter")
    page.wait_for_selector("#text .caret")
    assert page.evaluate("() => document.getAnimations().length") == 0
    page.keyboard.press("Escape")


@pytest.mark.slow
def test_page_never_runs_text_of_the_model(visit: Callable[..., Page], site: Any) -> None:
    page = visit(site.url)
    title = page.title()
    text = generate(page, HOSTILE[0], max_tokens=40, temperature=2, top_p=1, seed=3)
    assert HOSTILE[0] in text
    assert HOSTILE[1] in text
    assert "é" in text
    assert "\\x1b" in text
    assert "\\u202e" in text
    assert not re.search("[\x00-\x08\x0e-\x1f\u202e]", page.inner_text("#text"))
    page.hover(".token:has-text('img') >> nth=0")
    assert page.locator("main, header").locator("img, script, a, b:not(#model, #figures b), iframe").count() == 0
    assert page.title() == title
    assert MODEL in title


@pytest.mark.slow
def test_page_refuses_text_as_html(visit: Callable[..., Page], site: Any) -> None:
    """Even if its own script had a fault that put text of others into the page as HTML."""
    page = visit(site.url)
    with pytest.raises(Exception, match="TrustedHTML"):
        page.evaluate("() => { document.body.innerHTML = '<img src=x onerror=alert(1)>'; }")


@pytest.mark.slow
def test_page_announces_states_and_not_tokens(visit: Callable[..., Page], site: Any) -> None:
    page = visit(site.url)
    generate(page, "The tide", max_tokens=4)
    live = page.locator("[role=status], [role=alert], [aria-live]")
    assert set(live.evaluate_all("nodes => nodes.map((node) => node.id)")) == {"state", "status", "failure"}
    assert page.locator("#text [role], #text [aria-live]").count() == 0
    for label in ("Prompt", "Max new tokens", "Temperature", "Top-p", "Top-k", "Min-p", "Repetition penalty", "Seed"):
        assert page.get_by_label(label, exact=True).count() == 1


@pytest.mark.slow
def test_page_stretches_are_tokens_or_whole_characters(visit: Callable[..., Page], site: Any) -> None:
    """Each stretch of text has the tokens that the API gives at its place; offsets count characters of any plane."""
    page = visit(site.url)
    text = generate(page, "The tide", max_tokens=40, temperature=2, top_p=1, seed=0)
    settings = {"temperature": 2.0, "top_p": 1.0, "max_tokens": 40, "seed": 0, "logprobs": 5}
    body = json.dumps({"model": MODEL, "prompt": "The tide", **settings}).encode()
    request = urllib.request.Request(f"{site.url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        (choice,) = json.load(response)["choices"]
    whole, offsets = choice["text"], choice["logprobs"]["text_offset"]
    starts = sorted({offset for offset in offsets if offset < len(whole)})
    expected = [whole[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]
    assert page.locator("#text .token").all_text_contents() == list(map(shown, expected))
    assert text == shown(whole)
    assert {"🌊", "é"} <= set(expected)
    page.locator("#text .token", has_text=re.compile("^é$")).first.hover()
    at = offsets.index(starts[expected.index("é")])
    assert page.locator("#card > p code").all_text_contents() == choice["logprobs"]["tokens"][at : at + 2]
    assert offsets[at] == offsets[at + 1]


def shown(text: str) -> str:
    """The text with the control characters of HOSTILE as escapes."""
    return re.sub("[\x1b\u202c\u202e]", lambda character: ascii(character[0])[1:-1], text)


@pytest.mark.slow
def test_page_asks_for_key_only_where_needed(visit: Callable[..., Page], start_site: Callable[..., Any]) -> None:
    locked = start_site(KEY)
    page = visit(locked.url, until="#key:visible")
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    page.wait_for_selector("#key-error:visible")
    assert page.evaluate("() => document.activeElement.id") == "key"
    page.fill("#key", KEY)
    page.press("#key", "Enter")
    page.wait_for_selector(".state.ready")
    assert not page.locator("#key").is_visible()
    assert generate(page, "The tide", max_tokens=3)
    assert page.evaluate("() => [localStorage.length, document.cookie]") == [0, ""]
    page.reload()
    page.wait_for_selector(".state.ready")


@pytest.mark.slow
def test_page_waits_for_model_to_load(visit: Callable[..., Page], start_site: Callable[..., Any]) -> None:
    """The key is accepted meanwhile."""
    locked = start_site(KEY)
    locked.service.engine.is_ready = False
    page = visit(locked.url, until="#key:visible")
    page.fill("#key", KEY)
    page.press("#key", "Enter")
    page.wait_for_selector("#key", state="hidden")
    page.wait_for_selector("#state:has-text('the model is loading')")
    locked.service.engine.is_ready = True
    page.wait_for_selector(".state.ready")


def test_page_without_key_is_refused_and_shown(start_site: Callable[..., Any]) -> None:
    """The answer to a request without the key has the status of a refusal; its body is the page, which asks for it."""
    locked = start_site(KEY)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(locked.url, timeout=30)
    with refused.value as answer:
        assert answer.status == 401
        # No dialog of the browser's, after which it would send the key unasked, also for pages of other sites.
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert answer.headers["Content-Security-Policy"] == PAGE.headers["Content-Security-Policy"]
        assert answer.read() == PAGE.content


@pytest.mark.slow
def test_page_keeps_text_when_connection_breaks(visit: Callable[..., Page], site: Any) -> None:
    page = visit(site.url)
    text = generate(page, "The tide", max_tokens=5)
    page.route("**/v1/completions", lambda route: route.abort("connectionrefused"))
    assert generate(page, "The tide") == text
    assert "does not answer" in page.inner_text("#failure")
    part = {"index": 0, "text": "half", "logprobs": None, "finish_reason": None}
    broken = f": ping\r\n\r\ndata: {json.dumps({'choices': [part]})}\r\n\r\n"
    page.unroute("**/v1/completions")
    page.route("**/v1/completions", lambda route: route.fulfill(body=broken, content_type="text/event-stream"))
    generate(page, "The tide")
    assert "connection ended before the text" in page.inner_text("#failure")
    assert page.inner_text("#text") == "The tidehalf"


@pytest.mark.slow
def test_page_explains_full_queue(visit: Callable[..., Page], start_site: Callable[..., Any]) -> None:
    busy = start_site(max_batch=1, max_queue=0)
    first, second = visit(busy.url), visit(busy.url)
    first.fill("#max_tokens", str(MAX_TOKENS))
    first.press("#prompt", "Control+Enter")
    first.wait_for_selector("#text .token >> nth=3")
    generate(second, "The tide")
    assert re.search(r"busy.* Try again in \d+ seconds?\.", second.inner_text("#failure"))
    first.keyboard.press("Escape")
    wait_until_idle(busy)
    generate(second, "The tide", max_tokens=2)
    assert not second.locator("#failure").is_visible()


@pytest.mark.slow
def test_page_shows_failure_within_stream(
    visit: Callable[..., Page], start_site: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = start_site()
    page = visit(broken.url)
    page.fill("#max_tokens", str(MAX_TOKENS))
    page.press("#prompt", "Control+Enter")
    page.wait_for_selector("#text .token >> nth=3")

    def fail() -> None:
        raise GenerationError("the model's logits are not finite")

    monkeypatch.setattr(broken.scheduler, "step", fail)
    finished(page)
    assert "logits are not finite" in page.inner_text("#failure")
    assert page.locator("#text .token").count() > 3
