"""The pages of scripts/web_demo.py in a real browser: what is clicked works, and nothing a model writes gets out.

Skipped where there is no Chromium or no playwright (pip) to drive it.
"""

import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

pytest.importorskip("playwright", reason="driving a browser needs: pip install playwright")
pytest.importorskip("streamlit", reason="the chat page needs streamlit")
from playwright.sync_api import expect, sync_playwright

from dataset import jsonl
from scripts.web.labels import LABELS
from scripts.web.text import plain
from tests.test_web import HOSTILE, stub_server, write_models, write_run

ROOT = pathlib.Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 120                                         # seconds, for a busy machine
PHONE = {"width": 390, "height": 844}
ESCAPED = HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    expect.set_options(timeout=1000 * PATIENCE)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=1000 * PATIENCE)
        context = browser.new_context()                # one for all tests: a page is loaded from its cache
        context.set_default_timeout(1000 * PATIENCE)
        yield context
        browser.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory, browser):
    """The address of the pages, started within scripts/, and the folder of runs they read."""
    runs = write_models(tmp_path_factory.mktemp("runs"))
    write_run(runs / "one" / "long", [{"step": step, "loss": 1 / step, "lr": 0.1} for step in range(1, 40)], done=True)
    write_run(runs / "two" / "short", [{"step": step, "loss": 2 / step} for step in range(1, 9)])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", "web_demo.py", "--server.headless", "true", "--server.port",
               str(port), "--", "--model", str(runs / "one"), "--runs", str(runs), "--device", "cpu"]
    with open(runs / "log.txt", "w+", encoding="utf-8") as log:
        server = subprocess.Popen(command, cwd=ROOT / "scripts", stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                  env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            wait_until_served(server, port)
            yield f"http://127.0.0.1:{port}", runs
        finally:
            server.terminate()
            server.wait(PATIENCE)
        log.seek(0)
        assert "Traceback" not in log.read()


def wait_until_served(server, port):
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=5).close()
            return
        time.sleep(0.1)
    raise AssertionError("the pages are not served")


@pytest.fixture
def page(browser, served):
    """The chat page in a window of its own. Afterwards: no error was logged, and nobody else was asked for anything."""
    address, runs = served
    page, problems = browser.new_page(), []
    page.set_viewport_size({"width": 1280, "height": 900})
    page.on("console", lambda message: message.type == "error" and problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(dialog.message))

    def look(request):
        if not request.url.startswith((address, address.replace("http", "ws", 1), "data:", "blob:")):
            problems.append(request.url)

    page.on("request", look)
    page.goto(address)
    expect(page.get_by_test_id("stChatInputTextArea")).to_be_enabled()
    yield page
    page.close()
    assert problems == []


def say(page, text):
    page.get_by_test_id("stChatInputTextArea").fill(text)
    page.keyboard.press("Enter")


def messages(page):
    return page.get_by_test_id("stChatMessage")


def answered(page, times=1):
    """Wait until the last message is answered; returns the text of the last answer."""
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    expect(page.get_by_test_id("stChatInputTextArea")).to_be_enabled()
    return messages(page).last.inner_text()


def use_server(page, url):
    page.get_by_test_id("stSidebar").get_by_role("combobox", name="Where the model runs").click()
    page.get_by_role("option", name="OpenAI-compatible server").click()
    address = page.get_by_label("Address of the server")
    address.fill(url)
    address.press("Enter")
    expect(page.get_by_role("combobox", name="Model", exact=True)).to_have_value("first")
    expect(page.get_by_test_id("stChatInputTextArea")).to_be_enabled()


def check_that_it_fits(page):
    """Nothing is wider than the window, once charts have found their size."""
    page.wait_for_function("document.documentElement.scrollWidth <= window.innerWidth && [...document.querySelectorAll("
                         "'[data-testid=stMain]')].every(main => main.scrollWidth <= main.clientWidth)")


def test_a_conversation(page, served):
    say(page, "Who are you?")
    first = answered(page)
    assert "tokens/s" in first and messages(page).count() == 2
    page.get_by_role("button", name="Regenerate").click()
    expect(messages(page).last).not_to_have_text(first, use_inner_text=True)
    second = answered(page)
    assert second != first and messages(page).count() == 2
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Your message").fill("Who am I?")
    page.get_by_role("button", name="Send", exact=True).click()
    expect(messages(page).first).to_contain_text("Who am I?")
    answered(page)
    assert messages(page).count() == 2
    with page.expect_download() as download:
        page.get_by_role("button", name="Export as JSONL").click()
    download.value.save_as(served[1] / "conversation.jsonl")
    trainable, = jsonl.records(served[1] / "conversation.jsonl", kind="chat")
    record = json.loads((served[1] / "conversation.jsonl").read_text(encoding="utf-8"))
    assert len(trainable["messages"]) == len(record["messages"])
    assert [message["role"] for message in record["messages"]][:2] == ["user", "assistant"]
    assert record["messages"][0]["content"] == "Who am I?" and record["model"] == str(served[1] / "one")
    page.get_by_test_id("stFeedback").get_by_role("radio").first.click(force=True)
    expect(page.get_by_text("Kept in")).to_be_visible()
    assert json.loads((served[1] / "ratings.jsonl").read_text(encoding="utf-8"))["messages"] == record["messages"]
    page.get_by_role("button", name="New conversation").click()
    expect(messages(page)).to_have_count(0)


