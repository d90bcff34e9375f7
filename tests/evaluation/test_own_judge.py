"""An autoregressive checkpoint of this project judges texts and makes their features."""

import json

import pytest
import torch
from checkpoint_helpers import recorded_file, variant
from conftest import GOLDEN
from networks import CHECKPOINTS, MANIFEST
from runs import write_text

import main
import settings
from checkpointing import export
from checkpointing.layouts import read_checkpoint
from data.tokenizer import get_tokenizer
from evaluation.judge import load_judge
from modes.build_data import build_rows, build_tokenizer
from sampling.notebook import load

TOKENIZER, SPLITS = GOLDEN / "tokenizer", ("train", "valid")


def trained(folder, inserted):
    """A checkpoint that says this of data.insert_train_special, or nothing."""

    def change(raw):
        data = raw["hyper_parameters"]["config"]["data"]
        data["tokenizer_name_or_path"] = str(TOKENIZER)
        if inserted is not None:
            data["insert_train_special"] = inserted

    return variant(folder, "ar", change).rename(folder / "ar.ckpt")


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return load_judge(recorded_file("ar", tmp_path_factory.mktemp("ar")), batch_size=3)


@pytest.mark.usefixtures("_launch_folder")
def test_its_score_is_the_exact_likelihood_of_ppl_eval(tmp_path):
    plain = trained(tmp_path, False)
    words = ["mode=ppl_eval", "algo=ar", "data=files", "wandb=null", "trainer.accelerator=cpu"]
    words += [f"data.{kind}={write_text(tmp_path / 'valid.txt', 99, 2)}" for kind in SPLITS]
    words += ["data.insert_valid_special=false", "data.insert_valid_eos=false"]
    words += [f"data.cache_dir={tmp_path}", f"data.tokenizer_name_or_path={TOKENIZER}"]
    words += [f"model.{key}={MANIFEST[key]}" for key in ("hidden_size", "n_blocks", "n_heads")]
    words += [f"model.length={MANIFEST['length']}", "loader.num_workers=0"]
    words += [f"eval.checkpoint_path={plain}"]
    words += [f"checkpointing.save_dir={tmp_path}"]
    assert main.main(words) == 0
    (path,) = tmp_path.glob("ppl_*.json")
    found = json.loads(path.read_text())
    config = settings.load(words)
    ids = build_rows(config, build_tokenizer(config), "valid").ids
    judge = load_judge(str(plain), batch_size=3)
    assert judge.context == ids.shape[1] == MANIFEST["length"]
    scores = judge.score_tokens([torch.tensor(row) for row in ids])
    assert sum(s.tokens for s in scores) == found["tokens"] > 100
    assert sum(s.nll for s in scores) == pytest.approx(found["nll"] * found["tokens"], rel=1e-5)


def test_a_text_longer_than_the_training_is_seen_in_windows(judge, tmp_path):
    """They move by half the context, so that every token but the first is scored with some before
    it, and each begins with BOS."""
    (ids,) = judge.tokenize(["the work of the king and the day of the night " * 4])
    (score,) = judge.score_tokens([ids])
    context, half = judge.context, judge.context // 2
    assert len(ids) > 2 * context
    model, total, done = load(recorded_file("ar", tmp_path)), 0.0, 1
    assert ids[0] == model.params.bos_id
    for start in range(0, len(ids), half):
        part = ids[start : start + context]
        if start:
            part = torch.cat([ids[:1], part[:-1] if len(part) == context else part])
        end = start + len(part) - bool(start)
        read = range(len(part) - (end - done), len(part))
        if read:
            log_p = model.log_probs(part, read)[0]
            total -= float(log_p.gather(1, part[list(read)][:, None]).double().sum())
            done = end
    assert score.nll == pytest.approx(total, rel=1e-5)
    assert score.tokens == len(ids) - 1


@pytest.mark.parametrize("inserted", [None, True, False])
def test_a_text_begins_as_the_rows_of_the_training_did(inserted, tmp_path):
    """The published code puts BOS there where a run does not say. A text is scored alike with BOS
    and without; an export remembers."""
    file = trained(tmp_path, inserted)
    folder = export.export(
        read_checkpoint(file), tmp_path / "export", get_tokenizer(str(TOKENIZER))
    )
    for path in (file, folder):
        judge = load_judge(str(path))
        plain, begun = judge.score(["the work of the king", "<|endoftext|>the work of the king"])
        (ids,) = judge.tokenize(["the work of the king"])
        assert (plain == begun) == (ids[0] == judge.eos_id) == (inserted is not False)
        assert plain.tokens == len(ids) - 1
        assert judge.context == MANIFEST["length"] - (inserted is not False)  # there is EOS


