"""What must hold between settings: check() says in one sentence each what stops a run.

Each rule is a generator of sentences that name the setting as typed, its value and the way out.
"""

import copy
import re
from collections.abc import Callable, Collection, Iterable, Iterator

from settings.blame import blamed
from settings.composing import read
from settings.keys import LEAVES, get, put
from settings.overrides import limit_problem, parse
from settings.rules import amounts, data, files, machine, network, noise, sampling, training
from settings.rules.effects import without_effect
from settings.schema import Config
from settings.sweep import sweep
from utils import CIRCUMSTANCES

Rule = Callable[[Config], Iterator[str]]


def examine(
    overrides: list[str], rules: Iterable[Rule] = ()
) -> tuple[Config | None, list[str], list[str]]:
    """The settings of a command line, everything that is wrong with them, and warnings. The Config
    is None where it cannot be made; never raises ConfigError. rules: as in check."""
    parsed = parse(overrides)
    config, problems, notes = read(parsed)
    if config is None:
        return None, problems, notes
    more, warnings = check(config, {key for key, _ in parsed.values}, rules)
    # what is refused already has its default here
    begun = {re.split(r"[=: ]", problem.lstrip("'\""))[0] for problem in problems}
    return config, problems + _without(begun & LEAVES.keys(), more), notes + warnings


def check(
    config: Config, typed: Collection[str] = (), rules: Iterable[Rule] = ()
) -> tuple[list[str], list[str]]:
    """(problems, warnings): why the run cannot start, and what is set without effect.

    typed: the settings that stand on the command line. rules: beside RULES. Of a sweep, each point
    is checked like a run.
    """
    if config.mode != "sample_eval" or config.sampling.sweep is None:
        return _check_one(config, typed, rules)
    made = sweep(config)
    found = [_check_one(each.config, {*typed, *each.keys}, rules) for each in made.points]
    problems, warnings = (_shared([pair[part] for pair in found]) for part in (0, 1))
    for point, (own, _) in zip(made.points, found, strict=True):
        if own := [problem for problem in own if problem not in problems]:
            made.problems.append(f"sampling.sweep, point {point.text}: {'; '.join(own)}")
    return made.problems + problems, warnings


def _shared(sentences: list[list[str]]) -> list[str]:
    """Those that are in every list."""
    first = sentences[0] if sentences else ()
    return [each for each in first if all(each in others for others in sentences)]


def _check_one(
    config: Config, typed: Collection[str], rules: Iterable[Rule]
) -> tuple[list[str], list[str]]:
    """check() of a run without a sweep."""
    outside = {key: problem for key in LEAVES if (problem := limit_problem(key, get(config, key)))}
    # The rules between settings go on with stand-ins; what they say about those is not repeated.
    possible = copy.deepcopy(config)
    for key in outside:
        limit, value = LEAVES[key].limit, get(config, key)
        put(possible, key, type(value)() if limit is None else limit.stand_in)
    said = [problem for rule in (*RULES, *rules) for problem in _said(rule, possible)]
    # what other settings take over from one that is typed is said of that one
    asked = {str(get(config, key)) for key in outside if key in typed}
    own = [
        key
        for key in outside
        if key in typed or not any(value in str(get(config, key)) for value in asked)
    ]
    problems = [*(outside[key] for key in own), *_without(outside, said)]
    return problems, _without(outside, without_effect(possible, typed))


def _said(rule: Rule, config: Config) -> Iterator[str]:
    """The sentences of a rule; what it cannot look at is one of them."""
    try:
        yield from rule(config)
    except CIRCUMSTANCES as error:
        yield blamed(error, config)


def _without(keys: Iterable[str], sentences: Iterable[str]) -> list[str]:
    """The sentences that are about none of these settings, each once."""
    found = re.compile("|".join(rf"\b{re.escape(key)}\b" for key in keys) or "(?!)")
    return [sentence for sentence in dict.fromkeys(sentences) if not found.search(sentence)]


RULES = (
    amounts.amounts,
    network.network,
    network.algorithm,
    noise.clipping,
    noise.counts,
    noise.block_sizes,
    noise.adaptation,
    training.batches,
    machine.machine,
    machine.packages,
    training.optimizer,
    training.masters,
    training.adapters,
    training.optimization,
    training.saving,
    data.data,
    sampling.sampling,
    sampling.demo,
    files.checkpoints,
    files.corpora,
    data.chats,
    files.results,
)
