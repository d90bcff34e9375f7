"""The page of mode=demo in a real browser, headless Chromium. Skipped where gradio, selenium or
Chromium with its driver are missing (requirements-demo.txt, the packages chromium and
chromium-driver of Debian)."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import GOLDEN
from networks import CHECKPOINTS
from sampling_tools import Table
from test_live import HOSTILE

import settings
from checkpointing.layouts import read_checkpoint
from modes.demo import build_page, listen, load_writer
from sampling.demo_page import build_app, serve
from sampling.live import plain
from utils import escaped

pytest.importorskip("gradio", reason="needs gradio: pip install -r requirements-demo.txt")
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="needs chromium and chromedriver"
)
ROOT = Path(__file__).parent.parent.parent
BLOCKS = GOLDEN / CHECKPOINTS["bd3lm_bs4"]["file"]
COMMAND = [
    "mode=demo",
    f"eval.checkpoint_path={BLOCKS}",
    f"data.tokenizer_name_or_path={GOLDEN / 'tokenizer'}",
]
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--window-size=1400,1800",
)
PATIENCE = 60
# main.py, which also says on standard error whom it looks for and connects to
WATCHED = """
import runpy, sys
def watch(event, arguments):
    if event in ("socket.getaddrinfo", "socket.connect"):
        print(event, arguments[-1 if event == "socket.connect" else 0], file=sys.__stderr__)
sys.addaudithook(watch)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def until(true, what="it"):
    """The first value of true() that is true."""
    end = time.monotonic() + PATIENCE
    while not (found := true()):
        assert time.monotonic() < end, f"{what} did not come"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.get("about:blank")
    yield driver
    driver.quit()


def model_page(name="bd3lm_bs4"):
    path = GOLDEN / CHECKPOINTS[name]["file"]
    config, found = settings.load(COMMAND), read_checkpoint(path)
    return build_page(config, found, load_writer(config, found))


def served(page) -> str:
    """The address of a page that is served to the end of the tests."""
    listening = listen("127.0.0.1", 0)
    app = build_app(page, ["127.0.0.1"])
    threading.Thread(target=serve, args=(app, listening), daemon=True).start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}/"


@pytest.fixture(scope="module")
def address():
    return served(model_page())


class Screen:
    """The page in the browser, as a user has it."""

    def __init__(self, driver, address: str):
        self.driver = driver
        driver.get_log("performance"), driver.get_log("browser")
        driver.get(address)
        until(lambda: driver.find_elements(By.ID, "write"), "the page")
        until(lambda: driver.find_elements(By.CSS_SELECTOR, "#B-seed input"), "the settings")

    def one(self, selector: str):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def put(self, selector: str, text: str) -> None:
        """What a user types in place of what is there."""
        box = self.one(selector)
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(text)

    def put_prompt(self, text: str) -> None:
        self.driver.execute_script(
            "const box = document.querySelector('#prompt textarea'); box.value = arguments[0];"
            "box.dispatchEvent(new Event('input', {bubbles: true}));",
            text,
        )

    def choose(self, side: str, rule: str) -> None:
        box = self.one(f"#{side}-steps input")
        box.click()
        until(lambda: self.driver.find_elements(By.CSS_SELECTOR, "[role=option]"))
        for option in self.driver.find_elements(By.CSS_SELECTOR, "[role=option]"):
            if option.get_attribute("aria-label") == rule or option.text.strip("✓ \n") == rule:
                option.click()
                return
        raise AssertionError(rule)

    def press(self, button: str) -> None:
        self.one(f"#{button}").click()

    def state(self, side: str) -> str:
        found = self.driver.find_elements(By.CSS_SELECTOR, f"#text-{side} .side")
        return found[0].get_attribute("class").split()[-1] if found else ""

    def write(self) -> None:
        """Press the button and wait for the end of both texts."""
        self.driver.execute_script("document.querySelectorAll('.side').forEach(e => e.remove())")
        self.press("write")
        until(lambda: all(self.state(side) in ("done", "problem") for side in "AB"), "the text")

    def spans(self, side: str) -> list[tuple[str, str, str]]:
        """(state, title, text) of each token."""
        return self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])]"
            ".map(e => [e.className, e.title, e.textContent])",
            f"#text-{side} .text > span",
        )

    def text(self, side: str) -> str:
        return "".join(text for _, _, text in self.spans(side))

    def figures(self, side: str) -> str:
        return self.one(f"#text-{side} .figures").text

    def asked(self) -> set[str]:
        """Hosts that a page has sent a request to since this one was opened."""
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [e["params"] for e in events if e["method"].startswith("Network.")]
        urls = [p.get("request", p).get("url", "") for p in sent]
        return {found[1] for url in urls if (found := re.match(r"(?:http|ws)s?://([^/]*)", url))}


