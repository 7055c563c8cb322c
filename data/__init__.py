"""Datasets, one file each, and the batches that a run makes of them.

A dataset's file has `load(data_dir) -> {"train": [(prompt, target), …], "validation": …,
"test": …}`, or `load()` if it needs no files. Where texts are labelled a row is
((text,) or (a, b), label). It may also define

    LABELS      names of the classes 0, 1, …; a single name means a regression
    PLAIN       True where the prompt is "" and the target is plain text to be modelled as it is
    METRICS     how it is judged, all better high; the first one selects the checkpoint (without
                METRICS the loss does)
    SPLITS      {split: where it comes from}, for result.json
    score       (pairs, texts) -> {metric: value} of decoded texts
    MAX_NEW     the tokens that a decoded text may have
    LONGEST     True: more of them where a reference is longer
    options     {prompt: (texts, number of the right one)} where the likeliest of several is chosen
    BETWEEN     what stands between prompt and text

A new dataset is one such file and its name in GENERATED or FROM_FILES. Data of one's own, `pairs`,
`chat` and `labels`, need none: what a file has at the top, an object has that knows the flags of
the run.
"""
import importlib
import random

from checkpoints import templates, tokenizers
from checkpoints.pretrained import ends_of
from data import glue, sets
from data.labels import Labels
from data.pairs import Pairs
from data.tasks import Converse, Label, Mask, Write, spans

PRETRAINING = "world", "opinions"  # the texts of the shipped models, in a folder of their own
GENERATED = "restaurants", "reviews", *PRETRAINING, "stdlib"  # load() needs no files
FROM_FILES = "pairs", "chat", "labels", "text", *sets.SETS, *(f"glue/{name}" for name in glue.TASKS)
DATASETS = *GENERATED, *FROM_FILES
# texts encoded at a time: what is in between of 400,000 texts would take half a gigabyte
BLOCK = 10000


def module(name, columns=None, metric=None, regression=False, last_turn=False, chatml=False):
    """The file of a dataset, imported when it is needed, or an object with the same names in it: a
    GLUE task, or data of one's own, read as the flags say, or a row of sets.py."""
    family, _, task = name.partition("/")
    if name in ("pairs", "chat"):
        return Pairs(columns, metric, True if name == "chat" else None, last_turn, chatml)
    if name == "labels":
        return Labels(columns, regression, metric)
    if name in sets.SETS:
        return sets.SETS[name]
    if task:
        return glue.TASKS[task]
    return importlib.import_module(f"{'pretraining' if name in PRETRAINING else 'data'}.{family}")


def about(dataset, what, default=()):
    """LABELS, PLAIN, METRICS, SPLITS, … of a dataset, by its name or what `module` gave, or the
    default where it does not say."""
    return getattr(module(dataset) if isinstance(dataset, str) else dataset, what, default)


def load(name, data_dir=None, source=None):
    """The splits of a dataset; ValueError for what is missing, empty or malformed, naming file and
    line. source: what `module` gave."""
    if data_dir and name in GENERATED:
        raise ValueError(f"dataset {name} is generated here: --data-dir {data_dir} is not for it")
    source = source or module(name)
    splits = source.load() if name in GENERATED else source.load(data_dir)
    for split, pairs in splits.items():
        if not pairs:
            raise ValueError(f"dataset {name}: the {split} split is empty")
    return splits


def task(name, folder, model, context, source=None):
    """(tokenizer, task) of a dataset for a model whose checkpoint lies in `folder`; ValueError for
    a model that cannot do it."""
    source = source or name
    tokenizer, labels = tokenizers.for_model(folder, model.config), about(source, "LABELS")
    if model.causal and about(source, "CHAT", False):
        template = (templates.chatml(folder, tokenizer) if source.chatml
                    else templates.of_folder(folder))
        if template is None:
            raise ValueError(f"{folder} has no chat template: --chatml writes the turns as ChatML")
        return tokenizer, Converse(tokenizer, context, template, source.last_turn, source.WHERE,
                                   ends_of(folder))
    if model.causal:
        return tokenizer, Write(tokenizer, context, about(source, "BETWEEN",
                                               "" if about(source, "PLAIN") else " ||"))
    if labels:
        return tokenizer, Label(tokenizer, context, len(labels))
    if not about(source, "PLAIN"):
        raise ValueError(f"dataset {name} wants text written, which a RoBERTa cannot: choose a GPT "
                         "for it, or labelled or plain texts for this model")
    return tokenizer, Mask(tokenizer, context)


