"""The page of app.py, and the file of generate.py --page, in headless Chromium, where it is installed."""

import importlib
import io
import os
import re
import shutil
import signal
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import ROOT, Done, assert_one_line, moving_square, run_command, small, start_command, train, write_image
from PIL import Image

pytest.importorskip("gradio")
browsers = pytest.importorskip("playwright.sync_api")
app = importlib.import_module("app")  # when it is known that gradio is there
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browsers.expect.set_options(timeout=120_000)  # ms: machines may be busy
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")


class Opened(NamedTuple):
    """The page, in a browser, and the folder of temporary files."""

    page: Any
    files: Path

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    def set_number(self, label: str, value: str) -> None:
        number = self.page.get_by_label(re.compile(f"number input for {label}"))
        number.fill(value)
        number.blur()

    def width(self, place: str) -> int:
        """The width of the first image or video that is seen; a video plays."""
        element = self.page.locator(f"{place}:visible").first
        if place == "video":
            wait_until_it_plays(element)
        return element.evaluate("x => x.naturalWidth ?? x.videoWidth")

    def tune(self, file: Path) -> None:
        """Drops a file, and tunes to it for a second."""
        self.page.reload()
        self.tab("Your own")
        self.page.locator("input[type=file]").first.set_input_files(file)
        self.page.get_by_text(file.name[:3]).first.wait_for()
        self.page.get_by_label("32", exact=True).check()
        self.set_number("Seconds to tune", "1")
        self.page.get_by_role("button", name="Tune", exact=True).click()


def wait_until_it_plays(video: Any) -> None:
    for _ in range(2400):
        if video.evaluate("x => x.currentTime") > 0.1:
            return
        time.sleep(0.05)
    pytest.fail("it doesn't play")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsers.sync_playwright() as tools:
        opened = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("page") / "runs"
    wanted = ["training.steps=4", "output.sample_every=2", "output.log_every=1"]
    for name in ("one", "two"):
        assert train(*small(folder, image_folder, *wanted, name=name)) == 0
    return folder / "one"


@pytest.fixture(scope="module")
def opened(browser: Any, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    """Of a run, from a server that at the end has left nothing, said nothing more, and asked for nothing elsewhere."""
    files = tmp_path_factory.mktemp("files")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(files), "PYTHONPATH": str(ROOT)}
    command = ["app.py", str(run), f"--runs={run.parent}", "--no-browser", "--device=cpu"]
    with start_command(*command, env=environment, cwd=files) as process, ExitStack() as ended:
        ended.callback(process.kill)
        line = process.stdout.readline()
        address = re.fullmatch(r"the page is at (http://127\.0\.0\.1:\d+)/ and Ctrl-C ends it\n", line)
        assert address, line + process.stderr.read()
        page, asked = browser.new_page(accept_downloads=True), list[str]()
        page.on("request", lambda request: asked.append(request.url))
        page.set_default_timeout(120_000)
        page.goto(address[1])
        yield Opened(page, files)
        assert [url for url in asked if not url.startswith((address[1], "data:", "blob:"))] == []
        process.send_signal(signal.SIGINT)
        assert (process.wait(60), process.stderr.read()) == (0, "")
    assert [*files.iterdir()] == []


def test_an_image_that_is_chosen_by_keyboard_moves_and_its_clip_and_weights_are_shown(opened: Opened) -> None:
    browsers.expect(images := opened.page.locator("#grid button:has(img)")).to_have_count(16)
    images.nth(3).press("Enter")
    browsers.expect(opened.page.get_by_label("Seed: which image")).to_have_value("3")
    opened.tab("Move")
    opened.page.get_by_label("webp").check()
    opened.page.get_by_role("button", name="Move it").click()
    assert opened.width("video") == 256
    assert opened.width("img") == 715
    with opened.page.expect_download() as download:
        opened.page.locator("a[download='clip.webp']").first.click()
    clip = Image.open(download.value.path())
    assert (clip.format, clip.n_frames) == ("WEBP", 96)  # type: ignore[attr-defined]


