"""An algorithm is one file in objectives/ and one in configs/algo/."""

import textwrap

import pytest
from networks import small, texts

import objectives
import settings
from noise_schedule import LogLinear
from objectives.algorithms import ObjectiveSettings, build_objective, get_algorithm
from settings.keys import choices

SETTINGS = ObjectiveSettings(mask_id=6, schedule=LogLinear(), block_size=4, length=12)
NEW = '''
    """Every token is drawn with the same chance, whatever is visible."""
    from objectives.algorithms import Algorithm
    from objectives.autoregressive import Autoregressive

    ALGORITHMS = {
        "unigram": Algorithm(
            lambda s: Autoregressive(s.mask_id),
            parameterization="ar",
            sampler="ar",
            writes="ar",
            noise=False,
        )
    }
'''


def test_every_file_of_settings_has_its_algorithm():
    for choice in choices("algo"):
        algo = settings.load([f"algo={choice}"]).algo
        entry = get_algorithm(algo.name)
        assert (algo.parameterization, algo.sampler) == (entry.parameterization, entry.sampler)


def test_a_new_algorithm_is_one_more_file(tmp_path, monkeypatch):
    (tmp_path / "unigram.py").write_text(textwrap.dedent(NEW))
    monkeypatch.setattr(objectives, "__path__", [*objectives.__path__, str(tmp_path)])
    objective = build_objective("unigram", SETTINGS)
    loss = objective.loss(small(adaln=False), texts(2, 12, 6), texts(2, 12, 1) + 1, training=True)
    assert loss.loss_mask.sum() == 22
    with pytest.raises(ValueError, match=r"algo must be one of \['ar', .*'unigram'.*\], got 'gan'"):
        get_algorithm("gan")


def test_what_is_one_block_to_the_sampler_is_one_in_training():
    for name, blocks in (("bamdlm", 4), ("mdlm", 12), ("sedd", 12)):
        assert build_objective(name, SETTINGS).noise_block(12) == blocks
        assert get_algorithm(name).noise == build_objective(name, SETTINGS).draws_noise
    assert not build_objective("ar", SETTINGS).draws_noise
