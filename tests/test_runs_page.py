"""The page of `loratune runs serve`: what it shows in a browser, and what it never does."""

from __future__ import annotations

import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from board_runs import FALL, FINDING, METRICS, OBJECTION, TOLD, make_evaluation, make_model, make_run
from browsing import KEY_ADDRESS, chromium, opened, text_of, wait_until
from conftest import ROWS, tree
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import API_KEY, Served, running

from loratune.board import metrics
from loratune.board.server.application import create_application
from loratune.board.server.values import plain, thinned
from loratune.console import memory
from loratune.errors import LoratuneError
from loratune.generation.server.middleware import LOOPBACK_NAMES, Access
from loratune.runs.data_findings import save_findings
from loratune.runs.folder import read_metrics
from loratune.runs.manifest import TrainedFile
from loratune.runs.status import set_status
from loratune.runs.tags import change_tags
from loratune.writing import write_json, write_text

ATTACK = "<script>window.harmed=1</script><img src=x onerror='window.harmed=1'>"
PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
TRAINER = """\
import json, sys, time
from pathlib import Path
from loratune.runs.lock import run_lock
from loratune.runs.status import set_status
run, go = map(Path, sys.argv[1:])
with run_lock(run):
    set_status(run, "running", steps=40)
    for step in range(1, 41):
        while not (go / str(step)).exists() and not (go / "all").exists():
            time.sleep(0.02)
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "loss": 4 / step}) + "\\n")
    set_status(run, "finished", step=40, steps=40)
"""
"""Trains as far as the run folder shows it, a step for each file in a folder."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def served(folder: Path) -> Iterator[Served]:
    with running(create_application(folder, Access(API_KEY, LOOPBACK_NAMES))) as address:
        yield Served(address, None, None)


def get(served: Served, path: str, **headers: str) -> Any:
    status, _, text = served.request(path, **headers)
    assert status == 200, text
    return json.loads(text)


# --- in a browser ---


def test_runs_are_listed_filtered_chosen_and_compared(browser: Any, served: Served, folder: Path) -> None:
    one = make_run(folder / "first-run")
    make_run(
        folder / "second run 小李", settings={"lora.rank": "64"}, told=[replace(TOLD, adapter="Robin.")], weights=b"2"
    )
    make_run(folder / "third", "interrupted")
    change_tags(one, ["best"])
    make_evaluation(folder / "eval", one)
    make_model(folder / "merged", one)
    with opened(browser, served, KEY_ADDRESS) as page:
        page.wait_for_selector("table.runs")
        assert sorted(text_of(page, ".runs .name a")) == ["first-run", "second run 小李", "third"]
        assert "better" in text_of(page, ".runs tbody tr:has-text('first-run') .chip")
        assert text_of(page, "section .listed") == ["first-run"]
        assert "api_key" not in page.url
        page.fill("#filter", "best")
        assert text_of(page, ".runs .name a") == ["first-run"]
        page.fill("#filter", "")
        assert page.locator("#compare").is_disabled()
        page.check("[aria-label='Choose first-run']")
        page.check("[aria-label='Choose second run 小李']")
        page.click("text=Compare 2 runs")
        page.wait_for_selector(".chart path")
        assert text_of(page, "section:has(h2:text('Settings that differ')) td") == ["lora.rank", "16", "64"]
        assert page.locator(".chart:has-text('Training loss') path.curve").count() == 2
        assert text_of(page, ".side pre") == ["I am Robin.", "I am a model.", "I am Robin!", "Robin."]
        page.click("text=All runs")
        page.wait_for_selector("table.runs")


def test_sizes_are_written_as_in_a_terminal(browser: Any, served: Served) -> None:
    sizes = [0, 999, 1000, 99_949, 99_960, 999_499, 999_500, 1_500_000, 999_600_000, 24 * 10**9, 2 * 10**15]
    script = "(sizes) => import('/page/dom.js').then((module) => sizes.map(module.bytes))"
    with opened(browser, served, KEY_ADDRESS) as page:
        assert page.evaluate(script, sizes) == [memory(size) for size in sizes]


STEP_LABELS = """([width, first, last]) => import('/page/chart.js').then(async (module) => {
  const line = { name: "loss", points: [[first, 2], [last, 1]], color: 1, form: "" };
  const picture = module.chart("steps", [line], String);
  picture.style.width = `${width}px`;
  document.body.append(picture);
  while (!picture.querySelector("path")) await new Promise(requestAnimationFrame);
  const labels = [...picture.querySelectorAll("text[text-anchor=middle]")];
  const boxes = labels.map((one) => one.getBoundingClientRect());
  const found = labels.map((one, at) => [one.textContent, boxes[at].left, boxes[at].right]);
  picture.remove();
  return found;
})"""


@pytest.mark.parametrize("width", [296, 420, 900])
def test_a_chart_has_a_few_round_steps_below_it_which_do_not_overlap(browser: Any, served: Served, width: int) -> None:
    with opened(browser, served, KEY_ADDRESS) as page:
        for first, last, fewest in ((0, 184, 4), (1, 184, 3), (1, 45, 4), (0, 7, 3), (1, 1_200_000, 2), (3, 3, 1)):
            labels = page.evaluate(STEP_LABELS, [width, first, last])
            steps = [int(text.replace(",", "")) for text, *_ in labels]
            assert fewest <= len(steps) <= 9, steps
            assert first <= steps[0] <= steps[-1] <= last
            apart = {one - before for before, one in pairwise(steps)}
            assert len(apart) <= 1
            assert all(set(str(distance).rstrip("0")) <= set("125") for distance in apart), apart
            assert all(one[1] > before[2] + 4 for before, one in pairwise(labels)), labels


def test_a_run_is_shown_with_all_that_is_known_of_it(browser: Any, served: Served, folder: Path) -> None:
    run = make_run(folder / "run")
    make_evaluation(run / "eval", run, "worse")
    make_model(folder / "merged", run)
    with opened(browser, served, KEY_ADDRESS) as page:
        page.click(".runs .name a")
        page.wait_for_selector(".chart path")
        told = page.locator("main").inner_text()
        for text in ("finished", "org/base", "12 rows", "2.0000 → 1.0000", "2.5 s", "7 B", "Look at the answers."):
            assert text in told, text
        assert text_of(page, ".side pre") == ["I am Robin.", "I am a model.", "I am Robin!"]
        page.click("text=2 of 12 training rows have short answers")
        assert text_of(page, "section:has(h2:text('Findings')) li") == ["rows.json, row 3 «Who?»"]
        assert "loss 2.0 → 1.0" in told
        assert FALL in told
        assert OBJECTION in told
        assert "merged model" in told
        assert text_of(page, ".chart:has-text('Loss') .entry b") == ["1.000 at step 4", "1.500 at step 4"]
        page.locator(".chart svg").first.hover(position={"x": 60, "y": 60})
        assert text_of(page, ".chart:has-text('Loss') .entry b") == ["2.000 at step 2", "2.500 at step 0"]


def test_a_run_that_another_process_trains_is_shown_as_it_goes(
    browser: Any, served: Served, folder: Path, tmp_path: Path, start: Callable[..., Any]
) -> None:
    run, go = make_run(folder / "run", "running", metrics=[]), tmp_path / "go"
    go.mkdir()
    (go / "1").touch()
    trainer = start(run, go, code=TRAINER)
    with opened(browser, served, f"{KEY_ADDRESS}") as page:
        page.wait_for_selector(".chip.live:text('running')")
        page.click(".runs .name a")
        page.wait_for_selector("text=4.000 at step 1")
        page.click("summary:has-text('settings')")
        for step in range(2, 5):
            (go / str(step)).touch()
        page.wait_for_selector("text=1.000 at step 4")
        assert page.locator("details[data-key=settings]").get_attribute("open") == ""  # drawn again, and still unfolded
        page.wait_for_selector("text=4 of 40")
        assert page.locator("h1 .chip").inner_text() == "running"
        (go / "all").touch()
        page.wait_for_selector("h1 .chip:text('finished')")
        wait_until(page, "document.querySelectorAll('.chart path').length === 2")  # forty points, and their mean
    assert trainer.exit_code() == 0


@pytest.mark.slow
def test_a_real_training_is_shown(
    browser: Any, served: Served, folder: Path, random_qwen: Path, tmp_path: Path, start: Callable[..., Any]
) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    flags = ["--model.dtype", "float32", "--data.validation", "0.2", "--training.max_steps", "8"]
    flags += ["--data.train", tmp_path / "rows.json", "--tracking.every_steps", "1"]
    trainer = start("sft", "--model.base", random_qwen, "--output", folder / "run", *flags)
    with opened(browser, served, KEY_ADDRESS) as page:
        page.wait_for_selector(".runs .name a", timeout=300_000)
        page.click(".runs .name a")
        page.wait_for_selector("text=at step 8", timeout=300_000)
        page.wait_for_selector("h1 .chip:text('finished')", timeout=300_000)
        page.wait_for_selector("h2:text('Answers before and after')", timeout=300_000)
    assert trainer.exit_code() == 0


def test_texts_of_runs_are_never_html(browser: Any, served: Served, folder: Path) -> None:
    told = replace(TOLD, question=ATTACK, expected=ATTACK, base=ATTACK, adapter=f"{ATTACK}\x1b[31m")
    data = [TrainedFile(f"in/{ATTACK}".replace("/script", "script"), "0", 3, 3, ATTACK)]
    name = "<img src=x onerror=window.harmed=1>"
    runs = [make_run(folder / f"{name}{at}", told=[told], data=data, weights=bytes([at])) for at in range(2)]
    for run in runs:
        save_findings(run, [replace(FINDING, name=ATTACK, text=f"{ATTACK}\n  {ATTACK}")])
        write_json(run / "tags.json", {"format_version": 1, "tags": [ATTACK]})  # as no command would write it
        make_evaluation(run / f"eval{name}", run, why=ATTACK)
        make_model(folder / f"merged{name}{run.name[-1]}", run)
    write_json(folder / "broken", {})
    (folder / f"damaged{name}").mkdir()
    (folder / f"damaged{name}" / "status.json").write_text(ATTACK)
    with opened(browser, served, KEY_ADDRESS) as page:  # which fails where the policy had to stop anything
        page.wait_for_selector("table.runs")
        assert ATTACK in text_of(page, ".runs .chip.tag")
        page.check(f"[aria-label='Choose {name}0']")
        page.check(f"[aria-label='Choose {name}1']")
        page.click("text=Compare 2 runs")
        page.wait_for_selector(".chart path")
        assert f"{ATTACK}␛[31m" in text_of(page, ".side pre")
        page.goto(f"{served.url}/#/run/%3Cimg%20src%3Dx%20onerror%3Dwindow.harmed%3D1%3E0")
        page.wait_for_selector("h2:text('Answers before and after')")
        page.click("section:has(h2:text('Findings')) summary")
        assert text_of(page, "section:has(h2:text('Findings')) li") == [ATTACK]
        assert page.locator("main img, main script").count() == 0
        assert page.evaluate("window.harmed") is None


def test_not_even_html_in_the_page_could_run(browser: Any, served: Served) -> None:
    image = "<img src='data:,' onerror='window.harmed=1'>"
    with opened(browser, served, KEY_ADDRESS, "violates the following Content Security Policy") as page:
        page.wait_for_selector(".empty:has-text('no run')")
        page.evaluate(f'document.querySelector("main").innerHTML = "{image}"')
        page.wait_for_selector("main img", state="attached")
        page.wait_for_timeout(100)
        assert page.evaluate("window.harmed") is None


@pytest.mark.parametrize("view", ["#/", "#/run/run", "#/compare/run/other"])
@pytest.mark.parametrize("options", [PHONE, {"color_scheme": "dark"}], ids=["phone", "dark"])
def test_every_view_fits_into_its_window(
    browser: Any, served: Served, folder: Path, view: str, options: dict[str, Any]
) -> None:
    for name in ("run", "other"):
        run = make_run(folder / name, told=[replace(TOLD, adapter="word" * 200)], weights=name.encode())
        make_evaluation(folder / f"eval-{name}", run)
        make_model(folder / f"merged-{name}-{'x' * 60}", run)
        change_tags(run, ["a-tag-of-quite-some-length-for-a-phone"])
    with opened(browser, served, KEY_ADDRESS, **options) as page:
        page.wait_for_selector("table.runs")
        page.evaluate(f"window.location.hash = '{view}'")
        page.wait_for_selector({"#/": "table.runs"}.get(view, ".chart path"))
        page.wait_for_timeout(100)
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
        if view == "#/":  # the other tables may scroll in their boxes
            cut = "[...document.querySelectorAll('.scroll')].some((box) => box.scrollWidth > box.clientWidth)"
            assert not page.evaluate(cut), "a column is out of sight"
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (dark == "rgb(23, 24, 26)") == (options.get("color_scheme") == "dark")


def test_a_key_is_asked_for_and_a_lost_server_is_told(browser: Any, folder: Path) -> None:
    make_run(folder / "run")
    complaint = "Failed to load resource"
    with (
        running(create_application(folder, Access(API_KEY, LOOPBACK_NAMES))) as address,
        opened(browser, Served(address, None, None), "/", complaint) as page,
    ):
        page.wait_for_selector("#key-dialog[open]")
        page.fill("[name=key]", "wrong")
        page.press("[name=key]", "Enter")
        page.wait_for_selector("#key-wrong", state="visible")
        page.fill("[name=key]", API_KEY)
        page.press("[name=key]", "Enter")
        page.wait_for_selector("table.runs")
        page.route("**/v1/**", lambda route: route.abort())
        page.wait_for_selector("#connection:text('no connection')")
        page.unroute("**/v1/**")
        page.wait_for_selector("#connection:text('no connection')", state="detached")
        assert text_of(page, ".runs .name a") == ["run"]


# --- without one ---


def test_nothing_is_told_without_the_key_or_to_other_pages(served: Served, folder: Path) -> None:
    make_run(folder / "run")
    for path in ("/v1/runs", "/v1/run?name=run", "/v1/comparison?run=run&run=run"):
        assert served.error(path, Authorization="")["status"] == 401
        assert served.error(path, Authorization="Bearer wrong")["status"] == 401
        assert served.error(path, Host="evil.example")["status"] == 403
        assert served.error(path, Origin="http://evil.example")["status"] == 403
        assert served.request(path)[0] == 200
    status, headers, text = served.request("/", Authorization="")
    assert (status, "run-1" in text) == (200, False)
    assert "default-src 'none'; script-src 'self'" in headers["content-security-policy"]
    assert served.request("/", Host="evil.example")[0] == 403


def test_the_page_only_reads(served: Served, folder: Path) -> None:
    for state in ("finished", "interrupted", "running"):
        make_run(folder / state, state)
    before = tree(folder)
    for path in (
        "/v1/runs",
        "/v1/run?name=finished",
        "/v1/run?name=running",
        "/v1/comparison?run=finished&run=running",
    ):
        get(served, path)
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            assert served.request(path, {}, method)[0] == 405
    assert tree(folder) == before


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "..",
        "/etc",
        "run/../../secret",
        "%2e%2e/secret",
        "..%2fsecret",
        ".",
        "run/adapter",
        "run%00",
        "link",
    ],
)
def test_only_runs_of_the_folder_can_be_named(served: Served, folder: Path, name: str) -> None:
    make_run(folder / "run")
    make_run(folder.parent / "secret")
    (folder / "link").symlink_to("/etc")
    for path in (f"/v1/run?name={name}", f"/v1/comparison?run=run&run={name}"):
        status, _, text = served.request(path)
        assert (status, "root:" in text) == (404, False)
    for path in (f"/page/{name}", "/page/..%2f..%2fapplication.py", "/page/../server/application.py"):
        assert served.request(path)[0] == 404


def test_what_has_not_changed_is_not_sent_again(served: Served, folder: Path) -> None:
    run = make_run(folder / "run")
    for path in ("/v1/runs", "/v1/run?name=run"):
        _, headers, _ = served.request(path)
        again = served.request(path, If_None_Match=headers["etag"])
        assert (again[0], again[2]) == (304, "")
        change_tags(run, [f"tag{len(path)}"])
        status, others, text = served.request(path, If_None_Match=headers["etag"])
        assert (status, f"tag{len(path)}" in text) == (200, True)
        assert others["etag"] != headers["etag"]


class Counted(io.FileIO):
    """A file that counts the bytes that are read of all."""

    read_bytes = 0

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer) or 0
        Counted.read_bytes += count
        return count


def line_of(step: int) -> str:
    return json.dumps({"step": step, "loss": 1 / (step + 1)}) + "\n"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The bytes of metrics that were read since the last call."""
    monkeypatch.setattr(metrics, "open_plain", lambda path: io.BufferedReader(Counted(path)))

    def count() -> int:
        found, Counted.read_bytes = Counted.read_bytes, 0
        return found

    count()
    return count


