"""What the command line says at once: help where nothing is asked, and what it refuses before anything is loaded."""

import pytest

from disagg.cli.main import run
from disagg.errors import RequestError
from disagg.request import SamplingParams


def said(capsys, *args):
    """Exit code, output and error output."""
    code = run(args)
    return code, *capsys.readouterr()


def test_nothing_asked_is_answered_with_help(capsys):
    """The help itself, not one long error."""
    code, out, err = said(capsys)
    assert (code, out) == (2, "")
    assert err == said(capsys, "--help")[1]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("generate", "a", "b"), "(b). See disagg generate --help."),
        (("generate", "a", "--nonsense"), "? See disagg generate --help."),
        (("generate", "a", "--deploy", "3X"), "'3X' is not understood"),
        (("generate", "a", "--budget", "much"), "'much' is not understood"),
        (("generate", "a", "--deploy", "1C", "--budget", "cpu:99999"), "this machine lends"),
        (("generate", "a", "--dtype", "fp8", "--budget", "cpu:1"), "use float32 or float16 on cores."),
        (("generate", "a", "--top-k", "-2"), "0 or -1"),
    ],
)
def test_what_is_refused_is_one_line(capsys, args, words):
    """Whole sentences, exit code 2, and no word of loading before it."""
    code, out, err = said(capsys, *args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert err.endswith(".\n")


def test_top_k_is_off_in_two_ways():
    """0, and -1 as in vLLM, which is the same to all that look at it; what is refused is told both."""
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0) == SamplingParams()
    for value in (-2, 2**31):
        with pytest.raises(RequestError, match=r"between 1 and 2\*\*31 - 1, or be 0 or -1, which keep all tokens"):
            SamplingParams(top_k=value)
