"""What mode=demo shows of a text while it is written, without the page and its server."""

import functools
import html
import time
from html.parser import HTMLParser

import pytest
import torch
from conftest import GOLDEN
from networks import CHECKPOINTS
from sampling_tools import Table

from sampling import live
from sampling.live import Control, Job, Progress, Text, piece_reader, plain, side_html, text_html
from sampling.notebook import load
from settings.limits import LIMITS
from utils import escaped

TOKENIZER = str(GOLDEN / "tokenizer")
HOSTILE = (
    "<script>window.flag = 1</script>",
    "</p><img src onerror=flag=1>",
    "\" onmouseover=\"alert(1)' x='",
    "&lt;b&gt; &amp; &#60;",
    "${flag = 1} {{flag}} `",
    "\x00\x07\x1b[2J\r\x7f",
    "\u202egnp.exe\u2066\u200b",
    "\ud800 half \udfff",
    "two\nlines\u2028three",
)


class Read(HTMLParser):
    """The tags of a page with their attributes, and its text, as a browser takes them."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.text = [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")

    handle_decl = handle_pi = unknown_decl = handle_comment


@functools.cache
def writer_of(name, **params):
    return load(GOLDEN / CHECKPOINTS[name]["file"], tokenizer=TOKENIZER, num_steps=4, **params)


@pytest.fixture(scope="module")
def blocks():
    return writer_of("bd3lm_bs4")


def written(text: Text, pause: float = 0.0) -> Text:
    for _ in Job([text], pause).run():
        pass
    return text


# as text


@pytest.mark.parametrize("hostile", HOSTILE, ids=ascii)
def test_whatever_a_token_says_is_text(hostile):
    read = Read(plain(hostile))
    assert read.tags == []
    assert read.text == "\n".join(map(escaped, hostile.split("\n")))
    assert all(c.isprintable() or c == "\n" for c in read.text)
    read.text.encode()

    progress = Progress([1, 0, 2], [0.25, None, None], [3, 0, 0], 3)
    page = text_html(progress, 0, lambda token: hostile, seen=2)
    read = Read(page)
    assert [tag for tag, _ in read.tags] == ["div", "span", "span", "span"]
    assert [set(found) for _, found in read.tags[1:]] == [{"class", "title"}] * 3
    fresh, masked, given = (found for _, found in read.tags[1:])
    assert (fresh["class"], masked["class"], given["class"]) == ("fresh", "masked", "given")
    assert fresh["title"] == f"{escaped(repr(hostile))}, probability 0.250, evaluation 3"
    assert read.text == f"{Read(plain(hostile)).text}░{Read(plain(hostile)).text}"


def test_problems_that_quote_the_user_are_text():
    read = Read(live.refused_html(f"prompt 1 ({HOSTILE[0]!r}) is too long"))
    assert [tag for tag, _ in read.tags] == ["div", "p"]
    assert "<script>" in read.text


def test_tokens_are_fresh_once():
    progress = Progress([5, 6], [0.5, 0.5], [1, 2], 2)
    states = [
        [found["class"] for _, found in Read(text_html(progress, 0, str, seen)).tags[1:]]
        for seen in (0, 1, 2, None)
    ]
    assert states == [["fresh"] * 2, ["settled", "fresh"], ["settled"] * 2, ["settled"] * 2]


def test_pieces_make_up_the_text(blocks):
    words = blocks.tokenizer
    ids = words.encode("the work of the first")
    piece = piece_reader(words)
    assert "".join(map(piece, ids)) == words.decode(ids)


class Spaced:
    """A tokenizer that puts spaces between words, as BERT's does."""

    bos_id = 0
    words = ("[CLS]", "all", "the", "##re")

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids).replace(" ##", "")


def test_pieces_keep_the_space_that_stands_between_words():
    assert "".join(map(piece_reader(Spaced()), [1, 2, 3])) == " all there"


