"""MAUVE: what it must be, published anchors, and the original where it is installed."""

import importlib.util

import numpy as np
import pytest
from conftest import GOLDEN

from evaluation import mauve as module
from evaluation.judge import load_judge
from evaluation.mauve import area, ceiling_halves, features, mauve

PACKAGES = ("mauve", "faiss")  # pip install mauve-text==0.4.0 faiss-cpu==1.15.1 (GPL)


def gaussians(n, shift, seed=0, width=64):
    draw = np.random.default_rng(seed).normal
    return draw(size=(n, width)), draw(size=(n, width)) + shift


def test_the_area_of_histograms_that_are_known():
    even = np.full(4, 0.25)
    assert area(even, even) == pytest.approx(1, abs=1e-9)
    assert area(np.array([1.0, 0]), np.array([0, 1.0])) < 0.01  # no text of one is like the other
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    assert area(p, q) == pytest.approx(area(q, p), rel=1e-9)
    # by hand, on a fine grid of mixtures: 25 of them are the published figure, not the limit
    share = np.linspace(1e-9, 1 - 1e-9, 20_001)
    curve = []
    for lam in share:
        r = lam * p + (1 - lam) * q
        curve.append([np.exp(-5 * (d * np.log(d / r)).sum()) for d in (q, p)])
    x, y = np.array(curve).T
    whole = x[-1] * 1 - np.trapezoid(y, x)  # from (0, 1) to its first point, then along it
    assert area(p, q) == pytest.approx(whole, abs=2e-3)


def test_equal_sets_and_sets_that_differ():
    p, q = gaussians(150, 0.0)
    same = mauve(p, p.copy(), clusterings=2)
    assert same.mean == pytest.approx(1, abs=1e-9)
    assert (same.buckets, same.texts) == (15, 150)
    assert same.name("judge") == "mauve-2x15-n150-judge"
    near, far = mauve(p, q, clusterings=2).mean, mauve(p, q + 1, clusterings=2).mean
    assert far < 0.1 < 0.7 < near < 1
    assert mauve(p, q, clusterings=2) == mauve(p, q, clusterings=2)  # nothing is left to chance
    several = mauve(p, q, clusterings=3)
    assert len(set(several.values)) > 1
    assert several.deviation == pytest.approx(np.std(several.values, ddof=1))
    point = np.ones((6, 3))
    assert mauve(point, point, clusterings=1).mean == pytest.approx(1, abs=1e-9)


@pytest.mark.slow
def test_published_anchors():
    """.962 for two samples of one law, .685 for means that differ by .2: 1 000 texts, 64 features.
    One pair of samples differs from another by about .03 for the shifted ones."""
    found = {
        shift: [mauve(*gaussians(1000, shift, seed)).mean for seed in range(4)]
        for shift in (0, 0.2)
    }
    assert np.mean(found[0]) == pytest.approx(0.962, abs=0.01)
    assert np.mean(found[0.2]) == pytest.approx(0.685, abs=0.05)


@pytest.mark.slow
def test_the_original_gives_the_same():
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}: pip install mauve-text==0.4.0 faiss-cpu==1.15.1")
    import mauve as original

    for shift in (0.0, 0.2):
        p, q = gaussians(1000, shift)
        theirs = [
            original.compute_mauve(p_features=p, q_features=q, seed=seed) for seed in range(5)
        ]
        for each in theirs:  # of the same histograms the same figure
            assert area(each.p_hist, each.q_hist) == pytest.approx(each.mauve, rel=1e-9)
        ours, values = mauve(p, q), [each.mauve for each in theirs]
        assert ours.buckets == theirs[0].num_buckets
        apart = abs(ours.mean - np.mean(values))
        assert apart < 3 * np.hypot(ours.deviation, np.std(values, ddof=1)) / np.sqrt(5)


def test_what_cannot_be_is_said():
    p, _ = gaussians(10, 0, width=3)
    with pytest.raises(ValueError, match="each set needs 2"):
        mauve(p[:1], p)
    with pytest.raises(ValueError, match="there are fewer texts"):
        mauve(p[:4], p[4:], buckets=11)
    with pytest.raises(ValueError, match="must be finite"):
        mauve(np.where(p > 0, np.nan, p), p)
    with pytest.raises(ValueError, match="2 and 4 are needed"):
        ceiling_halves(5, 3)


def test_the_ceiling_is_of_other_texts_and_as_many():
    for texts, reference, size in ((10, 100, 10), (100, 30, 15)):
        one, two = ceiling_halves(texts, reference)
        assert len(one) == len(two) == size
        assert len({*one.tolist(), *two.tolist()}) == 2 * size


def test_features_are_made_once(tmp_path, monkeypatch):
    judge = load_judge(str(GOLDEN / "judge"))
    texts = ["the work of the king", "any", ""]
    first = features(judge, texts, tmp_path)
    assert first.shape == (3, judge.model.config.hidden_size)
    (path,) = tmp_path.glob("*.npy")
    asked = []
    monkeypatch.setattr(judge, "last_states", lambda ids: asked.append(ids))
    assert (features(judge, texts, tmp_path) == first).all()
    assert not asked
    monkeypatch.undo()
    path.write_bytes(path.read_bytes()[:-3])  # damaged: made anew
    assert (features(judge, texts, tmp_path) == first).all()
    features(judge, texts[:2], tmp_path)
    monkeypatch.setattr(judge, "fingerprint", "another")
    features(judge, texts, tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == 3
    assert module.MOST_TOKENS == 1024
