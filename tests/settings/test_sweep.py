"""sampling.sweep: its points, and what is refused before anything is loaded."""

import pytest

import settings
from modes.sampling_params import sampling_problems

MANY = [*range(32)]
WORDS = [
    "mode=sample_eval",
    "algo=bamdlm",
    "block_size=4",
    "model=tiny",
    "model.length=128",
    "trainer.accelerator=cpu",
    "eval.checkpoint_path=/dev/null",
    "eval.gen_ppl_eval_model_name_or_path=null",
    "sampling.logdir=/tmp/texts-of-nobody.csv",
    "data.train=shakespeare",
]


def examined(swept, *more):
    return settings.examine([*WORDS, *more, f"sampling.sweep={swept}"], [sampling_problems])


def points(swept, *more):
    config, problems, _ = examined(swept, *more)
    assert problems == []
    return settings.sweep(config)


def problems(swept, *more):
    _, found, _ = examined(swept, *more)
    return found


def test_points_are_the_combinations_in_their_order():
    made = points("{temperature: [1, 0.5], nucleus_p: [0.9, 1], seed: [3, 2]}")
    assert [point.text for point in made.points] == [
        f"temperature={t} nucleus_p={p} seed={s}"
        for t in (1.0, 0.5)
        for p in (0.9, 1.0)
        for s in (3, 2)
    ]
    assert made.combinations == 8
    last = made.points[-1].config
    assert (last.sampling.temperature, last.sampling.nucleus_p, last.seed) == (0.5, 1.0, 2)
    assert last.sampling.sweep is None


def test_numbers_that_a_rule_does_not_read_make_no_points():
    made = points("{steps: [first_hitting, threshold, confidence], threshold: [.6, .9], k: [1, 2]}")
    assert [point.text for point in made.points] == [
        "steps=first_hitting",
        "steps=threshold threshold=0.6",
        "steps=threshold threshold=0.9",
        "steps=confidence k=1",
        "steps=confidence k=2",
    ]
    (point,) = points("{steps: [null]}").points
    assert point.text == "steps=null"
    assert made.combinations == 12
    assert made.points[0].config.sampling.threshold == 0.9  # as without the sweep


def test_a_point_has_the_settings_of_a_command_of_its_own():
    made = points("{steps: [null, ancestral], T: [8], context_size: [64]}")
    for point, words in zip(
        made.points,
        (
            ["sampling.context_size=64"],
            ["sampling.steps=ancestral", "algo.T=8", "sampling.context_size=64"],
        ),
        strict=True,
    ):
        alone, wrong, _ = settings.examine([*WORDS, *words], [sampling_problems])
        assert wrong == []
        assert point.config == alone


def test_a_run_without_a_sweep_is_one_point():
    made = points("null")
    assert [(point.text, point.values) for point in made.points] == [("", {})]


@pytest.mark.parametrize(
    ("swept", "said"),
    [
        ("{}", "sampling.sweep={} names no setting: write {steps: ["),
        ("3", "sampling.sweep=3 must be lists of values by name, like {"),
        ("[1]", "sampling.sweep=[1] must be lists of values by name, like {"),
        ("threshold", "sampling.sweep=threshold must be lists of values by name, like {"),
        ("{threshold: 0.5}", "sampling.sweep: threshold=0.5 must be a list of values"),
        ("{threshold: []}", "sampling.sweep: threshold=[] must be a list of values"),
        ("{thresold: [1]}", "sampling.sweep: there is no thresold to go through. Did you mean thr"),
        ("{batch_size: [1]}", "sampling.sweep: there is no batch_size to go through."),
        ("{prompt: [a]}", "sampling.sweep: there is no prompt to go through. Names are context_si"),
        ("{3: [1]}", "sampling.sweep={3: [1]} must be lists of values by name, like {"),
        ("{temperature: [a]}", "sampling.sweep: sampling.temperature=a must be a number"),
        ("{temperature: [[1]]}", "sampling.sweep: sampling.temperature=[1] must be a number"),
        ("{k: [null]}", "sampling.sweep: sampling.k=null must be a whole number"),
        ("{kv_cache: [1]}", "sampling.sweep: sampling.kv_cache=1 must be True or False"),
        ("{top_k: [-1]}", "sampling.sweep: sampling.top_k=-1 must be at least 0"),
        ("{steps: [frist_hitting]}", "sampling.sweep: sampling.steps=frist_hitting must be one of"),
        ("{k: [1, 2]}", "sampling.sweep: k has no effect in any point"),
        (
            "{steps: [ancestral, first_hitting]}",
            "sampling.sweep, point steps=ancestral: algo.T=0: sampling.steps=ancestral takes algo.",
        ),
        (
            "{steps: [confidence], k: [4, 5]}",
            "sampling.sweep, point steps=confidence k=5: sampling.k=5 is more than the block_size=",
        ),
        ("{block_size: [3, 4]}", "sampling.sweep, point block_size=3: block_size=3 does not divid"),
        (f"{{seed: {MANY}, top_k: {MANY}}}", "sampling.sweep has 1,024 combinations, more than 1,"),
    ],
)
def test_what_cannot_be_is_one_line_that_names_it(swept, said):
    (found,) = problems(swept)
    assert found.startswith(said)


def test_every_bad_name_value_and_point_has_its_line():
    found = problems("{steps: [ancestral, remask, threshold], T: [0, 4], nope: [1], top_k: [x]}")
    assert len(found) == 4
    assert sum("there is no nope" in line for line in found) == 1
    assert sum("top_k=x" in line for line in found) == 1
    assert {line.split(":")[0] for line in found if "point" in line} == {
        "sampling.sweep, point steps=ancestral T=0",
        "sampling.sweep, point steps=remask T=0",
    }


def test_what_is_wrong_with_every_point_is_said_once():
    found = problems("{seed: [1, 2, 3]}", "eval.checkpoint_path=no/where.ckpt")
    assert found == ["eval.checkpoint_path=no/where.ckpt does not exist"]


def test_one_page_replays_no_several_runs():
    (found,) = problems("{seed: [1, 2]}", "sampling.trajectory=page.html")
    assert found.startswith("sampling.trajectory=page.html replays one run, and sampling.sweep has")
    assert problems("{seed: [2]}", "sampling.trajectory=page.html") == []


def test_what_has_an_effect_in_one_point_is_not_called_without():
    more = ["sampling.threshold=0.5"]
    assert examined("{steps: [first_hitting, threshold]}", *more)[2] == []
    (note,) = examined("{seed: [1, 2]}", *more)[2]
    assert note == "sampling.threshold has no effect without sampling.steps=threshold"


def test_blocks_of_another_size_are_no_point_of_ar():
    (found,) = problems("{block_size: [1]}", "algo=ar")
    assert found.startswith("sampling.sweep: there is no block_size to go through.")