# as it is written


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("bd3lm_bs4", {"length": 12}),
        ("bd3lm_bs4", {"length": 16, "steps": "threshold", "threshold": 0.02, "temperature": 0.5}),
        (
            "bd3lm_bs4",
            {"length": 16, "steps": "confidence", "k": 2, "top_k": 20, "kv_cache": False},
        ),
        ("bd3lm_bs16", {"steps": "remask", "remask_eta": 0.5, "num_steps": 8}),
        ("bd3lm_bs16", {"steps": "low_confidence", "k": 4, "corrector": 5}),
        ("mdlm", {"steps": "ancestral", "nucleus_p": 0.9}),
        ("ar", {"length": 12}),
    ],
)
def test_each_token_has_the_probability_that_the_network_gave_it(name, changes):
    """What is shown equals what the network says of the text as it was before the evaluation; and
    to look on does not change the text."""
    writer = writer_of(name)
    text = Text(writer, "the", changes)
    frames, after = [], Progress.after

    def noting(progress, frame, seconds):
        frames.append(frame)
        return after(progress, frame, seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "after", noting)
        assert written(text).problem is None
    alone = writer.generate("the", **changes).samples[0]
    assert text.progress.tokens == alone.tokens.tolist() == text.sample.tokens.tolist()
    assert text.sample.nfe == alone.nfe == text.progress.nfe == len(frames)
    expected = [None] * len(alone.tokens)
    for frame in frames:
        drawn = (frame.before != frame.tokens)[0].nonzero()[:, 0]
        found = writer.log_probs(frame.before, drawn.tolist())[0]
        for i, row in zip(drawn.tolist(), found, strict=True):
            expected[i] = float(row[frame.tokens[0, i]].exp())
    given = text.sample.given
    assert text.progress.chances[:given] == expected[:given] == [None] * given
    shown = torch.tensor(text.progress.chances[given:])
    torch.testing.assert_close(shown, torch.tensor(expected[given:]), rtol=1e-4, atol=0)
    assert all(0 < n <= alone.nfe for n in text.progress.evaluations[given:])


def test_sedd_has_no_probabilities_to_show():
    text = written(Text(writer_of("sedd"), "", {}))
    assert text.sample.nfe == 5
    assert set(text.progress.chances) == {None}
    assert "probability" not in side_html(text, str, None)


def test_gaps_are_filled_between_words_that_stay(blocks):
    prompt = "the [MASK][MASK] work [MASK] a"
    text = Text(blocks, prompt, {})
    given = text.request.tokens
    assert given.count(blocks.tokenizer.mask_id) == 3
    written(text)
    kept = [i for i, token in enumerate(given) if token != blocks.tokenizer.mask_id]
    assert [text.progress.tokens[i] for i in kept] == [given[i] for i in kept]
    assert [i for i, n in enumerate(text.progress.evaluations) if n == 0] == kept
    assert len(text.progress.tokens) == len(given)
    assert live.figures(text).startswith("NFE 3 · 3 tokens written · 1.00 tokens per evaluation")


def test_two_texts_side_by_side_are_those_of_each_alone(blocks):
    wanted = [{"seed": 1, "length": 12}, {"seed": 2, "length": 12, "steps": "threshold"}]
    alone = [written(Text(blocks, "", changes)).progress.tokens for changes in wanted]
    texts = [Text(blocks, "", changes) for changes in wanted]
    looks = list(Job(texts, pause=0.001).run())
    assert [text.progress.tokens for text in texts] == alone
    assert all(text.ended for text in texts)
    assert len(looks) >= 2


def test_a_pause_is_not_counted(blocks):
    begun = time.perf_counter()
    text = written(Text(blocks, "[MASK][MASK][MASK]", {}), pause=0.05)
    assert 0 < text.progress.seconds < time.perf_counter() - begun - 3 * 0.05


@pytest.mark.parametrize("told", [True, False], ids=["stopped", "forsaken"])
def test_a_text_ends_where_nobody_wants_the_rest(blocks, told, monkeypatch):
    monkeypatch.setattr(live, "FORSAKEN", 10 if told else -1)
    text = Text(blocks, "", {})
    job = Job([text], pause=0.02)
    for _ in job.run():
        if told and text.progress.nfe:
            job.stop.set()
    assert text.problem == "stopped"
    assert 0 < text.progress.nfe < 31
    page = side_html(text, piece_reader(blocks.tokenizer), None)
    assert 'class="side problem"' in page
    assert "masked" in page


