"""Results in a notebook: whatever a text says, only a table comes out, and the numbers are in it."""

import html
import html.parser

import hypothesis
import pytest
from hypothesis import strategies

from safety_neurons.results import Agreement, Completion, Completions, Difference, Effect, Rate, html_table
from safety_neurons.results.notebook import visible

RATE = Rate(0.5, 0.25, 0.75, 12, 3)
HOSTILE = '</td><script>alert(1)</script><img src=x onerror=alert(1)>"\u202e\x00\ud800'
TAGS = {"table", "caption", "thead", "tbody", "tr", "th", "td", "bdi"}


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.seen, self.attributes, self.said, self.rows = set(), set(), [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.rows += tag == "tr"

    def handle_data(self, data):
        self.said.append(data)


@hypothesis.given(strategies.text(strategies.characters(), max_size=80))
def test_any_text_stays_text(text):
    seen = Tags(html_table(text, [text, "b"], [[text, text]]))
    assert seen.seen <= TAGS
    assert seen.attributes <= {"scope"}
    assert len([said for said in seen.said if said != "b"]) in (0, 4)


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (RATE, "0.50 [0.25, 0.75]"),
        (Rate(None, None, None, 0, 5), "undefined"),
        (Effect(0.9, 0.8, 1.0, 12, 0, HOSTILE, HOSTILE), "0.90 [0.80, 1.00]"),
        (Effect(None, None, None, 0, 5, HOSTILE, HOSTILE), "undefined: </td>"),
        (Difference(-0.5, -0.6, -0.4, 12, 0, HOSTILE), "\u22120.50 [\u22120.60, \u22120.40]"),
        (Agreement(HOSTILE, "b", RATE, RATE, ((1, 2), (3, 4))), "0.50 [0.25, 0.75]"),
        (
            Completions(
                [Completion(HOSTILE, HOSTILE, HOSTILE, arm=HOSTILE, verdicts={HOSTILE: {"label": HOSTILE}})]
                * 30
            ),
            "⟨U+202E⟩⟨U+0000⟩⟨U+D800⟩",
        ),
    ],
)
def test_results_show_their_numbers_and_nothing_else(result, says):
    shown = result._repr_html_()
    seen = Tags(shown)
    assert seen.seen <= TAGS
    assert says in " ".join(seen.said).replace("\N{NO-BREAK SPACE}", " ")
    assert "http" not in shown
    assert shown.encode()


def test_a_text_is_never_cut_to_something_longer():
    for length in range(20, 60):
        shown = visible("x" * length, 24)
        assert len(shown) <= length
        assert shown == "x" * length or shown.endswith(f"… ({length - 24:,} characters more)")
    assert visible("x" * 24 + "y" * 40, 24) == "x" * 24 + "… (40 characters more)"


def test_long_lists_and_long_texts_are_cut_and_counted():
    many = Completions([Completion(f"p{place}", "x" * 1_000_000, "y") for place in range(30)])
    shown = many._repr_html_()
    assert Tags(shown).rows == 21
    assert "30 completions in untreated, the first 20" in html.unescape(shown)
    assert "(999,700 characters more)" in shown
    assert len(shown) < 20_000
