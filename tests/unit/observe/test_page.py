"""The page in a real browser: it loads without a complaint, asks nobody, and draws what it was given."""

import shutil
from pathlib import Path

import pytest

from moe_trainer.observe.report import write_report
from tests.unit.observe.browser import CHROMIUM, Browser
from tests.unit.observe.runs import EXPERTS, write_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
PLOTS = (
    "Loss|Perplexity|Gradient norm|Learning rate|Throughput|Model FLOPs|MFU|Step time|Memory|Expert load|Entropy|"
    "Dead experts|Skipped steps|Expert load by layer"
).split("|")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    profile = tmp_path_factory.mktemp("chromium")
    with Browser(profile) as browser:
        yield browser
    shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "single", steps=100, val_every=20, load_every=10)
    write_report([folder], folder / "report.html")
    return folder / "report.html"


def titles(browser: Browser) -> list[str]:
    return browser.evaluate("[...document.querySelectorAll('figure')].map(node => node.dataset.plot)")


def line(browser: Browser, plot: str, name: str) -> list[dict]:
    """Points and pixels of each run's curve."""
    return browser.evaluate(
        f"""[...document.querySelectorAll('figure[data-plot="{plot}"] path[data-name="{name}"]')].map(path => ({{
            points: Number(path.dataset.points), vertices: path.getAttribute('d').split(/[ML]/).length - 1,
            box: path.getBBox().toJSON ? path.getBBox().toJSON() : {{width: path.getBBox().width, height:
            path.getBBox().height}}}}))"""
    )


def test_every_plot_is_there_with_its_data(browser: Browser, single: Path) -> None:
    browser.open(single)
    assert browser.complaints == [] and browser.requests == [single.resolve().as_uri()]
    assert titles(browser) == PLOTS
    (loss,), (validation,) = line(browser, "Loss", "loss"), line(browser, "Loss", "val_loss")
    assert loss["points"] == loss["vertices"] == 100 and validation["vertices"] == 5
    assert loss["box"]["width"] > 900 and loss["box"]["height"] > 150
    for plot in PLOTS[:-1]:
        drawn = browser.evaluate(
            f"""document.querySelectorAll('figure[data-plot="{plot}"] path.line[d^="M"]').length"""
        )
        assert drawn > 0, plot
    assert browser.evaluate("document.querySelectorAll('#load rect.cell').length") == 2 * EXPERTS


def test_the_loss_falls_on_the_screen_too(browser: Browser, single: Path) -> None:
    browser.open(single)
    first, last = browser.evaluate(
        """(path => [0, 1].map(end => path.getPointAtLength(end * path.getTotalLength()).y))
        (document.querySelector('path[data-name="loss"]'))"""
    )
    assert last > first + 100  # downwards is plus


def test_the_slider_moves_through_the_tables(browser: Browser, single: Path) -> None:
    browser.open(single)
    color = "getComputedStyle(document.querySelector('#load rect.cell')).fill"
    label = "document.querySelector('#load output').textContent"
    assert browser.evaluate(label) == "step 100"
    alive = browser.evaluate(color)
    browser.evaluate(
        "(s => { s.value = 0; s.dispatchEvent(new Event('input')); })(document.querySelector('#load input'))"
    )
    assert browser.evaluate(label) == "step 10"
    assert browser.evaluate(color) == browser.evaluate(
        "(p => { p.style.color = 'var(--dead)'; return getComputedStyle(p).color; })(document.querySelector('h1'))"
    )
    assert alive != browser.evaluate(color)


def test_a_log_axis_and_smoothing_change_the_curve(browser: Browser, single: Path) -> None:
    browser.open(single)
    drawn = "document.querySelector('path[data-name=\"loss\"]').getAttribute('d')"
    linear = browser.evaluate(drawn)
    browser.evaluate("document.querySelector('figure button').click()")
    logarithmic = browser.evaluate(drawn)
    browser.evaluate(
        "(s => { s.value = 0; s.dispatchEvent(new Event('input')); })(document.querySelector('#smoothing'))"
    )
    unsmoothed = browser.evaluate(drawn)
    assert len({linear, logarithmic, unsmoothed}) == 3
    assert "NaN" not in linear + logarithmic + unsmoothed
    assert browser.evaluate("document.querySelector('figure button').ariaPressed") == "true"
    assert browser.complaints == []


def test_several_runs_lie_over_each_other_and_can_be_hidden(browser: Browser, tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, steps=60, seed=number) for number, name in enumerate(("one", "two"))]
    folders.append(write_run(tmp_path / "three", steps=3, load_every=10, seed=7.0000001, extra="only here"))
    write_report(folders, tmp_path / "all.html")
    browser.open(tmp_path / "all.html")
    assert browser.complaints == []
    assert [curve["points"] for curve in line(browser, "Loss", "loss")] == [60, 60, 3]
    strokes = "[...document.querySelectorAll('path[data-name=\"loss\"]')].map(path => getComputedStyle(path).stroke)"
    assert len(set(browser.evaluate(strokes))) == 3
    legend = "[...document.querySelectorAll('#runs label')].map(label => label.textContent)"
    assert browser.evaluate(legend) == ["one", "two", "three"]
    browser.evaluate("document.querySelectorAll('#runs input')[0].click()")
    assert [curve["points"] for curve in line(browser, "Loss", "loss")] == [60, 3]
    chosen = "[...document.querySelectorAll('#load select option')].map(option => option.textContent)"
    assert browser.evaluate(chosen) == ["one", "two"]
    differing = "[...document.querySelectorAll('#tables details tr.differs th')].map(head => head.textContent)"
    assert set(browser.evaluate(differing)) == {"run_name", "seed", "extra"}
    cells = "[...document.querySelectorAll('#tables section:first-child tr')].map(row => row.innerText.split('\\t'))"
    assert ["seed", "0", "1", "7.0000001"] in browser.evaluate(cells)


