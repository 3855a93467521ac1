"""Figures of the analyses: names and tokens of any kind leave a well-formed SVG, and end no process."""

from xml.etree import ElementTree

import pytest
from analysed_sets import random_set, small_table

from safety_neurons.analysis import name_sets, overlap
from safety_neurons.analysis.figures import cards_figure, overlap_figure

HOSTILE = ["\x1b[31m", "\x00", "\u202eevil", "<script>alert(1)</script>", "]]>&", "\ud800", "\uffff"]


def words_of(place):
    return "".join(ElementTree.fromstring(place.read_bytes()).itertext())


@pytest.fixture
def cards():
    def made(token):
        effects = {"deactivate": {"value": 0.1, "low": 0.0, "high": 0.2}}
        writes = {"top": [{"token": token}]}
        return {"random": {"deactivate": {"n": 0}}, "cards": [{"neuron": "layers.0.down:1", "effects": effects, "writes": writes}]}

    return made


def test_tokens_of_any_kind_can_stand_on_a_card(cards, tmp_path):
    for token in HOSTILE:
        cards_figure(cards(token), tmp_path / "cards.svg")
        assert "layers.0.down:1" in words_of(tmp_path / "cards.svg")
        assert not set("\x1b\x00\u202e") & set(words_of(tmp_path / "cards.svg"))
    cards_figure(cards(HOSTILE[0]), tmp_path / "cards.svg")
    assert "⟨U+001B⟩" in words_of(tmp_path / "cards.svg")


def test_a_name_of_a_set_is_drawn_as_it_reads(tmp_path):
    table = small_table()
    found = overlap(name_sets([("one\x1b", random_set(table, 0.2, 0)), ("<b>two</b>", random_set(table, 0.2, 1))]))
    overlap_figure(found, tmp_path / "overlap.svg")
    assert "one⟨U+001B⟩ and <b>two</b>" in words_of(tmp_path / "overlap.svg")


def test_a_token_of_blanks_is_named_on_a_card(cards, tmp_path):
    cards_figure(cards("\n"), tmp_path / "cards.svg")
    assert "\\n" in words_of(tmp_path / "cards.svg")
