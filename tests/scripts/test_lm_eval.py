"""lm-eval with this project's models, on local tasks; where it is installed
(requirements-lm-eval.txt)."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDEN
from hub_folders import with_tokenizer
from networks import CHECKPOINTS
from runs import tiny_of_checkpoint

import main
from scripts import export_hf

pytest.importorskip("lm_eval.api.model", reason="lm-eval is not installed")

SCRIPT = Path(__file__).parents[2] / "scripts" / "lm_eval.py"
TOKENIZER = str(GOLDEN / "tokenizer")
PAIRS = [("the work of", " any"), ("", "the other"), ("of the", " same state and"), ("a", " b c d")]


def requests(pairs):
    return [SimpleNamespace(args=pair) for pair in pairs]


@pytest.fixture(scope="module")
def adapter():
    found = importlib.util.spec_from_file_location("bamdlm_lm_eval", SCRIPT)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def model(adapter, name, **options):
    file = GOLDEN / CHECKPOINTS[name]["file"]
    return adapter.BlockDiffusionLM(str(file), tokenizer=TOKENIZER, device="cpu", **options)


@pytest.mark.parametrize("name", ["bd3lm_bs4", "bd3lm_bs16", "mdlm", "ar"])
@pytest.mark.parametrize("likelihood", ["greedy", "left_to_right", "counts", "iw:2"])
def test_the_batch_does_not_matter(adapter, name, likelihood):
    alone = model(adapter, name, likelihood=likelihood, batch_size=1)
    together = model(adapter, name, likelihood=likelihood, batch_size=8)
    found = [lm.loglikelihood(requests(PAIRS), disable_tqdm=True) for lm in (alone, together)]
    for (one, one_greedy), (many, many_greedy) in zip(*found, strict=True):
        assert one == pytest.approx(many, rel=1e-5)
        assert one_greedy == many_greedy
        assert one < 0


def test_what_the_greedy_rule_writes_is_greedy(adapter):
    """The samplers, with the likeliest token at the likeliest place, write what is_greedy says."""
    lm = model(adapter, "bd3lm_bs4", likelihood="greedy", steps="confidence")
    request = SimpleNamespace(args=("the work of", {"max_gen_toks": 9, "until": []}))
    prompt = lm.given(lm.tok_encode("the work of"))
    params = lm.model.params.changed(length=16, nucleus_p=1e-9, steps="confidence")
    asked = [adapter.TextRequest(0, tuple(prompt))]
    groups = adapter.generate("bamdlm", lm.model.denoise, asked, params)
    ((sample,),) = [group for group in groups if group]
    ids = sample.tokens.tolist()
    (answer,) = lm._loglikelihood_tokens([(None, prompt, ids[len(prompt) :])], True)
    assert answer[1] is True
    ids[-1] = (ids[-1] + 1) % 300
    (answer,) = lm._loglikelihood_tokens([(None, prompt, ids[len(prompt) :])], True)
    assert answer[1] is False
    assert isinstance(lm.generate_until([request], disable_tqdm=True)[0], str)


def test_a_context_that_is_cut_keeps_its_bos(adapter):
    lm = model(adapter, "bd3lm_bs4")
    assert lm.cut([lm.prefix_token_id, 5, 6, 7], 3) == [lm.prefix_token_id, 6, 7]
    assert lm.cut([lm.prefix_token_id, 5, 6, 7], 4) == [lm.prefix_token_id, 5, 6, 7]
    assert lm.cut([lm.prefix_token_id, 5, 6, 7], 1) == [7]  # the model sees a token at least
    assert model(adapter, "ar").cut([4, 5, 6, 7], 3) == [5, 6, 7]


def test_stop_strings_end_a_text(adapter):
    lm = model(adapter, "bd3lm_bs4")
    whole = lm._continued("the work", {"max_gen_toks": 12})
    middle = whole[len(whole) // 2]
    assert (
        lm._continued("the work", {"max_gen_toks": 12, "until": [middle]}) == whole.split(middle)[0]
    )


def test_rolling_scores_every_token_once(adapter):
    text = "the work of any other state and the same " * 6
    lm = model(adapter, "bd3lm_bs4", likelihood="left_to_right")
    ids = lm.tok_encode(text)
    assert len(ids) > 2 * lm.max_length
    (total,) = lm.loglikelihood_rolling(requests([(text,)]), disable_tqdm=True)
    counted = []
    lm._loglikelihood_tokens = lambda windows, quiet: [
        (counted.extend(w[2]), (-1.0, False))[1] for w in windows
    ]
    lm.loglikelihood_rolling(requests([(text,)]), disable_tqdm=True)
    assert counted == ids
    assert total < 0


def test_ar_has_the_numbers_of_lm_evals_own_adapter(adapter, tmp_path):
    """The same weights in an exported folder, which lm-eval's `hf` loads by its path."""
    pytest.importorskip("lm_eval.models.huggingface", reason="needs accelerate")
    from lm_eval.api.registry import get_model

    folder = tmp_path / "export"
    checkpoint = str(GOLDEN / CHECKPOINTS["ar"]["file"])
    assert export_hf.main([checkpoint, str(folder), "--tokenizer", TOKENIZER]) == 0
    words = f"pretrained={folder},trust_remote_code=True"
    theirs = get_model("hf").create_from_arg_string(words, {"batch_size": 2, "device": "cpu"})
    lm = model(adapter, "ar")
    assert theirs.max_length == lm.scorer.length
    pairs = [*PAIRS, ("the work " * 40, " any other")]
    ours, other = (x.loglikelihood(requests(pairs), disable_tqdm=True) for x in (lm, theirs))
    for (mine, greedy), (his, his_greedy) in zip(ours, other, strict=True):
        assert mine == pytest.approx(his, abs=1e-4)
        assert greedy == his_greedy
    texts = requests([("the work of any other state " * 12,), ("the",)])
    ours, other = (x.loglikelihood_rolling(texts, disable_tqdm=True) for x in (lm, theirs))
    assert ours == pytest.approx(other, abs=1e-4)


