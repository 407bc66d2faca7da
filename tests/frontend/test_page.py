"""The live page in a real browser and a real server under load: numbers are what was sent, and nobody else is asked."""

import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np
import pytest
from playwright.sync_api import expect, sync_playwright

from headrace.frontend.live import responses
from headrace.frontend.scale import RESPONSE_NS
from tests.test_serve import Server, infer_body

SERVED = "page_model"
NAME = "<img src=x onerror=alert(1)>"  # what a page that is careless with names would run; no server lets it through
PATH = f"/v2/models/{SERVED}"
WAIT_MS = 30_000
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SIZES = ["1", "2", *(f"{low}\N{EN DASH}{high}" for low, high in ((3, 4), (5, 8), (9, 16), (17, 32), (33, 48)))]
NOTHING = "\N{EN DASH}"
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 375, "height": 812}

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: apt-get install chromium)")


@dataclass
class Sent:
    """What clients sent and saw."""

    answered: int = 0
    failed: dict[str, int] = field(default_factory=lambda: {"invalid": 0, "model": 0})
    longest_ms: float = 0.0
    shortest_ms: float = 1e9


class LoadedServer(Server):
    """A server, and what was sent to it so far."""

    def __init__(self, folder):
        super().__init__(folder, "--frontends", "2", "--name", SERVED)
        self.sent = Sent()

    def send(self, count):
        """Send so many requests, of which a tenth cannot be decoded and a tenth make the model raise."""
        kinds = [("invalid", "model", *["good"] * 8)[number % 10] for number in range(count)]
        with ThreadPoolExecutor(8) as pool:
            for kind, took_ms in pool.map(self._ask, kinds):
                if kind == "good":
                    self.sent.answered += 1
                    self.sent.longest_ms = max(self.sent.longest_ms, took_ms)
                    self.sent.shortest_ms = min(self.sent.shortest_ms, took_ms)
                else:
                    self.sent.failed[kind] += 1

    def _ask(self, kind):
        body = {"invalid": b"{", "model": infer_body([13, 0, 0, 0]), "good": infer_body([1, 2, 3, 4])}[kind]
        began = time.perf_counter()
        status, _, _ = self.call(f"{PATH}/infer", body)
        took_ms = (time.perf_counter() - began) * 1000
        assert status == {"invalid": 400, "model": 500, "good": 200}[kind]
        return kind, took_ms


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = LoadedServer(tmp_path_factory.mktemp("server"))
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        # Within a container the tests are root, whom the sandbox refuses; only our own server is visited.
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def viewport(request):
    return request.param


def disguise(route):
    """Let the server say that its model has that name."""
    response = route.fetch()
    route.fulfill(response=response, body=response.text().replace(SERVED, NAME))


@pytest.fixture
def page(server, browser, viewport):
    """The page, opened; whatever it complains about or asks of others fails the test."""
    context = browser.new_context(viewport=viewport)
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    expect.set_options(timeout=WAIT_MS)
    troubles = []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("dialog", lambda dialog: troubles.append(dialog.message))
    page.on("request", lambda request: urlsplit(request.url).netloc == server.address or troubles.append(request.url))
    page.on("response", lambda answer: answer.ok or troubles.append(f"{answer.status} {answer.url}"))
    page.route("**/live.json", disguise)
    page.clock.install()  # it runs as usual; a test may let it run faster
    page.goto(f"http://{server.address}/")
    expect(of(page, "state")).to_have_text("Ready")
    yield page
    assert troubles == []
    context.close()


def of(page, name):
    """Return an element of the page, or of its one model."""
    return page.locator(f'[data-is="{name}"]').first


def number(page, name):
    return float(re.search(r"[\d,.]+", of(page, name).inner_text())[0].replace(",", ""))


def table(page, name):
    """Return a table's rows as {its header: the other cells}."""
    rows = of(page, name).locator("tr").all()
    return {row.locator("th").inner_text(): row.locator("td").all_inner_texts() for row in rows}


