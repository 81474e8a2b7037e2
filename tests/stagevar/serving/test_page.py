"""The page at `/` in a real browser, the system's chromium driven by playwright: keyboard, phone, dark mode."""

import os
import shutil

import pytest

from stagevar.serving.app import Keys
from stagevar.serving.desk import Desk
from tests.fakes.serving import FakeArtist, in_thread

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed ([dev])")
CHROMIUM = os.environ.get("CHROMIUM") or next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
#: How long the browser may take for anything; a busy machine is slower than playwright's half a minute.
PATIENCE_MS = 180_000
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"], timeout=PATIENCE_MS
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def artist():
    return FakeArtist()


@pytest.fixture(scope="module")
def url(artist):
    with in_thread(Desk(lambda: artist, 64)) as (host, port):
        yield f"http://{host}:{port}/"


def opened(browser, url, **options):
    """A page that is ready to draw, with every address it asked for and every fault that it reported."""
    context = browser.new_context(**options)
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    page.asked, page.faults = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("console", lambda message: page.faults.append(message.text) if message.type == "error" else None)
    page.goto(url)
    page.wait_for_selector("#draw:not([disabled])")
    return page


def test_the_keyboard_alone_draws_both_schedules_side_by_side(browser, url, artist):
    page = opened(browser, url, viewport={"width": 1200, "height": 800})
    assert page.locator("#key").is_hidden(), "no key is needed here"
    artist.batches.clear()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.press("Control+A")
    page.keyboard.type("a <b>bold</b> circle")
    order = []
    for _ in range(3):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id"))
    assert order == ["size", "seed", "draw"]
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Control+A")
    page.keyboard.type("200")
    page.keyboard.press("Enter")
    page.wait_for_selector("figure:nth-of-type(2) img")
    page.wait_for_function("document.getElementById('status').textContent.includes('times as long')")
    assert artist.batches == [[200], [200]]
    captions = page.locator("figcaption").all_inner_texts()
    assert captions[0].startswith("fake-1") and captions[1].startswith("fake-full")
    assert all(" ms, of which 5 ms in the scales" in caption for caption in captions)
    boxes = [figure.bounding_box() for figure in page.locator("figure").all()]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"], "side by side"
    assert page.evaluate("document.querySelector('img').naturalWidth") == 64
    color = page.evaluate("""() => {
        const canvas = document.createElement('canvas').getContext('2d');
        canvas.drawImage(document.querySelector('img'), 0, 0);
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
    }""")
    assert color == [200, 200, 200], "the image of the seed that was typed"
    assert page.locator("img").first.get_attribute("alt") == "fake-1: a <b>bold</b> circle"
    assert page.locator("figure b b").count() == 0 and page.faults == []


def test_nothing_is_fetched_from_elsewhere(browser, url):
    page = opened(browser, url)
    page.click("#draw")
    page.wait_for_selector("figure:nth-of-type(2) img")
    assert {address for address in page.asked if not address.startswith((url, "data:"))} == set()
    assert "default-src 'none'" in page.request.get(url).headers["content-security-policy"]


def test_it_fits_a_phone(browser, url):
    page = opened(browser, url, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    page.tap("#draw")
    page.wait_for_selector("figure:nth-of-type(2) img")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360, "no scrolling sideways"
    boxes = [figure.bounding_box() for figure in page.locator("figure").all()]
    assert boxes[0]["x"] == boxes[1]["x"] and boxes[0]["y"] < boxes[1]["y"], "one below the other"
    assert page.locator("#draw").bounding_box()["height"] >= 40, "large enough for a thumb"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(browser, url, scheme):
    page = opened(browser, url, color_scheme=scheme)
    pairs = page.evaluate("""() => ['body', '#prompt', '#draw', '#status', 'label'].map(one => {
        const element = document.querySelector(one), style = getComputedStyle(element);
        let back = style.backgroundColor;
        for (let up = element; back === 'rgba(0, 0, 0, 0)'; up = up.parentElement) back = getComputedStyle(up).backgroundColor;
        return [one, style.color, back];
    })""")
    for name, ink, paper in pairs:
        assert contrast(ink, paper) >= 4.5, (name, ink, paper)
    assert (luminance(pairs[0][2]) < 0.05) == (scheme == "dark")


def luminance(color):
    """Relative luminance of "rgb(r, g, b)". Source: WCAG 2.2, relative luminance (a formula)."""
    channels = [int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_a_refusal_is_told_where_screen_readers_hear_it(browser, url, artist):
    page = opened(browser, url)
    artist.fails["bad"] = ValueError("a fault")
    page.fill("#prompt", "bad")
    page.click("#draw")
    page.wait_for_selector("#status.bad")
    status = page.locator("#status")
    assert "could not be drawn" in status.inner_text() and status.get_attribute("aria-live") == "polite"
    assert page.locator("#draw").is_enabled()


def test_a_key_is_asked_for_where_one_is_needed(browser):
    with in_thread(Desk(FakeArtist, 10), keys=Keys.of(["open sesame"])) as (host, port):
        page = browser.new_context().new_page()
        page.goto(f"http://{host}:{port}/")
        page.wait_for_selector("#key", state="visible")
        assert page.locator("#draw").is_disabled()
        page.fill("#key", "open sesame")
        page.keyboard.press("Tab")
        page.wait_for_selector("#draw:not([disabled])")
        page.click("#draw")
        page.wait_for_selector("figure img")
