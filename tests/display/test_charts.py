"""Charts outside a page: names and tokens of any kind leave a well-formed SVG in colours of its own, and end
no process.
"""

import dataclasses
import importlib.resources
import re
from xml.etree import ElementTree

import pytest

from page_text import HOSTILE
from safety_neurons.display import ReportedRun, part_of
from safety_neurons.display.charts import _LIGHT, standalone
from safety_neurons.display.parts import plain
from safety_neurons.studies.ranking import Standing

NAMES = [HOSTILE[0], "\x1b[31m", "\x00", "\u202eevil", "]]>&", "\ud800", "\uffff", "\n"]


def drawn(verb, result):
    figures = part_of(ReportedRun.of(verb, result)).figures
    return standalone([(figure.drawing, plain(figure.caption)) for figure in figures])


def words_of(svg):
    return "".join(ElementTree.fromstring(svg.encode()).itertext())


def titles(svg):
    return [
        element.text
        for element in ElementTree.fromstring(svg.encode()).iter()
        if element.tag.endswith("title")
    ]


CHANCE = {"value": 0.141, "expected": 0.005, "low": 0.0, "high": 0.01}
MATCHED = {"expected": 0.02, "low": 0.012, "high": 0.032}


def agreeing(*pairs):
    nothing = {"spearman": {"value": None}, "spearman_union": {"value": None}}
    pairs = [
        {"names": names, "jaccard": {**found, "matched": matched}, **nothing}
        for names, found, matched in pairs
    ]
    names = dict.fromkeys(name for pair in pairs for name in pair["names"])
    mean = {"value": 0.1, "n_pairs": len(pairs)}
    return {
        "sets": [{"name": name} for name in names],
        "pairs": pairs,
        "mean_jaccard": mean,
        "in_all": CHANCE,
    }


def marks(svg, colour):
    """Lines of a colour."""
    return [
        element
        for element in ElementTree.fromstring(svg.encode()).iter()
        if _LIGHT[colour] in (element.get("stroke"),)
    ]


def test_every_jaccard_index_stands_beside_unrelated_sets_and_those_matched_per_matrix():
    result = agreeing(
        (["one", "two"], CHANCE, MATCHED), (["one", "three"], {**CHANCE, "value": 0.0}, {"verdict": None})
    )
    svg = drawn("analyze-overlap", result)
    for text in (
        "one and two",
        "0.141",
        "one and three",
        "0.000",
        "Jaccard index of the neurons",
        "unrelated sets",
    ):
        assert text in words_of(svg)
    assert "one and two: 0.141 (unrelated 0.000 to 0.010, as many per matrix 0.012 to 0.032)" in titles(svg)
    assert "one and three: 0.000 (unrelated 0.000 to 0.010, as many per matrix \N{EN DASH})" in titles(svg)
    assert len(marks(svg, "band")) == 2
    assert len(marks(svg, "c1")) == 1, "a range that is not known is not drawn"
    figure = part_of(ReportedRun.of("analyze-overlap", result)).figures[0]
    assert (
        "one and two 0.141 (unrelated 0.000 to 0.010, as many per matrix 0.012 to 0.032)"
        in figure.alternative
    )


def taxed(**ranks):
    expected = {"expected": 5.0, "low": 1.0, "high": 9.0}
    known = {"value": 0.4, "interval": [0.3, 0.5]}
    spearman = {"all": known, "given_activation": known, "union": known, **ranks}
    pair = {
        "pair": ["safety", "helpfulness"],
        "size": 102,
        "overlap": {"value": 40, "low": 35, "high": 44},
        "shared": None,
    }
    pair |= {"chance": {"all": expected, "in_activation": {**expected, "high": 19.0}}, "spearman": spearman}
    rate = {"value": 0.5, "low": 0.4, "high": 0.6}
    arms = [
        {"arm": name, "refused": rate, "helpful": rate, "over_refused": rate}
        for name in ("safety", "safety from helpfulness", "safety from helpfulness, random 0")
    ]
    return {"relations": [pair], "n_shared": 40, "helpfulness": "taught", "arms": arms, "cross_patching": []}


def test_the_tax_draws_overlap_beside_chance_ranks_and_cross_patching():
    svg = drawn("analyze-tax", taxed(given_activation={"value": None, "interval": [None, None]}))
    titled = (
        "neurons in both top sets",
        "Spearman of change scores",
        "harmful requests refused",
        "helpful answers",
    )
    for text in (
        *titled,
        "safety and helpfulness",
        "40 of 102",
        "all neurons",
        "given activation",
        "in either top set",
    ):
        assert text in words_of(svg)
    chance = "random sets 5.0 [1, 9], as active 5.0 [1, 19]"
    assert f"safety and helpfulness: 40 of 102 ({chance})" in titles(svg)
    assert "0.40\N{NO-BREAK SPACE}[0.30,\N{NO-BREAK SPACE}0.50]" in words_of(svg)
    assert words_of(svg).count("undefined") == 1
    assert (
        len(
            [
                title
                for title in titles(svg)
                if title.startswith(("all neurons", "given activation", "in either"))
            ]
        )
        == 2
    )
    alone = {key: value for key, value in taxed().items() if key not in ("relations", "helpfulness")}
    assert "neurons in both top sets" not in words_of(drawn("analyze-tax", alone))


