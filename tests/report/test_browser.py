"""The page in a real browser: what its scripts do, what hostile text cannot do, and how it fits a screen."""

import json
import re

import pytest

import report_runs
from page_text import HOSTILE, Outline
from safety_neurons.neurons import NeuronSet, Scores
from safety_neurons.report import write_report
from safety_neurons.results import Completion, Completions

TAGS = "[...document.querySelectorAll('*')].map((each) => each.localName)"


@pytest.fixture
def opened(browser, page):
    browser.screen(1280)
    return browser.open(page)


def choose(browser, name, value):
    """Sets a control as a reader would, and waits for the search."""
    browser.ask(
        f"(() => {{ const box = document.getElementById({json.dumps(name)}); box.value = {json.dumps(value)};"
        " box.dispatchEvent(new Event(box.localName === 'input' ? 'input' : 'change')); })()"
    )
    browser.ask("new Promise((done) => setTimeout(done, 200))")
    return int(browser.ask("document.getElementById('status').textContent").split()[0].replace(",", ""))


def test_the_page_shows_without_an_error_and_asks_for_nothing(opened, page):
    assert opened.said == []
    assert [url for url in opened.requests if url != page.resolve().as_uri()] == []
    assert "80 of 80 prompts" in opened.ask("document.body.innerText")


def test_completions_are_found_by_word_and_by_verdict(opened, page):
    completions = Completions.load(page.parents[1] / "verify-contrast" / "completions.jsonl")
    assert "verify-contrast" in opened.ask("document.getElementById('sheet').selectedOptions[0].textContent")
    arm = opened.ask("document.getElementById('treatment').selectedOptions[0].textContent")

    def refused(which):
        return {
            item.arm.partition("/")[2] + item.prompt_id: item.verdicts["wording-1"]["refused"]
            for item in completions
            if which(item)
        }

    treated, base = (
        refused(lambda item: item.arm.startswith(arm + "/")),
        refused(lambda item: item.arm.startswith("untreated/")),
    )
    assert choose(opened, "verdict", "refused") == sum(treated.values())
    assert choose(opened, "verdict", "changed") == sum(treated[name] != base[name] for name in treated)
    assert choose(opened, "verdict", "") == len(treated)
    assert choose(opened, "query", "PAINT house number 3") == sum(
        "paint house number 3" in item.prompt for item in completions.arm("aligned/harmless")
    )
    assert choose(opened, "query", "no such words") == 0
    choose(opened, "query", "")


def test_a_cell_opens_into_the_neurons_of_its_matrix_by_keyboard(opened, page):
    folder = page.parents[1] / "contrast"
    neurons, scores = (
        NeuronSet.load(folder / "neurons.safetensors"),
        Scores.load(folder / "scores.safetensors"),
    )
    other = Scores.load(page.parents[1] / "importance" / "scores.safetensors")
    part = (
        "[...document.querySelectorAll('.explorer')].find((each) => "
        "each.querySelector('h3').textContent.startsWith('contrast'))"
    )
    opened.ask(f"{part}.querySelector('[data-cell=\"0.down\"]').focus()")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowDown"):
        opened.press(key)
    assert opened.ask("document.activeElement.dataset.cell") == "3.down"
    assert opened.ask("document.activeElement.getAttribute('aria-pressed')") == "true"
    panel = f"{part}.querySelector('.panel')"
    said = opened.ask(f"{panel}.innerText")
    members = neurons["layers.3.down"]
    assert f"{len(members)} of 1,024 neurons kept" in said
    rows = opened.ask(
        f"[...{panel}.querySelectorAll('tbody tr')].map((row) => [...row.children].map((cell) => "
        "cell.textContent))"
    )
    kept = [row for row in rows if "not kept" not in row[1]]
    best = sorted(members, key=lambda index: -scores["layers.3.down"][index])
    assert [int(row[0]) for row in kept] == best[: len(kept)]
    above = sum((values > scores["layers.3.down"][best[0]]).sum() for _, values in scores.items())
    assert int(rows[0][1].replace(",", "")) == above + 1
    column = opened.ask(f"[...{panel}.querySelectorAll('thead th')].map((each) => each.textContent)").index(
        "rank by importance"
    )
    above = sum((values > other["layers.3.down"][best[0]]).sum() for _, values in other.items())
    assert int(rows[0][column].split()[0].replace(",", "")) == above + 1
    opened.ask(f"{panel}.querySelector('.opener').focus()")
    opened.press("Enter")
    assert f'NeuronSet({{"layers.3.down": [{best[0]}]}})' in opened.ask(
        f"{panel}.querySelector('.card').textContent"
    )
    assert opened.ask("document.activeElement.getAttribute('aria-expanded')") == "true"
    opened.press("Enter")
    assert opened.ask(f"{panel}.querySelector('.card')") is None
    assert opened.said == []


