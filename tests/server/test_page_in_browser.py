"""The page at `/` in real headless Chromium: what a user does and sees."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("selenium", reason="the page is tested with Selenium")

from selenium.webdriver.common.keys import Keys

from .browser import Browser, find_chromium
from .conftest import Server, serving, serving_endless
from .raw_http import connect, request

pytestmark = pytest.mark.slow  # Chromium takes seconds to start

HOSTILE = (
    '<img src=x onerror="document.title=\'owned\'"><script>document.title="owned"</script>'
    "<b>bold</b> &lt;i&gt;\n```<u>\n</code></pre><h1>big</h1>\n```\n`<s>`"
)


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium, for all tests here: each loads the page anew."""
    find_chromium()
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(window: Browser, server: Server) -> Iterator[Browser]:
    """The page over the tiny model. Its console must stay empty, and it asks no other host."""
    window.resize(1280, 860)
    window.use_scheme("light")
    window.driver.get("about:blank")  # so that an earlier page asks no more
    window.errors(), window.requested()
    window.open(server.url)
    yield window
    assert window.errors() == []
    assert {url for url in window.requested() if not url.startswith(server.url)} == set()


def test_a_message_is_answered_with_its_figures(page: Browser) -> None:
    page.set_field("max_tokens", "5")
    page.set_field("temperature", "0")
    page.set_field("seed", "3")
    page.ask("Hello")
    first = page.wait_for_answer()
    assert first and page.text(".user") == "Hello"
    assert re.search(r"[\d.]+ tokens/s · 5 tokens · first after", page.text(".figure-line"))
    assert "limit of tokens" in page.text(".figure-line")
    page.find(".figures-of-answer summary").click()
    assert page.find(".phases").is_displayed() and "prefill" in page.text(".phases")
    # The next message goes with the conversation; a new chat forgets it.
    page.ask("More")
    page.wait_for_answer()
    assert page.count(".answer") == 2
    page.find("#new-chat").click()
    assert page.count(".message") == 0
    page.ask("Hello")
    assert page.wait_for_answer() == first


def test_the_keyboard_sends_begins_lines_and_stops(window: Browser, locked: Server) -> None:
    window.open(locked.url)
    # The page asks for the key, and keeps it for this tab.
    window.wait(lambda: window.find("#key-dialog").is_displayed())
    window.find("#key").send_keys("secret", Keys.ENTER)
    window.wait(lambda: window.text("#model") == "tiny")
    assert window.script("return localStorage.length") == 0
    window.find("#prompt").send_keys("one", Keys.SHIFT + Keys.ENTER)
    assert window.count(".message") == 0
    window.press(Keys.NULL, "two", Keys.ENTER)
    assert window.text(".user") == "one\ntwo"
    window.wait(lambda: len(window.text(".answer > .text")) > 20)
    assert window.find("#stop").is_displayed() and not window.find("#send").is_displayed()
    # The cockpit sees the request run.
    window.wait(lambda: window.text("#running") == "1" and window.text("#kv-held") != "0")
    window.wait(lambda: float(window.text("#rate").replace(",", "")) > 0)
    window.press(Keys.ESCAPE)
    answer = window.wait_for_answer()
    assert "stopped after" in window.text(".figure-line")
    assert window.find("#send").is_displayed()
    window.wait(lambda: window.text("#running") == "0" and window.text("#kv-held") == "0")
    assert window.text(".answer > .text") == answer
    assert window.count("#steps-chart rect") > 20 and "median" in window.text("#steps-typical")
    window.errors()  # the browser tells of the refusal that asked for the key


def test_hostile_answers_are_text(page: Browser, server: Server) -> None:
    page.force_answer(HOSTILE)
    page.ask(HOSTILE.partition("\n")[0])
    answer = page.wait_for_answer()
    assert HOSTILE.partition("\n")[0] in answer and "</code></pre><h1>big</h1>" in answer
    assert page.count(".message :is(img, script, b, i, h1, u, s)") == 0
    assert page.count(".answer pre") == 1 and page.text(".answer > .text p > code") == "<s>"
    assert page.script("return document.title") != "owned"
    assert page.text(".user") == HOSTILE.partition("\n")[0]


def test_no_script_makes_html_from_strings(page: Browser) -> None:
    source = (
        "try { document.body.innerHTML = '<b>x</b>'; return 'made' } catch { return 'refused' }"
    )
    assert page.script(source) == "refused"
    page.errors()  # the browser tells of it


def test_reasoning_is_folded(page: Browser) -> None:
    page.force_answer("<think>private thoughts</think>The answer.")
    page.ask("Why?")
    assert page.wait_for_answer() == "The answer."
    assert "private thoughts" in page.text(".reasoning")
    assert not page.find(".reasoning .text").is_displayed()
    page.find(".reasoning summary").click()
    assert page.find(".reasoning .text").is_displayed()


def test_a_refused_request_is_told_in_the_servers_words(page: Browser) -> None:
    page.ask("a" * 3000)
    page.wait(lambda: page.count(".failure") == 1)
    assert "2048" in page.text(".failure")
    assert any("400" in error for error in page.errors())
    page.set_field("max_tokens", "3")
    page.ask("shorter")
    page.wait(lambda: page.count(".figure-line") == 1)


