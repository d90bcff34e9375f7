"""A run whose checkpoints lie in S3 (a server process): killed while saving, it ends the same."""

import io
import os
import signal

import pytest
from runs import ALGORITHMS, differences, run, tiny

from checkpointing import torch_file

boto3 = pytest.importorskip("boto3")
s3fs = pytest.importorskip("s3fs")

BUCKET, FOLDER = "resumed", "runs/a"
MOMENTS = (  # (what is about to be called in the save of step 4, the files that are there by then)
    ("mv", ["step=4.ckpt.partial"]),
    ("cp_file", ["step=4.ckpt"]),  # to last.ckpt
)
FEW = ["trainer.max_steps=6", "callbacks.checkpoint_monitor=null"]  # each request takes its time


@pytest.fixture
def client(s3):
    """Runs have a client of their own."""
    made = boto3.client(
        "s3",
        endpoint_url=s3["AWS_ENDPOINT_URL"],
        region_name=s3["AWS_DEFAULT_REGION"],
        aws_access_key_id=s3["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=s3["AWS_SECRET_ACCESS_KEY"],
    )
    made.create_bucket(Bucket=BUCKET)
    return made


def names(client) -> list[str]:
    found = client.list_objects_v2(Bucket=BUCKET, Prefix=FOLDER).get("Contents", [])
    return sorted(each["Key"].rpartition("/")[2] for each in found)


def last(client) -> dict:
    answer = client.get_object(Bucket=BUCKET, Key=f"{FOLDER}/checkpoints/last.ckpt")
    return torch_file.load(io.BytesIO(answer["Body"].read()), "last.ckpt")


def killed_in(name):
    """Patch for the new process: SIGKILL as the client's method is called."""

    def deadly(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    return lambda: setattr(s3fs.S3FileSystem, name, deadly)


def test_killed_while_saving_it_goes_on_to_the_same_end(s3, client, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # its log lies under outputs/
    place = f"{BUCKET}/{FOLDER}"
    save_dir = f"checkpointing.save_dir=s3://{place}"
    overrides = [*tiny(tmp_path), *ALGORITHMS["bamdlm"], *FEW, save_dir]
    code, text = run(overrides, tmp_path / "log", environment=s3)
    assert code == 0, text
    assert f"run folder: s3://{place} (its log: outputs/s3/{place})" in text
    assert (tmp_path / f"outputs/s3/{place}/metrics.csv").exists()
    at_the_end = ["last.ckpt", "step=4.ckpt", "step=6.ckpt"]
    assert names(client) == at_the_end
    expected = last(client)
    for name in at_the_end:
        client.delete_object(Bucket=BUCKET, Key=f"{FOLDER}/checkpoints/{name}")

    for name, there in MOMENTS:
        code, text = run(overrides, tmp_path / "log", before=killed_in(name), environment=s3)
        assert code == -signal.SIGKILL, f"{name}: {text}"
        assert names(client) == there, name
    code, text = run(overrides, tmp_path / "log", environment=s3)
    assert code == 0, text
    assert f"going on from step 4 of s3://{place}/checkpoints/step=4.ckpt" in text
    assert names(client) == at_the_end
    assert differences(last(client), expected) == []