def milliseconds(page, name):
    value, unit = of(page, name).inner_text().split()
    return float(value) * {"µs": 0.001, "ms": 1, "s": 1000}[unit]


def test_the_numbers_are_what_was_sent(server, page):
    server.send(100)
    sent = server.sent
    expect(of(page, "total-requests")).to_have_text(f"{sent.answered:,} requests answered")
    expect(of(page, "total-rows")).to_have_text(f"{sent.answered:,} rows answered")
    expect(of(page, "failures-about")).to_have_text(f"{sum(sent.failed.values()):,} requests")
    expect(of(page, "in-flight")).to_have_text("0")
    failures = table(page, "failures")
    assert failures["invalid request"][1] == f"{sent.failed['invalid']}"
    assert failures["model raised"][1] == f"{sent.failed['model']}"
    assert all(
        cells == ["0", "0"] for name, cells in failures.items() if name not in {"invalid request", "model raised"}
    )
    (stats,) = json.loads(server.call(f"{PATH}/stats")[2])["model_stats"]
    assert stats["inference_stats"]["success"]["count"] == sent.answered


def test_times_batches_and_lanes_appear_under_load_and_agree_with_the_clients(server, page):
    server.send(50)
    expect(of(page, "p50")).not_to_have_text(NOTHING)
    percentiles = [milliseconds(page, name) for name in ("p50", "p90", "p99", "p999")]
    assert percentiles == sorted(percentiles)
    assert percentiles[-1] <= 1.05 * server.sent.longest_ms
    shares = [float(cells[1].removesuffix(" %")) for cells in table(page, "stages").values()]
    assert len(shares) == 5
    assert re.fullmatch(r"\d+\.\d on average, last 10 s", of(page, "in-flight-mean").inner_text())
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert list(table(page, "batches")) == ["1", "2", "3", "4"]
    assert re.fullmatch(r"[\d.]+ rows in a batch, on average", of(page, "batches-about").inner_text())
    assert 1 <= number(page, "batches-about") <= 4
    assert list(table(page, "lanes")) == ["0"]
    assert "half within" in of(page, "times-chart").get_attribute("aria-label")
    assert of(page, "times-chart").locator("rect").count() > 0
    expect(of(page, "rate-chart").locator("path.line")).not_to_have_count(0)


def test_what_is_under_way_is_told(server, page):
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(server.call, f"{PATH}/infer", infer_body([77, 0, 0, 0]))
        expect(of(page, "in-flight")).to_have_text("1")
        expect(of(page, "room")).to_have_text("1 of 64 rows in use")
        server.release()
        assert held.result(WAIT_MS / 1000)[0] == 200
    server.sent.answered += 1
    expect(of(page, "in-flight")).to_have_text("0")


def test_a_name_is_text_and_nothing_else(page):
    expect(of(page, "name")).to_have_text(NAME)
    assert of(page, "name").locator("*").count() == 0


def test_it_fits_its_place_and_is_told_by_headings_and_tables(page, viewport):
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    outline = page.get_by_role("heading").all_inner_texts()
    assert outline[0].startswith("Headrace")
    assert outline[1] == NAME
    for name in ("Where the time goes", "Batches", "Lanes", "Not answered"):
        assert page.get_by_role("heading", name=name).is_visible()
    assert page.get_by_role("table").count() == 5
    assert page.get_by_role("main").count() == 1
    assert all(label for label in page.eval_on_selector_all("[role=img]", "all => all.map(e => e.ariaLabel)"))


def test_the_keyboard_pauses_and_resumes_the_asking(server, page):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.keyboard.press("Tab")
    expect(of(page, "pause")).to_be_focused()
    page.keyboard.press("Enter")
    expect(of(page, "pause")).to_have_text("Resume")
    expect(of(page, "state")).to_have_text("Paused")
    page.wait_for_load_state("networkidle")
    before, shown = len(asked), of(page, "uptime").inner_text()
    page.clock.run_for(10_000)
    assert (len(asked), of(page, "uptime").inner_text()) == (before, shown)
    page.keyboard.press("Enter")
    expect(of(page, "pause")).to_have_text("Pause")
    expect(of(page, "state")).to_have_text("Ready")
    expect(of(page, "uptime")).not_to_have_text(shown)


