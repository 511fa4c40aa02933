"""The chat page: its files and rules without a browser, and then as a person uses it, in headless Chromium.

Screenshots of the browser's tests stay in artefacts/web.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import shutil
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model
from PIL import Image
from serving import IMAGE, KEY, SPEECH, Running, check_error, running, settled_answer, settling_model

from x2l.assistant import Assistant
from x2l.build import build
from x2l.config import ModelConfig
from x2l.data.media import decode_audio
from x2l.serve.app import ServerConfig
from x2l.serve.engine import Engine
from x2l.serve.intake import EngineConfig
from x2l.serve.server import served_names
from x2l.serve.web import CHINESE, LOOKAHEAD, add_page, knows_chinese
from x2l.types import Part, assistant, user

PAGE = Path(__file__).parents[1] / "x2l" / "serve" / "page"
SHOTS = Path(__file__).parents[1] / "artefacts" / "web"
PATIENCE = 120_000  # ms; a busy machine is slow, not wrong


def photo(width: int = 640, height: int = 480) -> bytes:
    down, right = np.mgrid[0:height, 0:width]
    pixels = np.stack([right * 255 // width, down * 255 // height, np.full_like(down, 120)], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def model(llm_folder: Path) -> Assistant:
    torch.manual_seed(0)
    return Assistant(build(ModelConfig.model_validate(tiny_model(llm_folder, image=IMAGE, speech=SPEECH))))


@pytest.fixture(scope="module")
def site(model: Assistant) -> Iterator[Running]:
    with running(model, EngineConfig(max_new_tokens=400)) as up:
        add_page(up.server.gate, {"x2l": up.engine}, ServerConfig(api_keys=[KEY]))
        yield up


@pytest.fixture(scope="module")
def other(llm_folder: Path) -> Assistant:
    """Another model, which does not hear, and answers otherwise."""
    torch.manual_seed(1)
    return Assistant(build(ModelConfig.model_validate(tiny_model(llm_folder, image=IMAGE) | {"template": {"name": "paper"}})))


@pytest.fixture(scope="module")
def pair(model: Assistant, other: Assistant) -> Iterator[Running]:
    """A server of two models, and its page."""
    second = Engine(other, EngineConfig(max_new_tokens=400))
    with running(model, EngineConfig(max_new_tokens=400), others={"other": second}) as up:
        add_page(up.server.gate, {"x2l": up.engine, "other": second}, ServerConfig(api_keys=[KEY]))
        yield up
    second.close()


# --- without a browser ------------------------------------------------------------------------------------------------


def test_the_page_is_open_and_the_model_is_not(site: Running) -> None:
    strangers = {"Authorization": ""}
    for path in ("/", *(f"/page/{file.name}" for file in PAGE.iterdir() if file.name != "index.html")):
        response = site.http.get(path, headers=strangers)
        assert response.status_code == 200, path
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
    assert site.http.get("/page/model", headers=strangers).status_code == 401
    facts = site.http.get("/page/model").json()
    reads = {"image": "patches → QFormer → Adapter", "speech": "conformer → FrozenListener → CFormer → Adapter"}
    assert facts["models"] == [{"model": "x2l", "reads": reads, "lookahead": None, "chinese": False}]
    assert facts["max_new_tokens"] == 400


def test_two_models_are_told_apart(pair: Running, model: Assistant, other: Assistant) -> None:
    assert [entry["id"] for entry in pair.http.get("/v1/models").json()["data"]] == ["x2l", "other"]
    assert pair.http.get("/v1/models/other").json()["modalities"] == ["text", "image"]
    for name, one in (("x2l", model), ("other", other)):
        answer = pair.ask("What is it?", model=name, max_tokens=20).json()
        assert answer["model"] == name
        assert answer["choices"][0]["message"]["content"] == "".join(one.stream([user("What is it?")], 20))
        assert pair.metric(f'x2l_engine_requests_total{{model="{name}"}}') == 1
    message = check_error(404, pair.ask("?", model="third").content)
    assert message == "the model \"third\" does not exist; this server has 'x2l', 'other'"
    sound = pair.http.post("/v1/audio/transcriptions", files={"file": b"x"}, data={"model": "other"})
    assert "no speech interface" in check_error(400, sound.content)
    assert [entry["model"] for entry in pair.http.get("/page/model").json()["models"]] == ["x2l", "other"]


def test_names_of_two_checkpoints() -> None:
    assert served_names(["tiny"]) == ["tiny"]
    assert served_names(["runs/a.yaml", "tiny"]) == ["a", "tiny"]
    assert served_names(["runs/a/model.yaml", "runs/b/model.yaml"]) == ["runs/a/model.yaml", "runs/b/model.yaml"]
    with pytest.raises(ValueError, match="is the model itself"):
        served_names(["tiny", "tiny"])


@pytest.mark.parametrize(
    "path", ["/page/../web.py", "/page/%2e%2e/web.py", "/page/..%2fweb.py", "/page//etc/passwd", "/file=/etc/passwd", "/page/"]
)
def test_no_request_becomes_a_path(site: Running, path: str) -> None:
    for headers in ({}, {"Authorization": ""}):
        response = site.http.get(path, headers=headers)
        check_error(response.status_code, response.content)


def test_whether_a_vocabulary_knows_chinese() -> None:
    class Spells:
        def __init__(self, length: float) -> None:
            self.length = length

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [0] * int(self.length * len(text))

    assert len(CHINESE) == 17
    assert knows_chinese(Spells(0.6))
    assert not knows_chinese(Spells(2.3))


class Tags(HTMLParser):
    """Attributes of all elements."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def tags() -> list[tuple[str, dict[str, str | None]]]:
    parser = Tags()
    parser.feed((PAGE / "index.html").read_text(encoding="utf-8"))
    return parser.found


