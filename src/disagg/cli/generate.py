"""`disagg generate`: one prompt, streamed."""

import json
from typing import Any

import click

from disagg.cli import options
from disagg.config import Dtype, EngineSpec
from disagg.errors import DisaggError, InputError
from disagg.request import SamplingParams


def _prompt(text: str | None, ids: str | None) -> str | list[int]:
    if (text is None) == (ids is None):
        raise InputError("Give one prompt: a text, or token ids with --ids 1,2,3.")
    if text is not None:
        return text
    assert ids is not None
    try:
        return [int(part) for part in ids.split(",")]
    except ValueError:
        raise InputError(f"--ids {ids!r} is not understood: write whole numbers with commas, as in 1,2,3.") from None


def _check(asked: str | list[int], params: SamplingParams, model: str, max_len: int | None) -> None:
    """Refuse a prompt that the model cannot take while no worker runs."""
    from disagg.cluster import limits
    from disagg.model.load import load_info

    info = load_info(model, max_len)
    engine = limits.resolved(EngineSpec(model=model, max_len=max_len), info.spec.max_len)
    tokens = info.tokenizer.encode(asked) if isinstance(asked, str) else asked
    any_room = info.spec.max_len  # pages: what a worker has is not known yet
    limits.validate(tokens, params, engine, info.spec.vocab_size, any_room)


@click.command(
    epilog="""\b
Examples:
  disagg generate "The capital of France is" --model smollm2
  disagg generate "Why is the sky blue?" --model smollm2 --chat --max-tokens 60
  disagg generate --model seed --ids 1,2,3 --deploy 1P1D --json
"""
)
@click.argument("prompt", required=False)
@click.option("--ids", help="Token ids instead of a text, as in 1,2,3; the model seed needs them.")
@options.deployment(model="smollm2", deploy="1C")
@options.policy
@options.max_len
@click.option("--prefix-caching", is_flag=True, help="Share the pages of prompts that begin alike.")
@click.option("--chat", is_flag=True, help="Put the text into the model's chat template as a user's message.")
@click.option("--max-tokens", default=64, show_default=True, help="Length of the output, in tokens.")
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-p", default=1.0, show_default=True, help="Keep the likeliest tokens of this total probability.")
@click.option("--top-k", default=0, show_default=True, help="Keep this many of the likeliest; 0 or -1 keeps all.")
@click.option("--seed", type=int, help="The same seed and prompt give the same tokens.")
@click.option("--stop", multiple=True, help="End before this text; may be given several times.")
@click.option("--ignore-eos", is_flag=True, help="Go on to --max-tokens.")
@click.option("--json", "as_json", is_flag=True, help="Print output and timing as one JSON line, not streamed.")
def generate(
    prompt: str | None,
    ids: str | None,
    model: str,
    random_weights: bool,
    dtype: Dtype | None,
    deploy: str,
    budget: str | None,
    policy: str,
    chat: bool,
    max_len: int | None,
    prefix_caching: bool,
    as_json: bool,
    stop: tuple[str, ...],
    **sampling: Any,
) -> None:
    """Continue PROMPT on any deployment, streamed to standard output."""
    asked = _prompt(prompt, ids)
    if chat and ids is not None:
        raise InputError("--chat puts a text into the chat template: give a text, or leave --chat out.")
    params = SamplingParams(stop=stop, **sampling)
    engine = {"random_weights": random_weights, "dtype": dtype, "max_len": max_len, "prefix_caching": prefix_caching}
    kind = options.placed(deploy, budget).budget.kind
    EngineSpec.on(kind, model=model, **engine)  # raises what LLM would, before anything is loaded
    if not as_json:
        click.echo(f"Loading {model} ...", err=True)

    from disagg.llm import LLM  # imports torch: slow

    _check(asked, params, model, max_len)
    with LLM(model, deploy, budget, policy, **engine) as llm:
        if chat:
            asked = llm.chat([{"role": "user", "content": str(asked)}])
        if as_json:
            (done,) = llm.generate([asked], params)
            assert done.record is not None
            if done.record.error:
                raise DisaggError(done.record.error)
            answer = {
                "text": done.text,
                "token_ids": done.token_ids,
                "finish_reason": done.finish_reason,
                "ttft_s": done.record.ttft_s,
                "e2e_parts_s": done.record.e2e_parts(),
            }
            click.echo(json.dumps(answer))
            return
        for delta in llm.stream(asked, params):
            click.echo(delta.text, nl=False)
        click.echo()
