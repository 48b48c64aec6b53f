import string

import pytest

from disagg.measure import sentences
from disagg.measure.sentences import say, sentence
from disagg.measure.stats import Interval
from disagg.measure.verdict import METRICS, explain, judge


@pytest.mark.parametrize(
    ("metric", "low", "high", "kind"),
    [
        ("ttft_s", -0.2, -0.1, "better"),
        ("ttft_s", 0.1, 0.2, "worse"),
        ("ttft_s", 0.001, 0.002, "worse"),
        ("throughput", 0.1, 0.2, "better"),
        ("goodput", -0.2, -0.1, "worse"),
        ("ttft_s", -0.04, 0.05, "equal"),
        ("ttft_s", -0.04, 0.06, "open"),
        ("ttft_s", 0.0, 0.06, "open"),
    ],
)
def test_kinds(metric, low, high, kind):
    """Zero outside: better or worse, by the metric's direction. Zero inside: equal within 5 %, else open."""
    assert judge(metric, "2C", "1P1D", Interval((low + high) / 2, low, high, 5, 0.05)).kind == kind


def test_equal_states_its_bound():
    """The larger end of the interval, not the margin."""
    verdict = judge("ttft_s", "2C", "1P1D", Interval(-0.01, -0.04, 0.02, 5, 0.02))
    assert verdict.bound == 0.04
    assert sentence(verdict) == (
        "No difference in mean time to first token larger than 4.0 % between 1P1D and 2C: -1.0 % "
        "(95 % interval -4.0 % to +2.0 %, 5 paired repeats)."
    )


def test_open_says_how_many_more():
    """Not resolved, and what would resolve it."""
    verdict = judge("e2e_s", "2C", "1P1D", Interval(0.1, -0.15, 0.35, 5, 0.2))
    assert (verdict.kind, verdict.n_more) == ("open", 13)
    assert "about 13 more repeats needed" in sentence(verdict)
    assert "约需再重复 13 次" in sentence(verdict, "zh")


def test_one_repeat_resolves_nothing():
    """Without an interval there is no verdict, whatever the estimate."""
    verdict = judge("e2e_s", "2C", "1P1D", Interval(0.5, None, None, 1))
    assert verdict.kind == "open"
    assert "allows no interval" in sentence(verdict)


def test_goodput_is_in_points():
    """A share's difference is not a relative one."""
    verdict = judge("goodput", "2C", "1P1D", Interval(-0.12, -0.2, -0.04, 5, 0.05))
    assert sentence(verdict) == (
        "1P1D is worse than 2C: goodput -12.0 points (95 % interval -20.0 points to -4.0 points, 5 paired repeats)."
    )


@pytest.mark.parametrize(
    ("low", "high", "handoff", "kind"),
    [
        (0.011, 0.283, 0.010, "unexplained"),  # +14.7 %, of which +1.0 %
        (0.09, 0.11, 0.049, "unexplained"),  # just less than half
        (0.09, 0.11, 0.051, "worse"),  # just more
        (0.09, 0.11, 0.3, "worse"),  # the rest is a gain: the split costs no less for it
        (-0.11, -0.09, 0.01, "unexplained"),  # a hand-off makes nothing faster
        (-0.01, 0.11, 0.01, "open"),
        (-0.01, 0.02, 0.01, "equal"),
    ],
)
def test_what_the_hand_off_does_not_explain(low, high, handoff, kind):
    """One at a time: a resolved difference of which the hand-off is less than half is neither better nor worse."""
    verdict = judge("e2e_s", "2C", "1P1D", Interval((low + high) / 2, low, high, 3, 0.05))
    assert explain(verdict, handoff).kind == kind


def test_unexplained_says_how_much_the_hand_off_accounts_for():
    """And that the rest is not the split's, in both languages; it is not called worse."""
    verdict = explain(judge("e2e_s", "2C", "1P1D", Interval(0.139, 0.011, 0.283, 3, 0.05)), 0.0101)
    assert sentence(verdict) == (
        "Not explained by the split: mean end-to-end latency of 1P1D against 2C +13.9 % (95 % interval +1.1 % to "
        "+28.3 %, 3 paired repeats), of which the hand-off accounts for +1.0 %. The rest is noise of the machine or "
        "another cause."
    )
    chinese = sentence(verdict, "zh")
    assert "无法用分离解释" in chinese
    assert "KV 传输只占 +1.0 %" in chinese
    assert "劣于" not in chinese


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_has_words(metric, lang):
    """In both languages, for every kind of verdict."""
    for low, high in ((-0.2, -0.1), (0.1, 0.2), (-0.01, 0.01), (-0.5, 0.5)):
        text = sentence(judge(metric, "2C", "1P1D", Interval((low + high) / 2, low, high, 5, 0.2)), lang)
        assert "2C" in text
        assert "{" not in text


def test_both_languages_say_the_same():
    """Same keys, and every sentence needs the same values in both."""
    names = [
        {
            key: {field for _, field, _, _ in string.Formatter().parse(text) if field}
            for key, text in sentences.SENTENCES[lang].items()
        }
        for lang in ("en", "zh")
    ]
    assert names[0] == names[1]
    assert say("drift", {"arm": "2C", "change": 0.3, "limit": 0.25}).startswith(
        "2C drifted: the same requests took +30%"
    )
