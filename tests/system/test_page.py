"""The page at `/` in a real browser (headless Chromium) against a real server."""

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from leftovers import nothing_left
from serving import serving

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="1P1D needs two cores")
expect = sync_api.expect
INSTALL_S = 120
PROMPT = list(range(200))


@pytest.fixture(scope="module")
def chromium():
    """The machine's own, or that of playwright, which is installed if it is not there. Without a network: skipped."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    if found is None and not Path(own).exists():
        command = [sys.executable, "-m", "playwright", "install", "chromium"]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=INSTALL_S)
        except (subprocess.SubprocessError, OSError) as error:
            pytest.skip(f"No Chromium, and none can be installed ({error}): apt-get install chromium")
    return found or own


@pytest.fixture(scope="module")
def url(tmp_path_factory, chromium):
    """A server of the seed model, 1P1D, for all tests here."""
    with nothing_left(), serving(tmp_path_factory.mktemp("page"), "--model", "seed", "--deploy", "1P1D") as server:
        yield server.url
        server.stop()


@pytest.fixture(scope="module")
def browser(chromium):
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def visit(browser, url):
    """`visit(width=360)` opens the page. At the end it must have said nothing on the console and thrown nothing."""
    said, contexts = [], []

    def visit(width=1280, watch=True, prepare=lambda page: None, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **options))
        page = contexts[-1].new_page()
        if watch:
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
        prepare(page)
        page.goto(url)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert said == []


def live(page):
    expect(page.locator("#state.live")).to_be_visible()
    return page


def ask(url, **options):
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **options}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status().json()


def tile(page, name):
    """The number in a tile."""
    text = page.locator(".tile", has=page.get_by_text(name, exact=True)).locator("b").inner_text()
    return int(text.replace(",", ""))


def test_it_shows_what_is_deployed(visit):
    """Without an error: the deployment, both workers with their roles, and pages that add up to the pool."""
    page = live(visit())
    expect(page.locator("#deployment")).to_have_text("1P1D · seed · least-outstanding")
    cards = page.locator("#workers .card")
    expect(cards).to_have_count(2)
    expect(cards.nth(0)).to_contain_text("P0.0")
    expect(cards.nth(0).locator(".badge")).to_have_text("prefill")
    expect(cards.nth(1).locator(".badge")).to_have_text("decode")
    label = cards.nth(0).locator(".bar").get_attribute("aria-label")
    total = sum(int(part.split()[-1]) for part in label.split(", "))
    assert f"/{total:,} pages" in cards.nth(0).inner_text()


def test_it_updates_while_requests_run(visit, url):
    """Without a reload: running requests show, then their rows by phase, the charts and the counters."""
    page = live(visit())
    done = tile(page, "done")
    threads = [threading.Thread(target=ask, args=(url,), kwargs={"max_tokens": 400}) for _ in range(4)]
    for thread in threads:
        thread.start()
    busy = page.locator("#workers .bar i[title^=running]")
    expect(busy.first).to_be_visible(timeout=20_000)
    for thread in threads:
        thread.join()
    expect(page.locator(".tile", has=page.get_by_text("done", exact=True)).locator("b")).to_have_text(str(done + 4))
    rows = page.locator("#rows li:not(.titles)")
    expect(rows.first).to_contain_text("P0→D0 200→400 tok")
    for phase in ("prefill", "decode"):
        expect(rows.first.locator(f".bar i[title^='{phase}:']")).to_be_visible()
    for chart in page.locator(".chart").all():
        assert chart.locator("path.a").get_attribute("d") or chart.locator("circle.a").count()


def test_one_prompt_both_ways(visit):
    """The box gives the same text on one worker and on two, with the times of each; only two hand over."""
    page = live(visit())
    box = page.get_by_role("textbox", name="Prompt")
    expect(box).to_have_value(re.compile(r"^[\d, ]+$"))  # a model without a tokenizer is offered token ids
    box.fill(", ".join(map(str, PROMPT)))
    page.get_by_label("Output tokens").fill("6")
    page.get_by_role("button", name="Run both ways").click()
    one, two = (page.locator(f"[data-way={way}]") for way in ("colocated", "disaggregated"))
    expect(two.locator(".bar")).to_be_visible(timeout=20_000)
    expect(two.locator(".head")).to_contain_text("P0→D0")
    expect(one.locator(".head")).not_to_contain_text("→")
    assert len(one.locator(".output").inner_text().split()) == 6
    assert one.locator(".output").inner_text() == two.locator(".output").inner_text()
    for card in (one, two):
        expect(card).to_contain_text("Time to first token")
    expect(two).to_contain_text("hand-off copy")
    expect(one).not_to_contain_text("hand-off copy")
    expect(page.get_by_role("button", name="Run both ways")).to_be_enabled()


def test_a_refused_prompt_says_why(visit):
    """What the server answers is shown where the text would be."""
    page = live(visit(watch=False))  # the browser notes a 400 on the console
    page.get_by_role("textbox", name="Prompt").fill("123456789")
    page.get_by_role("button", name="Run both ways").click()
    expect(page.locator("[data-way=disaggregated] .error")).to_contain_text("vocabulary")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 360, 768, 1600])
def test_nothing_overflows_or_overlaps(visit, url, width, scheme):
    """At any width: no sideways scrolling, and no two pieces of text cover one another."""
    ask(url)
    page = live(visit(width, color_scheme=scheme))
    expect(page.locator("#rows li").nth(1)).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.evaluate(
        """() => {
          const shown = (element) => element.getClientRects().length > 0;
          const leaves = [...document.querySelectorAll("body *")].filter((element) => shown(element) &&
            [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.textContent.trim()));
          return leaves.map((element) => {
            const range = document.createRange();
            range.selectNodeContents(element);
            const {left, right, top, bottom} = range.getBoundingClientRect();
            const text = element.textContent.trim();
            return {left, right, top, bottom, text, tag: element.tagName};
          });
        }"""
    )
    assert len(boxes) > 40
    leaves = [box for box in boxes if box["tag"] != "LABEL"]
    slack = 2.5  # px: line boxes are a little higher than their letters
    covered = [
        (a["text"], b["text"])
        for i, a in enumerate(leaves)
        for b in leaves[i + 1 :]
        if min(a["right"], b["right"]) - max(a["left"], b["left"]) > slack
        and min(a["bottom"], b["bottom"]) - max(a["top"], b["top"]) > slack
    ]
    assert covered == []
    assert max(box["right"] for box in boxes) <= width


def test_the_browsers_language_is_spoken(visit):
    """Chinese for those who read Chinese; both languages have the same words."""
    page = live(visit(locale="zh-CN"))
    expect(page.locator("#try-h")).to_have_text("同一提示，两种方式")
    assert page.evaluate("document.documentElement.lang") == "zh"
    latin = "[...document.querySelectorAll('[data-t]')].map((e) => e.textContent).filter((t) => /^[a-z ]+$/i.test(t))"
    assert page.evaluate(latin) == []


def test_a_key_is_asked_for_and_used(visit):
    """Answered 401, the page asks for the key and sends it with every request from then on."""

    def locked(route):
        if route.request.headers.get("authorization") == "Bearer sesame":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": {"message": "An API key is needed."}})

    page = visit(watch=False, prepare=lambda page: page.route("**/live", locked))
    expect(page.locator("#key")).to_be_visible()
    page.get_by_label("This server asks for an API key").fill("sesame")
    page.get_by_role("button", name="Use").click()
    live(page)
    expect(page.locator("#key")).to_be_hidden()


def test_a_server_that_is_gone_is_missed_and_found_again(visit):
    """While the server does not answer the page says so and goes on asking."""
    page = live(visit(watch=False))
    page.route("**/live", lambda route: route.abort())
    expect(page.locator("#state.lost")).to_be_visible()
    page.unroute("**/live")
    live(page)
