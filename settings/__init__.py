"""The settings of a run: load() composes them, check() says what is wrong with them.

    config = load(["algo=bamdlm", "block_size=4"])
    problems, warnings = check(config)

Types and meanings are in schema.py, values in configs/*.yaml; a test holds the two together.
Nothing here imports torch or lightning unless the machine has a GPU: a wrong command line is
answered at once.
"""

from settings.blame import blamed
from settings.checks import check, examine
from settings.composing import ConfigError, composed_yaml, load
from settings.run_folder import differences, local_folder, run_dir, shaping, write_settings
from settings.schema import Checkpointing, Config
from settings.sweep import Sweep, sweep