def adapted(folder, place):
    """A checkpoint of block diffusion that has the weights of the folder: the first step of a
    warm-up has the rate 0."""
    words = [*tiny_of_checkpoint(place), "algo=bamdlm", "block_size=1", "algo.backbone=llama"]
    words += ["adapt.clean=causal", "adapt.label=next", "trainer.max_steps=1", "model.length=32"]
    words += [f"training.from_pretrained={folder}", f"data.tokenizer_name_or_path={folder}"]
    assert main.main([*words, f"checkpointing.save_dir={place / 'run'}"]) == 0
    return place / "run" / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_a_model_of_transformers_has_the_numbers_of_lm_evals_own_adapter(adapter, family, tmp_path):
    """As ar, and untrained as block diffusion in blocks of one, with causal clean tokens and the
    label at the token before. That lm-eval takes one token less: all of its tokens are seen."""
    HFLM = pytest.importorskip("lm_eval.models.huggingface", reason="needs accelerate").HFLM
    folder = with_tokenizer(tmp_path / "model", family=family)
    as_ar = adapter.BlockDiffusionLM(str(folder), algo="ar", device="cpu")
    file = str(adapted(folder, tmp_path))
    in_blocks = adapter.BlockDiffusionLM(file, device="cpu", add_bos_token=False)
    assert in_blocks.get_model_info()["likelihood_is"] == "exact"
    for lm in (as_ar, in_blocks):
        given = {"max_length": lm.max_length - 1, "batch_size": 2, "device": "cpu"}
        hf = HFLM(pretrained=str(folder), **given)
        next_id = hf.model(torch.tensor([hf.tok_encode("of the")])).logits[0, -1].argmax()
        likeliest = ("of the", hf.tok_decode([int(next_id)]))
        pairs = requests([*PAIRS, likeliest, ("the work " * 4, " any other")])
        ours, theirs = (x.loglikelihood(pairs, disable_tqdm=True) for x in (lm, hf))
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
        assert ours[len(PAIRS)][1]
        whole = requests([("the work of any other state " * 12,), ("the",)])
        rolling = [x.loglikelihood_rolling(whole, disable_tqdm=True) for x in (lm, hf)]
        figures = [*(value for value, _ in ours), *rolling[0]]
        wanted = [*(value for value, _ in theirs), *rolling[1]]
        gaps = [abs(a - b) for a, b in zip(figures, wanted, strict=True)]
        print(f"{family}, {lm.model.writes}: {figures} differ from hf by at most {max(gaps):.1e}")
        assert figures == pytest.approx(wanted, rel=1e-7, abs=1e-4)


def test_sedd_is_refused(adapter):
    with pytest.raises(ValueError, match="not defined for sedd"):
        model(adapter, "sedd")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_local_task_runs_offline(tmp_path, processes):
    rows = [{"text": f"{a}{b}", "start": a, "choices": [b, " of"]} for a, b in PAIRS[:3]]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    files = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
    )
    choice = "output_type: multiple_choice\ndoc_to_text: '{{start}}x'\ndoc_to_target: 0\n"
    choice += "doc_to_choice: '{{choices}}'\nmetric_list: [{metric: acc}]\n"
    rolling = "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    rolling += "metric_list: [{metric: word_perplexity}]\n"
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name, body in (("our_choice", choice), ("our_rolling", rolling)):
        (tasks / f"{name}.yaml").write_text(f"task: {name}\n{files}{body}")
    checkpoint = GOLDEN / CHECKPOINTS["bd3lm_bs4"]["file"]
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    done = subprocess.run(
        [
            sys.executable,
            *launch,
            str(SCRIPT),
            *("--model", "bamdlm", "--tasks", "our_choice,our_rolling", "--device", "cpu"),
            *("--model_args", f"checkpoint={checkpoint},tokenizer={TOKENIZER},likelihood=greedy"),
            *("--include_path", str(tasks), "--output_path", str(tmp_path / "out")),
        ],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "out").rglob("results*.json")
    report = json.loads(path.read_text())
    assert report["config"]["likelihood"] == "greedy"
    assert report["results"]["our_rolling"]["word_perplexity,none"] > 1
    assert 0 <= report["results"]["our_choice"]["acc,none"] <= 1
