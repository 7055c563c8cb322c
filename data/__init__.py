"""Datasets: one file each, with `load(data_dir) -> {"train": [(prompt, target), …], "validation": …, "test": …}`.

A prompt of "" means plain text to be modelled as it is. Where texts are labelled a row is ((text,) or (a, b), label).
A file may also say: LABELS, the names of its classes, a single one for a regression; METRICS, how it is judged, all of
them better high, the first selects (without: the loss); SPLITS, where its splits come from; score(pairs, texts) ->
{metric: value} of decoded texts, and MAX_NEW, the tokens that they may have. Here: the registry, where a new file is
entered, and the order of the batches.
"""
import importlib
import random

from data import bpe, glue
from data.tasks import Label, Mask, Write

GENERATED = "restaurants", "reviews", "world", "opinions", "stdlib"  # need no files
PLAIN = "world", "opinions", "stdlib", "text"  # prompt "": a masked language model can learn them too
DATASETS = *GENERATED, "e2e", "gsm8k", "text", *(f"glue/{name}" for name in glue.TASKS)


def module(name):
    """The file of a dataset, imported when asked for; of a GLUE task what says the same."""
    family, _, task = name.partition("/")
    return glue.TASKS[task] if task else importlib.import_module(f"data.{family}")


def labels(name):
    """Names of the classes, a single name for a regression, none where text is predicted."""
    return getattr(module(name), "LABELS", ())


def metrics(name):
    """Metrics beside the loss."""
    return getattr(module(name), "METRICS", ())


def splits(name):
    """Where the three splits come from."""
    return getattr(module(name), "SPLITS", {"train": "train", "validation": "validation", "test": "test"})


def load(name, data_dir=None):
    """The splits of a dataset; ValueError for what is missing, empty or malformed, naming file and line."""
    if data_dir and name in GENERATED:
        raise ValueError(f"dataset {name} is generated here: --data-dir {data_dir} is not for it")
    found = module(name).load() if name in GENERATED else module(name).load(data_dir)
    for split, pairs in found.items():
        if not pairs:
            raise ValueError(f"dataset {name}: the {split} split is empty")
    return found


def task(name, folder, model, context):
    """(tokenizer, task) of a dataset for a GPT or a RoBERTa whose checkpoint lies in `folder`; ValueError for a model
    that cannot do it. A GPT's tokenizer is tiktoken's own, RoBERTa's has `build`, `pad` and `mask` instead."""
    size = model.config.vocab_size
    if hasattr(model.config, "n_embd"):  # a GPT
        tokenizer = bpe.load(folder, size)
        return tokenizer, Write(tokenizer, context)
    tokenizer = bpe.RobertaTokenizer(folder, size)
    if labels(name):
        return tokenizer, Label(tokenizer, context, len(labels(name)))
    if name not in PLAIN:
        raise ValueError(f"dataset {name} wants text written, which a RoBERTa cannot: choose a GPT for it, or labelled "
                         "or plain texts for this model")
    return tokenizer, Mask(tokenizer, context)


def epoch_batches(examples, batch_size, seed):
    """Index lists of one epoch: shuffled, yet of similar length within a batch, so that little is padding.

    The order depends on nothing but the arguments: a resumed run finds its place by counting.
    """
    rng = random.Random(seed)
    order = rng.sample(range(len(examples)), len(examples))
    batches, pool = [], 32 * batch_size
    for i in range(0, len(order), pool):
        near = sorted(order[i:i + pool], key=lambda j: len(examples[j][0]))
        batches += [near[k:k + batch_size] for k in range(0, len(near), batch_size)]
    rng.shuffle(batches)
    return batches
