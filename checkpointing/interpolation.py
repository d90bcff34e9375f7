"""The configuration of a checkpoint with its ${...} filled in, within bounds."""

import functools
import operator
import re

MOST_CHARACTERS = 300_000  # of a configuration; a run's has 3 000
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def resolve(config: dict) -> dict:
    """Interpolations `${a.b}` and `${.b}` filled in; resolvers (`${cwd:}`) stay as written.
    ValueError where the result would be longer than MOST_CHARACTERS."""
    left = MOST_CHARACTERS

    def counted(*texts):
        nonlocal left
        left -= 1 + sum(len(text) for text in texts if isinstance(text, str))
        if left < 0:
            raise ValueError(f"it has more than {MOST_CHARACTERS:,} characters")

    def filled(node, path, chain=()):
        counted(node, *path[-1:])
        if isinstance(node, dict):
            return {key: filled(item, (*path, key), chain) for key, item in node.items()}
        if isinstance(node, list | tuple):
            return [filled(item, (*path, str(i)), chain) for i, item in enumerate(node)]
        if not isinstance(node, str) or path in chain:
            return node
        chain = (*chain, path)

        def target(match):
            name = match[1]
            up = len(name) - len(name.lstrip("."))
            start = path[: len(path) - up] if up else ()
            found = (*start, *name.lstrip(".").split("."))
            return filled(functools.reduce(operator.getitem, found, config), found, chain)

        try:
            whole = _REFERENCE.fullmatch(node)
            if whole:
                return target(whole)
            node = _REFERENCE.sub(lambda m: str(target(m)), node)
        except (KeyError, TypeError):  # it leads nowhere
            return node
        counted(node)
        return node

    return filled(config, ())
