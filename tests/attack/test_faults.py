"""Faults of the machine while a run is at work: full disks, dead processes, files that are gone.

Each ends as documented in docs/reliability.md: what could be saved is there and whole, one line
says what could not, and the exit code is not 0 where something is missing.
"""

import contextlib
import errno
import json
import os
import resource
import select
import shutil
import signal
import socket
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import ALGORITHMS, LAST, Run, at_call, differences, read, run, tell, tiny
from tools import bounded
from torch.utils.data import Dataset

import main
import settings
import utils
from data import preparation, shards, streaming
from data.token_rows import TokenRows
from diffusion import Diffusion
from evaluation.journal import Journal
from evaluation.likelihood import RowResults
from modes import build_data, train
from sampling import sample_file
from sampling.sample_file import SampleFile, SampleRow
from training import profiling
from training.checkpoint_io.files import CarefulIO
from training.csv_log import CSVLog
from training.health import StepHealth
from training.loading import Loader, _Workers, prepare_worker
from training.log_reading import read_log
from training.run_lock import NAME, RunLock, process_start
from training.saving import BestCheckpoint, Deadline
from utils import DataFailure


@contextlib.contextmanager
def full_disk(room: int):
    """Files of this process have at most so many bytes: a write beyond them is cut, then fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Of runs of ten steps without a validation."""
    return [
        *tiny(tmp_path_factory.mktemp("data")),
        *ALGORITHMS["ar"],
        "trainer.limit_val_batches=0",
    ]


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    code, text = run([*base, f"checkpointing.save_dir={folder / 'run'}"], folder / "log")
    assert code == 0, text
    return folder


def ended(words, folder, *, before=None, program=main.command):
    """(exit code, what it printed) of a run in folder/run."""
    words = [*words, f"checkpointing.save_dir={folder / 'run'}"]
    code, text = run(words, folder / "log", before=before, program=program)
    assert "Traceback" not in text
    assert "[Errno" not in text
    return code, text


# ---- files that are added to, on a full disk ----------------------------------------------------


def sample(row: int) -> SampleRow:
    return SampleRow(None, 4, 1.0, 8, f"text {row} " * 20, 1, row, "a")


def test_samples_are_added_whole_or_not_at_all(tmp_path):
    file = SampleFile(tmp_path / "texts.csv")
    file.add([sample(0)], {})
    before = file.path.read_bytes()
    with full_disk(len(before) + 100), pytest.raises(OSError, match=r"texts\.csv") as failed:
        file.add([sample(1), sample(2)], {})
    assert failed.value.errno == errno.EFBIG
    assert file.path.read_bytes() == before
    file.add([sample(1), sample(2)], {})
    assert sorted(file.rows("a")) == [0, 1, 2]


def test_samples_whose_notes_do_not_fit_are_reported(tmp_path):
    file = SampleFile(tmp_path / "texts.csv")
    file.add([sample(0)], {"long": "x" * 3000})
    notes = file.log.read_bytes()
    with full_disk(len(notes) + 10), pytest.raises(OSError, match=r"texts\.csv\.log\.jsonl"):
        file.add([sample(1)], {"rows": 1})
    assert file.log.read_bytes() == notes
    assert sorted(file.rows("a")) == [0, 1]


def test_the_journal_of_an_evaluation_stays_readable(tmp_path):
    journal = Journal(tmp_path, {"of": "this"})
    journal.write([0], [4], [[1.0]], 1.0)
    before = journal.path.read_bytes()
    with full_disk(len(before) + 7), pytest.raises(OSError, match=journal.path.name):
        journal.write([1], [4], [[2.0]], 1.0)
    assert journal.path.read_bytes() == before
    journal.read(RowResults(2, 1))


