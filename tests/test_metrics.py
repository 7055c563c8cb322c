"""Metrics against their definitions, written another way."""
import itertools
import math

import numpy as np
import pytest

from data import metrics


@pytest.fixture
def labels():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 200)
    return np.where(rng.random(200) < 0.3, 1 - truth, truth), truth


def test_classification_metrics_from_the_four_counts(labels):
    """accuracy, F1 from precision and recall, Matthews from TP, TN, FP, FN."""
    found, truth = labels
    tp, tn, fp, fn = (sum((f, t) == pair for f, t in zip(found, truth, strict=True))
                      for pair in ((1, 1), (0, 0), (1, 0), (0, 1)))
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    assert metrics.accuracy(found, truth) == pytest.approx((tp + tn) / 200)
    assert metrics.f1(found, truth) == pytest.approx(2 * precision * recall / (precision + recall))
    assert metrics.matthews(found, truth) == pytest.approx(
        (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))


def test_correlations():
    """Pearson is numpy's; Spearman is 1 - 6 sum d^2 / n (n^2 - 1) without ties, and with ties Pearson of mean ranks."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 50))
    assert metrics.pearson(x, x + y) == pytest.approx(np.corrcoef(x, x + y)[0, 1])
    d = x.argsort().argsort() - y.argsort().argsort()
    assert metrics.spearman(x, y) == pytest.approx(1 - 6 * (d**2).sum() / (50 * (50**2 - 1)))
    a, b = rng.integers(0, 6, (2, 50))

    def ranks(v):  # the mean over all ways to break the ties is how many are smaller, and half of those that are equal
        return np.array([(v < e).sum() + ((v == e).sum() + 1) / 2 for e in v])
    assert metrics.spearman(a, b) == pytest.approx(np.corrcoef(ranks(a), ranks(b))[0, 1])
    assert metrics.spearman(x, np.exp(x)) == pytest.approx(1.0)


def test_perfect_and_worthless_predictions(labels):
    """1 for the truth itself; a constant answer is worth 0 in every correlation, and is not an error."""
    _, truth = labels
    for name in ("accuracy", "f1", "matthews", "pearson", "spearman"):
        assert metrics.METRICS[name](truth, truth) == pytest.approx(1.0)
    for constant, name in itertools.product((np.zeros(200), np.ones(200)), ("matthews", "pearson", "spearman")):
        assert metrics.METRICS[name](constant, truth) == 0.0
    assert metrics.f1(np.zeros(200), truth) == 0.0 == metrics.f1(np.zeros(3), np.zeros(3))


def test_exact_match_and_perplexity():
    """Shares of equal answers; e^loss, finite for any loss."""
    assert metrics.exact_match([1, None, 3.0], [1, 2, 3]) == pytest.approx(2 / 3)
    assert metrics.perplexity(math.log(7)) == pytest.approx(7) and math.isfinite(metrics.perplexity(1e9))


# Generated texts: the examples that the libraries publish

def test_bleu_is_sacrebleus_published_example():
    """README of sacrebleu: two references each, 48.53; a text with one reference less counts the others."""
    texts = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    references = [["The dog bit the man.", "The dog had bit the man."],
                  ["It was not unexpected.", "No one was surprised."],
                  ["The man bit him first.", "The man had bitten the dog."]]
    assert metrics.bleu(texts, references) == pytest.approx(48.530827)
    for some in (references, [group[::-1] for group in references]):  # the best one first, or last
        fewer = metrics.bleu(texts, [*some[:2], references[2][:1]])
        assert fewer < 48 and fewer == metrics.bleu(texts, [*some[:2], references[2][:1] * 2])
    assert metrics.bleu(texts, [["nothing", *some] for some in references]) == pytest.approx(48.530827)


def test_rouge_l_is_its_published_example():
    """README of rouge-score: precision 5/8, recall 5/9; of several references the best one counts."""
    text, reference = "The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog"
    assert metrics.rouge_l([text], [[reference]]) == pytest.approx(2 * 5 / 8 * 5 / 9 / (5 / 8 + 5 / 9))
    assert metrics.rouge_l([text, text, text], [[reference, text], ["nothing"], [text]]) == pytest.approx(2 / 3)


def test_nist_is_nltks_published_example():
    """Documentation of nltk.translate.nist_score: 3.3709 and 1.4619 for the two hypotheses; nothing in common is 0."""
    references = ["It is a guide to action that ensures that the military will forever heed Party commands",
                  "It is the guiding principle which guarantees the military forces always being under the command of "
                  "the Party", "It is the practical guide for the army always to heed the directions of the party"]
    first = "It is a guide to action which ensures that the military always obeys the commands of the party"
    second = "It is to insure the troops forever hearing the activity guidebook that party direct"
    assert metrics.nist([first], [references]) == pytest.approx(3.3709, abs=1e-4)
    assert metrics.nist([second], [references]) == pytest.approx(1.4619, abs=1e-4)
    assert metrics.nist(["", "no"], [["a b"], ["c"]]) == 0
