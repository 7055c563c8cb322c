"""Metrics by hand, and as the libraries compute them at the settings that data/metrics.py names."""
import json
import math
import sys

import numpy as np
import pytest
from pytest import approx

from data.pairs import Pairs
from evaluation import metrics

# Labels and numbers


@pytest.fixture
def labels():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 200)
    return np.where(rng.random(200) < 0.3, 1 - truth, truth), truth


def test_classification_metrics_from_the_four_counts(labels):
    """accuracy, F1 from precision and recall of class 1, Matthews from TP, TN, FP, FN; and six rows
    by hand: TP 2, FP 1, FN 0, TN 3."""
    found, truth = labels
    tp, tn, fp, fn = (sum((f, t) == pair for f, t in zip(found, truth, strict=True))
                      for pair in ((1, 1), (0, 0), (1, 0), (0, 1)))
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    assert metrics.accuracy(found, truth) == approx((tp + tn) / 200)
    assert metrics.f1(found, truth) == approx(2 / (1 / precision + 1 / recall))
    assert metrics.matthews(found, truth) == approx(
        (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    found, truth = np.array([1, 1, 1, 0, 0, 0]), np.array([1, 1, 0, 0, 0, 0])
    by_hand = {"accuracy": 5 / 6, "f1": 4 / 5, "matthews": 6 / math.sqrt(3 * 2 * 4 * 3)}
    for name, value in by_hand.items():
        assert metrics.METRICS[name](found, truth) == approx(value), name
        assert type(metrics.METRICS[name](found, truth)) is float
    assert metrics.accuracy(np.array([0, 2, 1, 2]), np.array([2, 2, 1, 2])) == 0.75


def test_correlations():
    """Pearson is numpy's; Spearman without ties is 1 - 6 sum d^2 / n (n^2 - 1), and with ties
    Pearson of mean ranks; and a few numbers by hand."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 50))
    assert metrics.pearson(x, x + y) == approx(np.corrcoef(x, x + y)[0, 1])
    d = x.argsort().argsort() - y.argsort().argsort()
    assert metrics.spearman(x, y) == approx(1 - 6 * (d**2).sum() / (50 * (50**2 - 1)))
    a, b = rng.integers(0, 6, (2, 50))

    def ranks(v):  # the mean over all ways to break the ties
        return np.array([(v < e).sum() + ((v == e).sum() + 1) / 2 for e in v])
    assert metrics.spearman(a, b) == approx(np.corrcoef(ranks(a), ranks(b))[0, 1])
    assert metrics.spearman(x, np.exp(x)) == approx(1)
    found = metrics.pearson(np.array([1, 2, 3]), np.array([6, 4, 3]))
    assert found == approx(-3 / math.sqrt(28 / 3))
    assert metrics.spearman(np.array([1, 1, 9]), np.array([2, 4, 4])) == approx(0.5)


def test_perfect_and_worthless_predictions(labels):
    """1 for the truth itself; a constant answer is worth 0 in every correlation, and no error."""
    _, truth = labels
    for name in ("accuracy", "f1", "matthews", "pearson", "spearman"):
        assert metrics.METRICS[name](truth, truth) == approx(1)
    for constant in (np.zeros(200), np.ones(200)):
        for measure in (metrics.matthews, metrics.pearson, metrics.spearman):
            assert measure(constant, truth) == 0 == measure(truth, constant)
    assert metrics.f1(np.zeros(200), truth) == 0 == metrics.f1(np.zeros(3), np.zeros(3))


def test_perplexity():
    """e^loss, finite for any loss."""
    assert metrics.perplexity(math.log(7)) == approx(7) and metrics.perplexity(0.0) == 1
    assert metrics.perplexity(1e9) == approx(math.exp(700))


# Generated texts

SAT, NEAR = "the cat sat on the mat", "the cat sat on a mat"
BY_HAND = [  # metric, texts, their references, value
    ("bleu", [SAT], [[NEAR]], 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25),
    # the case of letters counts; of none of 3 four-grams half a one
    ("bleu", ["The" + SAT[3:]], [[NEAR]], 100 * (5 / 6 * 2 / 5 * 1 / 4 * 1 / 6) ** 0.25),
    ("bleu", ["a b c d"], [["a b c d e f"]], 100 * math.exp(1 - 6 / 4)),  # too short
    ("bleu", ["a b c d"], [["a b c d e f", "a b c"]], 100),  # the nearest length counts
    ("bleu", ["a-b c, d e."], [["a-b c , d e ."]], 100),
    ("bleu", [SAT, "a b c d"], [[SAT], ["a b c e"]],
     100 * (9 / 10 * 7 / 8 * 5 / 6 * 3 / 4) ** 0.25),
    ("bleu", ["", ""], [["a b"], ["c"]], 0),
    ("nist", ["a b c d e"], [["a b c d e"]], math.log2(5)), ("nist", ["a b c d"], [["a b c d"]], 0),
    ("nist", ["A b c d e"], [["a b c d e"]], 0.8 * math.log2(5)),
    ("nist", ["a b c d!"], [["a b c d !"]], math.log2(5)),
    ("nist", ["", "a b c d e"], [["x"], ["a b c d e"]], math.log2(6) * math.exp(
        math.log(0.5) / math.log(1.5) ** 2 * math.log(6 / 5) ** 2)),  # of all texts, not a mean
    ("nist", ["v w x y z"], [["a b"]], 0), ("nist", [""], [["a"]], 0),
    ("ter", ["The cat sat down"], [["the cat sat up"]], 25),
    ("ter", ["c d a b"], [["a b c d"]], 25),  # a shift is one edit
    ("ter", ["a b", "c"], [["a b"], ["c x x"]], 40), ("ter", [""], [["a b"]], 100),
    ("ter", ["a b c d."], [["a b c d ."]], 40),
    ("ter", ["a b"], [["a b c", "a b x y z"]], 25),  # one edit of (3 + 5) / 2 words
    ("rouge_l", ["The CATS, sat."], [["the cat sat"]], 2 / 3),
    ("rouge_l", ["a b c d"], [["d a c"]], 4 / 7), ("rouge_l", [""], [["a"]], 0),
    ("rouge_l", ["a b", "c"], [["x", "b a c d"], ["c"]], (2 / 6 + 1) / 2),
    ("rouge", ["The CATS, sat."], [["the cat sat"]], {"rouge1": 1, "rouge2": 1, "rougeL": 1}),
    ("rouge", ["a b c d"], [["x", "b a c d"]], {"rouge1": 1, "rouge2": 1 / 3, "rougeL": 3 / 4}),
    ("rouge", ["a b", ""], [["a b"], ["a"]], {"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5}),
    # 3 of 3 words and 3 of 4, in 2 pieces: F_mean times 1 - (2 / 3)^3 / 2
    ("meteor", ["b C a"], [["a b c d"]], 0.75 / (0.9 + 0.075) * (1 - (2 / 3) ** 3 / 2)),
    ("meteor", ["a b.", "x"], [["b a . c", "a b ."], ["x"]], (1 - (1 / 3) ** 3 / 2 + 0.5) / 2),
    ("same_text", [" a b\n", "A", "c", "d  e"], [["x", "a b "], ["a"], ["c"], ["d e"]], 0.5)]


@pytest.mark.parametrize("name, texts, references, value", BY_HAND)
def test_texts_are_worth_what_the_formula_says(name, texts, references, value):
    """Letter case, stems, tokens, the shortest text that scores, no text, several references."""
    assert getattr(metrics, name)(texts, references) == approx(value, abs=1e-9)


def test_texts_are_worth_what_the_libraries_say():
    """Forty random texts, with capitals, commas and endings, of one to three references each."""
    import sacrebleu
    from nltk.translate import meteor_score, nist_score
    from rouge_score.rouge_scorer import RougeScorer
    rng = np.random.default_rng(0)
    known = "The the cat cats dog sat sitting on mat, Mat mat. hat and red".split()

    def some(n):
        return [" ".join(rng.choice(known, rng.integers(3, 12))) for _ in range(n)]
    texts, many = some(40), [some(1 + i % 3) for i in range(40)]
    cut = [[" ".join(t.replace(",", " ,").replace(".", " .").split()) for t in group]
           for group in [texts, *many]]
    padded = [[group[i] if i < len(group) else None for group in many] for i in range(3)]
    theirs = sacrebleu.BLEU(lowercase=False, tokenize="13a", smooth_method="exp", force=True)
    assert metrics.bleu(texts, many) == approx(theirs.corpus_score(texts, padded).score)
    theirs = sacrebleu.TER(normalized=False, no_punct=False, case_sensitive=False)
    assert metrics.ter(texts, many) == approx(theirs.corpus_score(texts, padded).score)
    ours, *references = [[t.split() for t in group] for group in cut]
    assert metrics.nist(texts, many) == approx(nist_score.corpus_nist(references, ours, 5))
    without = {"rougeL": metrics.rouge_l(texts, many)}
    for found, stems in ((metrics.rouge(texts, many), True), (without, False)):
        scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stems)
        for name, value in found.items():
            best = [max(scorer.score(r, t)[name].fmeasure for r in group)
                    for t, group in zip(texts, many, strict=True)]
            assert value == approx(sum(best) / 40), name
    if (found := metrics.meteor(texts, many)) is not None:  # nltk has WordNet here
        theirs = list(map(meteor_score.meteor_score, references, ours))
        assert found == approx(sum(theirs) / 40)
    Cider = pytest.importorskip("pycocoevalcap.cider.cider").Cider
    lower = [[t.lower() for t in group] for group in cut]
    told, asked = {i: [t] for i, t in enumerate(lower[0])}, dict(enumerate(lower[1:]))
    expected, _ = Cider().compute_score(asked, told)
    assert metrics.cider(texts, many) == approx(expected) and expected > 0.1
    perfect = ["a dog ran far", "the mat, here now", "no cat at all"]
    assert metrics.cider(perfect, [[t.upper()] for t in perfect]) == approx(10)


def test_a_score_that_is_not_at_hand_is_named(monkeypatch, capsys):
    """CIDEr without pycocoevalcap, METEOR without WordNet: a line each, no number."""
    import generate

    def lacking(*_):
        raise LookupError("wordnet")
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    monkeypatch.setattr("nltk.translate.meteor_score.meteor_score", lacking)
    assert metrics.cider(["a"], [["a"]]) is None is metrics.meteor(["a"], [["b"]])
    scores = generate.judge("e2e", ["r"], ["a b c d e"], [["a b c d e"]])
    said = capsys.readouterr().out
    assert scores == approx({"BLEU": 100, "NIST": math.log2(5), "ROUGE_L": 1})
    assert "CIDEr is left out: pip install pycocoevalcap" in said and "METEOR is left out" in said


@pytest.mark.parametrize("metric, name, worth", [
    ("exact", "exact_match", metrics.same_text), ("bleu", "bleu", metrics.bleu),
    ("rouge", "rouge_l", metrics.rouge_l)])
def test_pairs_are_judged_by_all_completions_of_a_prompt(tmp_path, metric, name, worth):
    """Of a prompt that stands there twice the first text counts, beside those of all splits."""
    (tmp_path / "train.jsonl").write_text("".join(
        json.dumps({"prompt": f"p {i % 9}", "completion": f"it is said that this is {i}"}) + "\n"
        for i in range(18)))
    more = {"validation": "so it is said that one is", "test": "it is a mat that sat"}
    for split, text in more.items():
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"prompt": "p 1", "completion": text}))
    own = Pairs(metric=metric)
    assert own.METRICS == (name,)
    pairs = own.load(tmp_path)["train"]
    texts = [f"it is said that this is {i if i % 2 else 'no'}" for i in range(18)]
    texts[1] = more["validation"]
    references = [[f"it is said that this is {j}" for j in (i, i + 9)] for i in range(9)]
    references[1] += more.values()
    found = own.score(pairs, texts)
    assert found == {name: worth(texts[:9], references)}
    assert metric != "exact" or found[name] == 4 / 9


def test_the_figures_of_each_class_by_hand():
    """Of three classes, one of which is never predicted and one never true; their mean F1 over
    those that occur is the macro F1."""
    truth, predicted = np.array([0, 0, 0, 1, 1]), np.array([0, 0, 2, 0, 2])
    found = metrics.by_class(predicted, truth, ["a", "b", "c"])
    assert found["a"] == {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 * 2 / (3 + 3), "texts": 3}
    assert found["b"] == {"precision": 0, "recall": 0, "f1": 0, "texts": 2}
    assert found["c"] == {"precision": 0, "recall": 0, "f1": 0, "texts": 0}
    assert approx(metrics.macro_f1(predicted, truth)) == sum(f["f1"] for f in found.values()) / 3
    absent = metrics.by_class(truth, truth, ["a", "b", "c"])["c"]
    assert absent == {"precision": 0, "recall": 0, "f1": 0, "texts": 0}


def test_the_macro_f1_of_a_class_that_is_never_predicted_counts_as_zero():
    """Always the common class: 95 % accuracy, and half of a good F1."""
    truth = np.array([0] * 95 + [1] * 5)
    always = np.zeros(100, dtype=int)
    assert metrics.accuracy(always, truth) == 0.95
    assert metrics.macro_f1(always, truth) == approx((2 * 95 / (2 * 95 + 5) + 0) / 2)
    assert metrics.matthews(always, truth) == 0.0
    assert metrics.macro_f1(truth, truth) == metrics.matthews(truth, truth) == 1.0
    # one that is only predicted counts as zero too
    assert metrics.macro_f1(np.array([0, 0, 0, 2]), np.zeros(4)) == approx((6 / 7 + 0) / 2)


def test_matthews_of_several_classes_is_gorodkins():
    """By the confusion matrix: (c s - t p) / sqrt((s^2 - p p) (s^2 - t t))."""
    draw = np.random.default_rng(0)
    truth = draw.integers(0, 4, 200)
    predicted = np.where(draw.random(200) < 0.6, truth, draw.integers(0, 4, 200))
    t, p = (np.bincount(v, minlength=4) for v in (truth, predicted))
    c, s = np.sum(truth == predicted), 200
    expected = (c * s - t @ p) / np.sqrt(float(s**2 - p @ p) * float(s**2 - t @ t))
    assert metrics.matthews(predicted, truth) == approx(expected)