def test_a_file_that_is_replaced_stays_as_it_was(tmp_path):
    path = tmp_path / "report.json"
    utils.write_json(path, {"a": 1})
    with full_disk(100), pytest.raises(OSError, match=r"report\.json") as failed:
        utils.write_json(path, {"a": "x" * 1000})
    assert "[Errno" not in utils.reason(failed.value)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_a_folder_that_does_not_fit_leaves_nothing(tmp_path):
    with (
        full_disk(100),
        pytest.raises(OSError, match="rows") as failed,
        utils.atomic_folder(tmp_path / "rows") as new,
    ):
        (new / "ids.bin").write_bytes(bytes(1000))
    assert utils.reason(failed.value) == f"{tmp_path / 'rows'}: File too large"
    assert not [*tmp_path.iterdir()]


def test_a_checkpoint_that_does_not_fit_is_one_line(tmp_path, capsys):
    io, path = CarefulIO(), tmp_path / "step=1.ckpt"
    with full_disk(1000):
        io.save_checkpoint({"weights": torch.zeros(1000)}, path)
    assert io.failure == (
        f"{path} could not be written (File too large); the checkpoint before it is as it was"
    )
    assert capsys.readouterr().err == f"{io.failure}\n"
    assert not [*tmp_path.iterdir()]


def test_a_bad_batch_that_cannot_be_kept_is_no_half_file(tmp_path):
    health = StepHealth(folder=str(tmp_path))
    with full_disk(100):
        step = SimpleNamespace(batches=[{"input_ids": torch.zeros(99)}], losses=[torch.zeros(1)])
        said = health._keep("step=1.pt", step, [])
    assert said.startswith("no file: ")
    assert not [*(tmp_path / "bad_steps").iterdir()]


# ---- metrics.csv --------------------------------------------------------------------------------

NEW = "step,unix_time,trainer/loss\n1,1.0,3.0\n2,2.0,2.0\n"
OLD = "step,name,value,unix_time\n0,trainer/loss,3.0,1.0\n1,trainer/loss,2.0,2.0\n"


