"""The command lines that stand in one with -m."""

import itertools

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from settings.keys import choices
from settings.multirun import SLURM, expand

# words: those of each job
SWEPT = {
    "block_size=4,16 seed=1,2 algo=ar": ["4 1", "4 2", "16 1", "16 2"],
    "seed=range(1,4)": ["1", "2", "3"],
    "++seed=choice(7,8)": ["7", "8"],
    "seed=sort(3,1,2)": ["1", "2", "3"],
    "data.train='a,b.txt',c.txt": ["'a,b.txt'", "c.txt"],
    "eval.likelihood=[exact],[greedy,counts]": ["[exact]", "[greedy,counts]"],
    "algo=glob(*dlm)": ["bamdlm", "mdlm"],
    "seed=3": [""],
    "sampling.prompt=one,two": [""],  # is taken as it stands
}


@pytest.mark.parametrize("words", SWEPT)
def test_the_jobs_are_the_product_in_the_order_of_hydra(words):
    multirun = expand(["-m", *words.split()])
    assert multirun.problems == []
    assert [" ".join(w.partition("=")[2] for w in job.swept) for job in multirun.jobs] == SWEPT[
        words
    ]
    for job in multirun.jobs:
        assert [w.partition("=")[0] for w in job.words] == [
            w.partition("=")[0] for w in words.split()
        ]


def test_hydra_itself_lists_the_same():
    words = ["block_size=4,16", "seed=range(1,3)", "algo=ar", "optim.lr=choice(1e-3,1e-4)"]
    theirs = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(words), None)
    assert [list(job.words) for job in expand(["-m", *words]).jobs] == [
        list(each) for each in itertools.chain.from_iterable(theirs)
    ]


# words: what the one problem says
REFUSED = {
    "optim.lr=interval(0,1)": "optim.lr=interval(0,1): an interval cannot be listed; write range(",
    "seed=glob(*)": "seed=glob(*): glob is for a group (algo, callbacks",
    "experiment=glob(zz*)": "experiment=glob(zz*): no value",
    "seed=range(1,5,0)": "seed=range(1,5,0): range() arg 3 must not be zero",
    "seed=range(1,100000000)": "seed=range(1,100000000): more than 1,000 values",
    "seed=shuffle(range(1,100000000))": ": more than 1,000 values",
    "seed=range(1,100) block_size=range(1,100)": "-m: these are 9,801 runs; at most 1,000",
    "hydra/launcher=slurm": "hydra/launcher=slurm must be basic or submitit_slurm",
    "hydra.launcher.nodes=2": "hydra.launcher.nodes needs hydra/launcher=submitit_slurm",
    "hydra/launcher=submitit_slurm hydra.launcher.mem=2": "hydra.launcher.mem does not exist. Did",
    "hydra/launcher=submitit_slurm hydra.launcher.nodes=0": "nodes=0 must be a number above 0",
    "hydra/launcher=submitit_slurm hydra.launcher.mem_gb=nan": "mem_gb=nan must be a number above",
    "hydra/launcher=submitit_slurm hydra.launcher.qos=": "qos= must be a name",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_listed_is_refused(words):
    (problem,) = expand(["-m", *words.split()]).problems
    assert REFUSED[words] in problem


def test_what_cannot_be_read_is_left_for_the_check_of_the_settings():
    assert [job.words for job in expand(["-m", "seed=a]b", "xyzzy"]).jobs] == [
        ("seed=a]b", "xyzzy")
    ]


def test_one_s_own_folder_goes_to_every_job(tmp_path):
    (tmp_path / "experiment").mkdir()
    for name in ("mine_a", "mine_b"):
        (tmp_path / "experiment" / f"{name}.yaml").touch()
    multirun = expand(["--config-dir", str(tmp_path), "experiment=glob(mine*)", "--multirun"])
    assert [job.words for job in multirun.jobs] == [
        ("--config-dir", str(tmp_path), f"experiment={name}") for name in ("mine_a", "mine_b")
    ]
    assert "mine_a" not in choices("experiment")


def test_the_options_of_slurm_have_hydra_s_names():
    words = "hydra/launcher=submitit_slurm hydra.launcher.timeout_min=60 hydra.launcher.mem_gb=1.5"
    multirun = expand(["-m", *words.split(), "hydra.launcher.partition=gpu", "seed=1,2"])
    assert multirun.problems == []
    assert multirun.slurm == {"timeout_min": 60, "mem_gb": 1.5, "partition": "gpu"}
    assert multirun.slurm.keys() <= SLURM.keys()
    assert [job.words for job in multirun.jobs] == [("seed=1",), ("seed=2",)]
