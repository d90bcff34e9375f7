"""A foreign tokenizer is tried in another process first.

What its files make the library do cannot be bounded from within: a regular expression may run for
ever or end in a panic, which is no Exception and prints a page, and a table may ask for more memory
than there is, which ends the process.
"""

import multiprocessing
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from utils import check_files, reason

SECONDS, MEMORY = 30, 5 << 28  # bytes beside those of this process, some 500 MB
# What expressions that never end mostly fail on, and what a text is made of.
TEXTS = (
    "a" * 64 + "!",
    " " * 64 + "!",
    "1" * 64 + "!",
    "ab" * 32,
    "The sea, 12 km off.\n\n",
    "äß 日本 🙂",
)


@contextmanager
def unheard() -> Iterator[None]:
    """transformers writes names out of foreign files to the terminal as they are."""
    from transformers.utils import logging as library

    before, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity(library.CRITICAL)
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(before)
        if bars:
            library.enable_progress_bar()


def tried(folder: Path, **options) -> None:
    """ValueError where AutoTokenizer cannot load the tokenizer in `folder`, with the options with
    which the caller will load it, or where texts cannot be tokenized, within SECONDS and MEMORY."""
    from transformers import AutoTokenizer  # not in the other process, whose memory it would take

    check_files(folder)
    load = partial(AutoTokenizer.from_pretrained, str(folder), **options)
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=_try, args=(load, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        said = ours.recv() if ours.poll(SECONDS) else f"it has not been read after {SECONDS} s"
    except EOFError:
        said = "reading it ended the process, perhaps for want of memory"
    finally:
        process.kill()
        process.join()
        ours.close()
    if said:
        raise ValueError(said)


def confine(memory: int) -> None:
    """This process prints nothing any more, and has so many bytes beside those it has."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _try(load: Callable, answer) -> None:
    confine(MEMORY)
    said = ""
    try:
        tokenizer = load()
        for text in TEXTS:
            with suppress(Exception):  # as where an alphabet lacks a character
                tokenizer([text], add_special_tokens=False)
    except BaseException as error:  # a panic is no Exception
        said = reason(error)[:1000]
    answer.send(said)
    os._exit(0)