@pytest.mark.parametrize(
    "torn",
    [
        "3,3.0,0.",
        "3,3.0\n",
        "3\n",
        "3,3.04,4.0,1.5\n",
        "3,3.0,1.5,4,4.0,1.5\n",
        "3,3.0,1.2.5\n",
        "3,3.0,a\n",
        "x,3.0,1.0\n",
        "\0\0\0\0\0\n",
        "\0\0\0\0\0",
        "3,3.0,\udcff\n",
        "\n",
        "²,3.0,1.0\n",
        f"{'9' * 5000},3.0,1.0\n",
        f"3,3.0,{'1' * 200_000}\n",
        '3,3.0,"\n',
    ],
)
def test_a_torn_line_is_no_row(torn, tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(NEW + torn, errors="surrogateescape")
    assert read_log(path) == {"trainer/loss": {1: 3.0, 2: 2.0}}
    CSVLog(path).log_metrics({"trainer/loss": 1.0}, step=3)
    assert read_log(path) == {"trainer/loss": {1: 3.0, 2: 2.0, 3: 1.0}}
    assert path.read_text().count("\n") == 4


@pytest.mark.parametrize(
    "torn",
    [
        "9,throughput/memory_gib,0.4386787410,trainer/lr,0.0\n",
        "9,trainer/loss,0.43\n",
        "9,trainer/loss,0.43",
        "9,trainer/loss,0.4.3,1.0\n",
    ],
)
def test_a_torn_line_of_the_old_format_is_no_figure(torn, tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(OLD + torn)
    assert read_log(path) == {"trainer/loss": {1: 3.0, 2: 2.0}}
    CSVLog(path).log_metrics({"trainer/loss": 1.0}, step=3)
    assert read_log(path) == {"trainer/loss": {1: 3.0, 2: 2.0, 3: 1.0}}


def test_what_this_project_adds_to_may_have_any_size(tmp_path, monkeypatch):
    """It is read bit by bit, also where a part of it is damaged: here 100 MB of zeros."""
    monkeypatch.setattr(utils, "MOST_LINE", 1 << 20)
    log, samples = tmp_path / "metrics.csv", SampleFile(tmp_path / "texts.csv")
    CSVLog(log).log_metrics({"trainer/loss": 3.0}, step=1)
    samples.add([sample(0)], {"n": 1})
    journal = Journal(tmp_path, {"of": "this"})
    journal.write([0], [4], [[1.0]], 1.0)
    for path in (log, samples.log, journal.path):
        os.truncate(path, 100 << 20)
        with path.open("a") as file:
            file.write("\n")
    with monkeypatch.context() as patch, bounded(memory=64 << 20):
        patch.setattr(utils.check_file, "__defaults__", (10,))  # bytes of what is read whole
        CSVLog(log).log_metrics({"trainer/loss": 2.0}, step=2)
        again = SampleFile(samples.path)
        again.check()
        again.add([sample(1)], {"n": 2})
        assert again.notes("a") == [{"run": "a", "n": 1}, {"run": "a", "n": 2}]
        found = RowResults(sampled=True)
        Journal(tmp_path, {"of": "this"}).read(found)
    assert [*again.rows("a")] == [0, 1]
    assert read_log(log) == {"trainer/loss": {1: 3.0, 2: 2.0}}
    assert found.seconds == 1.0


@pytest.mark.parametrize("text", ["", "step,uni", "step,unix_time,trainer/loss", "\0\0\0"])
def test_a_log_without_a_whole_head_begins_anew(text, tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    CSVLog(path).log_metrics({"trainer/loss": 1.0}, step=3)
    assert read_log(path) == {"trainer/loss": {3: 1.0}}


@pytest.mark.parametrize("room", [0, 60, 100, 130, 150])
def test_rows_that_do_not_fit_are_written_when_there_is_room(room, tmp_path, capsys):
    path = tmp_path / "metrics.csv"
    log = CSVLog(path)
    figures = {step: {"trainer/loss": 1 / step, "trainer/lr": step / 7} for step in range(1, 8)}
    with full_disk(room):
        for step in range(1, 6):
            log.log_metrics(figures[step], step=step)
            log.log_metrics({f"val/{step}": step}, step=step)  # another column
            assert not path.exists() or path.read_text()[-1:] in ("\n", "")
    assert log.failure == f"rows of the log are missing: {path}: File too large"
    assert capsys.readouterr().err == f"{path}: File too large; training goes on\n"
    for step in (6, 7):
        log.log_metrics(figures[step], step=step)
    assert log.failure is None
    found = read_log(path)
    for name in ("trainer/loss", "trainer/lr"):
        assert found[name] == {step: figures[step][name] for step in figures}
    for step in range(1, 6):
        assert found[f"val/{step}"] == {step: step}


# ---- two runs in one folder ---------------------------------------------------------------------

HERE = socket.gethostname()
ELSEWHERE = {"host": "elsewhere", "pid": 1, "start": "1"}
HOLDERS = {  # what running.json says, and whether the folder is taken over
    "alive": ({"host": HERE, "pid": 1, "start": process_start(1)}, False),
    "dead": ({"host": HERE, "pid": (1 << 22) + 1, "start": "1"}, True),
    "its number has another process": ({"host": HERE, "pid": 1, "start": "another"}, True),
    "another host": (ELSEWHERE, False),
    "another job": ({**ELSEWHERE, "job": "6"}, False),
    "requeued": ({**ELSEWHERE, "job": "7"}, True),
    "the same try": ({**ELSEWHERE, "job": "7", "restarts": 1}, 0),
    "again by torchrun": ({**ELSEWHERE, "job": "7", "restarts": 1, "torchrun": "8"}, True),
    "another torchrun": ({**ELSEWHERE, "job": "7", "restarts": 1, "torchrun": "9"}, False),
    "torchrun of another job": ({**ELSEWHERE, "job": "6", "torchrun": "8"}, False),
    "this process": ({"host": HERE, "pid": os.getpid(), "start": "1"}, True),
}


@pytest.mark.parametrize("which", HOLDERS)
def test_a_folder_is_taken_over_from_the_dead_alone(which, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "8")
    holder, free = HOLDERS[which]
    path = tmp_path / NAME
    text = json.dumps({"job": None, "restarts": 0, **holder})
    path.write_text(text)
    if free:
        with RunLock(tmp_path):
            assert json.loads(path.read_text())["pid"] == os.getpid()
        assert not [*tmp_path.iterdir()]
        return
    with pytest.raises(ValueError, match=r"is used by another run \(process 1 on ") as refused:
        RunLock(tmp_path)
    assert f"delete {path}" in str(refused.value)
    assert path.read_text() == text


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"host": 1}', '{"pid": true}', "\0"])
def test_what_is_no_lock_is_replaced(text, tmp_path):
    (tmp_path / NAME).write_text(text)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["host"] == HERE
    assert not [*tmp_path.iterdir()]


def test_the_other_ranks_of_a_run_share_its_folder(tmp_path, monkeypatch):
    held = json.dumps({"host": HERE, "pid": 1, "start": process_start(1), "job": None})
    (tmp_path / NAME).write_text(held)
    monkeypatch.setenv("RANK", "1")
    with RunLock(tmp_path):
        pass
    assert (tmp_path / NAME).read_text() == held


def test_a_second_run_in_a_folder_is_refused(base, tmp_path):
    """While the first one waits in its fifth step; then it ends as if nothing had been."""
    marks = [tmp_path / name for name in ("waiting", "go on")]

    def wait():
        marks[0].touch()
        while not marks[1].exists():
            time.sleep(0.01)

    words = [*base, f"checkpointing.save_dir={tmp_path / 'run'}"]
    first = Run(words, tmp_path / "first", before=at_call(Diffusion, "training_step", 9, wait))
    first.wait_for(marks[0])
    code, text = ended([*base, "optim.lr=1e-3", "checkpointing.resume_from_ckpt=false"], tmp_path)
    assert code == 2, text
    assert f"is used by another run (process {first.pid} on {HERE})" in text
    marks[1].touch()
    assert first.wait() == 0, first.text()
    assert read(tmp_path / LAST)["global_step"] == 10
    assert not (tmp_path / "run" / NAME).exists()


def test_a_run_that_trained_meanwhile_is_not_overwritten(base, tmp_path):
    """Between reading where to go on from and taking the folder."""
    place = tmp_path / "run/checkpoints/step=4.ckpt"

    def act():
        place.parent.mkdir(parents=True)
        place.touch()

    code, text = ended(base, tmp_path, before=at_call(train, "build_data", 1, act))
    assert code == 2, text
    assert f"another run has saved in {tmp_path / 'run'} meanwhile" in text
    assert not (tmp_path / "run" / NAME).exists()


# ---- a run folder that is renamed ---------------------------------------------------------------


def best(folder, *names):
    return {
        "dirpath": str(folder),
        "best_model_path": f"{folder}/{names[0]}",
        "kth_best_model_path": f"{folder}/{names[-1]}",
        "last_model_path": "",
        "best_k_models": {f"{folder}/{name}": i for i, name in enumerate(names)},
        "best_model_score": 0,
        "kth_value": len(names) - 1,
    }


def loaded(state, folder) -> BestCheckpoint:
    callback = BestCheckpoint(folder, monitor="val/nll", save_top_k=len(state["best_k_models"]))
    callback.load_state_dict(state)
    return callback


@pytest.mark.parametrize("names", [["best.ckpt"], ["best-step=2.ckpt", "best-step=4.ckpt"]])
@pytest.mark.parametrize("before", ["/old/place", None])
def test_scores_stay_where_their_files_have_come_along(before, names, tmp_path):
    for name in names:
        (tmp_path / name).touch()
    found, here = loaded(best(before or tmp_path, *names), tmp_path), best(tmp_path, *names)
    assert found.best_model_score == 0
    for name in ("best_k_models", "best_model_path", "kth_best_model_path", "kth_value"):
        assert getattr(found, name) == here[name]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_scores_of_files_that_are_elsewhere_are_forgotten(tmp_path):
    found = loaded(best("/old/place", "best.ckpt"), tmp_path)
    assert found.best_k_models == {}
    assert found.best_model_score is None


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "s3://bucket/best.ckpt",
        "FOLDER/../best.ckpt",
        "FOLDER/../../victim",
        "FOLDER/sub/best.ckpt",
        "FOLDER/step=4.ckpt",
        "FOLDER/last.ckpt",
        "best.ckpt",
    ],
)
@pytest.mark.parametrize(
    "name", ["best_k_models", "best_model_path", "kth_best_model_path", "last_model_path"]
)
def test_a_foreign_checkpoint_names_no_file_that_is_deleted(name, path, tmp_path):
    """Its state says what to delete when a better one comes."""
    path, folder = path.replace("FOLDER", str(tmp_path)), tmp_path / "run"
    folder.mkdir()
    path = path.replace(str(tmp_path), str(folder))
    state = best(folder, "best.ckpt")
    state[name] = {path: 1} if name == "best_k_models" else path
    callback = BestCheckpoint(folder, monitor="val/nll")
    callback.load_state_dict(state)
    assert callback.best_k_models == {}
    assert callback.best_model_path == callback.kth_best_model_path == ""
    assert callback.last_model_path == ""


