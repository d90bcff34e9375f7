"""Conversations in files of the user: .jsonl (one a line) and .parquet (one a row).

A record has `messages`, a list of {role, content}, or `prompt` and `response`. Files with other
names say so in data.chat_fields. Here a record is checked and becomes the text of a Piece: JSON of
its place and its messages, from which data/chat/encoding.py makes ids.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from data.readers import Piece, Record, bounded, check_pairs
from data.tables import RECORDS, Files, Part

ROLES = ("system", "developer", "user", "assistant", "tool")
# What data.chat_fields may give another name (settings/tables.py reads this).
NAMES = {
    "messages": "of a record",
    "prompt": "of a record",
    "response": "of a record",
    "role": "of a message",
    "content": "of a message",
    "system": "a role",
    "user": "a role",
    "assistant": "a role",
}
CALLS = ("tool_calls", "function_call")  # of a message; what a template makes of them is not scored

Message = dict[str, str]  # role and content


@dataclass(frozen=True)
class Chats(Files):
    """A source like Files, of conversations."""

    fields: dict[str, str] = field(default_factory=dict)  # data.chat_fields

    def parts(self, split, revision, cache, *, download=True) -> list[Part]:
        found = super().parts(split, revision, cache, download=download)
        for part in found:
            if Path(part.place).suffix not in RECORDS:
                raise ValueError(
                    f"data: {part.place} is no file of conversations: data.format=chat reads"
                    f" {' and '.join(RECORDS)}"
                )
        return [
            replace(part, read=partial(pieces, Path(part.place), self.fields)) for part in found
        ]


def pieces(path: Path, fields: dict[str, str], column: str) -> Iterator[Piece]:
    """Each conversation of a file; `column` has no meaning here."""
    return bounded(_pieces(path, fields), path.stat().st_size, f"data: {path}")


def _pieces(path: Path, fields: dict[str, str]) -> Iterator[Piece]:
    names = {name: name for name in NAMES} | fields
    columns = [names[name] for name in ("messages", "prompt", "response")]
    for record in RECORDS[path.suffix](path, columns):
        yield Piece(json.dumps([record.place, conversation(record, names)]), True, record.done)


def read_back(text: str) -> tuple[str, list[Message]]:
    """(place, messages) of a piece."""
    place, messages = json.loads(text)
    return place, messages


def conversation(record: Record, names: dict[str, str]) -> list[Message]:
    """The messages of a record; ValueError where they are none that could be trained on."""
    given, place = record.fields, record.place
    turns, prompt, response = (names[name] for name in ("messages", "prompt", "response"))
    if given.get(turns) is not None:
        messages = [*_messages(given[turns], names, f"{place}: {turns}")]
    elif given.get(prompt) is not None and given.get(response) is not None:
        messages = [
            {"role": role, "content": _text(given[name], f"{place}: {name}")}
            for role, name in (("user", prompt), ("assistant", response))
        ]
    else:
        raise ValueError(
            f"{place} has neither {turns!r} nor {prompt!r} and {response!r}, only"
            f" {', '.join(map(repr, given)) or 'no field'}; name them in data.chat_fields"
        )
    answers = [each["content"] for each in messages if each["role"] == "assistant"]
    if not answers:
        raise ValueError(f"{place} has no turn of the assistant, so nothing to learn")
    if not all(map(str.strip, answers)):
        raise ValueError(f"{place} has an empty answer; give it text, or take the line out")
    return messages


def _messages(given: object, names: dict[str, str], place: str) -> Iterator[Message]:
    if not isinstance(given, list) or not given:
        raise ValueError(f"{place} is {_kind(given)}, not a list of messages")
    roles = {role: role for role in ROLES}
    roles |= {names[role]: role for role, of in NAMES.items() if of == "a role"}
    for number, message in enumerate(given, 1):
        where = f"{place}, message {number}"
        if not isinstance(message, dict):
            raise ValueError(f"{where} is {_kind(message)}, not an object of role and content")
        for key in (names["role"], names["content"]):
            if key not in message:
                raise ValueError(
                    f"{where} has no {key!r}, only {', '.join(map(repr, message)) or 'no field'};"
                    " name it in data.chat_fields"
                )
        role = message[names["role"]]
        if not isinstance(role, str) or role not in roles:
            raise ValueError(
                f"{where}: the role {role!r} is none of {', '.join(roles)}; a user or an assistant"
                " of another name is named in data.chat_fields, such as {user: human}"
            )
        if asked := [key for key in CALLS if message.get(key)]:
            raise ValueError(f"{where} has {asked[0]}: calls of tools cannot be trained on here")
        content = _text(message[names["content"]], f"{where}: {names['content']}")
        yield {"role": roles[role], "content": content}


def _text(content: object, place: str) -> str:
    """Of a content, which may be a list of text parts."""
    if isinstance(content, list):
        content = "".join(_part(part, place) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{place} is {_kind(content)}, not text")
    check_pairs(content, place)
    return content


def _part(part: object, place: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = repr(part.get("type")) if isinstance(part, dict) else _kind(part)
    raise ValueError(f"{place} has a part of type {kind}; only text can be read")


def _kind(value: object) -> str:
    known = {type(None): "null", list: "a list", dict: "an object", str: "text"}
    if value == []:
        return "an empty list"
    return known.get(type(value), type(value).__name__)
