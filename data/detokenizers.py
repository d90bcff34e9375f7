"""Undoing the tokenization that some corpora were published in.

Each set has a list of substitutions, applied in order: a pair of strings replaces literally, a
pair that begins with a compiled pattern replaces by regular expression. The lists reproduce the
recordings in tests/golden/data/detokenizers.json, whose oddities (such as "$ 5" kept by one set and
joined by another) are part of the published perplexities.
"""

import re

from utils import digest

Rule = tuple[str | re.Pattern, str]

# Spaces inside a pair of marks: ( x ) -> (x).
WIKITEXT: tuple[Rule, ...] = (
    ("s '", "s'"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
    (re.compile(r"\(\s*([^)]*?)\s*\)"), r"(\1)"),
    (re.compile(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"),
    (re.compile(r"\{\s*([^}]*?)\s*\}"), r"{\1}"),
    (re.compile(r'"\s*([^"]*?)\s*"'), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)

PTB: tuple[Rule, ...] = (
    (" 's", "'s"),
    ("s ' ", "s' "),
    (" n't", "n't"),
    (" \n ", "\n"),
    ("\\/", "/"),
    *((" N ", " 1 "),) * 10,  # neighbours share a space, so one pass leaves every second
    ("$ 1", "$1"),
    ("# 1", "#1"),
    ("<unk>", "?"),
)

LM1B: tuple[Rule, ...] = (
    ("http : / / ", "http://"),
    ("https : / / ", "https://"),
    (re.compile(r" '(\w+)"), r"'\1"),
    (re.compile(r" (\w+) \. "), r" \1. "),
    (re.compile(r" (\w+) \.$"), r" \1."),
    (" ? ", "? "),
    (re.compile(r" \?$"), "?"),
    (" ! ", "! "),
    (re.compile(r" !$"), "!"),
    *((f" {mark} ", f"{mark} ") for mark in ",:;"),
    (" / ", "/"),
    (re.compile(r'" ([^"]+) "'), r'"\1"'),
    (re.compile(r"' ([^']+) '"), r"'\1'"),
    (re.compile(r"\( ([^()]+) \)"), r"(\1)"),
    (re.compile(r"\[ ([^\[\]]+) \]"), r"[\1]"),
    ("$ ", "$"),
    ("£ ", "£"),
)

LAMBADA: tuple[Rule, ...] = (
    ("“", '"'),
    ("”", '"'),
    (re.compile(r"\A\s*"), "\n"),  # the text without its outer spaces, after one line break
    (re.compile(r"(?<!\A)\s+\Z"), ""),
)

DETOKENIZERS = {
    "wikitext": WIKITEXT,
    "ptb": PTB,
    "lm1b": LM1B,
    "lambada": LAMBADA,
    "scientific_papers": WIKITEXT + LM1B,
}


def detokenize(name: str, text: str) -> str:
    for pattern, replacement in DETOKENIZERS[name]:
        if isinstance(pattern, str):
            text = text.replace(pattern, replacement)
        else:
            text = pattern.sub(replacement, text)
    return text


def fingerprint(name: str) -> str:
    """Changes when a rule changes."""
    rules = [
        (p if isinstance(p, str) else ["pattern", p.pattern], r) for p, r in DETOKENIZERS[name]
    ]
    return digest(repr(rules), 12)