# ---- data that do not come ----------------------------------------------------------------------


class Faulty(Dataset):
    def __init__(self, fault, *more):
        self.fault, self.more = fault, more

    def __getitems__(self, indices):
        if indices[0] == 3:
            self.fault()
        return {"row": indices[0], "more": [each.clone() for each in self.more]}


def gone():
    raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/cache/ids.bin")


def bug():
    raise RuntimeError("a bug of ours")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [(gone, DataFailure, "/cache/ids.bin"), (bug, RuntimeError, "a bug of ours")],
)
def test_a_fault_of_reading_is_told_from_a_bug(fault, kind, words, workers):
    loader = Loader(
        Faulty(fault), batch_sampler=[[i] for i in range(5)], collate_fn=dict, num_workers=workers
    )
    with pytest.raises(kind, match=words) as raised:
        list(loader)
    assert type(raised.value) is kind


@pytest.mark.parametrize("kind", ["rows", "documents", "streamed", "unreadable"])
def test_a_worker_writes_a_message_whole_or_not_at_all(kind, tmp_path, monkeypatch):
    """The kernel does so below PIPE_BUF: a worker that is killed leaves no half of one, for which
    the run would wait without end."""
    monkeypatch.setattr(streaming, "UNIT_CHARACTERS", 4000)  # of text at once; the rest is in store
    (tmp_path / "a.txt").write_text("one two three " * 300)
    words = tiny(tmp_path)
    words += [f"data.train={tmp_path / 'a.txt'}", "model.length=64", "block_size=16"]
    words += ["data.pack=documents"] * (kind == "documents")
    words += ["data.streaming=true"] * (kind in ("streamed", "unreadable"))
    config = settings.load([*words, "loader.batch_size=64", "loader.global_batch_size=64"])
    data = build_data.build_data(config, build_data.build_tokenizer(config), train=True)
    if kind == "unreadable":
        (tmp_path / "a.txt").write_bytes(b"\xff" * 9000)
    loader = data.train_dataloader()
    batch = loader.dataset.__getitems__(next(iter(loader.batch_sampler)))
    assert set(batch) >= {"error"} if kind == "unreadable" else {"input_ids"}
    assert ("bookmark" in batch) == (kind == "streamed")
    size = len(ForkingPickler.dumps((1 << 40, batch)))
    assert size + 16 < select.PIPE_BUF


