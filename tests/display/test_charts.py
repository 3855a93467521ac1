"""Charts outside a page: names and tokens of any kind leave a well-formed SVG in colours of its own, and end no process."""

import dataclasses
import importlib.resources
import re
from xml.etree import ElementTree

import pytest

from page_text import HOSTILE
from safety_neurons.display import ReportedRun, part_of
from safety_neurons.display.charts import _LIGHT, standalone
from safety_neurons.display.parts import plain
from safety_neurons.studies.comparison import Standing

NAMES = [HOSTILE[0], "\x1b[31m", "\x00", "\u202eevil", "]]>&", "\ud800", "\uffff", "\n"]


def drawn(verb, result):
    figures = part_of(ReportedRun.of(verb, result)).figures
    return standalone([(figure.drawing, plain(figure.caption)) for figure in figures])


def words_of(svg):
    return "".join(ElementTree.fromstring(svg.encode()).itertext())


def cards(token):
    effect = {"value": 0.1, "low": 0.0, "high": 0.2, "as_large_among_random": 0, "n_random": 0}
    writes = {"defined": True, "how": "", "top": [{"token": token}], "bottom": []}
    card = {"neuron": "layers.0.down:1", "score": 0.1, "writes": writes, "active": {}, "effects": {"deactivate": effect}}
    return {"random": {"deactivate": {"n": 0}}, "cards": [card]}


@pytest.mark.parametrize("text", NAMES)
def test_tokens_and_names_of_any_kind_are_drawn_as_they_read(text):
    svg = drawn("analyze-vocabulary", cards(text))
    assert "0.down:1" in words_of(svg)
    assert not set("\x1b\x00\u202e") & set(words_of(svg))
    chance = {"value": 0.2, "low": 0.1, "high": 0.3, "matched": {"low": 0.1, "high": 0.3}}
    pair = {"names": [text, "b"], "jaccard": chance, "spearman": {"value": None}, "spearman_union": {"value": None}}
    mean = {"value": 0.2, "n_pairs": 1}
    svg = drawn("analyze-overlap", {"sets": [{"name": text}, {"name": "b"}], "pairs": [pair], "mean_jaccard": mean, "in_all": chance})
    assert "0.20" in words_of(svg)
    assert not {"script", "image", "foreignObject"} & {
        element.tag.rpartition("}")[2] for element in ElementTree.fromstring(svg.encode()).iter()
    }


def test_blanks_and_controls_are_named():
    assert "⟨U+001B⟩" in words_of(drawn("analyze-vocabulary", cards("\x1b[31m")))
    assert "\\n" in words_of(drawn("analyze-vocabulary", cards("\n")))


def test_the_ranking_names_every_method_and_shows_every_organism():
    values = {"one": 0.5, "two": 0.25}
    made = [
        Standing(method, group, measure, 0.4, 0.25, values)
        for method in ("a", "b", "random")
        for group, measure in (("natural 0.02", "causal_effect"), ("planted", "recall"))
    ]
    svg = drawn("compare", {"ranking": [dataclasses.asdict(one) for one in made], "leaders": []})
    assert svg.startswith("<svg")
    for said in (">a<", ">b<", ">random<", "planted units found", "causal effect"):
        assert said in svg
    assert "2 % of the units" in plain(words_of(svg))


def test_a_file_has_the_colours_of_a_page_in_light_and_no_class():
    style = importlib.resources.files("safety_neurons.report").joinpath("assets", "style.css").read_text(encoding="utf-8")
    light = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", re.search(r":root \{(.*?)\}", style, re.DOTALL)[1]))
    assert light.items() >= _LIGHT.items()
    svg = drawn("analyze-vocabulary", cards("x"))
    assert "class=" not in svg
    colours = re.findall(r'(?:fill|stroke)="([^"]*)"', svg)
    assert {_LIGHT["ink"], _LIGHT["grid"]} < set(colours) <= {*_LIGHT.values(), "none", "transparent"}