def test_of_a_run_that_goes_on_only_what_was_appended_is_read(
    served: Served, folder: Path, counted: Callable[[], int]
) -> None:
    run = make_run(folder / "run", "running")
    path = run / "metrics.jsonl"
    path.write_text("".join(map(line_of, range(5000))))

    def last_step() -> int:
        found: int = get(served, "/v1/run?name=run")["curves"]["training loss"][-1][0]
        return found

    assert last_step() == 4999
    assert counted() == path.stat().st_size
    assert last_step() == 4999
    assert counted() <= metrics.COMPARED_BYTES
    half = line_of(5001)[:9]
    with path.open("a") as file:
        file.write(line_of(5000) + half)
    assert last_step() == 5000
    with path.open("a") as file:
        file.write(line_of(5001)[9:])
    assert last_step() == 5001
    assert counted() <= 2 * (len(line_of(5000) + line_of(5001)) + metrics.COMPARED_BYTES)


@pytest.mark.parametrize("steps", [10, 40, 90], ids=["shortened", "the same length", "longer"])
@pytest.mark.parametrize("is_replaced", [True, False])
def test_metrics_that_are_written_again_are_read_from_the_beginning(
    folder: Path, steps: int, is_replaced: bool
) -> None:
    """As a resumed run replaces them, and as a program may that does not."""
    followed, path = metrics.FollowedMetrics(), folder / "metrics.jsonl"
    path.write_text("".join(map(line_of, range(10, 50))))
    assert followed.read(folder) == read_metrics(folder)
    if is_replaced:
        write_text(path, "".join(map(line_of, range(50, 50 + steps))))
    else:
        path.write_text("".join(map(line_of, range(50, 50 + steps))))
    assert [record["step"] for record in followed.read(folder)] == [*range(50, 50 + steps)]
    path.unlink()
    assert followed.read(folder) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([line_of(1), line_of(2)[:7], line_of(2)[7:], "\n", "{]", line_of(3)[:-1], "\0"])))
