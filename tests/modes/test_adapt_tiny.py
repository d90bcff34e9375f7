"""A tiny Llama, trained as AR on Shakespeare and adapted, against the same steps from scratch."""

import pytest

import main
from training.log_reading import read_log


@pytest.mark.slow
def test_what_the_ar_model_knows_is_kept(tmp_path):
    """Perplexity of validation as block diffusion, S = 4, after 200 steps of the same recipe."""

    def run(name, *words):
        folder = tmp_path / name
        assert main.main([*words, f"checkpointing.save_dir={folder}"]) == 0
        return read_log(folder / "metrics.csv")

    run("ar", "experiment=adapt_tiny_ar")
    start = f"training.from_pretrained={tmp_path / 'ar/checkpoints/last.ckpt'}"
    adapted = run("adapted", "experiment=adapt_tiny", start)
    scratch = run("scratch", "experiment=adapt_tiny")
    # the bounds are measured on the same rows with the same noise
    assert adapted["val/ppl"][200] < scratch["val/ppl"][200]
    # what the first step knows is the AR network's: in blocks of one the two losses are one
    assert adapted["trainer/ar_loss"][10] < scratch["trainer/ar_loss"][10] - 1
