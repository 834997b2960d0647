"""The page of mnc serve in Chromium, as a person uses it."""

import json
import shutil
import threading

import numpy as np
import pytest
from PIL import Image

from mnc_d2 import load_predictor

pytest.importorskip("flask", reason="the extra 'serve' is not installed: pip install flask waitress")
api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="There is no chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def address(model_file):
    from werkzeug.serving import make_server

    from mnc_d2.serve import create_app

    predictor = load_predictor(model_file, device="cpu", overrides=["MODEL.MNC.OUTPUTS", "('instances', 'passes')"])
    server = make_server("127.0.0.1", 0, create_app(predictor, "a model", max_megabytes=1), threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.port}/"
    server.shutdown()
    thread.join()


@pytest.fixture
def page(address):
    """The page in a browser; what it asks for is in ``page.asked``, its errors in ``page.errors``."""
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # as root
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.asked, page.errors = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.errors.append(error))
        page.goto(address)
        yield page
        browser.close()


def choose(page, path):
    page.set_input_files("#file", path)
    api.expect(page.locator("#file")).to_be_enabled(timeout=60_000)


def wait_for_picture(page):
    api.expect(page.locator("#frame.busy")).to_have_count(0, timeout=60_000)


def test_an_image_is_shown_filtered_and_exported(page, address, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "cells.png")
    with page.expect_response("**/predictions") as answer:
        choose(page, tmp_path / "cells.png")
    result = answer.value.json()
    api.expect(page.locator("#message")).to_have_text("cells.png, 80 x 64 pixels")

    page.get_by_text("Pass 1", exact=True).click()
    page.locator("#score").fill("0.05")
    wait_for_picture(page)
    found = result["views"][0]["detections"]
    assert page.locator("#rows tr").count() == len(found) > 0
    assert page.locator("#picture").evaluate("image => image.naturalWidth") == 640
    page.locator("#rows tr").first.hover()
    assert page.locator("#mark").is_visible()
    with page.expect_download() as download:
        page.get_by_text("COCO JSON").click()
    assert download.value.suggested_filename == "cells_pass_1.json"
    content = json.loads(download.value.path().read_text())
    assert [x["score"] for x in content["annotations"]] == [x["score"] for x in found]

    page.locator("#score").fill("1")
    wait_for_picture(page)
    api.expect(page.locator("#summary")).to_have_text("Nothing has this score.")
    assert page.errors == []
    assert all(x.startswith((address, f"blob:{address}", "data:")) for x in page.asked)
    assert sum(x.endswith("/predictions") for x in page.asked) == 1


def test_what_is_wrong_is_said_on_the_page(page, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "large.png").write_bytes(bytes(1_000_001))
    choose(page, tmp_path / "notes.txt")
    api.expect(page.locator("#message.error")).to_contain_text("Image notes.txt cannot be read")
    choose(page, tmp_path / "large.png")
    api.expect(page.locator("#message.error")).to_contain_text("large.png has 1.0 MB; this page takes 1 at most")
    assert page.locator("#result").is_hidden()
    assert sum(x.endswith("/predictions") for x in page.asked) == 1  # the large one was not sent
