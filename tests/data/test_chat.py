"""data.format=chat from a record to a batch: which tokens are of answers, by an identity on the
text, whatever the template; how conversations lie in rows; what is refused."""

import json
import os
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chats import CHATML, TALK, TEMPLATES, some, talk, tokenizer, write
from conftest import GOLDEN

from data import packing, shards, streaming
from data.chat import rendering
from data.chat.encoding import ChatEncoder
from data.chat.rendering import Renderer, Template
from data.order import ExampleIndex
from data.packing import SCORED
from data.preparation import prepare
from data.remote_cache import CacheDir
from data.split import Split
from data.tokenizer import get_tokenizer
from dataloader import StreamedExamples

LENGTH, ALIGN = 256, 8


def piece(messages, place="here"):
    return json.dumps([place, messages])


def encoded(messages, template=CHATML, align=1, train=True, length=LENGTH):
    """(the tokenizer, ids, which are scored)"""
    made = tokenizer(template)
    (ids,) = ChatEncoder(made, length, align, train)([piece(messages)])
    ids = np.array(ids, np.int64)
    return made, ids & ~SCORED, ids & SCORED > 0


def runs_of(made, ids, scored):
    """The texts of what is scored, one for each run."""
    edges = np.flatnonzero(np.diff(scored, prepend=0, append=0))
    return [made.decode(ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


END = "<|endoftext|>"
LEARNT = {
    "chatml": ["Yes.<|im_end|>", "A model, 2 of them.<|im_end|>"],
    "inst": [f" Yes. {END}", f" A model, 2 of them. {END}"],
    "thinking": ["Yes.<|im_end|>", "<think>\n\n</think>\n\nA model, 2 of them.<|im_end|>"],
    "begun": ["Yes.<|im_end|>", "A model, 2 of them.<|im_end|>"],
    "lines": ["Yes.\n", f"A model, 2 of them.\n{END}"],
    "marked": ["Yes.<|im_end|>\n", f"A model, 2 of them.<|im_end|>\n{END}"],
    "plain": [f" Yes.{END}", f" A model, 2 of them.{END}"],
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_their_ends_are_scored(name):
    messages = TALK if name != "inst" else TALK[1:]
    assert runs_of(*encoded(messages, TEMPLATES[name])) == LEARNT[name]


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - {"plain"}))
def test_the_ids_are_those_of_transformers_up_to_the_last_answer(name):
    messages = TALK if name != "inst" else TALK[1:]
    made, ids, scored = encoded(messages, TEMPLATES[name])
    whole = made.hf.apply_chat_template(messages, return_dict=False)
    kept = len(ids) - (name in ("lines", "marked"))  # where EOS is added
    assert whole[:kept] == ids[:kept].tolist()
    assert set(made.decode(whole[kept:])) <= {"\n"}
    if name == "marked":
        found = made.hf.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        assert found["assistant_masks"][:kept] == scored[:kept].astype(int).tolist()


def test_an_answer_like_any_other_part_of_the_text_is_found():
    """By the identity; a search for the words would find them elsewhere."""
    for answer in ("i", "user", "0", "<|im_end|>", "assistant\n", " 1 "):
        messages = talk(answer, answer, answer, answer)
        found = runs_of(*encoded(messages))
        assert found == [f"{answer}<|im_end|>"] * 2


def test_what_the_model_is_asked_with_ends_where_the_answer_begins():
    made, ids, scored = encoded(TALK)
    asked = made.hf.apply_chat_template(TALK[:4], add_generation_prompt=True, return_dict=False)
    assert ids[: len(asked)].tolist() == asked
    assert scored[len(asked) :].all()
    assert not scored[len(asked) - 1]


def test_what_follows_the_last_answer_is_left_out():
    made, ids, _ = encoded(TALK[:4])
    assert made.decode(ids).endswith("Yes.<|im_end|>")


def test_a_token_that_reaches_into_an_answer_is_scored():
    """GPT-2 reads two line breaks as one token."""
    gpt2 = get_tokenizer("gpt2")
    gpt2.hf.chat_template = TEMPLATES["lines"].replace("'assistant: '", "'assistant:'")
    (ids,) = ChatEncoder(gpt2, LENGTH, 1, True)([piece(talk("a", "\n\nYes"))])
    first = next(i for i in ids if i & SCORED)
    assert gpt2.decode([first & ~SCORED]).strip(" ") in ("\n\n", "\n", "")
    text = gpt2.decode([i & ~SCORED for i in ids if i & SCORED])
    assert text.strip() == f"Yes\n{END}"


@pytest.mark.parametrize(("train", "fill"), [(True, END), (False, "[MASK]")])
def test_the_last_block_is_filled(train, fill):
    """For training with EOS, which is learnt; for evaluation with masks, which nobody scores."""
    made, ids, scored = encoded(talk("hi", "you"), align=ALIGN, train=train)
    plain = encoded(talk("hi", "you"))[1]
    rest = made.decode(ids[len(plain) :])
    assert rest == fill * (-len(plain) % ALIGN) != ""
    assert len(ids) % ALIGN == 0
    assert scored[len(plain) :].all() == train


def split(path, which="train", template=CHATML, align=ALIGN, length=LENGTH, fields=None):
    return Split(
        str(path),
        which,
        tokenizer=tokenizer(template),
        length=length,
        align=align,
        whole=True,
        insert_eos=False,
        insert_special=False,
        chat=fields or {},
    )


def rows(tmp_path, *records, processes=1, **how):
    path = write(tmp_path / "a.jsonl", *records)
    cache = CacheDir(tmp_path / f"cache{processes}")
    return prepare(split(path, **how), cache, processes)


def conversations(ids, scored, documents):
    """Each document of rows: (its ids, which are scored)."""
    found = []
    for row in range(len(ids)):
        for number in range(1, documents[row].max() + 1):
            here = documents[row] == number
            assert np.flatnonzero(here)[0] % ALIGN == 0
            found.append((tuple(ids[row][here]), tuple(scored[row][here])))
    return sorted(found)


def of_rows(made):
    numbers = list(range(len(made)))
    ids, scored = made.read(numbers)
    return conversations(ids, scored, made.document_ids(numbers))


def expected(records):
    found = (encoded(record["messages"], align=ALIGN)[1:] for record in records)
    return sorted((tuple(ids), tuple(scored.astype(int))) for ids, scored in found)


def test_rows_hold_whole_conversations_that_begin_at_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_CHARACTERS", 2000)
    records = some(24)
    made = rows(tmp_path, *records, processes=2)
    again = rows(tmp_path, *records, processes=0)
    assert made.about["left_out"] == 0
    assert of_rows(made) == expected(records)
    assert (made.ids == again.ids).all()
    assert (made.marks == again.marks).all()


def test_a_conversation_longer_than_a_row_is_left_out_and_counted(tmp_path, caplog):
    short, most = talk("hi", "yo"), talk("hi", "y" * 58)
    size = len(encoded(most, align=ALIGN)[1])
    records = [{"messages": each} for each in (short, most, talk("hi", "y" * 59))]
    made = rows(tmp_path, *records, length=size)
    assert made.about["left_out"] == 1
    assert made.about["documents"] == 3
    assert "1 of 3 conversations are left out, as they are longer than model.length" in caplog.text
    assert len(of_rows(made)) == 2
    with pytest.raises(ValueError, match=r"not one row of model.length=8; use a larger model.leng"):
        rows(tmp_path, *records, length=8)


def test_a_streamed_text_gives_the_same_conversations(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "UNIT_CHARACTERS", 400)
    records = some(12)
    path = write(tmp_path / "a.jsonl", *records)
    text = streaming.streamed(split(path), tmp_path)
    examples = StreamedExamples(text, 1, 0, 1, list, int)
    found = {}
    for start in range(0, 96, 4):
        batch = examples.__getitems__([ExampleIndex(i, i) for i in range(start, start + 4)])
        assert (batch["attention_mask"].bool() <= (batch["document_ids"] > 0)).all()
        arrays = (batch[name].numpy() for name in ("input_ids", "attention_mask", "document_ids"))
        found |= dict.fromkeys(conversations(*arrays))
    assert set(found) == set(expected(records))


SHAREGPT = {"messages": "conversations", "role": "from", "content": "value"}
SHAREGPT |= {"user": "human", "assistant": "gpt"}


def test_files_name_their_fields(tmp_path):
    """Messages, pairs, a map of names, parts of text, parquet: all the same conversation."""
    given = [{"messages": talk("hi", "yo")}]
    wanted = expected(given)
    theirs = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    parts = talk("hi", [{"type": "text", "text": "yo"}])
    records = {
        "pair": ({"prompt": "hi", "response": "yo", "id": 3}, {}),
        "names": ({"question": "hi", "a": "yo"}, {"prompt": "question", "response": "a"}),
        "sharegpt": ({"conversations": theirs}, SHAREGPT),
        "parts": ({"messages": parts}, {}),
    }
    for name, (record, fields) in records.items():
        (tmp_path / name).mkdir()
        assert of_rows(rows(tmp_path / name, record, fields=fields)) == wanted, name
    table = {"id": [1], "conversations": [theirs], "prompt": [None]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    made = prepare(split(tmp_path / "a.parquet", fields=SHAREGPT), CacheDir(tmp_path / "p"))
    assert of_rows(made) == wanted


def test_rows_of_another_template_or_map_have_another_name(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "hi", "response": "yo"})
    hows = [{}, {"template": None}, {"fields": {"user": "human"}}, {"which": "valid"}]
    assert len({split(path, **how).folder_name for how in hows}) == 4


def message(**fields):
    return {"messages": [{"role": "user", "content": "hi"}, fields]}


BAD = {  # a line, what is said of it
    "no assistant": ({"messages": talk("hi")}, "has no turn of the assistant, so nothing to learn"),
    "unknown role": (
        message(role="bot", content="yo"),
        "messages, message 2: the role 'bot' is none of system, developer, user, assistant, tool;",
    ),
    "role of a number": (message(role=3, content="yo"), "message 2: the role 3 is none of"),
    "content null": (
        message(role="assistant", content=None),
        "messages, message 2: content is null, not text",
    ),
    "content a number": (message(role="assistant", content=5), "content is int, not text"),
    "an image": (
        message(role="assistant", content=[{"type": "image_url", "image_url": "x"}]),
        "messages, message 2: content has a part of type 'image_url'; only text can be read",
    ),
    "messages no list": ({"messages": "hi"}, "messages is text, not a list of messages"),
    "no message": ({"messages": []}, "messages is an empty list, not a list of messages"),
    "a message that is text": ({"messages": ["hi"]}, "message 1 is text, not an object of role"),
    "no content": (message(role="assistant"), "message 2 has no 'content', only 'role'; name it"),
    "a tool": (
        message(role="assistant", content="", tool_calls=[{}]),
        "message 2 has tool_calls: calls of tools cannot be trained on here",
    ),
    "an empty answer": ({"messages": talk("hi", " \n")}, "has an empty answer; give it text"),
    "other fields": (
        {"text": "hi"},
        "has neither 'messages' nor 'prompt' and 'response', only 'text'; name them in data.chat_f",
    ),
    "half a pair": ({"prompt": "hi", "response": None}, "has neither 'messages' nor 'prompt' and"),
    "half a character": ({"prompt": "hi", "response": "\ud83d"}, "holds half of a surrogate pair"),
    "an array": ([1], "is list, not an object of fields"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named_with_its_line(name, tmp_path):
    record, said = BAD[name]
    path = write(tmp_path / "a.jsonl", {"prompt": "hi", "response": "yo"}, record)
    with pytest.raises(ValueError) as raised:
        prepare(split(path), CacheDir(tmp_path / "cache"))
    text = str(raised.value)
    assert text.startswith(f"data: {path}, line 2")
    assert said in text
    assert "\n" not in text


def test_files_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("hi")
    with pytest.raises(ValueError, match=r"a.txt is no file of conversations: .*jsonl and .parque"):
        prepare(split(tmp_path / "a.txt"), CacheDir(tmp_path / "cache"))
    pq.write_table(pa.table({"text": ["hi"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet, row 0 has neither 'messages'.* only 'text'"):
        prepare(split(tmp_path / "a.parquet"), CacheDir(tmp_path / "cache"))


FOREIGN = {  # a template, what is said of it
    "raises": ("{{ raise_exception('roles must\n alternate') }}", "roles must alternate"),
    "is broken": ("{% for %}", "Expected an expression"),
    "names what is not there": ("{{ messages[7].content }}", "has no element 7"),
    "calls what is not there": ("{{ ''.__class__.mro() }}", "unsafe"),
    "loops for ever": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}",
        "it has not ended after 1 s",
    ),
    "makes 1 GB": ("{{ 'a' * 1000000000 }}", "it needs more than 256 MiB"),
    "makes too much": ("{{ 'a' * 5000000 }}", "it makes a text of more than 4,194,304 characters"),
    "makes 100 GB": ("{{ 'a' * 100000000000 }}", "it needs more than 256 MiB"),
    "loses the answer": ("{{ messages[0].content }}", "it changes the text of message 2"),
    "changes the answer": (
        CHATML.replace("message.content", "message.content | upper"),
        "it changes the text of message 2, an answer",
    ),
    "writes it twice": (
        CHATML.replace("message.content", "message.content + ' or ' + message.content"),
        "it changes the text of message 2, an answer",
    ),
    "marks another part": (
        TEMPLATES["marked"].replace("== 'assistant' %}{% gen", "== 'user' %}{% gen"),
        "its generation marks leave out the answer of message 2",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_template_that_fails_is_one_line_with_the_conversation(name, monkeypatch, tmp_path):
    template, said = FOREIGN[name]
    if "has not ended" in said:
        monkeypatch.setattr(rendering, "SECONDS", 1)
    path = write(tmp_path / "a.jsonl", {"messages": talk("hi", "yo")})
    with pytest.raises(ValueError) as raised:
        prepare(split(path, template=template), CacheDir(tmp_path / "cache"))
    text = str(raised.value)
    failed = "the chat template of data.tokenizer_name_or_path fails: "
    assert text.startswith(f"data: {path}, line 1: {failed}")
    assert said in text
    assert "\n" not in text


def test_a_renderer_goes_on_after_a_conversation_that_failed(monkeypatch):
    endless = "{% if messages[0].content == 'x' %}" + FOREIGN["loops for ever"][0] + "{% endif %}"
    monkeypatch.setattr(rendering, "SECONDS", 1)
    renderer = Renderer(Template(endless + CHATML, {}))
    wanted = renderer.answers(talk("hi", "yo"))
    with pytest.raises(ValueError, match="not ended"):
        renderer.answers(talk("x", "yo"))
    assert renderer.answers(talk("hi", "yo")) == wanted


def test_what_renders_ends_with_its_owner_and_holds_none_of_its_files():
    renderer = Renderer(Template(CHATML, {}))
    renderer.answers(talk("hi", "yo"))
    child = renderer._child
    assert len(os.listdir(f"/proc/{child}/fd")) == 4  # the three standard ones and its channel
    renderer._channel.close()
    renderer._owner = None
    for _ in range(100):
        if os.waitpid(child, os.WNOHANG)[0] == child:
            return
        time.sleep(0.05)
    raise AssertionError("it goes on")


def test_what_renders_ends_with_the_last_of_its_texts():
    renderer = Renderer(Template(CHATML, {}))
    renderer.answers(talk("hi", "yo"))
    child = renderer._child
    del renderer
    assert not os.path.exists(f"/proc/{child}")


def test_a_tokenizer_without_places_is_refused():
    made = replace(tokenizer(), hf=SimpleNamespace(is_fast=False))
    with pytest.raises(ValueError, match="needs a tokenizer that tells the place of each token"):
        ChatEncoder(made, LENGTH, 1, True)


def test_scored_tokens_need_whole_documents():
    with pytest.raises(ValueError, match="give `whole`"):
        packing.RowFormat(8, True, False, False, bos=0, eos=1, pad=2, align=4, scored=True)


def test_text_rows_keep_their_names(tmp_path):
    """What is added for conversations does not touch the name of other rows."""
    made = get_tokenizer(str(GOLDEN / "tokenizer"))
    about = Split("shakespeare", "train", tokenizer=made, length=32).ways
    assert "chat" not in about
    assert "scored" not in about["shape"]
