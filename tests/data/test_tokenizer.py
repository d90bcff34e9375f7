"""Tokenizers against the recordings and the rules of the specification (section 2)."""

import json

import pytest
from conftest import GOLDEN, load_json

from data import tokenizer, vocabularies
from data.packaged import shakespeare
from data.tokenizer import get_tokenizer


@pytest.fixture(scope="module")
def golden():
    return get_tokenizer(str(GOLDEN / "tokenizer"))


@pytest.fixture(scope="module")
def recorded():
    return load_json("tokenizer/examples.json")


@pytest.fixture(scope="module")
def text8():
    return get_tokenizer("text8")


@pytest.fixture(scope="module")
def gpt2():
    return get_tokenizer("gpt2")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def bpe(cache):
    return get_tokenizer("shakespeare-bpe", cache_dir=cache)


def test_a_tokenizer_without_mask_gets_one_more_id(golden, recorded):
    assert golden.vocab_size == recorded["vocab_size_of_diffusion"]
    assert golden.mask_id == recorded["mask_index_of_diffusion"]
    assert (golden.bos_id, golden.eos_id) == (recorded["bos"], recorded["eos"])


def test_padding_shares_the_id_of_the_mask_where_there_is_none(golden, recorded):
    assert golden.pad_id == recorded["pad_id_ref"] == golden.mask_id


def test_ids_are_those_recorded(golden, recorded):
    """`raw_ids`: the reference adds [PAD] to the tokenizer, and with it a text that contains
    "[PAD]" gets mask tokens in clean data. Here no text encodes to the mask; else the two agree."""
    for example in recorded["examples"]:
        assert golden.encode(example["text"]) == example["raw_ids"]
        if "[PAD]" not in example["text"]:
            assert golden.encode(example["text"]) == example["ref_ids_no_special"]


def test_decoding_gives_what_was_recorded(golden, recorded):
    for example in recorded["examples"]:
        assert golden.decode(example["raw_ids"]) == example["decoded"]


def test_decoding_shows_a_mask_outside_the_vocabulary(golden):
    ids = golden.encode("the work")
    assert golden.decode([*ids, golden.mask_id, *ids]) == "the work[MASK]the work"


def test_batches_encode_as_single_texts(golden, recorded):
    texts = [example["text"] for example in recorded["examples"]]
    assert golden.encode_batch(texts) == [golden.encode(text) for text in texts]


def test_text8_is_the_recorded_character_tokenizer(text8):
    recorded = load_json("data/text8.json")
    assert text8.hf.get_vocab() == recorded["vocab"]
    assert text8.vocab_size == recorded["vocab_size"]  # it has a mask token: no id is added
    for name in ("bos", "eos", "pad", "mask"):
        assert getattr(text8, f"{name}_id") == recorded[name]
    for row in recorded["rows"]:
        assert text8.encode(row["text"]) == row["ids"]
        assert text8.decode(row["ids"]) == row["decoded"]
    specials = {recorded[name] for name in ("bos", "eos", "mask", "pad", "unk")}
    assert text8.hf.convert_ids_to_tokens(sorted(specials)) == [
        token
        for token, id in sorted(recorded["vocab"].items(), key=lambda x: x[1])
        if id in specials
    ]


def test_gpt2_needs_no_network(gpt2):
    assert (gpt2.vocab_size, gpt2.mask_id, gpt2.pad_id) == (50258, 50257, 50257)
    assert gpt2.bos_id == gpt2.eos_id == 50256
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("<|endoftext|>") == [50256]
    text = "café — £2\n\n  it's “fine”"
    assert gpt2.decode(gpt2.encode(text)) == text


@pytest.mark.parametrize("name", ["golden", "text8", "gpt2", "bpe"])
def test_a_saved_folder_loads_as_the_same_tokenizer(name, request, tmp_path):
    from transformers import AutoTokenizer

    saved = request.getfixturevalue(name)
    saved.save(tmp_path)
    text = "the king said: who's there? \n anon"
    plain = AutoTokenizer.from_pretrained(tmp_path)
    assert plain(text, add_special_tokens=False)["input_ids"] == saved.encode(text)
    again = get_tokenizer(str(tmp_path))
    assert again.fingerprint == saved.fingerprint
    assert again.mask_id == saved.mask_id
    assert again.decode(saved.encode(text)) == saved.decode(saved.encode(text))


def test_fingerprints_tell_tokenizers_apart(golden, text8, gpt2, bpe):
    other_end = get_tokenizer(str(GOLDEN / "tokenizer"), eos_token="a")
    prints = [t.fingerprint for t in (golden, text8, gpt2, bpe, other_end)]
    assert len(set(prints)) == len(prints)


def test_shakespeare_bpe_spells_every_play(bpe):
    assert (bpe.vocab_size, bpe.mask_id) == (
        vocabularies.CORPUS_TOKENS + 1,
        vocabularies.CORPUS_TOKENS,
    )
    assert bpe.bos_id == bpe.eos_id == bpe.encode("<|endoftext|>")[0]
    texts = [*shakespeare.documents("validation"), "unseen: ÄÖ 漢字 🙂"]
    ids = bpe.encode_batch(texts)
    assert [bpe.decode(document) for document in ids] == texts
    characters_per_token = sum(map(len, texts)) / sum(map(len, ids))
    assert 2.5 < characters_per_token < 3


