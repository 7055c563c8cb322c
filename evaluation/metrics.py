"""What predictions are worth. accuracy to spearman: numpy arrays of equal length in, a float out;
bleu, nist and rouge_l: texts and their references.

GLUE (Wang et al. 2018, arXiv:1804.07461) reports accuracy, F1 for MRPC and QQP, Matthews'
correlation for CoLA, Pearson's and Spearman's for STS-B. They are 1 for perfect predictions. Where
there is a single class F1 and the correlations are undefined and count as 0, which is what guessing
is worth.
"""
import importlib
import math

import numpy as np


def library(name):
    """A library of the extra [eval]; ValueError with what installs it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"{name.partition('.')[0]} is not installed: pip install -r "
                         "requirements.txt has all that scores texts and draws pictures") from None


def accuracy(predicted, truth):
    """Share of equal labels."""
    return float(np.mean(predicted == truth))


def f1(predicted, truth):
    """Of class 1: 2 TP / (2 TP + FP + FN), the harmonic mean of precision and recall."""
    hits = np.sum((predicted == 1) & (truth == 1))
    positives = np.sum(predicted == 1) + np.sum(truth == 1)
    return float(2 * hits / positives) if positives else 0.0


def macro_f1(predicted, truth):
    """The mean F1 of all classes that occur, each as much as the others, however rare it is."""
    kinds = np.unique(np.concatenate([truth, predicted]))
    return float(np.mean([f1((predicted == kind).astype(int), (truth == kind).astype(int))
                          for kind in kinds]))


def by_class(predicted, truth, labels):
    """{label: {"precision", "recall", "f1", "texts"}}: of what was called so the share that is so,
    of what is so the share that was called so, and how many there are. 0 where there is none."""
    found = {}
    for i, name in enumerate(labels):
        hits, called, real = (int(np.sum(which)) for which in (
            (predicted == i) & (truth == i), predicted == i, truth == i))
        found[name] = {"precision": hits / called if called else 0.0,
                       "recall": hits / real if real else 0.0,
                       "f1": 2 * hits / (called + real) if called + real else 0.0, "texts": real}
    return found


def matthews(predicted, truth):
    """Matthews' correlation, of two classes Pearson's of the labels, 0 and 1; of more of them
    Gorodkin's (2004): the covariance of both in one-hot vectors, by their deviations."""
    kinds = np.unique(np.concatenate([truth, predicted]))
    x, y = ((v[:, None] == kinds).astype(float) for v in (predicted, truth))
    x, y = x - x.mean(0), y - y.mean(0)
    scale = math.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum()) / scale if scale else 0.0


def pearson(predicted, truth):
    """cov(x, y) / (std(x) std(y))"""
    x, y = (v - v.mean() for v in (predicted.astype(float), truth.astype(float)))
    scale = math.sqrt((x @ x) * (y @ y))
    return float(x @ y) / scale if scale else 0.0


def spearman(predicted, truth):
    """Pearson's correlation of the ranks; equal values share the mean of their ranks."""
    def ranks(v):
        _, which, counts = np.unique(v, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[which]
    return pearson(ranks(predicted), ranks(truth))


def perplexity(loss):
    """e to the mean loss in nats per token."""
    return math.exp(min(loss, 700))  # e^709 is the last that a float holds


# Generated texts, each beside a list of references.

def grouped(splits):
    """{prompt: all its targets} of {split: [(prompt, target)]}"""
    of = {}
    for prompt, target in (pair for pairs in splits.values() for pair in pairs):
        of.setdefault(prompt, []).append(target)
    return of


def beside(pairs, texts, of):
    """(texts, references): the first text of each prompt, and all targets `of` it."""
    first = {}
    for (prompt, _), text in zip(pairs, texts, strict=True):
        first.setdefault(prompt, text)
    return list(first.values()), [of[prompt] for prompt in first]


def streams(references):
    """As sacrebleu wants them: the first reference of each text, the second of each, …; None where
    there is none."""
    return [[group[i] if i < len(group) else None for group in references]
            for i in range(max(map(len, references)))]


def bleu(texts, references):
    """BLEU-4 of the corpus by sacrebleu (Post 2018, arXiv:1804.08771), 0 to 100, tokenised by 13a,
    case kept."""
    sacrebleu = library("sacrebleu")
    # force: our texts are tokenised, do not warn
    return sacrebleu.corpus_bleu(texts, streams(references), force=True).score


def ter(texts, references):
    """Translation edit rate of the corpus by sacrebleu (Snover et al. 2006): edits in percent of
    the words of a reference, 0 is perfect."""
    sacrebleu = library("sacrebleu")
    return sacrebleu.corpus_ter(texts, streams(references)).score


def words(text):
    """A text as BLEU's 13a splits it."""
    return library("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()(text).split()


def nist(texts, references):
    """NIST-5 of the corpus by nltk (Doddington 2002), 0 for nothing in common, tokenised as for
    BLEU."""
    corpus_nist = library("nltk.translate.nist_score").corpus_nist
    texts = [words(text) for text in texts]
    if not any(len(text) >= 5 for text in texts):
        return 0.0  # nltk divides by the number of 5-grams
    return float(corpus_nist([[words(r) for r in group] for group in references], texts, 5))


def cider(texts, references):
    """CIDEr of the corpus (Vedantam et al. 2015, arXiv:1411.5726) by pycocoevalcap, 0 to 10, of
    words as 13a splits them, in lower case. None where pycocoevalcap is not installed, which is
    optional."""
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError:
        return None
    told = {i: [" ".join(words(text)).lower()] for i, text in enumerate(texts)}
    asked = {i: [" ".join(words(text)).lower() for text in group]
             for i, group in enumerate(references)}
    return float(Cider().compute_score(asked, told)[0])


def meteor(texts, references):
    """Mean METEOR (Banerjee and Lavie 2005) with the best reference, by nltk, 0 to 1. None where
    nltk has no WordNet, for synonyms. The official one is in Java and gives other numbers."""
    meteor_score = library("nltk.translate.meteor_score").meteor_score
    try:
        scores = [meteor_score([words(r) for r in group], words(text))
                  for text, group in zip(texts, references, strict=True)]
    except LookupError:
        return None
    return sum(scores) / len(scores)


def same_text(texts, references):
    """Share of the texts that are one of their references, but for spaces at the ends."""
    return sum(text.strip() in [r.strip() for r in group]
               for text, group in zip(texts, references, strict=True)) / len(texts)


def rouge_l(texts, references):
    """Mean F1 of the longest common subsequence with the best reference (Lin 2004) by rouge-score,
    0 to 1, no stems."""
    scorer = library("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    scores = [scorer.score_multi(group, text)["rougeL"].fmeasure
              for text, group in zip(texts, references, strict=True)]
    return sum(scores) / len(scores)


def rouge(texts, references):
    """Mean F1 of ROUGE-1, -2 and -L with the best reference by rouge-score, 0 to 1, with stems, as
    for summaries."""
    names = "rouge1", "rouge2", "rougeL"
    scorer = library("rouge_score.rouge_scorer").RougeScorer(names, use_stemmer=True)
    scores = [scorer.score_multi(group, text)
              for text, group in zip(texts, references, strict=True)]
    return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in names}


# of labels
METRICS = {f.__name__: f for f in (accuracy, f1, macro_f1, matthews, pearson, spearman)}
