"""Files and folders that settings name: do they exist, and are they of a kind that can be read?"""

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from settings.defaults import EVALUATES, has_user_cache, user_cache
from settings.overrides import nearest
from settings.run_folder import local_folder
from settings.schema import Config
from settings.tables import known_corpora
from utils import ALPHABET, matching_files, read_json, visible_files

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
WEIGHT_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors", ".gguf")
HF_DIT = "algo.backbone=hf_dit needs an exported folder or a hub id"
FILES_MADE = ("sampling.logdir", "sampling.trajectory")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*(@[\w./-]+)?)?")


def is_hub_id(name: str) -> bool:
    """Whether `org/name` is a model of the hub rather than a path: nothing local looks like it."""
    organisation, _, _ = name.partition("/")
    return (
        HUB_ID.fullmatch(name) is not None
        and "/" in name
        and not name.endswith(WEIGHT_SUFFIXES)
        and not Path(organisation).exists()
    )


def is_missing(path: str) -> bool:
    """Whether a local path does not exist. URLs and hub ids are not looked up here."""
    return not path or ("://" not in path and not Path(path).exists() and not is_hub_id(path))


def is_lost(name: str) -> bool:
    """Whether a tokenizer or a judge can only be a path, and does not exist."""
    return not HUB_ID.fullmatch(name) and is_missing(os.path.expanduser(name))


def checkpoints(config: Config) -> Iterator[str]:
    path = config.eval.checkpoint_path
    if config.mode in ("train", "plan"):
        yield from _training_start(config)
    elif config.mode not in EVALUATES:
        return
    elif path is None and config.algo.backbone == "hf_dit":
        yield f"eval.checkpoint_path is not set: {HF_DIT}"
    elif path is None:
        yield (
            f"eval.checkpoint_path is not set: mode={config.mode} needs a checkpoint, and no run of"
            f" algo={config.algo.name} in checkpointing.save_dir or under outputs/ has written one"
        )
    elif is_missing(path):
        yield f"eval.checkpoint_path={path} does not exist"
    elif config.algo.backbone == "hf_dit" and path.endswith(WEIGHT_SUFFIXES):
        yield f"eval.checkpoint_path={path}: {HF_DIT}; use algo.backbone=dit"


def _training_start(config: Config) -> Iterator[str]:
    start, checkpointing = config.training.from_pretrained, config.checkpointing
    if start is not None and is_missing(start) and not _goes_on(config):
        yield f"training.from_pretrained={start} does not exist (null trains from scratch)"
    if config.algo.backbone == "hf_dit" and (start is None or start.endswith(WEIGHT_SUFFIXES)):
        yield f"training.from_pretrained={start}: {HF_DIT}"
    resume, own = checkpointing.resume_ckpt_path, f"{checkpointing.save_dir}/checkpoints/last.ckpt"
    if checkpointing.resume_from_ckpt and resume != own and is_missing(resume):
        yield (
            f"checkpointing.resume_ckpt_path={resume} does not exist;"
            " checkpointing.resume_from_ckpt=False starts anew"
        )


def _goes_on(config: Config) -> bool:
    """Whether the run has a checkpoint here to go on from: it has all weights, so what training
    began with may be gone."""
    saved = config.checkpointing
    named, folder = Path(saved.resume_ckpt_path), Path(saved.save_dir, "checkpoints")
    found = named.exists() or any(folder.glob("step=*.ckpt"))
    return config.mode == "train" and saved.resume_from_ckpt and found


def results(config: Config) -> Iterator[str]:
    """Can what the mode makes be written? Each is tried, and nothing is left of it."""
    made, mode = {}, config.mode
    if mode in ("train", "ppl_eval"):
        made["checkpointing.save_dir"] = config.checkpointing.save_dir
    cache = config.data.cache_dir
    known = cache is None or "://" in cache
    known = known or (bool(cache) and Path(os.path.expanduser(cache)).exists())
    # sampling prepares no rows, so nobody need have chosen a place for them
    known = known or (mode in ("sample_eval", "demo") and cache == str(user_cache()))
    if mode != "plan" and not known:  # one that exists may be only to read
        made["data.cache_dir"] = os.path.expanduser(cache)
    if mode == "sample_eval":
        made["sampling.logdir"] = config.sampling.logdir
        made["sampling.trajectory"] = config.sampling.trajectory or None
    for key, name in made.items():
        if name == "":
            yield f"{key}= is empty: name a {'file' if key in FILES_MADE else 'folder'}"
        elif name is not None and name.startswith("~"):
            yield f"{key}={name}: a ~ is not replaced here, write $HOME"
        elif name is not None:
            yield from _unwritable(key, name)
    if not has_user_cache() and (cache is None or "://" in cache):
        yield (
            "data.cache_dir: this user has no home folder for what is prepared; name a folder of"
            " this machine, or set XDG_CACHE_HOME"
        )