def test_shakespeare_bpe_is_trained_once_and_kept(bpe, cache, monkeypatch):
    monkeypatch.setattr(vocabularies, "train_bpe", None)  # a second training would fail
    assert get_tokenizer("shakespeare-bpe", cache_dir=cache).fingerprint == bpe.fingerprint
    (folder,) = (path for path in (cache / "tokenizers").iterdir() if path.is_dir())
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, f"{folder.name}.lock"}


def test_training_a_tokenizer_twice_gives_the_same():
    texts = list(shakespeare.documents("validation"))[:5]
    once, twice = (tokenizer.wrap(vocabularies.train_bpe(texts, 400), "x") for _ in range(2))
    assert once.fingerprint == twice.fingerprint
    assert len(once.hf) == 400


def test_a_training_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    class Interrupted:
        def save_pretrained(self, folder):
            raise KeyboardInterrupt

    monkeypatch.setattr(vocabularies, "train_bpe", lambda *_: Interrupted())
    with pytest.raises(KeyboardInterrupt):
        get_tokenizer("shakespeare-bpe", cache_dir=tmp_path)
    assert not list((tmp_path / "tokenizers").iterdir())


def test_eos_token_can_be_another_word_of_the_vocabulary():
    """The published LM1B models end with [CLS]."""
    ended = tokenizer.wrap(vocabularies.characters("abc"), "abc", eos_token="[CLS]")
    assert ended.eos_id == 0
    with pytest.raises(ValueError, match=r"data.eos_token='\[NO\]' is not in the vocabulary"):
        tokenizer.wrap(vocabularies.characters("abc"), "abc", eos_token="[NO]")


def bert_like():
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    backend = Backend(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.enable_truncation(3)
    backend.enable_padding(length=3)
    names = ("pad", "unk", "cls", "sep", "mask")
    roles = {f"{name}_token": f"[{name.upper()}]" for name in names}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def test_bert_uses_its_own_mask_cls_and_sep():
    bert = tokenizer.wrap(bert_like(), "bert")
    assert (bert.vocab_size, bert.mask_id, bert.pad_id) == (7, 4, 0)
    assert (bert.bos_id, bert.eos_id) == (2, 3)


def test_saved_truncation_and_padding_do_not_touch_documents():
    bert = tokenizer.wrap(bert_like(), "bert")
    assert bert.encode_batch(["a b a b a", "a"]) == [[5, 6, 5, 6, 5], [5]]


def test_a_tokenizer_that_cannot_end_a_document_is_refused(tmp_path):
    hf = vocabularies.train_bpe(["to be or not to be"], 270)
    hf.bos_token = hf.eos_token = None
    hf.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no end-of-sequence .* set data.eos_token"):
        get_tokenizer(str(tmp_path))
    usable = get_tokenizer(str(tmp_path), eos_token="<|endoftext|>")
    assert (
        usable.bos_id == usable.eos_id == len(hf) - 1
    )  # where only an end is given, it begins as well


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(ValueError, match=r"holds no tokenizer .*; it needs tokenizer.json and"):
        get_tokenizer(str(tmp_path))


def test_a_model_beside_a_tokenizer_that_is_damaged_is_named(tmp_path):
    vocabularies.character_set("abc").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json' is not a valid JSON.*download it again$"):
        get_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["/nowhere/words", "./words", "../words", "~/words"])
def test_a_path_that_does_not_exist_is_not_taken_for_a_model_of_the_hub(name):
    with pytest.raises(FileNotFoundError, match=f"_path={name} does not exist: name the folder"):
        get_tokenizer(name)


def test_an_unreachable_hub_is_told_in_one_line(monkeypatch):
    def unreachable(name):
        raise OSError("no connection: unreachable")

    monkeypatch.setattr(vocabularies, "download", unreachable)
    with pytest.raises(ValueError, match=r"bert-base-uncased is neither .*unreachable.* its path"):
        get_tokenizer("bert-base-uncased")


def test_a_hub_tokenizer_is_taken_from_the_local_cache(tmp_path, golden, monkeypatch):
    """As huggingface_hub lays its cache out; nothing is asked of a network."""
    from huggingface_hub import constants
    from transformers.utils import hub

    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    golden.save(snapshot)
    (snapshot / "config.json").write_text('{"model_type": "gpt2"}')
    refs = tmp_path / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    if "TRANSFORMERS_CACHE" in vars(hub):
        monkeypatch.setattr(hub, "TRANSFORMERS_CACHE", str(tmp_path))
    monkeypatch.setattr(vocabularies, "download", None)
    assert get_tokenizer("some/model").fingerprint == golden.fingerprint


def test_fingerprint_is_short_and_stable(golden):
    assert len(golden.fingerprint) == 16
    assert json.dumps(golden.fingerprint)
    assert get_tokenizer(str(GOLDEN / "tokenizer")).fingerprint == golden.fingerprint