def test_an_error_of_the_work_is_a_sentence():
    def law(tokens, position):
        raise RuntimeError("<b>the device is gone</b>")

    bad = writer_of("bd3lm_bs4", kv_cache=False)
    object.__setattr__(bad, "denoise", Table(law, 301, 300, block_size=4))
    text = written(Text(bad, "", {}))
    assert text.problem == "<b>the device is gone</b>"
    assert "&lt;b&gt;the device is gone" in side_html(text, str, None)


# what cannot be

K = Control("sampling.k", "k", 1, "", whole=True, rules=("confidence",), limit=LIMITS["at least 1"])
P = Control("sampling.nucleus_p", "nucleus_p", 1.0, "", limit=LIMITS["in (0, 1]"])
STEPS = Control("sampling.steps", "steps", "a", "", names=("confidence", "threshold"))


def test_a_side_reads_what_its_rule_does():
    assert live.read([STEPS, K, P], ["confidence", 2.0, 1]) == {
        "steps": "confidence",
        "k": 2,
        "nucleus_p": 1.0,
    }
    assert live.read([STEPS, K, P], ["threshold", None, 0.5]) == {
        "steps": "threshold",
        "nucleus_p": 0.5,
    }


@pytest.mark.parametrize(
    ("control", "value", "expected"),
    [
        (K, 1.5, "sampling.k=1.5 must be a whole number"),
        (K, None, "sampling.k= must be a whole number"),
        (K, True, "sampling.k=True must be a whole number"),
        (K, 0, "sampling.k=0 must be at least 1"),
        (K, 1e300, "must be at most 4294967295"),
        (P, float("nan"), "sampling.nucleus_p=nan must be a number"),
        (P, float("inf"), "sampling.nucleus_p=inf must be a number"),
        (P, "0.5", "sampling.nucleus_p=0.5 must be a number"),
        (P, 1.5, "sampling.nucleus_p=1.5 must be in (0, 1]"),
        (STEPS, "<b>", "sampling.steps=<b> must be one of confidence, threshold"),
        (STEPS, ["confidence"], "must be one of confidence, threshold"),
        (STEPS, None, "must be one of confidence, threshold"),
    ],
)
def test_values_that_cannot_be_are_named(control, value, expected):
    with pytest.raises(ValueError) as error:
        control.read(value)
    assert expected in str(error.value)


def test_all_wrong_values_are_named_at_once():
    with pytest.raises(ValueError, match=r"sampling.k=0 .*; sampling.nucleus_p=0 "):
        live.read([STEPS, K, P], ["confidence", 0, 0])


@pytest.mark.parametrize(
    ("name", "prompt", "changes", "expected"),
    [
        ("bd3lm_bs4", "the " * 40, {}, r"44 tokens with BOS.* room for 31: shorten it"),
        ("bd3lm_bs4", "a" * 70_000, {}, "70,000 characters, more than 65,536: shorten it"),
        ("bd3lm_bs4", "half \ud800", {}, "half of a pair"),
        ("bd3lm_bs4", "", {"length": 30}, "block_size=4 does not divide model.length=30"),
        ("bd3lm_bs4", "", {"steps": "confidence", "k": 5}, "k=5 is more than the block_size=4"),
        ("ar", "a [MASK]", {}, "offered by bamdlm and mdlm, not by algo=ar"),
        ("mdlm", "", {"window": 1}, "need at least 2 tokens"),
    ],
)
def test_texts_that_cannot_be_written_are_refused_with_a_sentence(name, prompt, changes, expected):
    with pytest.raises(ValueError, match=expected):
        Text(writer_of(name), prompt, changes)


def test_entities_do_not_come_twice():
    assert html.unescape(plain("&lt;")) == "&lt;"
