"""A model's chat template is a program of strangers: it can read the messages, and nothing else."""

import logging
from types import SimpleNamespace

import pytest
from starlette.testclient import TestClient
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from disagg.model.tokenizer import HuggingFaceTokenizer
from disagg.server import texts
from disagg.server.app import create_app
from disagg.server.guards import Keys
from disagg.server.metrics import Metrics
from disagg.server.state import Settings, State

ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch FILE').read() }}",
    "{{ lipsum.__globals__['os'].system('touch FILE') }}",
    "{{ messages.append.__self__.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('FILE', 'w') }}",
    "{{ ('{0.__class__.__init__.__globals__}').format(raise_exception) }}",
    "{% set _ = messages.append({'role': 'user'}) %}",
    "{% include '/etc/passwd' %}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
)


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_cannot_escape(template, tmp_path, caplog, monkeypatch):
    """Whatever it tries is refused with a 400, and nothing of this process is in the answer; nor does it take long."""
    file = tmp_path / "escaped"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=library, chat_template=template.replace("FILE", str(file)))
    tokenizer = HuggingFaceTokenizer(wrapped)
    info = SimpleNamespace(tokenizer=tokenizer, spec=SimpleNamespace(vocab_size=256))
    cluster = SimpleNamespace(info=info, engine=SimpleNamespace(max_len=99, page_size=1), num_pages=99)
    front = SimpleNamespace(cluster=lambda: cluster, workers=[], note=lambda records, exchange: None)
    state = State(Settings(model="m"), front, Metrics(lambda: None))
    client = TestClient(create_app(state, Keys([]), frozenset()))
    body = {"messages": [{"role": "user", "content": "a"}]}
    monkeypatch.setattr(texts, "CHAT_S", 2.0)
    with client, caplog.at_level(logging.INFO):
        answer = client.post("/v1/chat/completions", json=body)
        client.portal.call(state.close)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert "template refuses" in message or "tokens and this server" in message or "took longer" in message
    assert not file.exists()
    assert "builtins" not in message + caplog.text
