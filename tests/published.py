"""The `python main.py` lines of the published README, as a shell would pass them."""

import re
import shlex
from pathlib import Path

PAGE = Path(__file__).parent / "published_commands.md"


def commands() -> dict[str, list[str]]:
    """{mode and number: arguments of main.py}, shell variables put in, redirections left out."""
    found = {}
    for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.S):
        variables = dict(re.findall(r"^(\w+)=(\S+)", block, re.M))
        line = block[block.index("python -u main.py") :].replace("\\\n", " ")
        line = re.sub(r"\$\{?(\w+)\}?", lambda match, v=variables: v[match[1]], line)
        arguments = shlex.split(line.partition(">")[0])[3:]
        mode = next(word for word in arguments if word.startswith("mode=")).partition("=")[2]
        found[f"{mode}-{len(found)}"] = arguments
    return found
