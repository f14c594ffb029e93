"""The demo page over HTTP and in a browser, with real uploads: answers, refusals, and what is left behind."""

import io
import json
import shutil
import socket
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from videos import write_video

from etmamba_timm.checkpoints.manifest import sample_video
from etmamba_timm.data import VideoError
from etmamba_timm.predict import load_model

if TYPE_CHECKING:
    from selenium.webdriver import Chrome as WebDriver

pytest.importorskip("gradio")
demo = pytest.importorskip("etmamba_timm.seeing.demo")

MODEL, SAMPLE = "etmamba_ti.mocap", sample_video()
MEGABYTES = 2  # the largest upload


class Page:
    """A page that is served, and what a program would ask it."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url.rstrip("/"), folder

    def ask(self, path: str, body: bytes | None = None, kind: str = "application/json") -> tuple[int, str]:
        """The status and text of an answer."""
        request = urllib.request.Request(self.url + path, body, {"Content-Type": kind})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")

    def upload(self, *files: tuple[str, bytes]) -> tuple[int, str]:
        body = b"".join(part(name, data) + b"\r\n" for name, data in files) + b"--limit--\r\n"
        return self.ask("/gradio_api/upload", body, "multipart/form-data; boundary=limit")

    def analyse(self, path: str, name: str = MODEL, seconds: float = 2) -> str:
        """The last event on a video that was uploaded, as text."""
        data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, name, seconds]
        status, text = self.ask("/gradio_api/call/analyse", json.dumps({"data": data}).encode())
        if status != 200:
            return f"{status} {text}"
        return self.ask(f"/gradio_api/call/analyse/{json.loads(text)['event_id']}")[1].strip().rsplit("event: ", 1)[-1]

    def files(self) -> list[str]:
        return sorted(str(file.relative_to(self.folder)) for file in self.folder.rglob("*") if file.is_file())


def part(name: str, data: bytes) -> bytes:
    """A file in the body of an upload."""
    return f'--limit\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode() + data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("uploads")
    model = load_model(MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(folder))
        with demo.serve(lambda name: model, [MODEL], SAMPLE, most_megabytes=MEGABYTES) as running:
            assert "127.0.0.1" in running.local_url
            yield Page(running.local_url, folder)
        assert not list(folder.iterdir())  # nothing is kept when the server stops


@pytest.fixture
def kept(page: Page) -> Iterator[list[str]]:
    """The files on the server before a test, which must be those after it."""
    before = page.files()
    yield before
    assert page.files() == before


def test_uploaded_sample_is_recognised(page: Page) -> None:
    status, text = page.upload(("my clip.mp4", SAMPLE.read_bytes()))
    assert status == 200
    event, data = page.analyse(json.loads(text)[0]).split("\n", 1)
    message, whole, moments, _, picture, field = json.loads(data.removeprefix("data: "))
    assert (event, message, whole["label"]) == ("complete", "", "spinkick")
    assert len(moments) >= 1
    assert all(moment["caption"].split(": ")[1] for moment in moments)
    for shown in (picture, field):
        assert page.ask("/gradio_api/file=" + shown["path"])[0] == 200


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("../../evil.mp4", SAMPLE.read_bytes())
    return buffer.getvalue()


HOSTILE = {
    "text": b"no video\n" * 99,
    "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    "zip": zipped(),
    "cut off": SAMPLE.read_bytes()[:3000],
    "empty": b"",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_video_gets_an_error_and_is_deleted(page: Page, kept: list[str], data: bytes) -> None:
    status, text = page.upload(("clip.mp4", data))
    assert status == 200
    answer = page.analyse(json.loads(text)[0])
    assert "**No answer:**" in answer
    assert str(page.folder) not in answer
    assert "clip.mp4" not in answer


@pytest.mark.parametrize(
    "name", ["../../../evil.mp4", "/etc/evil.mp4", "..\\\\..\\\\evil.mp4", "a/../../evil.mp4", ".evil.mp4"]
)
def test_names_with_paths_stay_in_the_folder(page: Page, kept: list[str], name: str) -> None:
    status, text = page.upload((name, b"text"))
    assert status == 200
    path = Path(json.loads(text)[0])
    assert path.resolve().is_relative_to(page.folder)
    assert path.name.endswith("evil.mp4")
    assert "**No answer:**" in page.analyse(str(path))


def test_large_uploads_are_refused(page: Page, kept: list[str]) -> None:
    large = ("a.mp4", bytes(MEGABYTES * 10**6 + 200_000))
    assert page.upload(large) == (413, "Larger than 2.1 MB")
    half = ("a.mp4", bytes(MEGABYTES * 10**6 // 2))
    assert page.upload(half, half, half)[0] == 413  # each file is small enough
    assert page.ask("/gradio_api/call/analyse", b" " * 200_000)[0] == 413


def raw(page: Page, head: str, body: bytes) -> bytes:
    """The start of the answer to a request that is sent as it is, and then broken off."""
    host, port = page.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        start = f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}:{port}\r\n"
        start += f"Content-Type: multipart/form-data; boundary=limit\r\n{head}\r\n\r\n"
        connection.sendall(start.encode() + body)
        connection.settimeout(2)
        with suppress(TimeoutError):
            return connection.recv(4096)
    return b""


def test_length_that_is_missing_or_huge_is_refused_before_the_body(page: Page, kept: list[str]) -> None:
    assert raw(page, "Content-Length: 3000000000", b"").startswith(b"HTTP/1.1 413")
    assert raw(page, "Transfer-Encoding: chunked", b"").startswith(b"HTTP/1.1 411")


def test_uploads_that_break_off_are_swept(page: Page) -> None:
    before = page.files()
    assert raw(page, "Content-Length: 900000", part("a.mp4", bytes(300_000))) == b""
    (left,) = set(page.files()) - set(before)
    served = page.folder / left.split("/")[0]
    assert demo.sweep(served, 60) >= 300_000
    assert left in page.files()
    time.sleep(0.1)
    demo.sweep(served, 0.05)
    assert page.files() == []


def test_full_folder_takes_no_more(page: Page, kept: list[str]) -> None:
    folder = next(page.folder.glob("etmamba-demo-*"))
    filler = folder / "filler"
    filler.write_bytes(bytes(5 * MEGABYTES * 10**6 + 1))
    status, text = page.upload(("a.mp4", b"text"))
    filler.unlink()
    assert (status, text) == (503, "Too many uploads at once; try again in ten minutes")


@pytest.mark.parametrize(
    "path",
    [
        "file=/etc/passwd",
        "file=../../../etc/passwd",
        "file=..%2f..%2f..%2fetc%2fpasswd",
        "file=%2fetc%2fpasswd",
        f"file={__file__}",
        "file=http://example.com/",
        "file=%68ttp://example.com/",
        "file/https://example.com/",
        "proxy=http://example.com/",
    ],
)
def test_server_files_and_addresses_are_not_readable(page: Page, path: str) -> None:
    status, text = page.ask(f"/gradio_api/{path}")
    assert status in (400, 403, 404)
    assert "root:" not in text
    assert "pytest" not in text.replace(path, "")


@pytest.mark.parametrize("path", ["http://example.com/a.mp4", " HTTPS://example.com/a.mp4", "/etc/passwd", str(SAMPLE)])
def test_only_uploads_are_analysed(page: Page, kept: list[str], path: str) -> None:
    answer = page.analyse(path)
    assert answer == "403 Not an upload" if "example" in path else answer.startswith("error"), answer
    assert "spinkick" not in answer
    assert str(page.folder) not in answer


def test_models_and_seconds_are_the_offered_ones(page: Page) -> None:
    _, text = page.upload(("a.mp4", SAMPLE.read_bytes()))
    assert "not in the list of choices" in page.analyse(json.loads(text)[0], name="local-dir:/tmp")
    assert "less than minimum" in page.analyse(json.loads(text)[0], seconds=1e-6)


def test_screen_recordings_are_refused(page: Page, kept: list[str]) -> None:
    assert page.ask("/gradio_api/process_recording", b"", "multipart/form-data; boundary=limit")[0] == 404


def test_limits_of_videos(tmp_path: Path) -> None:
    long = write_video(tmp_path / "long.mp4", 40, fps=10)
    demo.check_limits(long, 4)
    with pytest.raises(VideoError, match="is 4 s long and has 40 frames; cut it to 3 s"):
        demo.check_limits(long, 3)
    with pytest.raises(VideoError, match="cut it to 1 s and 60 frames at most"):
        demo.check_limits(write_video(tmp_path / "dense.mp4", 80, fps=100), 1)
    with pytest.raises(VideoError, match=r"has 4112×2304 pixels, which is too many"):
        demo.check_limits(write_video(tmp_path / "big.mp4", 1, 2304, 4112), 3)


@pytest.fixture(params=[1280, 390], ids=["desktop", "phone"])
def browser(request: pytest.FixtureRequest) -> Iterator[tuple["WebDriver", int]]:
    """Chromium with a window of some width."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs chromium or google-chrome, and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1280,1500"):
        options.add_argument(f"--{option}")
    if request.param < 500:
        metrics = {"width": request.param, "height": 844, "pixelRatio": 2}
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield window, request.param
    window.quit()