def kill_a_worker():
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [(Diffusion, "training_step", 11), (Diffusion, "validation_step", 3)],
    ids=["training", "validation"],
)
def test_a_dead_worker_ends_the_run_saved(owner, name, call, base, whole, tmp_path):
    words = [*base, "loader.num_workers=1", "trainer.limit_val_batches=4"]
    if name == "training_step":
        words[-1] = "trainer.limit_val_batches=0"
    code, text = ended(words, tmp_path, before=at_call(owner, name, call, kill_a_worker))
    assert code == 1, text
    assert "a data worker (process " in text
    assert "was ended from outside" in text
    step = read(tmp_path / LAST)["global_step"]
    assert f"saved step {step}; the same command goes on from here" in text
    assert step >= 4
    if name == "training_step":
        code, text = ended(base, tmp_path)
        assert code == 0, text
        end, undisturbed = read(tmp_path / LAST), read(whole / LAST)
        for name in ("state_dict", "ema", "optimizer_states", "loops", "sampler"):
            assert differences(end[name], undisturbed[name], name) == []


def few_files():
    """Patch: no file can be opened from here on, but for a few."""

    def act(*arguments):
        used = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 3, used + 3))
        return real(*arguments)

    real, Loader._get_iterator = Loader._get_iterator, act


def test_too_few_files_for_the_workers_end_the_run(base, tmp_path):
    code, text = ended([*base, "loader.num_workers=4"], tmp_path, before=few_files)
    assert code == 1, text
    assert "Too many open files" in text.splitlines()[-1]  # of a worker, or of another file