Elements = list[tuple[str, dict[str, str | None]]]


def test_the_html_needs_no_exception_from_its_policy(tags: Elements) -> None:
    for tag, attributes in tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        assert tag != "script" or attributes.get("src")
        for name in ("src", "href"):
            assert not re.match(r"\w+:|//", attributes.get(name) or ""), "nothing comes from elsewhere"


def test_both_languages_say_everything(tags: Elements) -> None:
    english, chinese = (PAGE / "texts.js").read_text(encoding="utf-8").split("export const")[0].split("const ZH")
    entry = re.compile(r"^  (\w+): (.*),$", re.MULTILINE)
    en, zh = dict(entry.findall(english)), dict(entry.findall(chinese))
    assert list(en) == list(zh)
    for key, text in en.items():
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", zh[key])), key
        assert not re.search("[\u4e00-\u9fff]", text) or key in ("other", "language")
    code = "".join(file.read_text(encoding="utf-8") for file in PAGE.glob("*.js") if file.name != "texts.js")
    used = set(re.findall(r'\bt\("(\w+)"', code))
    for name in ("data-t", "data-label", "data-aria", "data-placeholder"):
        used |= {str(attributes[name]) for _, attributes in tags if name in attributes}
    assert used <= set(en)


def test_the_scripts_find_their_elements(tags: Elements) -> None:
    ids = {attributes["id"] for _, attributes in tags if "id" in attributes}
    code = "".join(file.read_text(encoding="utf-8") for file in PAGE.glob("*.js"))
    assert set(re.findall(r'\$\("([\w-]+)"\)', code)) <= ids
    assert {f"i-{name}" for name in re.findall(r'icon\("(\w+)"\)', code)} <= ids


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'x2l[dev]'")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no browser: apt-get install chromium")
    SHOTS.mkdir(parents=True, exist_ok=True)
    playwright.expect.set_options(timeout=PATIENCE)
    flags = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", "--disable-gpu"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=flags, timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium: Any, site: Running) -> Iterator[Any]:
    with visitor(chromium, site.url) as page:
        yield page