def test_in_a_browser(page: Page, browser: tuple["WebDriver", int], tmp_path: Path) -> None:
    window, width = browser
    text = tmp_path / "text.mp4"
    text.write_bytes(HOSTILE["text"])
    window.get(page.url)
    waiting = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait(window, 120)

    def wait(css: str, count: int = 1) -> list:
        return waiting.until(lambda _: (found := window.find_elements("css selector", css))[count - 1 :] and found)

    wait("input[type=file]")[0].send_keys(str(SAMPLE))
    assert wait("[data-testid=label-output-value]")[0].text == "spinkick"
    thumbnails = wait(".grid-container button")
    wait("img[src$='.png']", 2)  # both plots
    thumbnails[-1].click()
    assert len(wait("[data-testid=label-output-value]", 2)) == 2
    assert any(label.text.startswith("From ") for label in window.find_elements("css selector", "label"))

    assert window.execute_script("return document.documentElement.scrollWidth") <= width
    rights = [thumbnail.rect["x"] + thumbnail.rect["width"] for thumbnail in thumbnails]
    assert max(rights) <= width
    names = window.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(name.startswith((page.url, "blob:", "data:")) for name in names)  # nothing from elsewhere

    wait("[aria-label='Clear'], [aria-label='clear'], [title='Clear']")[0].click()
    wait("input[type=file]")[0].send_keys(str(text))
    waiting.until(lambda _: "No answer: is a text file" in window.find_element("css selector", "body").text)