@pytest.fixture
def screen(browser, address):
    return Screen(browser, address)


def test_a_text_is_written_and_each_token_tells_of_itself(screen, address):
    screen.put("#pause input", "0.1")
    screen.put_prompt("the work")
    screen.press("write")
    until(lambda: any(state == "fresh" for state, _, _ in screen.spans("A")), "a fresh token")
    assert any(state == "masked" for state, _, _ in screen.spans("A"))
    until(lambda: all(screen.state(side) == "done" for side in "AB"), "the text")
    spans = screen.spans("A")
    assert len(spans) == 32
    assert {state for state, _, _ in spans} == {"given", "settled"}
    assert "".join(text for state, _, text in spans if state == "given").endswith("the work")
    told = re.compile(r".+, probability [01]\.\d{3}, evaluation \d+", re.S)
    assert all(told.fullmatch(title) for state, title, _ in spans if state == "settled")
    assert re.match(r"NFE \d+ · \d+ tokens written · 1.00 tokens per evaluation · [\d,]+ tokens/s",
                    screen.figures("A"))  # fmt: skip
    # A and B differ in the seed alone
    assert screen.text("A") != screen.text("B")
    screen.put("#B-seed input", "1")
    screen.write()
    assert screen.text("A") == screen.text("B")
    assert screen.asked() == {address.split("/")[2]}


@pytest.mark.parametrize("name", ["ar", "mdlm", "sedd"])
def test_the_other_algorithms_write_too(browser, name):
    screen = Screen(browser, served(model_page(name)))
    for part in ("gap", "A-steps", "A-window"):
        assert bool(browser.find_elements(By.ID, part)) == (name == "mdlm"), part
    screen.put("#pause input", "0")
    screen.write()
    assert [screen.state(side) for side in "AB"] == ["done", "done"]
    assert len(screen.spans("A")) == 32


def test_two_settings_stand_side_by_side(screen):
    screen.choose("B", "threshold")
    until(lambda: screen.driver.find_elements(By.CSS_SELECTOR, "#B-threshold input"))
    assert not screen.driver.find_elements(By.CSS_SELECTOR, "#A-threshold input")
    screen.put("#B-threshold input", "0.001")
    screen.put("#pause input", "0")
    screen.write()
    assert screen.figures("A").startswith("NFE 31 ")
    assert screen.figures("B").startswith("NFE 8 ")


def test_the_gap_button_puts_a_gap_where_the_cursor_is_and_it_is_filled(screen):
    screen.put("#prompt textarea", "the  work")
    screen.driver.execute_script(
        "document.querySelector('#prompt textarea').setSelectionRange(4, 4)"
    )
    screen.press("gap")
    box = screen.one("#prompt textarea")
    until(lambda: box.get_attribute("value") == "the [MASK] work", "the gap")
    screen.press("gap")
    until(lambda: box.get_attribute("value") == "the [MASK][MASK] work", "the second gap")
    screen.write()
    spans = screen.spans("A")
    assert [state for state, _, _ in spans].count("settled") == 2
    assert all("settled" in (a, b) or a == b for (a, _, _), (b, _, _) in zip(spans, spans[1:]))  # noqa: B905, RUF007
    kept = "".join(text for state, _, text in spans if state == "given")
    assert kept == "<|endoftext|>the work"
    assert screen.figures("A").startswith("NFE ")