class Dataset:
    """A dataset as it is read; `encode` makes it that of a model. flags: see `module`.

    pairs, examples: {split: rows}, as text and as tokens. chat: whether they are conversations.
    labels: names of the classes. metric: what selects. splits: {split: what it is}. cut: how many
    texts were too long.
    """

    def __init__(self, name, data_dir=None, test_texts=None, *flags):
        self.name, self.module = name, module(name, *flags)
        self.pairs = load(name, data_dir, self.module)
        if score := about(self.module, "score", None):
            score(self.pairs["test"][:1], [self.pairs["test"][0][1]])  # lacks it a library?
        self.labels, self.metrics = about(self.module, "LABELS"), about(self.module, "METRICS")
        self.metric = self.metrics[0] if self.metrics else "loss"
        self.splits = dict(about(self.module, "SPLITS",
                                 {split: split for split in ("train", "validation", "test")}))
        for split, pairs in self.pairs.items() if test_texts else ():
            if split not in ("train", "validation") and test_texts < len(pairs):
                # the same texts in all runs, whatever their seed
                chosen = random.Random(0).sample(range(len(pairs)), test_texts)
                self.pairs[split] = [pairs[i] for i in sorted(chosen)]
                self.splits[split] = f"{self.splits[split]}, {test_texts} of {len(pairs)} texts"

    def encode(self, folder, model, context):
        """For a model whose checkpoint lies in `folder`. A record that leaves no room for its text
        is dropped, and counted in `splits`."""
        self.tokenizer, self.task = task(self.name, folder, model, context, self.module)
        self.examples, self.cut = {}, 0
        self.max_new = about(self.module, "MAX_NEW", 96)
        self.chat = isinstance(self.task, Converse)
        for split, pairs in self.pairs.items():
            pairs = self.pairs[split] = self.task.rows(pairs) if self.chat else pairs
            examples = []
            for start in range(0, len(pairs), BLOCK):
                encoded, cut = self.task.encode(pairs[start:start + BLOCK])
                examples += encoded
                self.cut += cut
            dropped = examples.count(None)
            if dropped == len(examples):
                raise ValueError(f"dataset {self.name}: every record of {split} leaves no room for "
                                 f"its text in a context of {context} tokens")
            if dropped:
                self.splits[split] += (f", {dropped} of {len(pairs)} dropped: longer than "
                                       f"{context} tokens")
                self.pairs[split] = [pair for pair, example in zip(pairs, examples, strict=True)
                                     if example]
            self.examples[split] = [example for example in examples if example]
            if split != "train" and about(self.module, "LONGEST", False):
                longest = max(end - start for example in self.examples[split]
                              for start, end in spans(*example))
                self.max_new = max(self.max_new, longest)
        if self.chat:
            self.task.tell(self.examples["train"])
        return self


def epoch_batches(examples, batch_size, seed):
    """Index lists of one epoch: shuffled, yet of similar length within a batch, so that little is
    padding.

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


def step_batches(examples, task, batch_size, grad_accum=1, seed=0, skip=0, rank=0, world=1):
    """Endless, epoch after epoch, from step `skip` on: the batches of one process for each
    optimizer step, a list of (idx, targets, share) with one item for each accumulation. share is
    that of all targets of the step, times `world`, because gradients are averaged over the
    processes.

    Process `rank` of `world` takes every world-th part of a step's examples. How many parts there
    are does not change which examples a step has: two processes, or two accumulations, with half
    the batch each see what one sees.
    """
    epoch, parts = 0, grad_accum * world
    while True:
        order = epoch_batches(examples, batch_size * parts, f"{seed}/{epoch}")
        for number, indices in list(enumerate(order))[skip:]:
            idx, targets, real = task.collate([examples[i] for i in indices],
                                              f"{seed}/{epoch}/{number}")
            total, batches = int((targets != -100).sum()), []
            for part in range(rank, parts, world):
                # the last batch of an epoch may have fewer examples than parts: an extra part
                # repeats one, with share 0
                counts = part < len(indices)
                rows = slice(part, None, parts) if counts else slice(1)
                T = int(real[rows].sum(1).max())
                mine = targets[rows, :T] if targets.dim() > 1 else targets[rows]
                batches.append((idx[rows, :T], mine,
                                world * (counts * int((mine != -100).sum()) / total)))
            yield batches
        skip, epoch = max(0, skip - len(order)), epoch + 1
