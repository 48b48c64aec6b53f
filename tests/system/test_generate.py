"""`disagg generate`: what it prints and what it gives as JSON are the same."""

import json
from contextlib import nullcontext

import pytest

from disagg.cli.main import run
from disagg.llm import LLM

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def test_json_has_the_text_that_is_printed_without_it(capsys, monkeypatch):
    """Also of a model without a tokenizer, whose text is its token ids, each followed by a space."""
    asked = ("generate", "--model", "seed", "--ids", "1,2,3", "--max-tokens", "4", "--top-k", "-1")
    with LLM("seed", budget="cpu:1") as llm:  # one deployment for both
        monkeypatch.setattr("disagg.llm.LLM", lambda *args, **options: nullcontext(llm))
        assert run(asked) == run((*asked, "--json")) == 0
    printed, answer = capsys.readouterr().out.splitlines()
    assert json.loads(answer)["text"] == printed == "".join(f"{token} " for token in json.loads(answer)["token_ids"])
