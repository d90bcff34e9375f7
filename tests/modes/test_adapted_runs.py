"""Runs with adapt.*: training and what its log says, then every reader of the checkpoint."""

import pytest
import torch
from runs import ends_with_2, tiny

import main
from checkpointing.layouts import read_checkpoint
from sampling.notebook import load
from scripts import export_hf
from training.log_reading import read_log

ADAPT = ["adapt.clean=causal", "adapt.label=next"]
COMMON = ["algo=bamdlm", "block_size=4", "model.dropout=0"]
LLAMA = ["algo.backbone=llama", "model.n_kv_heads=1", "model.rope_theta=1e4"]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=["dit", "llama"])
def run(request, tmp_path_factory):
    """The words of a finished run, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    words = [*tiny(folder), *COMMON, *(LLAMA if request.param == "llama" else ())]
    training = ["adapt.ar_loss=.5", "training.block_schedule={0: 1, 3: 4}", "trainer.max_steps=6"]
    training += ["training.noise=counts", "trainer.val_check_interval=12"]
    saved = f"checkpointing.save_dir={folder / 'run'}"
    assert main.main([*words, *ADAPT, *training, saved]) == 0
    return words, folder / "run"


def test_both_losses_are_logged(run):
    log = read_log(run[1] / "metrics.csv")
    for step, loss in log["trainer/loss"].items():
        parts = log["trainer/diffusion_loss"][step], log["trainer/ar_loss"][step]
        assert loss == pytest.approx(parts[0] + 0.5 * parts[1], rel=1e-5)
        assert min(parts) > 0
        assert 0 < log["trainer/masked_share"][step] <= 1
    assert list(log["trainer/ar_loss"]) == list(range(1, 7))


def test_a_run_without_it_logs_one_loss(run, tmp_path):
    words = [*run[0], "trainer.max_steps=1", "trainer.limit_val_batches=0"]
    words += ["callbacks.checkpoint_monitor=null", f"checkpointing.save_dir={tmp_path}"]
    assert main.main(words) == 0
    assert not {"trainer/ar_loss", "trainer/diffusion_loss"} & set(
        read_log(tmp_path / "metrics.csv")
    )


def test_its_checkpoint_is_read_as_it_was_trained(run, tmp_path, capsys):
    words, folder = run
    last = folder / "checkpoints/last.ckpt"
    assert read_checkpoint(last).block_sizes == (1, 4)
    used = [*words, f"eval.checkpoint_path={last}", f"checkpointing.save_dir={tmp_path}"]
    assert main.main([*used, *ADAPT, "mode=ppl_eval", "eval.likelihood=[exact]"]) == 0
    texts = ["sampling.batch_size=2", f"sampling.logdir={tmp_path / 'texts.csv'}"]
    texts += ["eval.gen_ppl_eval_model_name_or_path=null", "sampling.kv_cache=true"]
    assert main.main([*used, *ADAPT, *texts, "mode=sample_eval"]) == 0
    for mode in ("ppl_eval", "sample_eval"):
        said = ends_with_2([*used, f"mode={mode}", "adapt.label=next", *texts], capsys)
        assert "was trained with adapt.clean=causal, here it is block" in said


def test_exports_and_notebooks_know_it(run, tmp_path):
    """The same texts from the checkpoint, from a folder, and from transformers."""
    from transformers import AutoModelForMaskedLM

    last, folder = run[1] / "checkpoints/last.ckpt", tmp_path / "export"
    assert export_hf.main([str(last), str(folder)]) == 0
    ids = [load(last).tokenizer.encode("a cat sat")]
    given = {"length": 16, "seed": 5, "batch_size": 1}
    found = [load(path).generate("a cat", **given).samples[0].tokens for path in (last, folder)]
    assert torch.equal(*found)
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
    prompt = found[0][None, : 1 + len("a cat")]
    made = model.generate(prompt, seed=5, max_length=16)
    assert torch.equal(made[0], found[0])
    scores = [load(path).nll(ids, likelihood="exact")[0].nll for path in (last, folder)]
    torch.testing.assert_close(*scores)
    writer = load(folder)
    assert writer.denoise.adapt.causal
    assert writer.denoise.adapt.shifted
    with pytest.raises(ValueError, match="no token is predicted at position 0"):
        writer.log_probs([[writer.tokenizer.mask_id, 1, 2, 3]])
    states = writer.hidden_states(ids)
    with torch.no_grad():
        asked = {"attention_mask": writer.denoise.attention_mask}
        plain = writer.denoise.backbone.hidden(torch.tensor(ids), **asked)
    torch.testing.assert_close(states[-1], plain)


def test_servers_compute_no_such_network(run, tmp_path, capsys):
    last = run[1] / "checkpoints/last.ckpt"
    assert export_hf.main([str(last), str(tmp_path / "x"), "--format", "sdar"]) != 0
    said = capsys.readouterr().err
    if "dit" not in said:
        assert "servers compute adapt.clean=block, it was trained with clean=causal" in said
