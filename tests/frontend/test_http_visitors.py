"""Web pages as clients: those of others are refused, those that are allowed are answered as browsers want it."""

import asyncio
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from playwright.sync_api import sync_playwright

from headrace.frontend.http.head import Refused
from headrace.frontend.http.visitors import EXPOSED, Visitors, preflight
from headrace.frontend_job import AccessSettings
from tests.frontend.requests import BINARY, HEADER, N, X, get, sized
from tests.frontend.test_http import serving
from tests.serving import Server, infer_body

OWN = ("localhost", "127.0.0.1", "::1")
FRIEND = "https://friend.test"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def allowed(*origins, hosts=OWN):
    return Visitors(AccessSettings(hosts=hosts, origins=origins))


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1:8000", None),
        ("localhost", None),
        ("LOCALHOST:1", None),
        ("[::1]:8000", None),
        (None, None),  # HTTP/1.0
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("localhost", "http://localhost"),
        ("localhost:80", "http://localhost"),
        ("localhost", "https://localhost:443"),  # a proxy in front encrypts
        ("[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_programs_and_the_servers_own_pages_are_let_in(host, origin):
    given = {"host": host, "origin": origin}
    assert allowed().admit({name: value for name, value in given.items() if value is not None}) == ()


@pytest.mark.parametrize(
    "origin",
    ["http://evil.test", "http://127.0.0.1:3000", "https://127.0.0.1", "null", "", "http://127.0.0.1:8000, http://a"],
)
def test_pages_of_others_are_refused_with_the_remedy(origin):
    for visitors in (allowed(), allowed(FRIEND), allowed(hosts=None)):
        with pytest.raises(Refused, match=r"a web page of .*start the server with --allow-origin") as refused:
            visitors.admit({"host": "127.0.0.1:8000", "origin": origin})
        assert refused.value.http_status == 403


def test_a_page_without_a_host_is_no_own_page():
    with pytest.raises(Refused, match="a web page of"):
        allowed().admit({"origin": "http://127.0.0.1"})


@pytest.mark.parametrize("host", ["evil.test", "evil.test:8000", "10.0.0.1", "localhost.evil.test", "a b", "", "::1"])
def test_names_that_are_not_the_servers_are_refused_with_the_remedy(host):
    for headers in ({"host": host}, {"host": host, "origin": f"http://{host}"}):
        with pytest.raises(Refused, match=r"none of this server's names; .*--allow-host") as refused:
            allowed().admit(headers)
        assert refused.value.http_status == 403


def test_a_server_that_does_not_know_its_names_takes_any():
    assert allowed(hosts=None).admit({"host": "gpu.lan:8000", "origin": "http://gpu.lan:8000"}) == ()


@pytest.mark.parametrize(
    ("origins", "origin"),
    [
        ((FRIEND,), FRIEND),
        ((FRIEND,), "https://friend.test:443"),
        (("HTTPS://FRIEND.test:443", "tauri://localhost"), FRIEND),
        (("tauri://localhost",), "tauri://localhost"),
        (("*",), "http://anybody.test:1"),
        (("*",), "null"),
    ],
)
def test_an_allowed_page_is_let_in_and_its_browser_told(origins, origin):
    headers = dict(allowed(*origins).admit({"host": "localhost", "origin": origin}))
    assert headers["Access-Control-Allow-Origin"] == origin
    assert headers["Vary"] == "Origin"
    assert headers["Access-Control-Expose-Headers"] == EXPOSED


def test_an_allowed_origin_is_that_one_only():
    for other in ("http://friend.test", "https://friend.test:8443", "https://a.friend.test"):
        with pytest.raises(Refused):
            allowed(FRIEND).admit({"host": "localhost", "origin": other})


def test_only_a_question_about_a_method_is_a_preflight():
    asked = {"access-control-request-method": "POST"}
    assert preflight("POST", asked) is None
    assert preflight("OPTIONS", {}) is None
    assert preflight("OPTIONS", asked) is not None


def within(access, *requests):
    """Return the answers of a front to requests on one connection."""

    async def asked():
        async with serving(access=access) as world:
            client = await world.connect()
            return [await client.ask(request) for request in requests]

    return asyncio.run(asked())


def infer(*headers):
    return sized(BINARY + N + X, HEADER, *headers)


def test_a_refused_page_has_nothing_computed_and_the_connection_goes_on():
    refused, answered = within(AccessSettings(), infer("Origin: http://evil.test"), infer())
    assert (refused.status, answered.status) == (403, 200)
    assert "--allow-origin" in refused.error
    assert "access-control-allow-origin" not in refused.headers


def test_a_browsers_question_is_answered_before_any_token(tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text("secret\n")
    tokens.chmod(0o600)
    asks = (f"Origin: {FRIEND}", "Access-Control-Request-Method: POST")
    told, refused, answered, foe = within(
        AccessSettings(token_file=tokens, origins=(FRIEND,)),
        get("/v2", *asks, "Access-Control-Request-Headers: authorization,content-type", method="OPTIONS"),
        infer(f"Origin: {FRIEND}"),
        infer(f"Origin: {FRIEND}", "Authorization: Bearer secret"),
        get("/v2", "Origin: http://evil.test", "Access-Control-Request-Method: POST", method="OPTIONS"),
    )
    assert told.status == 200
    assert "POST" in told.headers["access-control-allow-methods"]
    assert told.headers["access-control-allow-headers"] == "authorization,content-type"
    assert refused.status == 401
    assert answered.status == 200
    for each in (told, refused, answered):
        assert each.headers["access-control-allow-origin"] == FRIEND
    assert foe.status == 403
    assert "access-control-allow-methods" not in foe.headers


def test_options_without_a_page_are_no_method_here():
    (answer,) = within(AccessSettings(origins=(FRIEND,)), get("/v2", method="OPTIONS"))
    assert answer.status == 405


class Elsewhere(BaseHTTPRequestHandler):
    """Another site: an empty page."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def elsewhere():
    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as site:
        thread = threading.Thread(target=site.serve_forever)
        thread.start()
        yield site.server_address[1]
        site.shutdown()
        thread.join()


ASK = """async ([url, method, type, body]) => {
    const answer = await fetch(url, {method, headers: type && {"Content-Type": type}, body: body || undefined});
    return [answer.status, await answer.json()];
}"""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: apt-get install chromium)")
def test_a_browser_keeps_pages_of_others_out_and_lets_allowed_ones_in(tmp_path, elsewhere):
    server = Server(tmp_path, "--allow-origin", f"http://friend.test:{elsewhere}")
    port = server.address.rpartition(":")[2]
    url = f"http://{server.address}/v2/models/served"
    ask = [f"{url}/infer", "POST", "application/json", json.dumps(infer_body([1, 2, 3, 4]))]
    simple = [ask[0], "POST", "text/plain", ask[3]]  # needs no preflight, and may be sent by any page
    with sync_playwright() as playwright:
        names = "--host-resolver-rules=MAP *.test 127.0.0.1"
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", names])
        page = browser.new_page()
        page.goto(f"http://friend.test:{elsewhere}/")
        status, answer = page.evaluate(ASK, ask)
        assert (status, answer["outputs"][1]["data"]) == (200, [10])
        assert page.evaluate(ASK, [*ask[:3], "{"])[0] == 400, "errors can be read, too"
        page.goto(f"http://foe.test:{elsewhere}/")
        for asked in (ask, simple):
            with pytest.raises(Exception, match="Failed to fetch"):
                page.evaluate(ASK, asked)
        assert page.goto(f"http://rebound.test:{port}/v2").status == 403
        browser.close()
    stats = json.loads(server.call("/v2/models/served/stats")[2])["model_stats"][0]["inference_stats"]
    assert (stats["success"]["count"], stats["fail"]["count"]) == (1, 1), "of the friend's"
    assert server.stop() == 0