def test_a_worker_without_descriptors_is_not_waited_for(monkeypatch):
    """Wherever on the way of a batch they run out: each margin is another place."""
    monkeypatch.setattr(_Workers._try_get_data, "__defaults__", (0.2,))  # torch looks each 5 s

    def limit(margin):
        def begin(worker):
            prepare_worker(worker)
            used = len(os.listdir("/proc/self/fd"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + margin, used + margin))

        return begin

    for margin in range(6):
        loader = Loader(
            Faulty(lambda: None, *torch.zeros(3, 4)),
            batch_sampler=[[i] for i in range(9)],
            collate_fn=dict,
            num_workers=1,
            worker_init_fn=limit(margin),
            persistent_workers=True,
        )
        with bounded(20), pytest.raises(DataFailure, match=r"came: Too many open files \(load"):
            list(loader)


def test_rows_that_cannot_be_read_end_the_run_saved(base, tmp_path):
    code, text = ended(base, tmp_path, before=at_call(TokenRows, "read", 11, gone))
    assert code == 1, text
    step = read(tmp_path / LAST)["global_step"]
    assert step >= 4
    assert text.splitlines()[-2:] == [
        f"saved step {step}; the same command goes on from here",
        "no batch came: /cache/ids.bin: No such file or directory (loader.num_workers=0)",
    ]


# ---- saving -------------------------------------------------------------------------------------


def no_room_from(step):
    """Patch: checkpoints of this step and later ones cannot be written."""
    real = CarefulIO.attempt

    def attempt(self, path, write, done="written"):
        def fail():
            raise OSError(errno.ENOSPC, "No space left on device")

        number = str(path).rpartition("=")[2].removesuffix(".ckpt")
        full = number.isdigit() and int(number) >= step
        return real(self, path, fail if full else write, done)

    CarefulIO.attempt = attempt


@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_stop_that_could_not_be_saved_is_no_success(policy, base, tmp_path):
    def before():
        no_room_from(5)
        at_call(Diffusion, "training_step", 11, tell(signal.SIGTERM))()

    code, text = ended([*base, f"checkpointing.on_save_error={policy}"], tmp_path, before=before)
    assert code == 1, text
    assert "stopping at step 6 on SIGTERM: could not save" in text
    assert read(tmp_path / LAST)["global_step"] == 4


