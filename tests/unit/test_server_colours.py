"""The page's colours: text can be read, and phases are told apart, also by people who see colours otherwise."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

import disagg

STYLE = (Path(disagg.__file__).parent / "server" / "static" / "style.css").read_text()
LIGHT, DARK = (dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", STYLE, re.S))
PHASES = ("client", "router", "queue", "prefill", "handoff_wait", "handoff_copy", "admission", "decode")
PAGES = ("running", "holding", "sending", "quiescing", "cached", "free")
EYES = {  # linear RGB as seen with full protanopia, deuteranopia, tritanopia: Machado et al. 2009, table 1
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])  # sRGB, D65


def linear(colour):
    value = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    """Of WCAG 2."""
    darker, lighter = sorted(float(XYZ[1] @ linear(colour)) for colour in (one, other))
    return (lighter + 0.05) / (darker + 0.05)


def lab(rgb):
    x, y, z = np.cbrt(XYZ @ np.clip(rgb, 0, 1) / [0.95047, 1, 1.08883])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("colours", [LIGHT, {**LIGHT, **DARK}], ids=["light", "dark"])
def test_text_can_be_read(colours):
    """WCAG AA, on the page and on a card; buttons are the other way round."""
    for ground, ink in itertools.product(("ground", "card"), ("ink", "soft", "accent", "good", "bad", "warn")):
        assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    for line in ("median", "tail"):
        assert contrast(colours[line], colours["card"]) >= 3, line


@pytest.mark.parametrize("eyes", EYES)
@pytest.mark.parametrize("colours", [LIGHT, {**LIGHT, **DARK}], ids=["light", "dark"])
def test_phases_are_told_apart(colours, eyes):
    """Every pair differs by ten times what can just be seen (CIE76), whatever eyes one has; pages by six times."""
    for names, least in ((PHASES, 23), (PAGES, 14)):
        seen = {name: lab(np.array(EYES[eyes]) @ linear(colours[name])) for name in names}
        for one, other in itertools.combinations(names, 2):
            assert np.linalg.norm(seen[one] - seen[other]) >= least, (one, other)
