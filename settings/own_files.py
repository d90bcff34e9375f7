"""--config-dir: a folder with files of the user's own beside those of configs/."""

from pathlib import Path

from settings.keys import choices, groups
from settings.limits import unfit

CONFIG_DIR = ("--config-dir", "-cd")
OWN_FILE = "a file of your own is DIR/experiment/NAME.yaml: --config-dir DIR experiment=NAME"


def own_folder(overrides: list[str]) -> tuple[list[str], Path | None, list[str]]:
    """The words without --config-dir DIR, DIR as an absolute path if it can serve, and what is
    wrong with it."""
    words, given, left = [], [], iter(overrides)
    for word in left:
        option, equals, text = word.partition("=")
        if option in CONFIG_DIR:
            given.append(text if equals else next(left, ""))
        else:
            words.append(word)
    if not given:
        return words, None, []
    try:
        problem = _folder_problem(given)
    except OSError as error:
        problem = f"--config-dir={given[0]}: {error.strerror}"
    return words, None if problem else Path(given[0]).absolute(), [problem] * bool(problem)


def _folder_problem(given: list[str]) -> str | None:
    """The sentence about what stands behind --config-dir, or None."""
    named, known = f"--config-dir={given[0]}", groups()
    if len(given) > 1:
        return f"--config-dir is given {len(given)} times: name one folder"
    if not given[0]:
        return f"--config-dir names no folder; {OWN_FILE}"
    if end := unfit(given[0]):
        return f"{named} {end}"
    folder = Path(given[0])
    if not folder.is_dir():
        return f"{named} {'is no folder' if folder.exists() else 'does not exist'}; {OWN_FILE}"
    inside = [group for group in known if (folder / group).is_dir()]
    if not inside:
        return f"{named} has no folder of a group ({', '.join(known)}); {OWN_FILE}"
    for group in inside:
        if twice := set(choices(group)) & {path.stem for path in (folder / group).glob("*.yaml")}:
            name = min(twice)
            return f"{named}: {group}={name} is a file of configs/ too: rename {group}/{name}.yaml"
    return None