@contextlib.contextmanager
def visitor(chromium: Any, url: str) -> Iterator[Any]:
    """A fresh visitor with the key in the link, whose console must stay silent."""
    context = chromium.new_context(viewport={"width": 1000, "height": 760}, locale="en-GB")
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda line: complaints.append(line.text) if "Content Security Policy" in line.text else None)
    page.goto(f"{url}/#key={KEY}")
    page.locator("#examples button").first.wait_for()
    yield page
    context.close()
    assert not complaints


def expect(locator: Any) -> Any:
    from playwright.sync_api import expect as expectation

    return expectation(locator)


def add_photo(page: Any, blob: bytes) -> None:
    with page.expect_file_chooser() as chooser:
        page.click("#add-image")
    chooser.value.set_files({"name": "sea.png", "mimeType": "image/png", "buffer": blob})
    expect(page.locator("#attached img")).to_be_visible()


def ask(page: Any, text: str) -> Any:
    """Type, press Enter, and wait for the whole answer: its article."""
    page.fill("#question", text)
    page.press("#question", "Enter")
    return answered(page)


def answered(page: Any) -> Any:
    article = page.locator("article.answer").last
    expect(article).to_have_attribute("aria-busy", "false")
    return article


def said(article: Any) -> str:
    return str(article.locator(".bubble").text_content())


def alone(model: Assistant, *messages: Any) -> str:
    return "".join(model.stream(messages, 256))


@pytest.mark.slow
def test_a_photo_questions_edits_and_clearing(tab: Any, model: Assistant) -> None:
    """What is shown is what the model itself answers to the same conversation."""
    blob = photo()
    assert KEY not in tab.url
    add_photo(tab, blob)
    first = ask(tab, "What is it?")
    shown = user(Part("image", bytes=blob), "What is it?")
    answer = said(first)
    assert answer == alone(model, shown)
    facts = first.locator(".facts")
    expect(facts).to_contain_text("photo read by patches → QFormer → Adapter: 4 embeddings")
    expect(facts).to_contain_text("tokens/s")
    assert tab.locator("article.user img").evaluate("image => image.naturalWidth") == 640
    second = said(ask(tab, "And now?"))
    assert second == alone(model, shown, assistant(answer), user("And now?"))
    expect(tab.locator("article.answer").last.locator(".facts")).to_contain_text("prompt tokens known already")
    tab.screenshot(path=SHOTS / "answer.png")

    tab.locator("article.user").first.get_by_role("button", name="Edit").click()
    expect(tab.locator("#attached img")).to_be_visible()
    expect(tab.locator("#question")).to_have_value("What is it?")
    assert said(ask(tab, "Who is it?")) == alone(model, user(Part("image", bytes=blob), "Who is it?"))
    assert tab.locator("article").count() == 2

    tab.get_by_role("button", name="Regenerate").click()
    expect(answered(tab).locator(".facts")).to_contain_text("temperature 0.7")
    tab.click("#clear")
    expect(tab.locator("article")).to_have_count(0)
    expect(tab.locator("#welcome")).to_be_visible()


