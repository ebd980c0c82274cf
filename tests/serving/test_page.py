"""The page in a real browser, headless: a conversation, a stop, a reload, tools; nothing on the console."""

import os
import shutil
import time

import pytest
from served import GivenReplies, Server, byte_tokenizer, running

from qwen3next.chat.template import ChatTemplate

selenium = pytest.importorskip("selenium")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs Chromium and its driver"),
]
TEMPLATE = "{% if tools %}TOOLS{% endif %}{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}bot:<think>"
CALL = '</think><tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
TOOLS = '[{"type": "function", "function": {"name": "weather"}}]'
SHOTS = os.environ.get("QWEN3NEXT_SCREENSHOTS")  # a folder for pictures of the page


@pytest.fixture(scope="module")
def site():
    tokenizer = byte_tokenizer(markup=True)
    engine = GivenReplies(tokenizer, pause=0.004)
    with running(Server(engine, tokenizer, name="tiny", template=ChatTemplate(TEMPLATE))) as address:
        yield address, engine


@pytest.fixture
def page(site):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1000,760", "--no-proxy-server"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.get(site[0])
        yield driver
        assert driver.get_log("browser") == []
    finally:
        driver.quit()


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.05)
    return found


def say(page, text):
    page.find_element(By.ID, "text").send_keys(text + Keys.ENTER)


def cards(page, role):
    return [card.text for card in page.find_elements(By.CSS_SELECTOR, f"article.{role}")]


def idle(page):
    return page.find_element(By.ID, "send").is_displayed()


def picture(page, name):
    if SHOTS:
        page.save_screenshot(f"{SHOTS}/{name}.png")


def test_a_conversation_and_a_reload(page, site):
    site[1].replies = ["First I think.</think>Hello <b>you</b>.\n```python\nprint(1)\n```", "</think>Again."]
    until(lambda: page.title == "tiny")
    say(page, "Hi")
    until(lambda: idle(page) and "cached" in "".join(cards(page, "assistant")))
    (answer,) = cards(page, "assistant")
    assert "Hello <b>you</b>." in answer
    assert "7 of" in answer
    assert page.find_element(By.CSS_SELECTOR, ".said pre").text == "print(1)"
    thinking = page.find_element(By.CSS_SELECTOR, "details.thinking")
    assert "First I think." not in thinking.text
    thinking.find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
    assert "First I think." in thinking.text
    picture(page, "conversation")
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    picture(page, "dark")
    page.refresh()
    until(lambda: page.title == "tiny")
    assert cards(page, "user") == ["Hi"]
    assert "Hello <b>you</b>." in cards(page, "assistant")[0]
    say(page, "And?")
    until(lambda: idle(page) and len(cards(page, "assistant")) == 2)
    until(lambda: "Again." in cards(page, "assistant")[1])
    assert "assistant:Hello <b>you</b>." in site[1].tokenizer.decode(site[1].requests[-1].ids)
    page.find_element(By.ID, "clear").click()
    assert cards(page, "user") == []


def test_a_stop_frees_the_server(page, site):
    site[1].replies = ["</think>" + "word " * 400]
    say(page, "Go")
    until(lambda: "word word" in "".join(cards(page, "assistant")))
    picture(page, "streaming")
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.ESCAPE)
    until(lambda: idle(page))
    (answer,) = cards(page, "assistant")
    assert answer.endswith("Stopped.")
    assert answer.count("word") < 400
    assert "words" not in answer


def test_tools_are_shown_and_their_results_go_back(page, site):
    site[1].replies = [CALL, "</think>It rains."]
    page.find_element(By.ID, "options").click()
    page.find_element(By.ID, "tools").send_keys(TOOLS)
    picture(page, "settings")
    page.find_element(By.ID, "options").click()
    say(page, "Rain?")
    field = until(lambda: page.find_elements(By.CSS_SELECTOR, "article form input"))[0]
    assert "Calls weather" in cards(page, "assistant")[0]
    picture(page, "tools")
    field.send_keys("rain" + Keys.ENTER)
    until(lambda: idle(page) and len(cards(page, "assistant")) == 2 and "It rains." in cards(page, "assistant")[1])
    assert "tool:rain" in site[1].tokenizer.decode(site[1].requests[-1].ids)


def test_on_a_phone_nothing_is_wider_than_the_screen(page, site):
    site[1].replies = ["Some thoughts.</think>" + "An answer with " + "a" * 200 + "\n```\n" + "x" * 300 + "\n```"]
    size = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.refresh()
    until(lambda: page.title == "tiny")
    say(page, "A question that is somewhat longer than one line on a phone")
    until(lambda: idle(page) and "cached" in "".join(cards(page, "assistant")))
    picture(page, "phone")
    wide = page.execute_script("return document.scrollingElement.scrollWidth")
    assert wide <= 360


def test_errors_are_shown(page, site):
    page.find_element(By.ID, "options").click()
    page.find_element(By.ID, "tools").send_keys("[{]")
    say(page, "x")
    until(lambda: idle(page) and cards(page, "assistant"))
    assert page.find_elements(By.CSS_SELECTOR, ".error")


def test_keyboard_and_screen_reader(page, site):
    """Every control has a name, and Tab reaches all of them."""
    script = """return [...document.querySelectorAll("button, input, textarea")].filter(e => e.offsetParent)
        .filter(e => !(e.labels && e.labels.length) && !e.textContent.trim()).map(e => e.outerHTML)"""
    page.find_element(By.ID, "options").click()
    assert page.execute_script(script) == []
    reached = set()
    for _ in range(14):
        page.switch_to.active_element.send_keys(Keys.TAB)
        reached.add(page.switch_to.active_element.get_attribute("id"))
    assert {"options", "clear", "system", "temperature", "most", "seed", "key", "tools", "send"} <= reached
