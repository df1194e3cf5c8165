"""The report in a real browser, without network: pictures, errors, phone, dark mode, contrast, pointer."""

import json
import os
import shutil

import pytest
from report_run import LONG, trained_run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if BROWSER is None or DRIVER is None:
    pytest.skip("no Chromium with its driver here (apt install chromium chromium-driver)", allow_module_level=True)
webdriver = pytest.importorskip("selenium.webdriver")

DESKTOP, PHONE = (1280, 900), (390, 844)
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
# Every element with text of its own, the contrast of that text to what lies behind it (WCAG 2.2, 1.4.3), worst first.
CONTRAST = """
const channel = v => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
const parse = c => { const n = c.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
const light = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
function behind(element) {
  const layers = [];
  for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
  return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255, 1]);
}
for (const fold of document.querySelectorAll("details")) fold.open = true;
const found = [];
for (const element of document.body.querySelectorAll("*")) {
  const own = [...element.childNodes].filter(n => n.nodeType === 3 && n.textContent.trim()).length;
  if (!own || !element.getClientRects().length || element.closest("script, style, dialog")) continue;
  const style = getComputedStyle(element), back = behind(element);
  const ink = over(parse(element instanceof SVGElement ? style.fill : style.color), back);
  const [a, b] = [light(ink), light(back)].sort((x, y) => y - x);
  found.push([(a + 0.05) / (b + 0.05), element.tagName, element.textContent.trim().slice(0, 40)]);
}
return found.sort((x, y) => x[0] - y[0]);
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return trained_run(tmp_path_factory.mktemp("report")) / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    os.environ["SE_OFFLINE"] = "true"  # Selenium's own manager would look for drivers on the network
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def _open(browser, page, size=DESKTOP, dark=False):
    browser.get_log("browser"), browser.get_log("performance")
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get(page.as_uri())


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_nothing_fails_and_everything_is_seen(browser, page, size, dark):
    _open(browser, page, size, dark)
    pictures = browser.execute_async_script(
        "const done = arguments[0], all = [...document.querySelectorAll('main img')];"
        "for (const image of all) image.loading = 'eager';"
        "Promise.all(all.map(image => image.decode().catch(() => 0)))"
        ".then(() => done(all.map(i => [i.naturalWidth, i.getBoundingClientRect().width, i.alt])))"
    )
    assert len(pictures) > 60
    assert not [alt for natural, shown, alt in pictures if natural == 0 or shown < 16 or not alt]
    assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]
    # Boxes that scroll on their own are meant to hold what is wider; everything else ends inside the window.
    wide = browser.execute_script(
        "return [...document.querySelectorAll('main *, header *')].filter(e => !e.closest('.wide, .strip, svg')"
        " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 120))"
    )
    assert wide == []
    small = browser.execute_script(
        "return [...document.querySelectorAll('.tick')].filter(e => e.getBoundingClientRect().height < 8).length"
    )
    assert small == 0
    contrast = browser.execute_script(CONTRAST)
    assert len(contrast) > 150 and contrast[0][0] >= 4.5, contrast[:5]
    assert browser.get_log("browser") == []
    log = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in log if m["method"] == "Network.requestWillBeSent"}
    assert page.as_uri() in asked
    assert not [url for url in asked if url != page.as_uri() and not url.startswith("data:")]


def test_dark_mode_is_dark(browser, page):
    lightness = {}
    for dark in (False, True):
        _open(browser, page, dark=dark)
        colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        lightness[dark] = sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))
    assert lightness[True] < 120 and lightness[False] > 660


def test_values_under_the_pointer(browser, page):
    from selenium.webdriver import ActionChains

    _open(browser, page)
    last = json.loads((page.parent / "metrics.jsonl").read_text().splitlines()[-1])
    titles = [caption.text for caption in browser.find_elements("css selector", "#training .chart-card figcaption")]
    chart = browser.find_elements("css selector", "#training .chart-card svg")[titles.index("Gradient norm")]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", chart)
    edge = int(chart.size["width"] / 2 * 0.94)  # just inside the plot's right end
    ActionChains(browser).move_to_element_with_offset(chart, edge, 0).perform()
    tip = browser.find_element("id", "tip")
    assert tip.is_displayed()
    step, value = tip.text.splitlines()
    assert step == "step 20" and float(value) == pytest.approx(last["grad_norm"], rel=1e-3)
    ActionChains(browser).move_to_element(browser.find_element("css selector", "h1")).perform()
    assert not tip.is_displayed()


def test_a_picture_is_enlarged(browser, page):
    _open(browser, page)
    picture = browser.find_element("css selector", "#samples img")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", picture)
    dialog = browser.find_element("id", "large")
    assert not dialog.is_displayed()
    picture.click()
    assert dialog.is_displayed() and dialog.find_element("css selector", "img").size["width"] >= 400
    assert dialog.text == f"generated {LONG}"
    dialog.click()
    assert not dialog.is_displayed()


def test_without_scripts_the_page_still_tells_all(browser, page):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        _open(browser, page)
        assert len(browser.find_elements("css selector", ".chart polyline")) > 8
        assert "gFID" in browser.find_element("id", "results").text
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
