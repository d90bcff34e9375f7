"""A conversation as text by a chat template, and where its answers are.

A template is a foreign program (jinja, in the sandbox of transformers), which may run for ever or
make more text than there is memory. So it runs in a process of its own, with bounded memory, and
each conversation has SECONDS. An error in it stops the preparation and names the conversation.

Where an answer is follows from an identity, whatever the template: the text of a conversation and
that with another answer in its place differ in the answer alone. It begins where the text of the
earlier turns ends, with the generation prompt behind it, as it does when the model is asked.
"""

import json
import os
import re
import signal
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import NamedTuple

from data.chat.records import Message
from data.trial import confine
from utils import reason, shown

SECONDS, MEMORY = 30, 1 << 28  # of one conversation; bytes beside those of this process
MOST_CHARACTERS = 1 << 22  # of its text
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Of a tokenizer without a template.
PLAIN = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message.role | capitalize }}: {{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


class Answer(NamedTuple):
    """Places in the text of a conversation, in characters."""

    begin: int  # what the model is to write begins
    content: int  # the content of the message ends
    marked: int  # the template's own mark ends, at `content` where there is none
    end: int  # the turn ends


@dataclass(frozen=True)
class Template:
    """`tokens`: what the template may name, such as bos_token."""

    source: str
    tokens: dict[str, str]

    def write(self, messages: list[Message], prompt: bool = False) -> tuple[str, list]:
        """(text, marks [(begin, end)] of the template). prompt: what the model is asked with."""
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, marks = render_jinja_template(
            conversations=[messages],
            chat_template=self.source,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=MARKS.search(self.source) is not None,
            **self.tokens,
        )
        if len(texts[0]) > MOST_CHARACTERS:
            raise ValueError(f"it makes a text of more than {MOST_CHARACTERS:,} characters")
        return texts[0], marks[0] if marks else []


def answers(template: Template, messages: list[Message]) -> tuple[str, list[Answer]]:
    """The text of a conversation and its answers in their order. ValueError where an answer does
    not stand in the text as it was given."""
    text, marks = template.write(messages)
    found = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            found.append(_answer(template, messages, turn, text, marks))
    return text, found


def _answer(template: Template, messages: list, turn: int, text: str, marks: list) -> Answer:
    first, last = _place(template, messages, turn, text)
    end = len(text)
    if turn + 1 < len(messages):  # its end is what does not depend on the turns behind it
        alone, _ = template.write(messages[: turn + 1])
        _, stop = _place(template, messages[: turn + 1], turn, alone)
        end = last + _common(text[last:], alone[stop:])
    if marks:
        around = [(a, b) for a, b in marks if a <= first and last <= b]
        if not around:
            raise ValueError(f"its generation marks leave out the answer of message {turn + 1}")
        return Answer(around[0][0], last, around[0][1], end)
    asked = _asked(template, messages[:turn])
    begin = len(asked) if asked and text[:first].startswith(asked) else first
    return Answer(begin, last, last, end)


def _asked(template: Template, messages: list[Message]) -> str:
    """What the model is asked with; nothing where the template cannot ask so."""
    from jinja2 import TemplateError

    try:
        return template.write(messages, prompt=True)[0] if messages else ""
    except TemplateError:
        return ""


def _place(template: Template, messages: list, turn: int, text: str) -> tuple[int, int]:
    """Where the content of a turn stands in `text`, the text of the messages."""
    content = messages[turn]["content"]
    ends = {content[0], content[-1], content.strip()[0], content.strip()[-1]}
    other = next(each for each in "01234" if each not in ends)
    swapped, _ = template.write(
        [*messages[:turn], messages[turn] | {"content": other}, *messages[turn + 1 :]]
    )
    first = _common(text, swapped)
    most = min(len(text), len(swapped)) - first
    last = len(text) - min(_common(text[::-1], swapped[::-1]), most)
    if first >= last or text[first:last] not in content:
        raise ValueError(f"it changes the text of message {turn + 1}, an answer")
    return first, last


def _common(a: str, b: str) -> int:
    """The length of what both begin with."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


# ---- the process that renders -------------------------------------------------------------------


@dataclass
class Renderer:
    """`answers` in a process of its own, which begins with the first conversation and ends with
    this process. A process that was forked from this one begins its own."""

    template: Template
    _owner: int | None = None
    _child: int | None = None
    _channel: Connection | None = field(default=None, repr=False)

    def __reduce__(self):
        return Renderer, (self.template,)

    def __del__(self):
        if self._owner == os.getpid():
            self._end()

    def answers(self, messages: list[Message]) -> tuple[str, list[Answer]]:
        """ValueError where the template fails."""
        if self._owner != os.getpid():
            self._begin()
        try:
            self._channel.send_bytes(json.dumps(messages).encode())
            if not self._channel.poll(SECONDS):
                self._end()
                raise ValueError(f"it has not ended after {SECONDS} s")
            said = json.loads(self._channel.recv_bytes())
        except (EOFError, OSError) as error:
            self._end()
            raise ValueError("it ended its process, perhaps for want of memory") from error
        if isinstance(said, str):
            raise ValueError(said)
        text, found = said
        return text, [Answer(*each) for each in found]

    def _begin(self) -> None:
        from transformers.utils import chat_template_utils  # noqa: F401  before the fork

        ours, theirs = Pipe()
        child = os.fork()
        if child == 0:
            try:
                _serve(theirs, self.template)
            finally:
                os._exit(1)
        theirs.close()
        self._owner, self._child, self._channel = os.getpid(), child, ours

    def _end(self) -> None:
        self._channel.close()
        os.kill(self._child, signal.SIGKILL)
        os.waitpid(self._child, 0)
        self._owner = None


def _serve(channel: Connection, template: Template) -> None:
    """Answers until the other process has ended. Holds nothing else that was open there."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    confine(MEMORY)
    os.closerange(3, channel.fileno())
    os.closerange(channel.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    while True:
        try:
            messages = json.loads(channel.recv_bytes())
        except EOFError:
            os._exit(0)
        try:
            said = answers(template, messages)
        except MemoryError:
            said = f"it needs more than {MEMORY >> 20} MiB"
        except BaseException as error:
            said = shown(reason(error))
        channel.send_bytes(json.dumps(said).encode())