@pytest.mark.parametrize("is_dark", (False, True), ids=("light", "dark"))
@pytest.mark.parametrize("width", (1280, 420))
def test_nothing_sticks_out_or_overlaps(browser: Browser, single: Path, width: int, is_dark: bool) -> None:
    browser.open(single, width=width, is_dark=is_dark)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    overlaps = browser.evaluate(
        """[...document.querySelectorAll('svg')].flatMap(svg => {
            const boxes = [...svg.querySelectorAll('text')].map(text => [text, text.getBoundingClientRect()]);
            const across = (a, b) => a.left < b.right && b.left < a.right;
            const meet = (a, b) => across(a, b) && a.top < b.bottom - 2 && b.top < a.bottom - 2;
            return boxes.flatMap(([text, box], i) => boxes.slice(i + 1).filter(([_, other]) => meet(box, other))
                .map(([other]) => `${text.textContent} / ${other.textContent}`));
        })"""
    )
    assert overlaps == []
    brightness = browser.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(brightness) < 150) is is_dark


def test_a_name_is_never_markup(browser: Browser, tmp_path: Path) -> None:
    evil = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    one = write_run(tmp_path / "one", steps=5, run_name=evil, data={"path": evil})
    two = write_run(tmp_path / "two", steps=5, run_name="<b>bold</b> &amp;")
    with (two / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 1.0, "<script>document.title=1</script>": 2.0}\n')
    write_report([one, two], tmp_path / "all.html")
    browser.open(tmp_path / "all.html")
    assert browser.complaints == [] and len(browser.requests) == 1
    assert browser.evaluate("document.title") == f"{evil} · <b>bold</b> &amp;"
    assert browser.evaluate("document.querySelectorAll('img, b:not(.tip b)').length") == 0
    assert browser.evaluate("document.querySelectorAll('script').length") == 2
    assert browser.evaluate("document.querySelector('#runs label').textContent") == evil
    assert "<script>document.title=1</script>" in titles(browser)


def test_a_run_of_one_step_and_one_without_experts(browser: Browser, tmp_path: Path) -> None:
    for number, load_every in enumerate((1, 10)):
        folder = write_run(tmp_path / str(number), steps=1, load_every=load_every)
        write_report([folder], folder / "report.html")
        browser.open(folder / "report.html")
        assert browser.complaints == []
        assert browser.evaluate("document.querySelectorAll('figure[data-plot=\"Loss\"] circle.dot').length") == 1
        assert browser.evaluate("document.querySelectorAll('rect.cell').length") == (
            2 * EXPERTS if load_every == 1 else 0
        )


def test_pointing_at_a_curve_tells_its_value(browser: Browser, single: Path) -> None:
    browser.open(single)
    box = "document.querySelector('svg.plot').getBoundingClientRect()"
    place = browser.evaluate(f"(box => ({{x: box.left + box.width / 2, y: box.top + 50}}))({box})")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", **place)
    tip = browser.evaluate("document.querySelector('figure .tip').innerText")
    assert tip.startswith("step ") and "training" in tip and "validation" in tip
    assert browser.evaluate("getComputedStyle(document.querySelector('figure .tip')).visibility") == "visible"
    left = browser.evaluate("document.querySelector('figure .tip').getBoundingClientRect().left")
    assert 0 < left - place["x"] < 40
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    assert browser.evaluate("getComputedStyle(document.querySelector('figure .tip')).visibility") == "hidden"


def test_pointing_at_an_expert_tells_its_load(browser: Browser, single: Path) -> None:
    browser.open(single)
    browser.evaluate("document.querySelector('#load').scrollIntoView()")
    cell = "document.querySelectorAll('rect.cell')[8].getBoundingClientRect()"
    place = browser.evaluate(f"(box => ({{x: box.left + 5, y: box.top + 5}}))({cell})")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", **place)
    tip = browser.evaluate("document.querySelector('#load .tip').innerText")
    mean = sum(range(10, 10 + EXPERTS)) / EXPERTS
    assert tip.split("\n") == ["layer 2, expert 0", f"{round(1000 / mean) / 100:.2f} × the mean"]
    left, top = browser.evaluate(
        "(box => [box.left, box.top])(document.querySelector('#load .tip').getBoundingClientRect())"
    )
    assert 0 < left - place["x"] < 40 and 0 < top - place["y"] < 40
