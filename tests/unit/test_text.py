"""Text as it streams: nothing that may still become a stop string is shown, nothing after one, nothing is lost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.text import TextStream


class Pieces:
    """A detokenizer whose token ids are places in a list of pieces; `tail` is what only the flush gives."""

    def __init__(self, pieces, tail=""):
        self._pieces = list(pieces)
        self._tail = tail

    def push(self, ids):
        return "".join(self._pieces[i] for i in ids)

    def flush(self):
        tail, self._tail = self._tail, ""
        return tail


def shown(pieces, stop, tail=""):
    """What each token shows and, last, the final push without tokens; and the stream."""
    stream = TextStream(Pieces(pieces, tail), stop)
    return [stream.push([i]) for i in range(len(pieces))] + [stream.push([], final=True)], stream


def cut(text, stop):
    """The rule: text up to the earliest place where any stop string begins."""
    return text[: min((text.find(one) for one in stop if one in text), default=len(text))]


def test_without_stop_strings_text_passes_at_once():
    """With no stop string nothing is held back, and an empty piece shows nothing."""
    texts, stream = shown(["Hel", "", "lo"], ())

    assert texts == ["Hel", "", "lo", ""]
    assert not stream.stopped


def test_a_stop_string_split_over_tokens_stops():
    """A stop string that comes in several tokens stops with the token that completes it and is not shown at all."""
    texts, stream = shown(["one ", "S", "TO", "P two", " three"], ("STOP",))

    assert texts == ["one ", "", "", "", "", ""]
    assert stream.stopped


def test_a_stop_string_inside_one_token_cuts_it():
    """Text before the stop string in the same token is shown, text after it is not."""
    texts, stream = shown(["one STOP two"], ("STOP",))

    assert texts == ["one ", ""]
    assert stream.stopped


def test_only_what_could_begin_a_stop_string_is_held_back():
    """The end that could begin a stop string waits, no more than that, and is shown once it cannot."""
    texts, stream = shown(["a S", "T", "Op"], ("STOP",))

    assert texts == ["a ", "", "STOp", ""]
    assert not stream.stopped


def test_a_new_beginning_inside_held_text_is_still_held():
    """When held text turns out harmless, its end may begin the stop string anew: 'aab' is found in 'aaab'."""
    texts, stream = shown(["a", "a", "a", "b"], ("aab",))

    assert texts == ["", "", "a", "", ""]
    assert stream.stopped


def test_the_longest_beginning_of_any_stop_string_is_held():
    """With several stop strings the longest undecided end of any of them waits."""
    texts, _ = shown(["xab", "y"], ("bc", "abc"))

    assert texts == ["x", "aby", ""]


def test_the_final_push_shows_everything():
    """At the end nothing is undecided: held text and what the detokenizer kept both come."""
    texts, stream = shown(["end ST"], ("STOP",), tail="\ufffd")

    assert texts == ["end ", "ST\ufffd"]
    assert not stream.stopped


def test_a_stop_string_completed_by_the_flush_stops():
    """A stop string that only the detokenizer's last text completes counts as well."""
    texts, stream = shown(["end ST"], ("STOP",), tail="OP rest")

    assert texts == ["end ", ""]
    assert stream.stopped


def test_the_final_push_may_bring_tokens():
    """The last tokens and the flush may come in one push."""
    stream = TextStream(Pieces(["a", "bS"], "T"), ("STOP",))

    assert [stream.push([0]), stream.push([1], final=True)] == ["a", "bST"]


@pytest.mark.parametrize("stop", [("two", "one"), ("one", "two")])
def test_the_earliest_stop_string_wins(stop):
    """Of several stop strings in the text the first in the text counts, whatever the order they were given in."""
    texts, stream = shown(["zero one two"], stop)

    assert texts == ["zero ", ""]
    assert stream.stopped


def test_nothing_follows_a_stop():
    """After a stop neither tokens nor the flush show anything, and the stream stays stopped."""
    stream = TextStream(Pieces(["a.", "b"], "tail"), (".",))

    assert [stream.push([0]), stream.push([1]), stream.push([1], final=True)] == ["a", "", ""]
    assert stream.stopped


def test_a_stop_string_given_in_one_batch_of_tokens():
    """Several tokens in one push are one piece of text."""
    stream = TextStream(Pieces(["a", "b", "c"]), ("bc",))

    assert stream.push([0, 1, 2]) == "a"
    assert stream.stopped


TEXTS = st.lists(st.text("ab", max_size=4), max_size=12)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3, unique=True)


def none_inside_another(stop):
    """No stop string lies strictly inside another: then the one that begins first is also complete first."""
    return not any(inner in outer[1:-1] for outer in stop for inner in stop)


@settings(deadline=None, max_examples=400)
@given(pieces=TEXTS, tail=st.text("ab", max_size=2), stop=STOPS.filter(none_inside_another))
def test_any_split_gives_the_text_cut_at_the_earliest_stop(pieces, tail, stop):
    """However a text is split into pieces, what is shown in all is the text up to the earliest stop string."""
    text = "".join(pieces) + tail
    texts, stream = shown(pieces, stop, tail)

    assert "".join(texts) == cut(text, stop)
    assert stream.stopped == any(one in text for one in stop)


def test_a_stop_string_inside_another_is_cut_alike_however_split():
    """The same text shows the same, in one piece or in two, also when a stop string lies inside another."""
    whole, _ = shown(["abcd"], ("abcd", "c"))
    split, _ = shown(["abc", "d"], ("abcd", "c"))

    assert "".join(whole) == "".join(split)