@pytest.mark.slow
def test_two_models_answer_next_to_each_other(chromium: Any, pair: Running, model: Assistant, other: Assistant) -> None:
    """Each from its own conversation; what one of them cannot read is told below its name, and the other goes on."""
    blob = photo()
    shown = user(Part("image", bytes=blob), "What is it?")
    with visitor(chromium, pair.url) as tab:
        expect(tab.locator("#model")).to_have_text("x2l and other")
        expect(tab.locator("#reads")).to_contain_text("other: patches → QFormer → Adapter")
        tab.screenshot(path=SHOTS / "two-welcome.png")
        add_photo(tab, blob)
        tab.fill("#question", "What is it?")
        tab.press("#question", "Enter")
        first = both(tab)
        assert first == [alone(one, shown) for one in (model, other)]
        assert first[0] != first[1]
        boxes = [article.bounding_box() for article in tab.locator("article.answer").all()]
        assert boxes[0]["y"] == boxes[1]["y"]
        assert boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]
        tab.fill("#question", "And now?")
        tab.press("#question", "Enter")
        assert both(tab) == [
            alone(one, shown, assistant(answer), user("And now?")) for one, answer in zip((model, other), first, strict=True)
        ]
        tab.screenshot(path=SHOTS / "two.png")
        tab.set_viewport_size({"width": 360, "height": 700})
        boxes = [article.bounding_box() for article in tab.locator("article.answer").all()[-2:]]
        assert boxes[0]["x"] == boxes[1]["x"]
        assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        tab.click("#theme")
        tab.click("#theme")
        tab.click("#language")
        expect(tab.locator("#model")).to_have_text("x2l、other")
        tab.screenshot(path=SHOTS / "two-phone-dark-chinese.png")
        axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
        results = axe.run(tab)
        assert results.violations_count == 0, results.generate_report()
        tab.click("#language")
        tab.set_viewport_size({"width": 1000, "height": 760})
        tab.click("#clear")
        tab.click("#record")
        expect(tab.locator("#clock")).to_have_text("0:01")
        tab.press("#question", "Enter")
        both(tab)
        problems = tab.locator("article.answer .problem")
        expect(problems.nth(0)).to_be_hidden()
        expect(problems.nth(1)).to_contain_text("cannot read")
        tab.screenshot(path=SHOTS / "two-one-deaf.png")


def both(page: Any) -> list[str]:
    """The last question's answers, whole."""
    answers = page.locator(".row").last.locator("article.answer")
    for i in range(2):
        expect(answers.nth(i)).to_have_attribute("aria-busy", "false")
    return [said(answers.nth(i)) for i in range(2)]


@pytest.mark.slow
def test_stop_ends_the_computing(tab: Any, site: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site.engine, "stops", set())
    slow = site.engine.model.llm.register_forward_hook(lambda *_: time.sleep(0.05))
    cancelled = site.engine.stats.cancelled
    try:
        tab.click("#settings")
        tab.fill("#temperature", "2")
        tab.fill("#max-tokens", "400")
        tab.click("#dialog-done")
        tab.fill("#question", "Go on.")
        tab.press("#question", "Enter")
        expect(tab.locator("article.answer .bubble")).not_to_be_empty()
        assert tab.locator("article.answer").get_attribute("aria-busy") == "true"  # it is shown while it is made
        tab.click("#stop")
        expect(answered(tab).locator(".facts")).to_contain_text("stopped")
        until = time.monotonic() + PATIENCE / 1000
        while site.engine.load != (0, 0) and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        slow.remove()
    assert site.engine.stats.cancelled == cancelled + 1
    expect(tab.locator("#send")).to_be_visible()


def record(page: Any, seconds: int) -> None:
    page.click("#record")
    expect(page.locator("#clock")).to_have_text(f"0:0{seconds}")


def sent_sounds(body: dict[str, Any]) -> list[bytes]:
    parts = [part for message in body["messages"] if isinstance(message["content"], list) for part in message["content"]]
    return [base64.b64decode(part["audio_url"]["url"].split(",")[1]) for part in parts if part["type"] == "audio_url"]


