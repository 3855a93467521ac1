"""Colours of the page: text can be read in both schemes, categories stay apart for colour-blind readers."""

import importlib.resources
import itertools
import re

import numpy as np
import pytest

SEEN_BY = {
    "everybody": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
"""What linear light becomes for an eye without one kind of cone.

Source: Machado, Oliveira and Fernandes, 2009, table of severity 1.0.
"""
APART = 8.0
"""Least distance of two categories in CIE Lab; about 2 is just noticeable."""


def schemes():
    style = (
        importlib.resources.files("safety_neurons.report")
        .joinpath("assets", "style.css")
        .read_text(encoding="utf-8")
    )
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    return {
        name: dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", text))
        for name, text in (("light", light), ("dark", dark))
    }


SCHEMES = schemes()


def linear(colour):
    values = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(first, second):
    light, dark = sorted(
        (float(linear(each) @ (0.2126, 0.7152, 0.0722)) for each in (first, second)), reverse=True
    )
    return (light + 0.05) / (dark + 0.05)


def lab(rgb):
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.clip(to_xyz @ np.clip(rgb, 0, 1) / (0.9505, 1.0, 1.089), 1e-6, None))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_text_stands_out_from_what_is_behind_it(scheme):
    colours = SCHEMES[scheme]
    pairs = [(text, behind) for text in ("ink", "soft", "link") for behind in ("paper", "page")]
    pairs += [(tone, f"{tone}-bg") for tone in ("yes", "partly", "no", "open", "fact")]
    pairs += [(f"c{number}", "paper") for number in range(8)]
    pairs += [("on0", f"r{step}") for step in range(5)] + [("on1", f"r{step}") for step in range(5, 9)]
    assert {
        pair: round(found, 2)
        for pair in pairs
        if (found := contrast(*(colours[each] for each in pair))) < 4.5
    } == {}


@pytest.mark.parametrize("eye", SEEN_BY)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_first_six_categories_stay_apart_for_every_eye(scheme, eye):
    seen = [lab(SEEN_BY[eye] @ linear(SCHEMES[scheme][f"c{number}"])) for number in range(6)]
    distances = {
        pair: float(np.linalg.norm(seen[pair[0]] - seen[pair[1]]))
        for pair in itertools.combinations(range(6), 2)
    }
    assert {pair: round(found, 1) for pair, found in distances.items() if found < APART} == {}


@pytest.mark.parametrize("eye", SEEN_BY)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_ramp_grows_for_every_eye(scheme, eye):
    lightness = [lab(SEEN_BY[eye] @ linear(SCHEMES[scheme][f"r{step}"]))[0] for step in range(9)]
    steps = np.diff(lightness) * (1 if scheme == "dark" else -1)
    assert steps.min() > 0.5, np.round(lightness, 1)
