"""Conversations to texts, in a process of their own: a model's chat template is a program of strangers.

Whatever it does, short conversations or long, it holds up nothing but chats, has the time and the memory that it is
given, and can be killed. It works at the priority of the server, for an answer waits for it.
"""

import msgspec

from disagg.errors import RequestError
from disagg.model.tokenizer import render
from disagg.server.text_process import Done, Job, serve

_LONGEST = 16 << 20  # characters that a template may write


def main() -> None:
    """Entry point of the process."""
    serve(_load, work)


def _load(template: str) -> str:
    import transformers.utils.chat_template_utils  # noqa: F401 - takes a second, which is not the first request's

    return template


def work(template: str, job: Job) -> Done:
    """The text of a conversation, both as JSON."""
    try:
        text = render(template, msgspec.json.decode(job.text))
    except RequestError as error:
        return Done(error=str(error))
    if len(text) > _LONGEST:
        return Done(error=f"The model's chat template refuses these messages: it makes {len(text)} characters of them.")
    return Done(msgspec.json.encode(text))


if __name__ == "__main__":
    main()
