"""Bad inputs of the command line, of one's own YAML files and of the environment: each is refused
in one clear line, at once, and nothing is left behind.

A line of a table has the words that are wrong, and what the message says.
"""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from tools import ROOT, answer, clear, files, refused, refused_process

import main
from modes import cli
from settings.keys import CONFIGS, LEAVES
from settings.rules.amounts import memory
from utils import escaped, matching_files, reason, shown

TRAIN = [
    *("data=files", "data.train=text.txt", "data.valid=text.txt", "model=tiny", "wandb=null"),
    "data.tokenizer_name_or_path=characters",
]
SAMPLE = [*TRAIN, "mode=sample_eval", "eval.checkpoint_path=org/model"]
PPL = [*TRAIN, "mode=ppl_eval", "eval.checkpoint_path=org/model"]
NAME, PATH = "n" * 300, "/".join(["abcd"] * 1000)  # of 300 letters, of 5 000
DIGITS = "9" * 5000
CLIP = "algo.clip_search_widths=[0.5]"


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """A text, an empty folder, a FIFO."""
    monkeypatch.chdir(tmp_path)
    for name in ("XDG_CACHE_HOME", "NOWHERE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    Path("text.txt").write_text("A cat sat on a mat.\n" * 50)
    Path("folder").mkdir()
    os.mkfifo("fifo.csv")


# ---- words --------------------------------------------------------------------------------------

# the argument as it stands: what the message says
WORDS = {
    "~": "'~' names no setting",
    "~~": "'~~' names no setting",
    "+": "'+' is not key=value",
    "+=1": "'+=1' names no setting",
    "++=1": "'++=1' names no setting",
    "~a b": "a b is not a setting",
    "": "'' is not key=value",
    "-": "- is not an option",
    "--": "-- is not an option",
    "trainer..devices=1": "trainer..devices is not a setting. Did you mean trainer.devices?",
    ".seed=1": ".seed is not a setting. Did you mean seed?",
    "a.b.c.d=1": "a.b.c.d is not a setting",
    "модель=1": "модель is not a setting",
    "a@b@c=1": "a@b@c is not a setting",
    "seed@x=1": "packages (@) are not offered",
    "hydra/launcher=x": "hydra/launcher has no effect without -m, which starts several runs",
    "hydra.sweep.dir=x": "hydra.sweep.dir does not exist",
    # options of Hydra: what to do instead
    "--config-path=x": "a file of your own is DIR/experiment/NAME.yaml: --config-dir DIR exper",
    "--config-name=x": "DIR/experiment/NAME.yaml",
    "-cn": "DIR/experiment/NAME.yaml",
    "--config-dir": "--config-dir names no folder; a file of your own is DIR/experiment/NAME.yaml",
    "-cd": "--config-dir names no folder",
    "--config-dir=": "--config-dir names no folder",
    "--config-dir=nowhere": "--config-dir=nowhere does not exist; a file of your own is DIR/",
    "--config-dir=text.txt": "--config-dir=text.txt is no folder",
    "-cd=fifo.csv": "--config-dir=fifo.csv is no folder",
    "--config-dir=folder": "--config-dir=folder has no folder of a group (algo, callbacks, data, e",
    "--config-dir=a\x1b[31m": "--config-dir=a\\x1b[31m must be UTF-8 text",
    f"--config-dir={NAME}": "File name too long",
    f"--config-dir={CONFIGS}": ": algo=ar is a file of configs/ too: rename algo/ar.yaml",
    "--info": "`--cfg job` prints the settings",
    "--info=all": "`--cfg job` prints the settings",
    "--resolve": "`--cfg job` prints the settings",
    "-p": "`--cfg job` prints the settings",
    "--package=x": "`--cfg job` prints the settings",
    "--cfg": "`--cfg job` prints the settings",
    "--cfg=job": "`--cfg job` prints the settings",
    "-c": "`--cfg job` prints the settings",
    "--run": "leave it out",
    "--version": "--help lists all settings",
    "--hydra-help": "--help lists all settings",
    "-sc": "--help lists all settings",
    "--experimental-rerun": "the same command goes on with its run",
    "--foo=1": "--foo=1 is not an option: settings are key=value, see python main.py --help",
    # values of the wrong form
    "algo.clip_search_widths={a: 0.5}": "={'a': 0.5} must be a list like [0.5,0.6]",
    "training.block_sizes={null: 1}": "training.block_sizes={None: 1}: Incompatible key type",
    "algo.clip_search_widths=[": "algo.clip_search_widths=[ must be a list like [0.5,0.6]",
    "algo.clip_search_widths=0.5,0.6": "write 'algo.clip_search_widths=[0.5,0.6]'",
    "eval.likelihood=nelbo,counts": "write 'eval.likelihood=[nelbo,counts]'",
    "trainer.limit_train_batches=[]": "trainer.limit_train_batches=[] must be a number or null",
    "trainer=[]": "trainer=[] must be a section; its settings are accelerator",
    "trainer={}": "trainer={} sets nothing; its settings are accelerator",
    "algo={}": "algo={} sets nothing; its settings are name, ",
    "+model={}": "; its settings are hidden_size",
    "++data={}": "data={} sets nothing",
    "sampling={}": "sampling={} sets nothing",
    "wandb={}": "wandb={} sets nothing",
    "callbacks={checkpoint_every_n_steps: {}}": "{'checkpoint_every_n_steps': {}} sets nothing",
    "algo=null": "algo=null does not exist. Choices: ar, ",
    "algo=[]": "algo=[] must be one of: ar, ",
    "algo=3": "algo=3 does not exist",
    "model=": "model= does not exist. Choices: ",
    "model=[[tiny]]": "model=[['tiny']] must be one of",
    "callbacks=[]": "callbacks=[] must be one of: checkpoint_every_n_steps",
    "callbacks=[null]": "callbacks=null does not exist",
    "experiment={}": "experiment={} must be one of: ",
    "loader=${model}": "loader=${model} must be a section",
    "loader=${nowhere.x}": "loader=${nowhere.x} must be a section",
    "eval=null": "eval=null must be a section",
    "~trainer": "trainer=null must be a section",
    "seed=range(1,3)": "'seed=range(1,3)' names several values: give one",
    "seed=glob(*)": "names several values",
    "seed=shuffle(1)": "seed=[1] must be a whole number",
    "seed=１２": "seed=１２ must be a whole number",
    "seed={a: 1}": "seed={'a': 1} must be a whole number",
    "seed=" + "[" * 500: "must be a whole number",
    "seed=" + "[" * 1000 + "]" * 1000: "must be a whole number",
    "seed=" + "{a:" * 600 + "1" + "}" * 600: "must be a whole number",
    "seed=a\x1b[31m": "seed=a\\x1b[31m must be a whole number",
    "seed='a\nb'": "seed=a\\nb must be a whole number",
    "seed=\u202e1": "seed=\\u202e1 must be a whole number",
    "seed=\udcff": "seed=\\udcff must be a whole number",
    "\x1b[31m=1": "\\x1b[31m is not a setting",
    "\udcff=1": "\\udcff is not a setting",
    "x" * 100_000 + "=1": "is not a setting",
    "seed=" + "x" * 100_000: "must be a whole number",
    "experiment=../../etc/passwd": "experiment=../../etc/passwd does not exist",
    f"data={NAME}": "does not exist. Choices: ",
    "loader={": "'loader={' cannot be read",
    # interpolations
    "checkpointing.save_dir=${oc.env:NOWHERE}": "Environment variable 'NOWHERE' not found",
    "checkpointing.save_dir=${oc.env:NOWHERE}/${oc.env:NOWHERE}": "checkpointing.save_dir: Enviro",
    "data.train=${HOME}/x.txt": "data.train: Interpolation key 'HOME' not found",
    "checkpointing.save_dir=${checkpointing.save_dir}": "Recursive interpolation detected",
    "seed=${block_size}${seed}": "seed: Recursive interpolation detected",
    "data.train=${": "'data.train=${' cannot be read",
    "sampling.prompt=${": "sampling.prompt=${: ",
    "seed=${a": "seed=${a must be a whole number",
    "seed=${oc.env}": "seed: Interpolation key 'oc.env' not found",
    "trainer.precision=64": "trainer.precision=64 must be one of 32-true, bf16-mixed, 16-mixed",
    "trainer.precision=64-true": "trainer.precision=64-true must be one of 32-true, bf16-mixed",
    # numbers
    f"seed={DIGITS}": "seed=99",
    f"optim.lr={DIGITS}": "must be a number",
    "algo.T=1e30": "algo.T=1000000000000000019884624838656 must be at most",
    "algo.T=1e9": "algo.T=1000000000 must be at least 0 and at most 1000000",
    "algo.T=inf": "algo.T=inf must be a whole number",
    "optim.lr=1e400": "optim.lr=inf must be above 0",
    "model.hidden_size=1e12": "model.hidden_size=1000000000000 must be at most",
    "model.hidden_size=960000": "need more than the",
    "model.cond_dim=1e15": "model.cond_dim=1000000000000000 must be at most",
    "model.n_blocks=1e6": "model.n_blocks=1000000 must be at least 1 and at most 1000",
    "model.n_heads=1e12": "model.n_heads=1000000000000 must be at most",
    "model.length=1e12": "model.length=1000000000000 must be at most",
    "block_size=1e15": "block_size=1000000000000000 must be at most",
    "loader.global_batch_size=1e15": "loader.global_batch_size=1000000000000000 must be at most",
    "loader.eval_batch_size=1e9": "loader.eval_batch_size=1000000000 rows of model.length=1024 ne",
    "loader.num_workers=1e6": "loader.num_workers=1000000 processes need more than the",
    "trainer.max_steps=1e30": "trainer.max_steps=",
    "trainer.val_check_interval=1e30": "must be at most 4294967295",
    "trainer.limit_val_batches=1e30": "must be at most 4294967295",
    "eval.draws=1e15": "eval.draws=1000000000000000 must be at most",
    "checkpointing.keep_every=1e20": "checkpointing.keep_every=100000000000000000000 must be at",
    "trainer.max_time=99999999999:00:00:00": "must be DD:HH:MM:SS",
    "trainer.max_time='٣:00:00:00'": "must be DD:HH:MM:SS",
    "eval.likelihood=[]": "eval.likelihood=[] must be made of",
    # texts
    "checkpointing.save_dir='a\x1b[31m'": "=a\\x1b[31m must be UTF-8 text without control",
    "data.tokenizer_name_or_path=\udcff": "=\\udcff must be UTF-8 text without control",
    "data.train=caf\udce9.txt": "data.train=caf\\udce9.txt must be UTF-8 text",
    # empty
    "checkpointing.save_dir=": "checkpointing.save_dir= is empty: name a folder",
    "data.cache_dir=": "data.cache_dir= is empty: name a folder",
    "data.train=": "data.train= is empty: name a file",
    "data.valid=": "data.valid= is empty: name a file",
    "data.text_column=": "data.text_column= is empty",
    "data.eos_token=": "data.eos_token= is empty",
    "data.source=": "data.source= stands for a named corpus",
    "data.tokenizer_name_or_path=": "data.tokenizer_name_or_path= does not exist",
    "training.from_pretrained=": "training.from_pretrained= does not exist",
    "checkpointing.resume_ckpt_path=": "checkpointing.resume_ckpt_path= does not exist",
    # places
    "data.train=http://127.0.0.1:9/x.txt": "is a URL: text of your own is read from files of this",
    "data.valid=s3://bucket/x.txt": "is a URL: text of your own is read from files of this machine",
    "data.train='~nouser/x'": "data.train=~nouser/x does not exist",
    "data.tokenizer_name_or_path=~nouser/x": "=~nouser/x does not exist",
    "checkpointing.save_dir='~/runs'": "a ~ is not replaced here, write $HOME",
    "checkpointing.save_dir=~/runs": "write checkpointing.save_dir=$HOME/runs",
    "data.train=/dev/null/x.txt": "data.train=/dev/null/x.txt does not exist",
    "data.cache_dir=text.txt/a": "data.cache_dir=text.txt/a: text.txt is a file",
    "checkpointing.save_dir=/dev/null/x": "/dev/null is a file, not a folder",
}

# of mode=sample_eval
SAMPLING = {
    "sampling.logdir=/": "sampling.logdir=/ is a folder: name a file in it",
    "sampling.logdir=.": "sampling.logdir=. is a folder: name a file in it",
    "sampling.num_sample_batches=1e15": "sampling.num_sample_batches=1000000000000000 must be at",
    "sampling.num_sample_batches=4e9": "need at least",
    "sampling.batch_size=1e12": "sampling.batch_size=1000000000000 must be at most",
    "sampling.context_size=1e15": "sampling.context_size=1000000000000000 must be at most",
    "sampling.k=1e12": "sampling.k=1000000000000 must be at most",
    "sampling.logdir=": "sampling.logdir= is empty: name a file",
    "sampling.logdir=folder": "sampling.logdir=folder is a folder: name a file in it",
    "sampling.logdir=fifo.csv": "sampling.logdir=fifo.csv is no regular file",
    "sampling.logdir=/dev/full": "sampling.logdir=/dev/full is no regular file",
    "sampling.logdir='~/a.csv'": "a ~ is not replaced here, write $HOME",
    f"sampling.logdir={NAME}": "nothing can be written there (File name too long)",
    f"sampling.logdir={PATH}": "nothing can be written there (File name too long)",
    "sampling.logdir=" + "n" * 250: "nothing can be written there (File name too long)",
    "sampling.trajectory=": "sampling.trajectory= must be the name of an .html file",
    "sampling.trajectory=text.txt/a.html": "sampling.trajectory=text.txt/a.html: text.txt is a fi",
    "sampling.trajectory=/proc/a.html": "sampling.trajectory=/proc/a.html: nothing can be written",
    f"sampling.trajectory={NAME}.html": "nothing can be written there (File name too long)",
    "sampling.prompts=folder": "sampling.prompts=folder is a folder: name a .txt or .jsonl file",
    "sampling.prompts=fifo.csv": "sampling.prompts=fifo.csv is no regular file",
    "sampling.prompts=/dev/zero": "sampling.prompts=/dev/zero is no regular file",
    "sampling.prompts=": "sampling.prompts= does not exist",
    "sampling.prompt=a\udcff": "sampling.prompt=a\\udcff must be UTF-8 text",
    "sampling.prompt=a\x1b[31m": "sampling.prompt=a\\x1b[31m must be UTF-8 text",
    "eval.checkpoint_path=": "eval.checkpoint_path= does not exist",
    "eval.gen_ppl_eval_model_name_or_path=": "= does not exist",
    "eval.gen_ppl_eval_model_name_or_path='~nouser/x'": "=~nouser/x does not exist",
}
SEVERAL = {  # words that belong together
    f"trainer.devices=100000 loader.global_batch_size=100000 {CLIP}": "trainer.devices=100000 pro",
    "trainer.num_nodes=1000 loader.global_batch_size=1000": "trainer.num_nodes=1000: nothing",
    f"{CLIP} algo.var_min=True algo.clip_search_delta=1e-9": "makes 500,000,001 intervals",
    f"{CLIP} algo.var_min=True algo.clip_search_delta=5e-324": "makes inf intervals",
    f"{CLIP} algo.var_min=True block_size=4 training.resample=True algo.clip_search_delta=1e-8": (
        "makes 50,000,001 intervals"
    ),
}


@pytest.mark.parametrize("word", WORDS, ids=lambda word: shown(word)[:60])
def test_a_bad_word_is_refused(word):
    refused([*TRAIN, word], WORDS[word])


@pytest.mark.parametrize("word", SAMPLING, ids=lambda word: shown(word)[:60])
def test_a_bad_word_of_sampling_is_refused(word):
    refused([*SAMPLE, word], SAMPLING[word])


@pytest.mark.parametrize("words", SEVERAL)
def test_words_that_are_bad_together_are_refused(words):
    refused([*TRAIN, *words.split()], SEVERAL[words])


# ---- texts that a shell or Hydra takes apart ----------------------------------------------------

TEXTS = [
    *("[SEP]", "[MASK]", "</s>", "<|endoftext|>", "a[b].txt", "corpus [clean].txt", "a,b.txt"),
    *("a(b).txt", "a&b", "it's.txt", "'a", 'say "x"', "a\\b", "(", "a;b", "a!b", "a#b", "#"),
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_message_has_the_spelling_that_works_in_a_shell(text, capsys):
    """What stands behind `write` or `as text:` is typed, and gives exactly the text."""
    words = [*TRAIN, f"data.eos_token={text}"]
    try:
        assert cli.configure(words).data.eos_token == text  # Hydra takes it as it stands
        return
    except SystemExit:
        message = capsys.readouterr().err
    clear(message)
    advice = r"(?:write|as text:|comma:) (.*data\.eos_token=.*?)(?:; with -m each is .*)?$"
    advice = re.search(advice, message, re.M)[1]
    (word,) = shlex.split(advice)
    assert cli.configure([*TRAIN, word]).data.eos_token == text


def test_a_file_name_with_brackets_is_that_file():
    from data.tables import matching

    name = "corpus [clean].txt"
    Path(name).write_text("A text.\n")
    assert cli.configure([*TRAIN, f"data.train='{name}'"]).data.train == name
    assert matching(name) == [Path(name)]
    assert matching("te[wx]t.txt") == [Path("text.txt")]


def test_links_that_lead_back_have_an_end():
    for name in "ab":
        Path("folder", name).symlink_to(".")
    refused([*TRAIN, "data.train=folder/**/*.txt"], "data.train=folder/**/*.txt does not exist")
    Path("folder/deep/er").mkdir(parents=True)
    for name in ("c.txt", "deep/c.txt", "deep/er/c.txt", "deep/.c.txt"):
        Path("folder", name).write_text("A text.\n")
    found = {f"folder/{name}" for name in ("c.txt", "deep/c.txt", "deep/er/c.txt")}
    assert {str(path) for path in matching_files("folder/**/*.txt")} == found
    cli.configure([*TRAIN, "data.train=folder/**/*.txt"])


def test_the_projects_own_names_of_checkpoints_can_be_typed():
    Path("step=2.ckpt").touch()
    words = [*PPL, "eval.checkpoint_path=step=2.ckpt"]
    assert cli.configure(words).eval.checkpoint_path == "step=2.ckpt"
    message = refused([*PPL, "eval.checkpoint_path=step=3.ckpt"])
    assert "eval.checkpoint_path=step=3.ckpt does not exist" in message


# ---- every setting that names a place -----------------------------------------------------------

INPUTS = (
    *("data.train", "data.valid", "training.from_pretrained", "checkpointing.resume_ckpt_path"),
    *("checkpointing.save_dir", "data.cache_dir"),
)


@pytest.mark.parametrize("key", [*INPUTS, "data.tokenizer_name_or_path"])
@pytest.mark.parametrize("name", [NAME, PATH], ids=["name", "path"])
def test_a_name_that_is_too_long_is_refused(key, name):
    if (key, name) != ("data.tokenizer_name_or_path", NAME):  # which may be on the hub
        refused([*TRAIN, f"{key}={name}"], f"{key}=", "File name too long")


TEXT_KEYS = [key for key, leaf in LEAVES.items() if leaf.hint in (str, str | None)]


@pytest.mark.parametrize("key", [key for key in TEXT_KEYS if not key.startswith("wandb")])
def test_no_setting_takes_half_a_character_or_a_control_character(key):
    for text in ("a\udcffb", "a\x1bb", "a\0b"):
        code, message = answer([*SAMPLE, f'{key}="{text}"'])
        assert code == 2
        clear(message, None)
        assert f"{key}={escaped(text)}" in message


# ---- YAML of one's own --------------------------------------------------------------------------

TOP = "# @package _global_\n"
DOUBLED = "".join(f"d{i}: '${{d{i - 1}}}${{d{i - 1}}}'\n" for i in range(1, 31))
YAML = {
    "a tab": (f"{TOP}model:\n\tlength: 3\n", "line 3: found character that cannot start any token"),
    "not closed": (f"{TOP}model: [\n", "line 3: did not find expected node content"),
    "a list": (f"{TOP}- a\n", "Cannot merge DictConfig with ListConfig"),
    "a word": (f"{TOP}hello\n", "hello is not a setting"),
    "empty": ("", "must begin with the line `# @package _global_`"),
    "no header": ("seed: 3\n", "must begin with the line `# @package _global_`"),
    "NUL": ("seed: a\0b\n", "control characters are not allowed"),
    "escaped NUL": (f'{TOP}seed: "a\\0b"\n', "seed=a\\x00b"),
    "Latin-1": (f"{TOP}wandb:\n  name: caf\xe9\n".encode("latin-1"), "is not UTF-8 text"),
    "UTF-16": (f"{TOP}seed: 1\n".encode("utf-16"), "is not UTF-8 text"),
    "a key twice": (f"{TOP}seed: 1\nseed: 2\n", "line 3: found duplicate key seed"),
    "keys 80 000 times": (TOP + "seed: 1\n" * 80_000, "has more than 65,536 bytes"),
    "keys 9 000 times": (TOP + "a: 1\n" * 9000, "has more than 1,000 entries"),
    "aliases": (
        f"{TOP}a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(
            f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n"
            for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "has more than 1,000 entries",
    ),
    "an alias of itself": (f"{TOP}model: &m\n  length: *m\n", "aliases written out"),
    "no anchor": (f"{TOP}seed: *nope\n", "aliases written out"),
    "deep": (f"{TOP}seed: {'[' * 3000}{']' * 3000}\n", "20 inside each other"),
    "deep maps": (f"{TOP}seed: {'{a: ' * 300}1{'}' * 300}\n", "20 inside each other"),
    "Python": (f"{TOP}seed: !!python/name:os.system\n", "could not determine a constructor"),
    "bytes": (f"{TOP}seed: !!binary aGVsbG8=\n", "seed=b'hello' must be a whole number"),
    "a number as key": (f"{TOP}1: 2\n", "1 is not a setting"),
    "null as key": (f"{TOP}null: 2\n", "Incompatible key type 'NoneType'"),
    "a list as key": (f"{TOP}? [a, b]\n: 3\n", "found unhashable key"),
    "a control character": (f'{TOP}"\\e[31m": 1\n', "\\x1b[31m is not a setting"),
    "half a pair": (f'{TOP}wandb:\n  name: "\\ud800"\n', "line 3: found invalid Unicode"),
    "two documents": (f"{TOP}seed: 3\n---\nseed: 4\n", "found another document"),
    "5 000 digits": (f"{TOP}seed: {DIGITS}\n", "value has 5000 digits"),
    "300 000 letters": (f"{TOP}wandb:\n  name: {'x' * 300_000}\n", "has more than 65,536 bytes"),
    "defaults of nothing": (f"{TOP}defaults:\n  - nope\n", "Could not load 'experiment/"),
    "defaults of a number": (f"{TOP}defaults: 3\n", "defaults must be a list"),
    "defaults of itself": (f"{TOP}defaults:\n  - /experiment: OWN\n", "nested too deeply"),
    "an override of nothing": (f"{TOP}defaults:\n  - override /no: x\n", "Could not override 'no'"),
    "doubled": (f"{TOP}d0: abc\n{DOUBLED}checkpointing:\n  save_dir: ${{d30}}\n", "100,000 charac"),
    "doubled by a resolver": (
        f"{TOP}d0: abc\n{DOUBLED}wandb:\n  name: ${{d30}}\n".replace("${", "${oc.select:"),
        "has more than 100,000 characters",
    ),
    "doubled sections": (
        f"{TOP}s0: {{x: a, y: a}}\n"
        + "".join(f"s{i}: {{x: '${{s{i - 1}}}', y: '${{s{i - 1}}}'}}\n" for i in range(1, 30))
        + "wandb:\n  tags: ['${s29}']\n",
        "has more than 100,000 characters",
    ),
    "an unknown setting": (f"{TOP}modle:\n  length: 3\n", "modle is not a setting"),
    "a number for a section": (f"{TOP}model: 3\n", "model=3 must be a section"),
    "a list for a number": (f"{TOP}model:\n  length: [1]\n", "model.length=[1] must be a whole"),
    "a section for a list": (f"{TOP}algo:\n  clip_search_widths: {{a: 1}}\n", "Cannot merge Dict"),
    "no such variable": (f"{TOP}data:\n  cache_dir: ${{oc.env:NOWHERE}}\n", "variable 'NOWHERE'"),
    "a section of nowhere": (f"{TOP}trainer: ${{wandb.p}}\n", "trainer"),
    "a section of another": (f"{TOP}trainer: ${{model}}\n", "trainer=${model} must be a section"),
    "no such resolver": (f"{TOP}seed: ${{eval:1}}\n", "Unsupported interpolation type eval"),
}


@pytest.fixture
def configs(tmp_path_factory):
    """What chooses one's own experiment, and the folder with it."""
    folder = tmp_path_factory.mktemp("own")
    for group in ("experiment", "model"):
        (folder / group).mkdir()
    return ["--config-dir", str(folder), "experiment=own"], folder


@pytest.mark.parametrize("kind", YAML)
def test_a_bad_file_of_settings_is_refused(kind, configs):
    (words, folder), (text, piece) = configs, YAML[kind]
    content = text if isinstance(text, bytes) else text.replace("OWN", "own").encode()
    (folder / "experiment" / "own.yaml").write_bytes(content)
    refused([*(word for word in TRAIN if word != "wandb=null"), *words], piece)


def test_a_file_of_settings_that_is_no_file_is_refused(configs):
    words, folder = configs
    own = folder / "experiment" / "own.yaml"
    os.mkfifo(own)
    refused([*TRAIN, *words], "experiment=own", "is no regular file")
    own.unlink()
    own.symlink_to("/dev/zero")
    refused([*TRAIN, *words], "experiment=own", "is no regular file")
    own.unlink()
    own.symlink_to(own)
    refused([*TRAIN, *words], "'experiment/own'")


def test_a_file_that_another_file_names_is_looked_at_too(configs):
    words, folder = configs
    named = "defaults:\n  - override /model: bad\n"
    (folder / "experiment" / "own.yaml").write_text(TOP + named)
    (folder / "model" / "bad.yaml").write_text("length: [\n")
    refused([*(w for w in TRAIN if w != "model=tiny"), *words], "model=bad", "bad.yaml, line 2")


def test_beside_a_folder_that_cannot_be_used_its_names_are_no_second_problem():
    message = refused([*TRAIN, "--config-dir=nowhere", "experiment=mine", "modle=x"], problems=2)
    assert "experiment=mine" not in message
    refused([*TRAIN, "-cd", "folder", "--config-dir=folder"], "--config-dir is given 2 times")


# ---- the environment ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "words", "piece"),
    [
        ("XDG_CACHE_HOME", "/dev/null/x", [], "data.cache_dir=/dev/null/x/bamdlm: /dev/null is a"),
        ("XDG_CACHE_HOME", NAME, [], "File name too long"),
        ("XDG_CACHE_HOME", "a\udcffb", [], "data.cache_dir=a\\udcffb/bamdlm must be UTF-8 text"),
        ("XDG_CACHE_HOME", "a\x1bb", [], "data.cache_dir=a\\x1bb/bamdlm must be UTF-8 text"),
        ("NOWHERE", "", ["data.cache_dir=${oc.env:NOWHERE}"], "data.cache_dir= is empty"),
        ("NOWHERE", "x", ["seed=${oc.env:NOWHERE}"], "seed=x must be a whole number"),
        ("NOWHERE", "9" * 5000, ["seed=${oc.env:NOWHERE}"], "must be a whole number"),
        ("CXX", "a\x1bb", ["model.compile=True"], "needs a C++ compiler"),
    ],
)
def test_a_bad_variable_is_refused(name, value, words, piece, monkeypatch):
    monkeypatch.setenv(name, value)
    if name == "CXX":
        monkeypatch.setenv("PATH", "")
    refused([*TRAIN, *words], piece)


def test_sampling_needs_no_place_for_prepared_rows(monkeypatch):
    """In a container the user's cache is often out of reach."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/x")
    assert cli.configure(SAMPLE).data.cache_dir == "/dev/null/x/bamdlm"
    refused([*SAMPLE, "data.cache_dir=/dev/null/y"], "data.cache_dir=/dev/null/y: /dev/null is a")


@pytest.mark.parametrize("name", ["RANK", "LOCAL_WORLD_SIZE", "COLUMNS", "SLURM_PROCID"])
@pytest.mark.parametrize("value", ["", "x", "-1", DIGITS, "٣"])
def test_a_strange_variable_of_a_launcher_is_no_traceback(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    code, message = answer([*TRAIN, "seed=x"])
    assert code == 2
    if message:  # a process that is not the first says nothing
        clear(message, None)


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    import pwd

    def unknown(number):
        raise KeyError(number)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    refused(TRAIN, "data.cache_dir: this user has no home folder", "XDG_CACHE_HOME")
    refused([*TRAIN, "data.cache_dir=s3://bucket/x"], "this user has no home folder")
    assert cli.configure([*TRAIN, "data.cache_dir=cache"]).data.cache_dir == "cache"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_answers_with_the_same_line():
    words = [*TRAIN, "seed=x"]
    here = refused(words, "seed=x must be a whole number")
    for environment in ({"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}, {"HOME": None}):
        assert refused_process(words, **environment) == here


# ---- after the check ----------------------------------------------------------------------------

FIGURE = "eval.likelihood=[iw:" + DIGITS + "]"


@pytest.mark.parametrize(
    ("words", "piece"),
    [
        ([FIGURE], "eval.likelihood"),
        (["data.text_column=no"], None),
        (["training.from_pretrained=text.txt"], "text.txt"),
        (["data.tokenizer_name_or_path=folder"], "folder"),
        ([f"data.tokenizer_name_or_path={NAME}"], "nnn"),
        (["data.tokenizer_name_or_path=characters:aa"], "data.tokenizer_name_or_path"),
        (["checkpointing.resume_ckpt_path=text.txt"], "text.txt"),
        (
            ["training.from_pretrained=http://127.0.0.1:9/a.ckpt"],
            "http://127.0.0.1:9/a.ckpt cannot be reached",
        ),
    ],
)
def test_what_only_the_mode_can_see_is_one_line_too(words, piece, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path.cwd() / "cache"))
    if piece is None:
        Path("text.jsonl").write_text('{"text": "a"}\n')
        words = [*words, "data.train=text.jsonl"]
        piece = "data.text_column"
    refused([*TRAIN, "model.length=32", *words], piece, writes=("cache/*", "cache", "*.lock", "*"))


def test_a_bug_keeps_its_traceback(monkeypatch):
    import modes.train

    def broken(config):
        raise RuntimeError("a bug")

    monkeypatch.setattr(modes.train, "prepare", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main.main(TRAIN)


# ---- the primitives -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\x1b[31mb\x07", "a\\x1b[31mb\\x07"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\u202eabc\u2066", "\\u202eabc\\u2066"),
        ("\udcff\ud800", "\\udcff\\ud800"),
        ("\x9b31m\x7f", "\\x9b31m\\x7f"),
        ("é 日本 😀 \xa0", "é 日本 😀 \xa0"),
    ],
)
def test_foreign_text_is_shown_without_effect(text, expected):
    assert shown(text) == escaped(text) == expected


def test_long_text_loses_its_middle():
    assert len(shown("x" * 10**6)) < 300
    assert len(shown("word " * 10**6)) < 1500
    assert len(shown("\U000e0001 " * 10**6)) < 1500
    begins, _, ends = shown("a" * 500 + "b" * 500).partition("…")
    assert set(begins) == {"a"}
    assert set(ends) == {"b"}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device", "a/b"), "a/b: No space left on device"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ConnectionError("[Errno 111] Connection refused"), "Connection refused"),
        (OSError("a ([Errno 2] No such file: 'b')"), "a (No such file: 'b')"),
        (FileNotFoundError("a does not exist"), "a does not exist"),
        (MemoryError(), "this does not fit into the memory of this machine"),
        (RecursionError("maximum"), "this is nested too deeply"),
        (ValueError("a\n  b"), "a b"),
        (ValueError(), "ValueError"),
    ],
)
def test_an_error_is_one_line_without_its_number(error, expected):
    assert reason(error) == expected


def test_this_machine_has_memory():
    assert 1 << 28 < memory() < 1 << 50


def test_there_are_enough_cases():
    assert len(WORDS) + len(SAMPLING) + len(SEVERAL) + len(YAML) + len(TEXTS) >= 150
    assert files()
    assert (ROOT / "main.py").is_file()