def no_room_for_best():
    real = CarefulIO.attempt

    def attempt(self, path, write, done="written"):
        return real(self, path, no_room if str(path).endswith("best.ckpt") else write, done)

    CarefulIO.attempt = attempt


def test_a_best_checkpoint_that_is_not_written_is_a_failure(base, tmp_path):
    words = [*base[:-1], "trainer.limit_val_batches=1"]
    code, text = ended(words, tmp_path, before=no_room_for_best)
    assert code == 1, text
    assert "best.ckpt could not be written (No space left on device)" in text.splitlines()[-1]
    assert read(tmp_path / LAST)["global_step"] == 10


@pytest.mark.parametrize(("room_until", "code", "said"), [(99, 0, "saved"), (5, 1, "nothing")])
def test_the_end_of_its_time_is_a_failure_where_it_could_not_save(
    room_until, code, said, base, tmp_path
):
    def over():
        Deadline.over = lambda self: True

    def before():
        no_room_from(room_until)
        at_call(Diffusion, "training_step", 11, over)()

    got, text = ended([*base, "trainer.max_time=00:01:00:00"], tmp_path, before=before)
    assert got == code, text
    assert f"stopping at step 6: trainer.max_time has passed; {said}" in text


def test_a_run_folder_that_is_deleted_is_begun_anew(base, whole, tmp_path):
    folder = tmp_path / "run"
    act = at_call(Diffusion, "training_step", 13, lambda: shutil.rmtree(folder))
    code, text = ended(base, tmp_path, before=act)
    assert code == 0, text
    assert differences(read(tmp_path / LAST)["state_dict"], read(whole / LAST)["state_dict"]) == []
    assert (folder / "settings.json").exists()
    assert max(read_log(folder / "metrics.csv")["trainer/loss"]) == 10


def test_a_log_that_is_never_written_fails_the_run(base, tmp_path):
    def before():
        def write(self, step, figures):
            raise OSError(errno.ENOSPC, "No space left on device")

        CSVLog._write = write

    code, text = ended(base, tmp_path, before=before)
    assert code == 1, text
    assert text.count("metrics.csv: No space left on device") == 2
    assert read(tmp_path / LAST)["global_step"] == 10


@pytest.mark.parametrize("left", [b"", b'{"traceEvents": ['], ids=["nothing", "a part"])
def test_a_trace_that_is_not_whole_fails_the_run(left, base, tmp_path):
    """torch says nothing where it cannot write one."""

    def before():
        def export(self, path):
            Path(path).write_bytes(left) if left else None

        profiling.profile.export_chrome_trace = export

    code, text = ended([*base, "trainer.profiler=torch"], tmp_path, before=before)
    assert code == 1, text
    assert "trace-step=6-10.json.gz could not be written: torch could not write all" in text
    assert not [*(tmp_path / "run").glob("*trace*")]
    assert read(tmp_path / LAST)["global_step"] == 10


# ---- a cache ------------------------------------------------------------------------------------


def other_cache(words, folder):
    return [*words, f"data.cache_dir={folder / 'cache'}"]


def test_a_cache_that_is_deleted_while_it_is_read_stays_readable(base, whole, tmp_path):
    act = at_call(Diffusion, "training_step", 9, lambda: shutil.rmtree(tmp_path / "cache"))
    code, text = ended(other_cache(base, tmp_path), tmp_path, before=act)
    assert code == 0, text
    assert differences(read(tmp_path / LAST)["state_dict"], read(whole / LAST)["state_dict"]) == []


