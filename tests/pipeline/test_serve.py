"""`./run.sh serve`: a real server for a real client of LibreTranslate's API, and for a browser."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
from libretranslatepy import LibreTranslateAPI
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from models.export_format import ModelError
from pipeline import load
from pipeline.recipe import UsageError
from pipeline.serve import load_model, main, open_listener
from pipeline.server.batching import Batcher, Found
from pipeline.translation_recipe import TranslationRecipe
from tests.conftest import ROOT, wait_for_answer
from tests.mlflow_ui import needs_chromium
from tests.pipeline.conftest import exported
from tests.served_page import ADDRESSES, CONTRAST, CONTRASTS, FOCUS, ServedPage

pytestmark = pytest.mark.slow

WAITING = 6
LONG = 600  # lines, more than a batch takes from several requests


class Server(NamedTuple):
    """A server at work: CTranslate2 from de to en, PyTorch from en to de."""

    process: subprocess.Popen[bytes]
    address: str
    port: int
    half: socket.socket
    """A client that has sent the half of a request, right after the start."""

    def post(self, **fields: Any) -> requests.Response:
        """Ask for a translation from de to en."""
        fields = {"source": "de", "target": "en", **fields}
        return requests.post(f"{self.address}/translate", json=fields, timeout=60)

    def metric(self, name: str) -> float:
        """Return the value of a metric."""
        text = requests.get(f"{self.address}/metrics", timeout=60).text
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def send(self, head: str, body: bytes = b"") -> socket.socket:
        """Send what may be the half of a request."""
        client = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        client.sendall(f"POST /translate HTTP/1.1\r\nHost: localhost\r\n{head}".encode() + body)
        return client


@pytest.fixture(scope="module")
def back_folder(talkative_run: TranslationRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an export that says to go from English to German."""
    folder = tmp_path_factory.mktemp("back") / "back"
    shutil.copytree(exported(talkative_run, "safetensors"), folder)
    settings = json.loads((folder / "export.json").read_text())
    settings |= {"source_lang": "en", "target_lang": "de"}
    (folder / "export.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def server(
    ctranslate2_folder: Path, back_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    said = tmp_path_factory.mktemp("serve") / "said.txt"
    arguments = ["--model", ctranslate2_folder, "--model", back_folder, "--port", "0"]
    arguments += ["--max_waiting", str(WAITING), "--timeout", "20"]
    with said.open("wb") as output:
        process = subprocess.Popen(
            [str(ROOT / "run.sh"), "serve", *map(str, arguments)],
            stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        while not (told := re.search(r"^serve: (http://127.0.0.1:(\d+)) ", said.read_text(), re.M)):
            assert process.poll() is None, said.read_text()
            time.sleep(0.1)
        wait_for_answer(f"{told[1]}/health", process, said)
        server = Server(process, told[1], int(told[2]), socket.socket())
        half = server.send("Content-Length: 99\r\n\r\n", b'{"q": "Ja.", "sou')
        yield server._replace(half=half)
        assert "Traceback" not in said.read_text()
    finally:
        process.kill()
        process.wait(30)


def test_clients_get_what_a_batch_gives(
    server: Server, ctranslate2_folder: Path, sentences: list[str]
) -> None:
    translator = load(ctranslate2_folder)
    best = translator.n_best(sentences)
    expected = [translations[0].text for translations in best]
    client = LibreTranslateAPI(server.address)

    def ask(number: int) -> bool:
        order = [*range(number, len(sentences)), *range(number)]
        return all(client.translate(sentences[i], "de", "en") == expected[i] for i in order)

    with ThreadPoolExecutor(WAITING) as clients:
        assert all(clients.map(ask, range(WAITING)))
    requests_count = WAITING * len(sentences)
    labels = '{source="de",target="en"}'
    assert server.metric('ringformer_request_seconds_count{status="200"}') == requests_count
    assert 0 < server.metric(f"ringformer_batch_lines_count{labels}") < requests_count
    assert server.metric(f"ringformer_batch_lines_sum{labels}") == requests_count
    languages = [("de", ["en"]), ("en", ["de"])]
    assert [(each["code"], each["targets"]) for each in client.languages()] == languages
    several = server.post(q=sentences, alternatives=2).json()
    others = [[each.text for each in translations[1:3]] for translations in best]
    unseen = [translator.unseen([sentence]) for sentence in sentences]
    assert several == {
        "translatedText": expected, "alternatives": others, "unseenWords": unseen,
    }  # fmt: skip
    lines = server.post(q="\r\n".join(sentences), alternatives=2).json()
    assert lines == {
        "translatedText": "\n".join(expected), "alternatives": [],
        "unseenWords": translator.unseen(sentences),
    }  # fmt: skip


def test_alignments_come_from_models_that_show_them(server: Server, back_folder: Path) -> None:
    q = ["The house is old.", "", "one\ntwo"]
    found = server.post(q=q, source="en", target="de", alignment=True).json()
    translation = load(back_folder).translate(q[:1])[0]
    assert found["translatedText"][:2] == [translation, ""]
    first, *rest = found["alignment"]
    assert [target for _, target in first] == [*range(len(translation.split()))]
    assert {source for source, _ in first} <= {0, 1, 2, 3}
    assert rest == [[], []]
    assert "alignment" not in server.post(q=q, alignment=True).json()


def test_wrong_requests_are_refused_with_a_sentence(server: Server) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    pair = b'"source": "de", "target": "en"'
    for status, said, body, headers in (
        (400, "not valid JSON: ", b'{"q": ', {}),
        (400, "expected a JSON object", b"[1]", {}),
        (400, "not valid UTF-8: ", b'{"q": "\xff"}', {}),
        (400, "not valid UTF-8: ", b"q=%ff&source=de&target=en", form),
        (400, "not valid JSON: ", b'{"q": "\\ud800", %b}' % pair, {}),
        (400, "`target` is missing; ", b"q=Ja.&source=de", form),
        (400, "`q`: expected a text, or ", b'{"q": [1], %b}' % pair, {}),
        (400, "`format`: expected `text`; ", b'{"q": "a", "format": "html", %b}' % pair, {}),
        (400, "from auto to en, but de to en, en to de", b"q=Ja.&source=auto&target=en", form),
        (413, "5,001 characters; a request may", b'{"q": "%b", %b}' % (b"a" * 5001, pair), {}),
        (413, "the body of a request may have 64,096 bytes", b"a" * 10_000_000, {}),
        (415, "Content-Type text/html: expected ", b"Ja.", {"Content-Type": "text/html"}),
    ):  # fmt: skip
        found = requests.post(f"{server.address}/translate", body, headers=headers, timeout=60)
        assert list(found.json()) == ["error"]
        assert (found.status_code, said in found.json()["error"]) == (status, True), found.text
    found = requests.get(f"{server.address}/detect", timeout=60)
    assert (found.status_code, found.json()) == (404, {"error": "Not Found"})
    assert (
        "/translate" in requests.get(f"{server.address}/openapi.json", timeout=60).json()["paths"]
    )


@pytest.fixture(scope="module")
def page(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedPage]:
    page = ServedPage(server.address, tmp_path_factory.mktemp("chromium"))
    yield page
    page.browser.quit()


@needs_chromium
def test_the_page(server: Server, ctranslate2_folder: Path, page: ServedPage) -> None:
    """Somebody types two lines, takes the second best translation of the first, writes on, copies
    all, and looks where the other model's words come from."""
    best = load(ctranslate2_folder).n_best(["Das Haus ist alt.", "Zebra.", "Nein."])
    back = server.post(q="Das Haus ist alt.", source="en", target="de", alignment=True).json()
    aligned = [["Das", "Haus", "ist", "alt."][source] for source, _ in back["alignment"]]
    card = (ctranslate2_folder / "README.md").read_text().partition("\n---\n")[2].strip()
    page.open()
    page.wait(["German → English", "English → German"], "option")
    page.press("Das Haus ist alt.\nZebra.")
    page.wait([translations[0].text for translations in best[:2]], "#lines > li > button")
    assert page.texts("#lines > li:first-child ol button") == [each.text for each in best[0][1:]]
    said = r"The model was never trained on Zebra, and can only guess\. \d+ ms, \S+: 0\.\d MB"
    assert re.match(f"{said}, CTranslate2", page.texts("#state")[0])
    assert page.texts("#card") == [card]
    page.press(Keys.TAB, Keys.TAB, Keys.ENTER, Keys.TAB, Keys.ENTER)
    page.wait([best[0][1].text, best[1][0].text], "#lines > li > button")
    page.press_with(Keys.SHIFT, Keys.TAB, Keys.TAB)
    page.press("\n\nNein.")
    expected = [best[0][1].text, best[1][0].text, "", best[2][0].text]
    page.wait(expected, "#lines > li > :first-child")
    page.press(Keys.TAB, Keys.ENTER)
    page.wait(["Copied"], "#copy")
    page.press_with(Keys.SHIFT, Keys.TAB)
    page.press_with(Keys.CONTROL, "a", "v")
    text = page.browser.find_element(By.ID, "text")
    assert text.get_property("value") == "\n".join(expected)
    page.replace("Das Haus ist alt.")
    Select(page.browser.find_element(By.ID, "pair")).select_by_index(1)
    page.wait(back["translatedText"].split(), "#lines > li > button > span")
    word = page.browser.find_element(By.CSS_SELECTOR, "#lines > li > button > span")
    ActionChains(page.browser).move_to_element(word).perform()
    page.wait(aligned[:1], "mark")
    assert min(each for name, each in page.run(CONTRASTS) if name == "MARK") >= CONTRAST
    assert page.log() == []


@needs_chromium
def test_the_page_is_for_everybody(page: ServedPage) -> None:
    """It is for the keyboard and for screen readers, in light and dark, on a narrow screen; and
    says what is wrong."""
    page.open()
    page.wait(["German → English", "English → German"], "option")
    page.press("Das Haus ist alt.\n\n" + "Donaudampfschiff" * 9)
    page.wait([""], "#lines > li:nth-child(2) > *")
    page.press(Keys.TAB, Keys.TAB)
    assert page.run(FOCUS)
    page.press(Keys.ENTER)
    page.browser.find_element(By.TAG_NAME, "summary").click()
    heard = page.heard()
    assert all(name for _, name in heard), heard
    roles = {"combobox": 1, "option": 2, "textbox": 1, "DisclosureTriangle": 1, "link": 1}
    assert {role: [each for each, _ in heard].count(role) for role in roles} == roles
    buttons = page.texts("#copy, #lines > li > button, #lines > li:first-child ol button")
    assert len(buttons) > 2
    assert sorted(name for role, name in heard if role == "button") == sorted(buttons)
    everything = {"H1", "LABEL", "TEXTAREA", "SELECT", "BUTTON", "P", "SUMMARY", "PRE", "A"}
    page.can_be_read(everything, "translated")
    page.browser.find_element(By.ID, "text").click()
    page.replace("a" * 5001)
    page.wait(["5,001 characters; a request may have 5,000"], "[role=alert]")
    assert page.texts("#lines > li") == []
    page.can_be_read(everything, "refused")
    page.offline(True)
    page.replace("Ja.")
    page.wait(["The server does not answer."], "[role=alert]")
    page.offline(False)
    page.press(" Nein.")
    page.wait([""], "[role=alert]")
    assert len(page.texts("#lines > li")) == 1
    assert all("/translate - Failed to load resource" in error for error in page.log())


@needs_chromium
def test_the_description_of_the_api_comes_from_the_server(page: ServedPage) -> None:
    page.open("/docs")
    paths = ["/translate", "/languages", "/models", "/health", "/metrics"]
    page.wait(paths, ".opblock-summary-path")
    addresses = page.run(ADDRESSES)
    assert f"{page.address}/openapi.json" in addresses
    assert all(address.startswith(page.address) for address in addresses)
    assert page.log() == []


def test_a_client_that_leaves_is_forgotten(server: Server) -> None:
    body = json.dumps({"q": ["Ja."] * LONG, "source": "de", "target": "en"}).encode()
    forgotten = 'ringformer_request_seconds_count{status="499"}'
    before = server.metric(forgotten)  # the page leaves, too, when somebody types on
    server.send(f"Content-Length: {len(body)}\r\n\r\n", body).close()
    server.wait_for(lambda: server.metric(forgotten) > before)


def test_those_who_have_left_take_no_place_in_the_queue(ctranslate2_folder: Path) -> None:
    batches: list[int] = []

    async def scenario() -> Found:
        batcher = Batcher(load(ctranslate2_folder), 2, batches.append)
        left = [batcher.submit(["Ja."]) for _ in range(2)]
        with pytest.raises(asyncio.QueueFull):
            batcher.submit(["Ja."])
        for found in left:
            found.cancel()
        await asyncio.sleep(0)
        assert batcher.waiting() == 0
        stays = batcher.submit(["Ja.", "Nein."])
        at_work = asyncio.create_task(batcher.run())
        await stays
        at_work.cancel()
        return stays.result()

    found = asyncio.run(scenario())
    assert [best.text for best, *_ in found] == load(ctranslate2_folder).translate(["Ja.", "Nein."])
    assert batches == [2]


def test_a_signal_lets_those_who_wait_have_their_answers(
    server: Server, ctranslate2_folder: Path
) -> None:
    """The queue is full, and a client has sent half of its headers, another half of its body."""
    words = ["Ja.", "Nein."] * (LONG // 2)
    expected = load(ctranslate2_folder).translate(words)
    with ThreadPoolExecutor(2 * WAITING) as clients:
        asked = [clients.submit(server.post, q=words) for _ in range(2 * WAITING)]
        waiting = 'ringformer_waiting_requests{source="de",target="en"}'
        server.wait_for(lambda: server.metric(waiting) == WAITING)
        idle = server.send("Content-Le")
        server.process.send_signal(signal.SIGTERM)
        answers = [future.result() for future in asked]
    accepted = [answer.json() for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert (len(accepted) > WAITING, len(accepted) + len(refused)) == (True, 2 * WAITING)
    assert all(answer["translatedText"] == expected for answer in accepted)
    for answer in refused:
        assert answer.json() == {"error": "6 requests are waiting already; try again later"}
        assert answer.headers["Retry-After"] == "1"
    late = http.client.HTTPResponse(server.half)
    late.begin()
    assert (late.status, json.load(late)["error"][:26]) == (408, "the request did not arrive")
    assert idle.recv(1) == b""
    assert server.process.wait(60) == 0


def test_the_end_of_an_answer_does_not_wait_for_the_client_to_acknowledge_its_beginning() -> None:
    async def has_no_delay() -> bool:
        found = asyncio.get_running_loop().create_future()

        def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted = writer.get_extra_info("socket")
            found.set_result(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0)
            writer.close()

        listener = open_listener("127.0.0.1", 0)
        async with await asyncio.start_server(connected, sock=listener):
            with socket.create_connection(listener.getsockname()):
                return bool(await found)

    assert asyncio.run(has_no_delay())


def test_bad_usage(ctranslate2_folder: Path, talkative_run: TranslationRecipe) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        arguments = Namespace(model=[ctranslate2_folder] * 2, host="127.0.0.1")
        for port, said in (
            (taken.getsockname()[1], "Address already in use"),
            (70000, "ports have numbers up to 65535"),
            (0, "both go from de to en; serve one of them"),
        ):
            arguments.port = port
            with pytest.raises(UsageError, match=said):
                main(talkative_run, arguments)
    with pytest.raises(ModelError, match="serve it with --evaluation"):
        load_model(ctranslate2_folder, {"sampling_topk": 5})