def test_a_wrong_setting_is_shown_and_nothing_is_sent(page: Browser) -> None:
    page.resize(390, 844)
    page.script("document.querySelector('[name=top_p]').value = '7'")
    page.ask("Hello")
    assert page.count(".message") == 0 and page.find("[name=top_p]").is_displayed()


@pytest.mark.parametrize("is_at_end", [True, False])
def test_a_closed_panel_leaves_the_log_where_it_was(page: Browser, is_at_end: bool) -> None:
    """In a narrow window the panel takes the place of the chat."""
    page.resize(390, 500)
    page.force_answer("a line\n\n" * 60)
    page.ask("Hello")
    page.wait_for_answer()
    place = "const l = document.getElementById('log'); return Math.round(l.scrollTop)"
    if not is_at_end:
        page.script("document.getElementById('log').scrollTop = 100")
    page.wait(lambda: (page.script(place) == 100) != is_at_end)
    page.script("return new Promise(requestAnimationFrame)")
    before = page.script(place)
    assert before
    for _ in range(2):
        page.find("#show-panel").click()
    assert page.script(place) == before


def test_the_page_comes_back_with_its_server(
    window: Browser, tiny_model: Path, tmp_path: Path
) -> None:
    window.resize(1280, 860)
    options = ("--served-model-name", "tiny")
    with serving(tiny_model, tmp_path / "first.log", *options) as first:
        window.open(first.url)
        window.set_field("max_tokens", "3")
        window.ask("Hello")
        window.wait_for_answer()
    window.wait(lambda: window.text("#state") == "not reachable")
    # What runs is not known now.
    assert [window.text(f"#{name}") for name in ("running", "waiting", "rate")] == ["–"] * 3
    window.ask("Is anybody there?")
    window.wait(lambda: window.count(".failure") == 1)
    port = first.url.rpartition(":")[2]
    with serving(tiny_model, tmp_path / "second.log", *options, "--port", port):
        window.wait(lambda: window.text("#state") == "ready")
        assert window.text("#running") == "0"
        window.ask("Hello again")
        window.wait(lambda: window.count(".figure-line") == 2)
        window.driver.get("about:blank")


def test_messages_stay_in_line_with_the_composer(page: Browser) -> None:
    page.resize(900, 500)
    page.force_answer("a line\n\n" * 60)  # a scrollbar comes
    page.ask("Hello")
    page.wait_for_answer()
    middle = (
        "const r = document.querySelector('{}').getBoundingClientRect(); return r.left + r.right"
    )
    assert page.script(middle.format("#messages")) == page.script(middle.format("#composer"))


def test_the_panel_tells_why_requests_wait(
    window: Browser, endless_model: Path, tmp_path: Path
) -> None:
    body = {"prompt": "A ", "max_tokens": 400_000, "ignore_eos": True, "stream": True}
    data = request("POST", "/v1/completions", json.dumps(body).encode())
    with (
        serving_endless(endless_model, tmp_path / "log", "--max-num-seqs", "1") as server,
        connect(server.url) as first,
        connect(server.url) as second,
    ):
        window.resize(1280, 860)
        window.open(server.url)
        first.sendall(data)
        second.sendall(data)
        window.wait(lambda: window.count("#waits li") == 1)
        reason = window.text("#waits li")
        assert reason.startswith("1 waiting: ") and len(reason) > len("1 waiting: ")
        first.close()
        window.wait(lambda: window.count("#waits li") == 0)
        window.driver.get("about:blank")  # it would ask a server that has ended
    window.errors()


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_every_width_in_both_schemes(page: Browser, width: int, scheme: str) -> None:
    page.resize(width, 800)
    page.use_scheme(scheme)
    page.force_answer("word " * 40 + "w" * 300 + "\n```\n" + "x = 1; " * 60 + "\n```")
    page.ask("m" * 200)
    page.wait_for_answer()
    for _ in range(2):  # with the chat, and with the panel
        assert page.script("return document.documentElement.scrollWidth") == width
        assert page.script(
            "const l = document.getElementById('log'); return l.scrollWidth <= l.clientWidth"
        )
        if width < 860:
            page.find("#show-panel").click()
    background = str(page.script("return getComputedStyle(document.body).backgroundColor"))
    light = sum(map(int, re.findall(r"\d+", background)[:3])) > 3 * 128
    assert light == (scheme == "light")


def test_every_control_has_a_name_and_text_has_contrast(page: Browser) -> None:
    page.set_field("max_tokens", "3")
    page.ask("Hello")
    page.wait_for_answer()
    for element in page.driver.find_elements("css selector", "button, input, textarea, [role=img]"):
        if element.is_displayed():
            assert element.accessible_name, element.get_attribute("outerHTML")
    for scheme in ("light", "dark"):
        page.use_scheme(scheme)
        colours = [
            str(
                page.script(
                    f"return getComputedStyle(document.documentElement)"
                    f".getPropertyValue('--{name}')"
                )
            )
            for name in ("ink", "soft", "accent", "bad")
        ]
        paper = str(
            page.script(
                "return getComputedStyle(document.documentElement).getPropertyValue('--paper')"
            )
        )
        assert min(contrast(colour, paper) for colour in colours) >= 4.5


def contrast(first: str, second: str) -> float:
    """The contrast of two colours "#rrggbb" by WCAG 2.2: 4.5 is enough for text."""

    def luminance(colour: str) -> float:
        channels = [int(colour.strip()[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)