@pytest.mark.slow
def test_the_microphone(tab: Any, site: Running, model: Assistant) -> None:
    """The end of speech is followed by the answer, which is that to the recording; later turns find it known."""
    spoken = "x2l_voice_first_token_seconds_count"
    before = site.metric(spoken)
    tab.fill("#question", "Well?")
    record(tab, 2)
    tab.screenshot(path=SHOTS / "recording.png")
    tab.click("#record")
    expect(answered(tab).locator(".facts")).to_contain_text("speech read by conformer → FrozenListener → CFormer → Adapter")
    expect(tab.locator("article.user audio")).to_be_visible()
    answer = said(answered(tab))
    tab.screenshot(path=SHOTS / "spoken.png")
    assert site.metric(spoken) == before + 1
    with tab.expect_request("**/v1/chat/completions") as request:
        second = ask(tab, "And now?")
    (sound,) = sent_sounds(request.value.post_data_json)
    assert 1.5 < len(decode_audio(sound)) / 16_000 < 60
    assert answer == alone(model, user(Part("speech", bytes=sound), "Well?"))
    expect(second.locator(".facts")).to_contain_text("prompt tokens known already")

    tab.click("#clear")
    record(tab, 1)
    tab.press("#question", "Enter")  # sending ends the speech
    expect(tab.locator("article.user audio")).to_have_count(1)
    expect(answered(tab).locator(".problem")).to_be_hidden()
    assert site.metric(spoken) == before + 2
    record(tab, 1)
    tab.keyboard.press("Escape")  # and Escape forgets it
    expect(tab.locator("#record")).to_have_attribute("aria-pressed", "false")
    expect(tab.locator("#clock")).to_be_hidden()
    expect(tab.locator("article.user")).to_have_count(1)


@pytest.mark.slow
def test_the_microphone_of_a_model_that_settles(chromium: Any, llm_folder: Path, tmp_path: Path) -> None:
    """The page asks for it; the answer is that to what was settled while the person spoke."""
    model = settling_model(llm_folder, tmp_path)
    with running(model, EngineConfig(max_new_tokens=400)) as up:
        add_page(up.server.gate, {"x2l": up.engine}, ServerConfig(api_keys=[KEY]))
        with visitor(chromium, up.url) as tab:
            tab.fill("#question", "Well?")
            with tab.expect_request("**/v1/voice") as begun:
                record(tab, 4)
            assert begun.value.post_data_json["lookahead"] == LOOKAHEAD
            tab.click("#record")
            answer = said(answered(tab))
            with tab.expect_request("**/v1/chat/completions") as request:
                ask(tab, "And now?")
            (sound,) = sent_sounds(request.value.post_data_json)
        assert up.metric("x2l_voice_first_token_seconds_count") == 1
        assert answer == settled_answer(model, sound, LOOKAHEAD, 256, "Well?")


@pytest.mark.slow
def test_a_recording_goes_as_a_file_where_nobody_follows_it(tab: Any, site: Running) -> None:
    """Something was typed while the person spoke, or the server takes no spoken turn at the moment."""
    spoken = "x2l_voice_first_token_seconds_count"
    before = site.metric(spoken)
    frames: list[Any] = []
    tab.on("websocket", lambda socket: socket.on("framesent", lambda frame: frames.append(frame)))
    record(tab, 1)
    tab.fill("#question", "Well?")
    with tab.expect_request("**/v1/chat/completions") as request:
        tab.click("#record")
    assert len(sent_sounds(request.value.post_data_json)) == 1
    expect(answered(tab).locator(".facts")).to_contain_text("speech read by")
    tab.route("**/v1/voice", lambda route: route.fulfill(status=429, body='{"error": {"message": "too many"}}'))
    record(tab, 1)
    tab.click("#record")
    expect(tab.locator("article.user audio")).to_have_count(2)
    expect(answered(tab).locator(".facts")).to_contain_text("speech read by")
    assert site.metric(spoken) == before
    assert frames
    assert not [frame for frame in frames if isinstance(frame, str)]  # the server is not told of an end that it should not answer


@pytest.mark.slow
def test_what_the_model_lacks_says_so(tab: Any) -> None:
    video = tab.locator("#add-video")
    expect(video).to_have_attribute("aria-disabled", "true")
    video.focus()
    tab.keyboard.press("Enter")
    expect(tab.locator("#notice")).to_have_text("This model has no video interface, so it cannot read videos.")
    drop = """() => { const data = new DataTransfer();
        data.items.add(new File(['x'], 'film.mp4', {type: 'video/mp4'}));
        data.items.add(new File(['x'], 'notes.txt', {type: 'text/plain'}));
        return data; }"""
    tab.dispatch_event("main", "drop", {"dataTransfer": tab.evaluate_handle(drop)})
    expect(tab.locator("#notice")).to_have_text("notes.txt: neither a photo, a video nor a sound.")
    expect(tab.locator("#attached")).to_be_hidden()