def test_hostile_text_runs_nothing_and_makes_no_element(browser, page, hostile):
    plain = set(browser.open(page).ask(TAGS))
    browser.open(hostile)
    for name in ("query", "verdict"):
        choose(browser, name, "")
    browser.ask("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert (browser.said, browser.dialogs) == ([], [])
    assert [url for url in browser.requests if url != hostile.resolve().as_uri()] == []
    assert browser.ask("document.title").startswith(HOSTILE[0])
    assert set(browser.ask(TAGS)) <= plain
    seen = Outline(browser.document())
    assert not [name for name in seen.attributes if name.startswith("on")]
    assert all(link.startswith("#") for link in seen.links)
    for shown in ("⟨U+202E⟩", "⟨U+0000⟩", "⟨U+D800⟩", "characters more)"):
        assert shown in seen.text, shown


def test_every_hostile_text_stands_in_the_page_as_it_was_written(browser, tmp_path):
    run = report_runs.patch_run(tmp_path / "verify", "contrast", (0.1, 0.9), n=10)
    texts = [text for text in HOSTILE if text.isprintable()]
    texts += [
        "<svg><animate onbegin=alert(1) attributeName=x>",
        "<math><mi//xlink:href='data:x,<script>alert(1)</script>'>",
        "&lt;b&gt;",
        "\\u003cb>",
    ]
    made = [
        Completion(f"p{place}", text, text, (), "stop", arm)
        for place, text in enumerate(texts)
        for arm in ("untreated/harmful", "aligned/harmful")
    ]
    Completions([*made, Completion("long", "x", "y" * 1_000_000, (), "stop", "aligned/harmful")]).save(
        run / "completions.jsonl"
    )
    browser.open(write_report([run], tmp_path / "r.html"))
    shown = browser.ask(
        "[...document.querySelectorAll('#answers tbody th .text')].map((each) => each.textContent)"
    )
    assert shown[: len(texts)] == texts
    assert (browser.said, browser.dialogs, browser.ask("document.title")) == ([], [], "Safety neurons")


def test_the_policy_of_the_page_would_stop_a_script_that_got_in(browser, page, tmp_path):
    inside = (
        "<script>document.title='owned'</script><img src=x onerror=document.title='owned'><iframe "
        "src='data:text/html,x'></iframe>"
    )
    (tmp_path / "broken.html").write_text(
        page.read_text(encoding="utf-8").replace("</body>", inside + "</body>"), encoding="utf-8"
    )
    browser.open(tmp_path / "broken.html")
    assert browser.ask("document.title") == "An organism"
    assert sum("Content Security Policy" in line for line in browser.said) >= 3
    error = "(() => { try { document.body.innerHTML = '<b>x</b>'; } catch (error) { return error.name; } })()"
    assert browser.ask(error) == "TypeError"


@pytest.mark.parametrize(
    ("width", "media"), [(390, "screen"), (320, "screen"), (1280, "screen"), (794, "print")]
)
def test_nothing_is_wider_than_the_screen(browser, page, width, media):
    browser.screen(width, media=media)
    browser.open(page)
    every = "[...document.querySelectorAll('h1,h2,h3,p,figure,svg,.scroll,.panel,.answers,code')]"
    wide = f"{every}.filter((each) => each.getBoundingClientRect().right > innerWidth + 1)"
    assert browser.ask(f"{wide}.map((each) => each.outerHTML.slice(0, 120))") == []
    assert browser.ask("document.documentElement.scrollWidth - innerWidth") <= 0
    browser.screen(1280)


def test_what_can_be_used_has_a_name_and_can_be_reached(opened):
    used = (
        "a[href], button, input, select, summary, [tabindex], [role=button], [role=img], [role=region], "
        "[role=group]"
    )
    names = opened.ask(
        f"[...document.querySelectorAll('{used}')].filter((each) => each.checkVisibility() && each.id !== "
        "'main').map((each) => [each.outerHTML.slice(0, 90), (each.getAttribute('aria-label') || "
        "each.closest('label')?.textContent || each.textContent).trim()])"
    )
    assert len(names) > 60
    assert [tag for tag, name in names if not name] == []
    assert (
        opened.ask("document.querySelectorAll('[role=img] [tabindex], [aria-hidden=true] [tabindex]').length")
        == 0
    )
    levels = opened.ask(
        "[...document.querySelectorAll('h1,h2,h3,h4')].filter((each) => "
        "each.checkVisibility()).map((each) => Number(each.localName[1]))"
    )
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in zip(levels[1:], levels[2:], strict=False))
    assert re.search("focus-visible", opened.document())