@pytest.mark.parametrize(("owner", "name"), [(preparation, "write_rows"), (shards, "tokenize")])
def test_a_stop_in_preparation_leaves_nothing_half_written(owner, name, base, tmp_path):
    words = [*other_cache(base, tmp_path), "mode=prepare"]
    act = at_call(owner, name, 1, tell(signal.SIGTERM))
    code, _ = run(words, tmp_path / "log", before=act)
    assert code == -signal.SIGTERM
    assert not [*(tmp_path / "cache").rglob("about.json")]
    code, text = run(words, tmp_path / "log")
    assert code == 0, text
    assert len([*(tmp_path / "cache").rglob("about.json")]) == 2


def test_a_full_disk_in_preparation_is_one_line(base, tmp_path):
    def before():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))

    log = tmp_path / "log"
    code, text = run([*other_cache(base, tmp_path), "mode=prepare"], log, before=before)
    assert code == 2, text
    assert "File too large" in text
    assert str(tmp_path / "cache") in text
    assert "Traceback" not in text
    assert not [*(tmp_path / "cache").rglob("ids.bin")]


# ---- output -------------------------------------------------------------------------------------


def into(descriptor: int, path: str | None):
    """Patch: a descriptor is closed, or goes there."""

    def act():
        os.close(descriptor)
        if path is not None:
            opened = os.open(path, os.O_WRONLY)
            if opened != descriptor:
                os.dup2(opened, descriptor)

    return act


def unread_pipe():
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)


FULL = "standard output could not be written: No space left on device"


@pytest.mark.parametrize(
    ("words", "before", "code", "said"),
    [
        (["--help"], into(1, "/dev/full"), 2, FULL),
        (["--cfg", "job"], into(1, "/dev/full"), 2, FULL),
        (["--help"], into(1, None), 0, ""),
        (["--help"], unread_pipe, 0, ""),
        (["--help"], into(2, None), 0, "main.py"),
        (["no=setting"], into(2, "/dev/full"), 2, ""),
        (["no=setting"], into(2, None), 2, ""),
    ],
)
def test_output_that_does_not_arrive_is_told(words, before, code, said, tmp_path):
    got, text = run(words, tmp_path / "log", before=before, program=main.command)
    assert got == code, text
    assert said in text
    assert "Traceback" not in text
    assert len(text.splitlines()) == 1 or said != FULL


@pytest.mark.parametrize(
    ("descriptor", "path", "code"),
    [(1, "/dev/full", 1), (2, "/dev/full", 0), (1, None, 0)],
)
def test_a_run_goes_on_without_its_output(descriptor, path, code, base, whole, tmp_path):
    got, text = ended(base, tmp_path, before=into(descriptor, path))
    assert got == code, text
    assert (FULL in text) == (code == 1)
    assert differences(read(tmp_path / LAST)["state_dict"], read(whole / LAST)["state_dict"]) == []


# ---- sampling and evaluation --------------------------------------------------------------------


def no_room():
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("words", "fault", "file"),
    [
        (["mode=sample_eval"], at_call(sample_file, "write_whole", 1, no_room), "texts.csv"),
        (["mode=sample_eval"], at_call(sample_file, "write_whole", 2, no_room), "texts.csv.log"),
        (["mode=sample_eval"], at_call(utils.os, "fsync", 1, no_room), "texts.csv"),
        (["mode=sample_eval"], at_call(utils.os, "fsync", 3, no_room), "texts.json"),
        (["mode=ppl_eval"], at_call(utils.os, "fsync", 1, no_room), "ppl_valid"),
    ],
)
def test_results_that_cannot_be_written_are_a_failure(words, fault, file, base, whole, tmp_path):
    words = [
        *base[:-1],
        *words,
        f"eval.checkpoint_path={whole / LAST}",
        "eval.gen_ppl_eval_model_name_or_path=null",
        f"sampling.logdir={tmp_path / 'texts.csv'}",
        "loader.eval_batch_size=1",
    ]
    code, text = ended(words, tmp_path, before=fault)
    assert code == 1, text
    lines = [line for line in text.splitlines() if "No space left on device" in line]
    assert len(lines) == 1
    assert file in lines[0]