@pytest.mark.parametrize("hostile", HOSTILE[:5], ids=ascii)
def test_a_hostile_prompt_is_text(screen, hostile):
    screen.put_prompt(hostile)
    screen.put("#length input", "64")
    screen.put("#pause input", "0")
    screen.write()
    assert screen.driver.execute_script("return window.flag") is None
    given = "".join(text for state, _, text in screen.spans("A") if state == "given")
    assert given == "<|endoftext|>" + hostile
    assert screen.driver.execute_script(
        "return [...document.querySelectorAll('.side *')]"
        ".every(e => ['DIV', 'P', 'SPAN'].includes(e.tagName))"
    )


class Hostile:
    """A tokenizer whose tokens are attacks."""

    bos_id = eos_id = 0
    mask_id = len(HOSTILE) + 1
    pieces = ("<b>begin</b>", *HOSTILE)

    def encode(self, text):
        return []

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)


def test_hostile_tokens_are_text(browser):
    page = model_page()
    writer, words = page.writer, Hostile()
    size = words.mask_id + 1
    table = Table(lambda tokens, position: [1.0] * size, size, words.mask_id, block_size=4)
    params = writer.params.changed(bos_id=0, eos_id=0)
    for name, value in {"tokenizer": words, "denoise": table, "params": params}.items():
        object.__setattr__(writer, name, value)
    screen = Screen(browser, served(page))
    screen.put("#pause input", "0")
    screen.write()
    assert browser.execute_script("return window.flag") is None
    shown = {text for side in "AB" for _, _, text in screen.spans(side)}
    expected = {"\n".join(map(escaped, piece.split("\n"))) for piece in words.pieces}
    assert shown == expected
    assert len(HOSTILE) == len(expected) - 1
    assert plain(HOSTILE[0]) != HOSTILE[0]


def test_what_cannot_be_is_said_on_the_page(screen):
    screen.put("#pause input", "0")
    screen.put("#A-temperature input", "-1")
    screen.put("#B-temperature input", "0.5")
    screen.write()
    assert screen.state("B") == "done"
    assert screen.one("#text-A [role=alert]").text == "sampling.temperature=-1 must be in [0, 100]"
    screen.put("#length input", "4096")
    screen.press("write")
    until(lambda: "model.length=4096 must be" in screen.one("#text-B").text, "the length")
    screen.put("#length input", "32")
    screen.put_prompt("<b>x</b> " * 100)
    screen.press("write")
    until(lambda: "shorten it or set a greater model.length" in screen.one("#text-B").text)
    assert "Traceback" not in screen.driver.page_source


def test_the_stop_button_ends_the_texts(screen):
    screen.put("#pause input", "1")
    screen.press("write")
    until(lambda: any(state == "settled" for state, _, _ in screen.spans("A")), "a token")
    begun = time.monotonic()
    screen.press("stop")
    until(lambda: all(screen.state(side) == "problem" for side in "AB"), "the end")
    assert time.monotonic() - begun < 15  # thirty evaluations a side were to come
    assert screen.one("#text-A [role=alert]").text == "stopped"
    assert any(state == "masked" for state, _, _ in screen.spans("A"))
    screen.put("#pause input", "0")
    screen.write()
    assert screen.state("A") == "done"


def test_a_page_of_another_name_is_refused(address):
    """A site may let its name point to this machine, to read the page in a visitor's browser."""
    import http.client

    port = int(address.split(":")[2].strip("/"))
    for name, status in (("attacker.example", 400), ("127.0.0.1", 200)):
        asked = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        asked.request("GET", "/", headers={"Host": name})
        assert asked.getresponse().status == status, name
        asked.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_told_to_end(browser, number, tmp_path):
    """And asks nobody else for anything."""
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", WATCHED, "main.py", *COMMAND, "demo.port=0"],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        try:
            read = (tmp_path / "log").read_text
            found = until(lambda: re.search(r"the page is (http://127\.0\.0\.1:\d+/)", read()))
            screen = Screen(browser, found[1])
            screen.put("#pause input", "0")
            screen.write()
            process.send_signal(number)
            assert process.wait(PATIENCE) == -number
        finally:
            process.kill()
            process.wait()
    assert "Traceback" not in read()
    others = re.findall(r"^socket\.\w+ (?!127\.0\.0\.1$).*", read(), re.M)
    assert "socket.getaddrinfo 127.0.0.1" in read()
    assert others == []