def _unwritable(key: str, name: str) -> Iterator[str]:
    """Why the file or the folder cannot be made: a file of the longest name that will stand in its
    place for a moment is made, and removed."""
    path = local_folder(name)
    is_file = key in FILES_MADE
    try:
        if not is_file and path.is_symlink() and not path.exists():
            yield f"{key}={name} is a link to nowhere"
            return
        if is_file and path.is_dir():
            yield f"{key}={name} is a folder: name a file in it"
            return  # "/" and "." lie in no folder
        if is_file and path.exists() and not path.is_file():
            yield f"{key}={name} is no regular file"
            return
        folders = path.parents if is_file or not path.exists() else (path, *path.parents)
        there = next(each for each in folders if each.exists())
        prefix = f".{path.name}." if path.name else None
        with tempfile.NamedTemporaryFile(dir=there, prefix=prefix, suffix=".log.jsonl") as file:
            file.write(bytes(4096))
            file.flush()
    except NotADirectoryError:
        yield f"{key}={name}: {there} is a file, not a folder"
    except OSError as error:
        yield f"{key}={name}: nothing can be written there ({error.strerror})"


def corpora(config: Config) -> Iterator[str]:
    both = [key for key in ("train", "valid") if getattr(config.data, key) is not None]
    wanted = {"train": ("train", "valid"), "ppl_eval": ("valid",), "prepare": both or ("train",)}
    names = {f"data.{key}": getattr(config.data, key) for key in wanted.get(config.mode, ())}
    for key, name in names.items():
        if name == "":
            yield f"{key}= is empty: name a file ({', '.join(TEXT_SUFFIXES)})"
        elif name is None:
            yield f"{key} is not set: data=files needs a file ({', '.join(TEXT_SUFFIXES)})"
        elif name not in known_corpora() and not _is_prepared(config, key, name):
            yield from _files(key, name)
    for key in ("text_column", "eos_token", "train_revision", "valid_revision"):
        if getattr(config.data, key) == "":
            yield f"data.{key}= is empty: leave it out, null is its default"
    prepared = all(_is_prepared(config, key, name) for key, name in names.items())
    if config.data.source is not None and names and not prepared:
        yield from _source(config.data.source, names)
    if config.data.cache_dir and Path(config.data.cache_dir).is_file():
        yield f"data.cache_dir={config.data.cache_dir} is a file: name a folder"
    tokenizer = config.data.tokenizer_name_or_path
    if not tokenizer.startswith(ALPHABET) and is_lost(tokenizer):
        yield f"data.tokenizer_name_or_path={tokenizer} does not exist"


def _is_prepared(config: Config, key: str, name: str | None) -> bool:
    """Whether a text is gone, but rows of a text of that name are in the cache; whether they serve
    is for data/ to say."""
    place = config.data.source if name in known_corpora() else name
    place = os.path.expanduser(place or "")
    there = os.path.exists(place) or matching_files(place)
    if not place or not config.data.cache_dir or there:
        return False
    split = key.removeprefix("data.")
    rows = Path(os.path.expanduser(config.data.cache_dir)) / "rows"
    for path in rows.glob(f"*-{split}-*/about.json"):
        try:
            about = read_json(path)
        except (ValueError, OSError):
            continue
        if isinstance(about, dict) and about.get("corpus") == name:
            return True
    return False


def _source(source: str, names: dict[str, str | None]) -> Iterator[str]:
    """Problems of a local copy of the corpora {setting: name}."""
    if all(name not in known_corpora() for name in names.values()):
        own = ", ".join(f"{key}={name}" for key, name in names.items())
        yield f"data.source={source} stands for a named corpus, but {own} is text of your own"
    elif not Path(os.path.expanduser(source)).exists():
        yield (
            f"data.source={source} does not exist: name a folder, an archive or a file with"
            f" {', '.join(dict.fromkeys(map(str, names.values())))}"
        )


def _files(key: str, pattern: str) -> Iterator[str]:
    """Problems of a file, a folder or a glob pattern with own text."""
    path, suffixes = Path(os.path.expanduser(pattern)), ", ".join(TEXT_SUFFIXES)
    if "://" in pattern:
        yield f"{key}={pattern} is a URL: text of your own is read from files of this machine"
        return
    if path.is_dir():
        if not any(file.suffix in TEXT_SUFFIXES for file in visible_files(path)):
            yield f"{key}={pattern} holds no file of kind {suffixes}"
        return
    found = matching_files(pattern)
    if not found and (path.suffix or "/" in pattern):
        yield f"{key}={pattern} does not exist"
    elif not found:
        hint = nearest(pattern, known_corpora())
        yield f"{key}={pattern} is neither a known corpus nor a file.{hint}".removesuffix(".")
    for file in found:
        if file.suffix not in TEXT_SUFFIXES:
            yield f"{key}: {file} must be a file of kind {suffixes}"
        elif file.stat().st_size == 0:
            yield f"{key}: {file} is empty"