def test_an_answer_comes_bit_by_bit_and_stops(page):
    with stub_server(([f"word{number} " for number in range(1000)], 0.05)) as server:
        use_server(page, server.url)
        say(page, "go on")
        expect(messages(page).last).to_contain_text("word3 ")
        assert "word999" not in messages(page).last.inner_text() and "writing" in messages(page).last.inner_text()
        expect(page.get_by_test_id("stChatInputTextArea")).to_be_disabled()
        expect(messages(page).last).to_contain_text("word9 ")
        page.get_by_role("button", name="Stop").click()
        stopped = answered(page)
        assert "· stopped ·" in stopped and "word9 " in stopped
        time.sleep(0.3)
        assert messages(page).last.inner_text() == stopped and server.sent < 900


def test_two_models_side_by_side(page):
    page.get_by_text("Compare two models").click()
    page.get_by_test_id("stSidebar").get_by_role("combobox", name="Second model", exact=True).click()
    page.get_by_role("option", name="two").first.click()
    say(page, "hi")
    answered(page)
    left, right = messages(page).nth(1), messages(page).nth(2)
    assert left.inner_text().split("seed")[1] == right.inner_text().split("seed")[1]
    assert "/one" in left.inner_text() and "/two" in right.inner_text()
    assert left.bounding_box()["y"] == right.bounding_box()["y"]
    page.get_by_role("button", name="This one is better").first.click()
    expect(page.get_by_text("Kept in")).to_be_visible()
    page.set_viewport_size(PHONE)
    page.wait_for_function("""() => {
        const [_, left, right] = document.querySelectorAll('[data-testid=stChatMessage]');
        return left.getBoundingClientRect().x == right.getBoundingClientRect().x}""")
    check_that_it_fits(page)


def test_a_hostile_answer_is_text(page):
    call = {"index": 0, "function": {"name": HOSTILE, "arguments": json.dumps({"expression": HOSTILE})}}
    with stub_server([{"reasoning_content": HOSTILE}, {"tool_calls": [call]}], [HOSTILE]) as server:
        use_server(page, server.url)
        say(page, HOSTILE)
        answered(page)
        for line in ESCAPED.replace("```html\n", "").split("\n"):
            expect(messages(page).last).to_contain_text(line)
        for opened in messages(page).get_by_test_id("stExpander").all():
            if opened.locator("details").get_attribute("open") is None:
                opened.locator("summary").click()
        expect(messages(page).get_by_text("error: the tools are")).to_be_visible()
        assert messages(page).locator("a, iframe, script, object, embed, b, h1, .katex").count() == 0
        assert messages(page).locator("img").count() == 0
        assert page.title() == "Acorn"
        page.set_viewport_size(PHONE)
        check_that_it_fits(page)


def test_inside(page):
    page.get_by_role("link", name="Inspect").click()
    expect(page.get_by_test_id("stVegaLiteChart")).to_have_count(4)
    page.get_by_label("Text", exact=True).fill(plain(HOSTILE)[:60])
    page.get_by_label("Text", exact=True).press("Control+Enter")
    expect(page.get_by_text("script", exact=False).first).to_be_visible()
    page.get_by_test_id("stSidebar").get_by_role("combobox", name="Model", exact=True).click()
    page.get_by_role("option", name="mixture").click()
    expect(page.get_by_test_id("stVegaLiteChart")).to_have_count(5)
    page.set_viewport_size(PHONE)
    check_that_it_fits(page)


def test_training(page):
    page.get_by_role("link", name="Training").click()
    expect(page.get_by_test_id("stVegaLiteChart")).to_have_count(1)
    expect(page.get_by_test_id("stDataFrame")).to_be_visible()
    page.get_by_test_id("stMain").get_by_role("combobox", name="Metric").click()
    page.get_by_role("option", name="lr").click()
    expect(page.get_by_test_id("stVegaLiteChart")).to_have_count(1)
    page.set_viewport_size(PHONE)
    check_that_it_fits(page)


def test_chinese(page):
    page.get_by_text("中文").click()
    expect(page.get_by_role("heading", name=LABELS["chat"][1])).to_be_visible()
    expect(page.get_by_text(LABELS["compare"][1])).to_be_visible()