def step(n, refused, divergence, **more):
    rate = {"value": refused, "low": 0.0, "high": 1.0}
    return {
        "n_neurons": n,
        "harmful_refused": rate,
        "harmless_refused": rate,
        "perplexity": None,
        "divergence": divergence,
        **more,
    }


def bit_by_bit(*divergences):
    points = [step(10 * (n + 1), 0.9 - 0.3 * n, value, step=str(n)) for n, value in enumerate(divergences)]
    curves = [
        {"order": order, "points": points, "neurons_for_half": None}
        for order in ("by score", "one layer alone")
    ]
    ends = {"value": 0.2, "low": 0.1, "high": 0.3}
    random = {
        kind: [{"n_neurons": [10, 12], "harmful_refused": ends, "divergence": ends}]
        for kind in ("random order of layers", "random neurons")
    }
    return {"n_neurons": 20, "untreated": step(0, 1.0, None), "curves": curves, "random": random}


def test_refusals_and_divergence_are_drawn_from_the_untreated_model_on_beside_both_kinds_of_random_orders():
    svg = drawn("analyze-progressive", bit_by_bit(0.1, 0.4))
    for text in ("neurons off", "harmful requests refused", "KL per token, nats"):
        assert text in words_of(svg)
    for figure in part_of(ReportedRun.of("analyze-progressive", bit_by_bit(0.1, 0.4))).figures:
        assert (
            "the band is what random neurons leave; the dashed outline: random order of layers."
            in figure.caption
        )
    for title in ("by score: 0, 1.000", "by score: 10, 0.900", "by score: 0, 0.000", "by score: 20, 0.400"):
        assert title in titles(svg)
    assert not [title for title in titles(svg) if title.startswith("one layer alone")], "no curve"


def test_a_divergence_that_is_undefined_is_left_out_of_its_curve_and_of_the_page_where_there_is_none():
    assert "by score: 10, 0.000" not in titles(drawn("analyze-progressive", bit_by_bit(None, 0.4)))
    assert "KL per token" not in words_of(drawn("analyze-progressive", bit_by_bit(None, None)))


def cards(token):
    effect = {"value": 0.1, "low": 0.0, "high": 0.2, "as_large_among_random": 0, "n_random": 0}
    writes = {"defined": True, "how": "", "top": [{"token": token}], "bottom": []}
    card = {
        "neuron": "layers.0.down:1",
        "score": 0.1,
        "writes": writes,
        "active": {},
        "effects": {"deactivate": effect},
    }
    return {"random": {"deactivate": {"n": 0}}, "cards": [card]}


@pytest.mark.parametrize("text", NAMES)
def test_tokens_and_names_of_any_kind_are_drawn_as_they_read(text):
    svg = drawn("analyze-vocabulary", cards(text))
    assert "0.down:1" in words_of(svg)
    assert not set("\x1b\x00\u202e") & set(words_of(svg))
    chance = {"value": 0.2, "low": 0.1, "high": 0.3, "matched": {"low": 0.1, "high": 0.3}}
    pair = {
        "names": [text, "b"],
        "jaccard": chance,
        "spearman": {"value": None},
        "spearman_union": {"value": None},
    }
    mean = {"value": 0.2, "n_pairs": 1}
    svg = drawn(
        "analyze-overlap",
        {"sets": [{"name": text}, {"name": "b"}], "pairs": [pair], "mean_jaccard": mean, "in_all": chance},
    )
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
    style = (
        importlib.resources.files("safety_neurons.report")
        .joinpath("assets", "style.css")
        .read_text(encoding="utf-8")
    )
    light = dict(
        re.findall(r"--([\w-]+): (#[0-9a-f]{6});", re.search(r":root \{(.*?)\}", style, re.DOTALL)[1])
    )
    assert light.items() >= _LIGHT.items()
    svg = drawn("analyze-vocabulary", cards("x"))
    assert "class=" not in svg
    colours = re.findall(r'(?:fill|stroke)="([^"]*)"', svg)
    assert {_LIGHT["ink"], _LIGHT["grid"]} < set(colours) <= {*_LIGHT.values(), "none", "transparent"}