def test_sliders_between_two_images_and_over_the_steps_of_runs_change_what_is_shown(opened: Opened) -> None:
    opened.tab("Between")
    image = opened.page.locator("img:visible").first
    before = image.get_attribute("src")
    opened.page.get_by_role("slider", name=re.compile("From one to the other")).press("ArrowRight")
    browsers.expect(image).not_to_have_attribute("src", before)
    opened.tab("Runs")
    opened.page.get_by_label("two").check()
    opened.page.get_by_text("two, step 4").wait_for()
    opened.set_number("Step", "3")
    for name in ("one, step 2", "two, step 2"):
        opened.page.get_by_text(name).wait_for()
    assert opened.width("video") > 100


def test_an_image_that_is_dropped_is_tuned_and_moves(opened: Opened, tmp_path: Path) -> None:
    opened.tune(write_image(tmp_path / "a ..%2f..%2f$HOME `x`.png", moving_square(1)[0]))
    opened.page.locator(".prose:visible", has_text=re.compile("(drawing|moving|tuned): [0-9]+% done")).first.wait_for()
    opened.page.locator(".prose:visible", has_text="Done.").first.wait_for()
    pixels = """x => { const canvas = document.createElement("canvas"); canvas.width = canvas.height = 128;
                      canvas.getContext("2d").drawImage(x, 0, 0); return canvas.toDataURL(); }"""  # as it is seen
    seen = opened.page.locator("img:visible").first.evaluate(pixels).removeprefix("data:image/png;base64,")
    seen, drawn = Image.open(io.BytesIO(b64decode(seen))), Image.open(next(opened.files.glob("*/made-*/preview.png")))
    assert np.abs(np.float32(seen.convert("RGB")) - np.float32(drawn)).mean() < 4  # the last preview, as WebP
    assert opened.width("video") == 256
    browsers.expect(opened.page.get_by_label("Model").first).to_have_value(re.compile("^a .*HOME"))
    opened.tab("Move")
    opened.page.get_by_role("button", name="Move it").click()
    assert opened.width("video") == 256


def test_a_file_that_is_none_is_refused_in_one_line(opened: Opened, tmp_path: Path) -> None:
    (tmp_path / "text.gif").write_text("no gif")
    opened.tune(tmp_path / "text.gif")
    shown = opened.page.locator(".toast-body")
    browsers.expect(shown).to_contain_text("cannot read text.gif: it is no image, animation or video, or it is damaged")
    assert len(shown.inner_text().splitlines()) == 3  # Error, a cross to close it, and the line


def test_the_file_of_a_run_shows_its_samples_and_clips_and_asks_for_nothing(browser: Any, run: Path, tmp_path: Path):
    done = run_command("generate.py", str(run), "--page", "run.html", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("wrote run.html: one at 3 of 3 steps, ")
    page, asked = browser.new_page(), list[str]()
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: pytest.fail(message.text))
    page.goto(f"file://{tmp_path}/run.html")
    wait_until_it_plays(page.locator("figure:visible video"))
    assert page.locator("output").inner_text() == "4"
    page.get_by_role("slider").press("Home")
    assert page.locator("output").inner_text() == "0"
    image = page.locator("figure:visible img")
    assert image.get_attribute("alt") == "samples of step 0"
    assert image.evaluate("x => x.naturalWidth") == Image.open(run / "samples/step_000000.png").width
    assert "name: one" in (page.locator("pre").text_content() or "")
    assert [url for url in asked if not url.startswith("data:")] == [f"file://{tmp_path}/run.html"]


def test_mistakes_are_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for argument, words in (("nowhere", "no such run"), ("--port=0", "1 to 65,535"), ("--device=gpu", "--device")):
        assert_one_line(Done(app.main([argument, "--no-browser"]), *capsys.readouterr()), [words])