def events(*texts: str) -> str:
    chunks = [{"choices": [{"delta": {"content": text}, "finish_reason": None}]} for text in texts]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)


@pytest.mark.slow
def test_markup_stays_text_and_errors_are_told(tab: Any) -> None:
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> [x](javascript:alert(1))"
    whole = events(evil[:20], evil[20:]) + "data: [DONE]\n\n"
    tab.route("**/v1/chat/completions", lambda route: route.fulfill(body=whole, content_type="text/event-stream"))
    assert said(ask(tab, evil)) == evil
    assert tab.locator("article.user .bubble").text_content() == evil
    assert tab.locator("article img, article script, article a").count() == 0
    assert tab.title() == "X2L · x2l"

    tab.unroute("**/v1/chat/completions")
    tab.route("**/v1/chat/completions", lambda route: route.fulfill(body=events("Half"), content_type="text/event-stream"))
    half = ask(tab, "Go")
    assert said(half) == "Half"
    expect(half.locator(".problem")).to_have_text("The connection broke off in the middle of the answer.")

    tab.unroute("**/v1/chat/completions")
    busy = json.dumps({"error": {"message": "too many requests: 72 are in work or waiting"}})
    tab.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, body=busy))
    expect(ask(tab, "Go").locator(".problem")).to_contain_text("too many requests: 72")
    tab.unroute("**/v1/chat/completions")
    tab.get_by_role("button", name="Try again").click()
    expect(answered(tab).locator(".facts")).to_contain_text("tokens")


@pytest.mark.slow
def test_a_wrong_key_is_asked_for(tab: Any, site: Running) -> None:
    tab.evaluate("sessionStorage.clear()")
    tab.goto(f"{site.url}/?again")
    expect(tab.locator("#dialog-error")).to_have_text("This server asks for an API key.")
    tab.fill("#key", "not the key")
    tab.press("#key", "Enter")
    expect(tab.locator("#dialog-error")).to_have_text("The server did not accept the API key.")
    tab.fill("#key", KEY)
    tab.click("#dialog-done")
    expect(tab.locator("#model")).to_have_text("x2l")


@pytest.mark.slow
def test_phone_dark_chinese_and_accessibility(tab: Any) -> None:
    """axe-core finds nothing, light and dark, empty and in use; nothing is wider than a small phone, nothing too small to hit."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()

    def check() -> None:
        results = axe.run(tab)
        assert results.violations_count == 0, results.generate_report()

    check()
    tab.screenshot(path=SHOTS / "welcome.png")
    add_photo(tab, photo())
    ask(tab, "What is it?")
    check()
    tab.set_viewport_size({"width": 360, "height": 700})
    tab.screenshot(path=SHOTS / "phone.png")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    for button in tab.locator("button:visible").all():
        box = button.bounding_box()
        assert min(box["width"], box["height"]) >= 44, button.evaluate("node => node.outerHTML")
    tab.click("#theme")
    tab.click("#theme")
    check()
    tab.click("#language")
    assert tab.locator("html").get_attribute("lang") == "zh-CN"
    expect(tab.locator("#question")).to_have_attribute("placeholder", "输入问题")
    tab.screenshot(path=SHOTS / "phone-dark-chinese.png")
    tab.click("#clear")
    expect(tab.locator("#tongue")).to_be_visible()  # the test's vocabulary has no Chinese, and the page says so
    check()
    tab.click("#settings")
    check()
    tab.screenshot(path=SHOTS / "settings-dark-chinese.png")
    assert tab.locator("#key").evaluate("node => node.type") == "password"