@pytest.mark.parametrize("viewport", [DESKTOP], ids=["desktop"])
def test_it_follows_the_systems_colours(page):
    grounds = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        grounds[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light, dark = (sum(map(int, re.findall(r"\d+", grounds[scheme])[:3])) for scheme in ("light", "dark"))
    assert light > 600
    assert dark < 150


def test_a_server_that_does_not_answer_is_told_and_so_is_its_return(server, browser):
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(f"http://{server.address}/")
        expect(of(page, "state")).to_have_text("Ready")
        page.route("**/live.json", lambda route: route.abort())
        expect(of(page, "state")).to_contain_text("No answer from the server")
        page.unroute("**/live.json")
        expect(of(page, "state")).to_have_text("Ready")


def test_the_page_may_run_and_ask_only_what_comes_from_the_server(server):
    for path in ("/", "/page/page.js", "/page/page.css", "/live.json", "/metrics"):
        status, headers, _ = server.call(path)
        assert status == 200
        assert headers["Content-Security-Policy"].startswith("default-src 'self';")
        assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("viewport", [DESKTOP], ids=["desktop"])
class TestArithmetic:
    """The page's own functions."""

    def test_percentiles_are_within_5_percent(self, page):
        times = np.random.default_rng(0).lognormal(np.log(3e6), 0.7, 5000)
        scale = json.dumps(bucketed(times))
        for share in (0.5, 0.9, 0.99, 0.999):
            found = call(page, f"quantile({scale}, {share})")
            assert found == pytest.approx(np.quantile(times, share, method="inverted_cdf"), rel=0.05)
        assert call(page, "quantile([], 0.5)") is None

    @pytest.mark.parametrize(
        ("asked", "told"),
        [
            ("duration(950)", ["0.95", "µs"]),
            ("duration(12345)", ["12.3", "µs"]),
            ("duration(999960)", ["1.00", "ms"]),
            ("duration(8272000)", ["8.27", "ms"]),
            ("duration(123456000)", ["123", "ms"]),
            ("duration(61e9)", ["61.0", "s"]),
            ("age(0.4)", "0 s"),
            ("age(7)", "7 s"),
            ("age(249)", "4 min 09 s"),
            ("age(7500)", "2 h 05 min"),
            ("age(273600)", "3 d 04 h"),
            ("rate(3.14)", "3.1"),
            ("rate(12345.6)", "12,346"),
            ("sized([{rows: 3, count: 2}], 4).map(s => s.name)", ["1", "2", "3", "4"]),
            ("sized([{rows: 5, count: 2}, {rows: 33, count: 1}], 48).map(s => s.name)", SIZES),
            ("sized([{rows: 5, count: 2}, {rows: 33, count: 1}], 48).map(s => s.count)", [0, 0, 0, 2, 0, 0, 1]),
            ("before([{at: 1}, {at: 5}, {at: 9}, {at: 12}], 4).at", 5),
            ("before([{at: 9}, {at: 12}], 10).at", 9),
            ("grown([{k: 1, n: 5}, {k: 2, n: 3}], [{k: 1, n: 2}], 'k', 'n')", [{"k": 1, "n": 3}, {"k": 2, "n": 3}]),
        ],
        ids=lambda value: value if isinstance(value, str) and "(" in value else "",
    )  # fmt: skip
    def test_numbers_read_well(self, page, asked, told):
        assert call(page, asked) == told


def bucketed(times):
    """Return times in nanoseconds as the server would tell them."""
    counts = np.bincount([RESPONSE_NS.index(int(ns)) for ns in times], minlength=RESPONSE_NS.buckets)
    return responses(counts.tolist())


def call(page, expression):
    return page.evaluate(
        "async () => { const {quantile, duration, age, rate, sized, before, grown}"
        f" = await import('/page/numbers.js'); return {expression}; }}"
    )
