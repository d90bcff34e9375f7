"""MAUVE: how far the texts of a model are from real ones (Pillutla et al., arXiv:2102.01454).

Both sets become features, the features are put into clusters together, and two histograms are left.
With R a mixture of them, the curve of exp(-c KL(Q | R)) against exp(-c KL(P | R)) over all mixtures
is that of two kinds of error, and MAUVE is the area under it: 1 where the histograms are equal. The
figure depends on the clusters, the number of texts and the model that makes the features, so it is
a mean over several clusterings, and its name says the rest. Even two sets of real texts do not
reach 1: `ceiling` says what they reach.
"""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.judge import Judge
from random_streams import order
from utils import atomic_file, digest, say

MOST_TOKENS = 1024  # of a text, as published
CLUSTERINGS = 5
RESTARTS, ITERATIONS = 5, 500  # of k-means, as published
VARIANCE = 0.9  # kept by PCA
MIXTURES = 25
SCALING = 5.0  # c
TEXTS_PER_BUCKET = 10


@dataclass(frozen=True)
class Mauve:
    """`values`: of each clustering."""

    values: tuple[float, ...]
    buckets: int
    texts: int  # of each set

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def deviation(self) -> float:
        """Between clusterings; it says nothing of other texts."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else float("nan")

    def name(self, featurizer: str) -> str:
        return f"mauve-{len(self.values)}x{self.buckets}-n{self.texts}-{featurizer}"


def mauve(
    p: np.ndarray,
    q: np.ndarray,
    *,
    buckets: int | None = None,
    clusterings: int = CLUSTERINGS,
    seed: int = 1,
) -> Mauve:
    """Of features p, q [N, E] each. buckets: one for ten texts of a set where None. ValueError
    where there are fewer than two texts, or the features are not finite."""
    texts = min(len(p), len(q))
    if texts < 2:
        raise ValueError(f"MAUVE of {len(p)} and {len(q)} texts: each set needs 2 at least")
    buckets = buckets or max(2, round(texts / TEXTS_PER_BUCKET))
    if buckets > len(p) + len(q):
        raise ValueError(f"{buckets} clusters of {len(p) + len(q)} texts: there are fewer texts")
    points = reduced(np.concatenate([p, q]))
    values = []
    for number in range(clusterings):
        labels = clusters(points, buckets, seed + number)
        histograms = (np.bincount(part, minlength=buckets) for part in np.split(labels, [len(p)]))
        values.append(area(*(counts / counts.sum() for counts in histograms)))
    return Mauve(tuple(values), buckets, texts)


def reduced(points: np.ndarray) -> np.ndarray:
    """Features on the unit sphere, and of these the directions that hold 90 % of the variance."""
    from sklearn.decomposition import PCA

    points = points.astype(np.float64)
    if not np.isfinite(points).all():
        raise ValueError("features must be finite: the model that makes them has failed")
    points = points / np.linalg.norm(points, axis=1, keepdims=True).clip(min=1e-12)
    if (points == points[0]).all():
        return points[:, :1]
    return PCA(VARIANCE, svd_solver="full").fit_transform(points)


def clusters(points: np.ndarray, buckets: int, seed: int) -> np.ndarray:
    """The number of each point's cluster."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    means = KMeans(buckets, n_init=RESTARTS, max_iter=ITERATIONS, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different points than clusters
        return means.fit_predict(points)


def area(p: np.ndarray, q: np.ndarray) -> float:
    """The area under the curve of two histograms [K] that sum to 1, with the ends (0, 1), (1, 0)"""
    share = np.linspace(1e-6, 1 - 1e-6, MIXTURES)[:, None]
    mixed = share * p + (1 - share) * q
    x, y = (np.exp(-SCALING * divergence(each, mixed)) for each in (q, p))
    x, y = np.r_[0.0, x[::-1], 1.0], np.r_[1.0, y[::-1], 0.0]  # x rises, y falls
    order = np.argsort(x, kind="stable")
    return float(np.trapezoid(y[order], x[order]))


def divergence(p: np.ndarray, r: np.ndarray) -> np.ndarray:
    """KL(p | r) in nats of p [K] and each row of r [M, K], which is nowhere 0 where p is not."""
    there = p > 0
    return (p[there] * np.log(p[there] / r[:, there])).sum(1)


def ceiling_halves(texts: int, reference: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of reference texts: those that are compared with the model's, and as many others to
    compare them with. ValueError where there are fewer than four."""
    size = min(texts, reference // 2)
    if size < 2:
        raise ValueError(f"MAUVE of {texts} texts and {reference} of reference: 2 and 4 are needed")
    places = order(seed, "halves", texts, reference)
    return places[:size], places[size : 2 * size]


def features(featurizer: Judge, texts: Sequence[str], folder: str | Path) -> np.ndarray:
    """The last hidden state of the last token of each text, float32 [N, E]. They are kept in
    `folder` under a name made of the ids and the weights."""
    context = min(featurizer.context, MOST_TOKENS)
    ids = [x[:context] for x in featurizer.tokenize(texts)]
    facts = [f"{featurizer.fingerprint} {featurizer.eos_id}", *(str(x.tolist()) for x in ids)]
    path = Path(folder) / (digest("\n".join(facts), 24) + ".npy")
    if (found := _kept(path, len(ids))) is not None:
        return found
    say(f"features of {len(ids):,} texts")
    found = featurizer.last_states(ids).numpy()
    memory = io.BytesIO()
    np.save(memory, found, allow_pickle=False)
    with atomic_file(path, "wb") as file:
        file.write(memory.getvalue())
    return found


def _kept(path: Path, count: int) -> np.ndarray | None:
    """None where the file is not there or is damaged."""
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    whole = isinstance(found, np.ndarray) and found.ndim == 2 and len(found) == count
    return found if whole and found.dtype == np.float32 else None
