"""The words of a command line: which settings and groups exist, and what is wrong with an override.

Every problem becomes one sentence; nothing here raises for what a user got wrong.
"""

import difflib
import re
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from settings.keys import LEAVES, SCHEMA, choices, groups

# Keys of the authors' configs that nothing in their code read.
DEAD = {
    "model.tie_word_embeddings",
    "model.scale_by_sigma",
    "model.type",
    "algo.dropout",
    "algo.causal_attention",
    "training.coeff_clip",
    "sampling.noise_removal",
    "noise.sigma_min",
    "noise.sigma_max",
    "diffusion",
    "eval.compute_perplexity_on_sanity",
    "eval.generate_samples",
}
# Keys that people try, and what does the same here.
INSTEAD = {
    "algo.block_size": "block_size",
    "model.name": "the group, model=small",
    "trainer.max_epochs": "trainer.max_steps: the training data are one endless stream",
    "hydra.run.dir": "checkpointing.save_dir",
    "sampling.top_p": "sampling.nucleus_p",
    "tokenizer": "data.tokenizer_name_or_path",
}
PROSE = {"sampling.prompt", "wandb.notes", "data.tokenizer_name_or_path"}


def nearest(word: str, candidates) -> str:
    """' Did you mean X?', or '' when nothing is near."""
    found = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return f" Did you mean {found[0]}?" if found else ""


def unknown_key(key: str) -> str:
    """The sentence about a key that is not in the schema."""
    if key in DEAD:
        return f"{key} had no effect in the original code and does not exist here: leave it out"
    if key in INSTEAD:
        return f"{key} does not exist: use {INSTEAD[key]}"
    if key.startswith("hydra."):
        return f"{key} does not exist: the run folder is checkpointing.save_dir"
    same_name = [known for known in LEAVES if known.split(".")[-1] == key.split(".")[-1]]
    if same_name and difflib.SequenceMatcher(None, key, same_name[0]).ratio() < 0.95:
        return f"{key} is not a setting. Did you mean {' or '.join(same_name)}?"
    hint = nearest(key, [*SCHEMA, *groups()])
    return f"{key} is not a setting.{hint or ' python main.py --help lists them all'}"


def _group_problem(group: str, value) -> str | None:
    chosen = value if isinstance(value, list) else [value]
    if group == "experiment" and value is None:
        return None
    if isinstance(value, list) and group != "callbacks":
        return f"{group}={value} must be one of: {', '.join(choices(group))}"
    for choice in chosen:
        if str(choice) not in choices(group):
            hint = nearest(str(choice), choices(group))
            listed = ", ".join(choices(group))
            return f"{group}={choice} does not exist.{hint} Choices: {listed}"
    return None


@dataclass
class ParsedOverrides:
    """A command line in parts: what Hydra gets, and what cannot be read."""

    groups: dict[str, str]  # {group: override}
    values: list[tuple[str, object]]  # (key, value), in the order given
    problems: list[str]

    def without(self, keys) -> "ParsedOverrides":
        def concerned(key):
            return any(f"{bad}.".startswith(f"{key}.") for bad in keys)

        values = [entry for entry in self.values if not concerned(entry[0])]
        return ParsedOverrides(self.groups, values, self.problems)


@dataclass
class Word:
    """One argument that has the form of an override."""

    argument: str
    key: str
    value: object
    text: str  # the value as typed


def _prose(argument: str) -> Word | None:
    """Settings that hold prose or an alphabet are taken as they stand, commas and brackets too."""
    key, _, text = argument.lstrip("+").partition("=")
    if key not in PROSE or text == "null":
        return None
    quoted = re.fullmatch(r"'.*'|\".*\"", text, re.S)
    return Word(argument, key, text[1:-1] if quoted else text, text)


def _read(argument: str, parser: OverridesParser) -> Word | str:
    """The word, or the sentence about what is wrong with its form."""
    if argument.startswith("-"):
        return f"{argument} is not an option: settings are key=value, see python main.py --help"
    if argument.startswith("="):
        return f"{argument!r} names no setting: write key=value, without spaces"
    if "=" not in argument and not argument.startswith("~"):
        return f"{argument!r} is not key=value"
    if prose := _prose(argument):
        return prose
    try:
        override = parser.parse_override(argument)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        return f"{argument!r} cannot be read ({reason}): put quotes round special characters"
    if override.is_sweep_override():
        return f"{argument!r} names several values: give one, or put quotes round a comma"
    if override.package is not None:
        return f"{argument!r}: packages (@) are not offered"
    if override.is_delete():
        return Word(argument, override.key_or_group, None, "null")
    text = override.input_line.partition("=")[2]
    return Word(argument, override.key_or_group, override.value(), text)


def _value_problem(word: Word, nulled: set[str]) -> str | None:
    section = word.key.partition(".")[0]
    if word.key not in SCHEMA:
        return unknown_key(word.key)
    if section in nulled and word.key != section:
        return f"{word.argument} comes after {section}=null: leave one of them out"
    return None


def parse(overrides: list[str]) -> ParsedOverrides:
    """Sorts a command line into groups and values; a leading + or ++ makes no difference."""
    parser, known_groups = OverridesParser.create(), groups()
    parsed, nulled = ParsedOverrides({}, [], []), set()
    for argument in overrides:
        word = _read(argument, parser)
        if isinstance(word, str):
            parsed.problems.append(word)
            continue
        group = word.key in known_groups and not isinstance(word.value, dict)
        problem = _group_problem(word.key, word.value) if group else _value_problem(word, nulled)
        if problem is not None:
            parsed.problems.append(problem)
        elif group and word.value is None:
            parsed.groups.pop(word.key, None)  # experiment=null takes an earlier choice back
        elif group:
            parsed.groups[word.key] = f"{word.key}={word.text}"
        else:
            parsed.values.append((word.key, word.value))
            if word.key not in LEAVES:
                (nulled.add if word.value is None else nulled.discard)(word.key)
    return parsed