def test_rows_of_bos_and_eos_alone_are_no_judge(tmp_path):
    def change(raw):
        raw["hyper_parameters"]["config"]["model"]["length"] = 2
        raw["hyper_parameters"]["config"]["data"]["tokenizer_name_or_path"] = str(TOKENIZER)

    with pytest.raises(ValueError, match="rows of 2 tokens hold nothing but BOS and EOS"):
        load_judge(str(variant(tmp_path, "ar", change)))


def test_no_window_is_asked_for_eos_alone(judge, monkeypatch):
    """The last place of a text that the model ended."""
    asked = []
    monkeypatch.setattr(judge, "_nll", lambda ids, batch: asked.extend(batch) or [0.0] * len(batch))
    ids = torch.arange(1, judge.context + 1)
    judge.score_tokens([ids, torch.cat([ids, torch.tensor([judge.eos_id])])])
    assert [(w.start, w.stop) for w in asked] == [(0, judge.context)] * 2


def test_an_export_judges_as_the_checkpoint_does(judge, tmp_path):
    tokenizer = get_tokenizer(str(TOKENIZER))
    found = read_checkpoint(GOLDEN / CHECKPOINTS["ar"]["file"])
    folder = export.export(found, tmp_path / "export", tokenizer)
    other = load_judge(str(folder))
    texts = ["the work of the king", "any", "a<|endoftext|>the day"]
    for one, two in zip(judge.score(texts), other.score(texts), strict=True):
        assert one.nll == pytest.approx(two.nll, rel=1e-6)
        assert (one.tokens, one.entropy) == (two.tokens, two.entropy)
    assert load(folder).generate("any").texts  # which also finds its tokenizer there


@pytest.mark.parametrize("name", ["mdlm", "sedd", "bd3lm_bs4"])
def test_a_bidirectional_model_is_no_judge(name):
    algo = {"bd3lm_bs4": "bamdlm"}.get(name, name)
    said = rf"=.* cannot be used \(it holds {algo} weights, and a judge must be autoregressive\)"
    with pytest.raises(ValueError, match=f"eval.gen_ppl_eval_model_name_or_path{said}"):
        load_judge(str(GOLDEN / CHECKPOINTS[name]["file"]))
    with pytest.raises(ValueError, match=f"^--judge{said}"):
        load_judge(str(GOLDEN / CHECKPOINTS[name]["file"]), setting="--judge")
    with pytest.raises(ValueError, match="cannot be used"):
        load_judge(str(GOLDEN / "hf_export"))


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "last.ckpt").write_text("no")
    with pytest.raises(ValueError, match=r"gen_ppl_eval_model_name_or_path=.*last.ckpt"):
        load_judge(str(tmp_path / "last.ckpt"))


@pytest.mark.parametrize("own", [True, False])
def test_features_are_the_last_states_whatever_the_batch(own, judge):
    """Of a model of transformers: the states that it returns itself."""
    judge = judge if own else load_judge(str(GOLDEN / "judge"), batch_size=3)
    texts = ["the work of the king", "any", "", "the day " * 60, "of the"]
    ids = judge.tokenize(texts)
    together = judge.last_states(ids)
    assert together.shape[0] == len(texts)
    for x, found in zip(ids, together, strict=True):
        torch.testing.assert_close(found, judge.last_states([x])[0], rtol=1e-5, atol=1e-5)
    x = ids[0]
    if own:
        states = judge.model.backbone.output_layer.norm_final(
            load_states(judge.model.backbone, x)[-1]
        )
    else:
        with torch.no_grad():
            states = judge.model(input_ids=x[None], output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(together[0], states[0, -1].detach(), rtol=1e-5, atol=1e-5)


def load_states(backbone, ids):
    from models.masks import Causal

    with torch.no_grad(), backbone.states() as states:
        backbone.hidden(ids[None], attention_mask=Causal())
    return states