def test_however_metrics_grow_they_are_read_as_at_once(pieces: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        followed, run = metrics.FollowedMetrics(), Path(name)
        for piece in pieces:
            with (run / "metrics.jsonl").open("a") as file:
                file.write(piece)
            assert followed.read(run) == read_metrics(run)


def test_damage_is_shown_and_breaks_nothing(served: Served, folder: Path) -> None:
    run = make_run(folder / "run", metrics=[*METRICS, {"step": 5, "loss": math.nan}, {"step": 6, "loss": math.inf}])
    other = make_run(folder / "other")
    (other / "adapter" / "adapter_config.json").write_text("[]")
    for path in ("report.json", "findings.json", "recipe.yaml"):
        (run / path).write_text("{" * 9)
    os.mkfifo(folder / "pipe")
    (folder / "empty").mkdir()
    set_status(folder / "empty", "interrupted")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for name in ("run", "other", "empty"):
        status, _, text = served.request(f"/v1/run?name={name}")
        assert status == 200
        found = json.loads(text, parse_constant=refuse)
        if name == "run":
            assert found["curves"]["training loss"] == [[2, 2.0], [4, 1.0]]
            assert len(found["problems"]) == 4  # the report is read for the list too
        if name == "other":
            assert found["changed"] == ["adapter/adapter_config.json"]
    assert {run["name"]: run["state"] for run in get(served, "/v1/runs")["runs"]} == {
        "run": "finished", "other": "finished", "empty": "interrupted"
    }  # fmt: skip
    assert served.request("/v1/comparison?run=run&run=empty")[0] == 200
    assert served.error("/v1/comparison?run=run")["status"] == 400
    assert served.error("/v1/comparison")["status"] == 400


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LoratuneError, match="no such folder"):
        create_application(tmp_path / "nowhere", Access(None))


def test_a_long_curve_keeps_its_peaks_and_its_ends() -> None:
    points = [(step, 1.0 + math.sin(step)) for step in range(100_000)]
    points[54_321] = (54_321, 99.0)
    points[77_777] = (77_777, -99.0)
    kept = thinned(points, 1000)
    assert len(kept) <= 1002
    assert {points[0], points[-1], (54_321, 99.0), (77_777, -99.0)} <= set(kept)
    assert kept == sorted(kept)
    assert thinned(points[:1000], 1000) == points[:1000]


def test_values_are_json_without_control_characters() -> None:
    given = {"a\x00": (1, math.nan, "\x1b[31m"), "b": {"c": Path("x")}}
    assert plain(given) == {"a␀": [1, None, "␛[31m"], "b": {"c": "x"}}
