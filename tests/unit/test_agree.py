"""When bench/agree says that a load generator and the server's Records agree."""

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "bench" / "agree"


@pytest.fixture
def compare(monkeypatch):
    """The module of that name of a folder that is no package; others of its names are left alone."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("compare", "relay", "tools")
    kept = {name: sys.modules.pop(name, None) for name in names}
    yield importlib.import_module("compare")
    for name in names:
        sys.modules.pop(name, None)
        if kept[name] is not None:
            sys.modules[name] = kept[name]


def rows(compare, *gaps, ttft=100.0):
    return [compare.Row(ttft, gap, 1000.0, 9, 16 + place) for place, gap in enumerate(gaps)]


def test_a_lost_request_is_no_agreement(compare):
    """Neither a Record too few nor one too many is passed over."""
    two, three = rows(compare, 1.0, 2.0), rows(compare, 1.0, 2.0, 3.0)
    for one, other in ((two, three), (three, two)):
        with pytest.raises(ValueError, match="lost"):
            compare.judge(one, other, dict.fromkeys(compare.TIMES, 1e9))
        with pytest.raises(ValueError, match="lost"):
            compare.resolution([(one, other)])


def test_a_tool_resolves_what_it_resolved_anywhere(compare):
    """The farthest request from the wire on any deployment; each run alone has too few to tell."""
    exact, off = (rows(compare, 1.0, 2.0), rows(compare, 1.0, 2.0)), (rows(compare, 1.0, 2.5), rows(compare, 1.0, 2.0))
    assert compare.resolution([exact])["gap"] == 0
    assert compare.resolution([exact, off])["gap"] == compare.resolution([off, exact])["gap"] == 0.5


def test_repeats_that_differ_resolve_less(compare):
    """Both errors add as independent ones do; what is farther apart than that is named."""
    repeats = [compare.apart(rows(compare, gap), rows(compare, 10.0)) for gap in (10.3, 10.7)]
    spread = compare.spread(repeats)
    assert spread["gap"] == pytest.approx(0.4)
    most = compare.limits(dict.fromkeys(compare.TIMES, 0.3), spread)
    assert most["gap"] == pytest.approx(0.5)
    assert compare.judge(rows(compare, 10.45), rows(compare, 10.0), most)["disagree"] == []
    assert compare.judge(rows(compare, 10.55), rows(compare, 10.0), most)["disagree"] == ["gap"]
    assert compare.judge(rows(compare, 10.0), compare.shifted(rows(compare, 10.0), most), most)["disagree"] == [
        "ttft",
        "gap",
        "e2e",
    ]
