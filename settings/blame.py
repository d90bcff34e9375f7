"""Errors of the work, told as problems of the setting that they are about."""

import os
import re

from settings.keys import LEAVES, get
from settings.schema import Config
from utils import reason


def blamed(error: Exception, config: Config) -> str:
    """The reason of an error. One about a file or a URL begins with the setting that names it."""
    why, path = reason(error), str(getattr(error, "filename", None) or "")
    values = {key: value for key in LEAVES if isinstance(value := get(config, key), str) and value}
    if path:
        found = {key: len(v) for key, v in values.items() if _is_in(path, v)}
        found = found or {key: len(v) for key, v in values.items() if v in path or path in v}
    else:
        found = {key: len(v) for key, v in values.items() if os.path.lexists(v) and _is_in(why, v)}
        found = found or {key: -len(v) for key, v in values.items() if _is_about(why, v)}
    if not found or any(re.search(rf"\b{re.escape(key)}\b", why) for key in LEAVES):
        return why
    key = max(found, key=found.get)
    place = values[key]
    why = why.removeprefix("data: ").removeprefix(f"{place}: ").removeprefix(f"{place}, ")
    return f"{key}={place}: {why}"


def _is_in(text: str, place: str) -> bool:
    """Whether a path, or a text that begins with one, is this place or inside of it."""
    text = text.removeprefix("data: ")
    names = (place, os.path.expanduser(place), os.path.abspath(place))
    ends = ("", "/", ".", ":", " ", ",")
    return any(text.startswith(name) and text[len(name) :][:1] in ends for name in names)


def _is_about(text: str, url: str) -> bool:
    """Whether a text names the protocol or the host of a URL."""
    protocol, is_url, place = url.partition("://")
    host = re.split("[:/]", place)[0]
    return bool(is_url) and (text.endswith(f" {protocol}") or (bool(host) and host in text))
