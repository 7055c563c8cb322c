"""Losses and metrics of a model on a dataset, and the batches that merging is calibrated on.

dataset: a data.Dataset. device, amp: where the model is, and the autocast context of its
arithmetic; where they are left out, the CPU, and the arithmetic of the weights.
"""
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from data import epoch_batches
from data.tasks import Label
from evaluation import decoding, metrics
from loss import with_targets

CPU, EXACT = torch.device("cpu"), nullcontext()
# validation texts for a point of the curve; the report uses the whole test split
EVAL_EXAMPLES = 128
EVAL_LABELLED = 1000  # the same where texts are classified: an accuracy needs more of them
EVAL_BATCH = 32  # fixed, whatever --batch-size is: which words are masked depends on the batch
# texts decoded for a report; all of the test split where the dataset is judged by decoded texts
SCORED = 64
VALIDATED = 64  # texts decoded for a point of the curve, where decoded texts select the checkpoint
DECODED = 32  # texts decoded at a time: the cache holds 2 L C numbers per token
CALIBRATION = 16  # training batches that merging is calibrated on
# the same for a classifier: its texts are short, and few of their tokens count
CALIBRATION_LABELLED = 128


class InFp32(TorchFunctionMode):
    """Inside, products with weights in 16 bits are computed in fp32, one weight at a time: where a
    report compares models, rounding must not be what differs."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear:
            args = [in_fp32(value) for value in args]
            kwargs = {name: in_fp32(value) for name, value in (kwargs or {}).items()}
        return function(*args, **(kwargs or {}))


def in_fp32(value):
    """A tensor of 16 bits in fp32; anything else as it is."""
    half = torch.bfloat16, torch.float16
    return value.float() if torch.is_tensor(value) and value.dtype in half else value


def to_device(idx, device):
    """A copy that does not wait, where the device allows it. Targets stay on the CPU, see
    loss.with_targets."""
    return (idx.pin_memory().to(device, non_blocking=True) if device.type == "cuda"
            else idx.to(device))


@torch.inference_mode()
def evaluate(model, examples, task, device=CPU, amp=EXACT):
    """(mean loss per target, logits (N, L) in the order of the examples where they are labelled,
    else None)"""
    model.eval()
    total, count, logits = 0, 0, []
    batches = decoding.by_length([ids for ids, _ in examples], EVAL_BATCH)
    for number, rows in enumerate(batches):
        # the seed fixes which words are masked, so that models are comparable
        idx, targets, _ = task.collate([examples[i] for i in rows],
                                       f"evaluation/{number * EVAL_BATCH}")
        n = int((targets != -100).sum())
        with amp:
            out, mean = model(to_device(idx, device), targets)
        total, count = total + n * mean, count + n
        if isinstance(task, Label):
            logits.append(out.float())
    model.train()
    if logits:
        logits = torch.cat(logits).cpu()[torch.tensor(sum(batches, [])).argsort()]
    return float(total) / count, logits if len(logits) else None


@torch.inference_mode()
def decode(model, pairs, task, amp=EXACT, max_new=96):
    """(prompts, greedy texts, how many of them have max_new tokens and did not end): the text of
    each record, or the continuation of a plain text's beginning. task: that of the data, a Write.
    """
    tokenizer = task.tokenizer
    begin = min(32, model.context // 2 - 1)  # tokens of a plain text
    prompts = [task.prompt(record) if record else
               [tokenizer.bos, *tokenizer.encode_ordinary(text[:400])[:begin]]
               for record, text in pairs]
    model.eval()
    with amp:
        texts = decoding.in_batches(
            prompts, DECODED, lambda batch: decoding.generate(model, batch, max_new, task.stops))
    model.train()
    return ([tokenizer.decode(p[1:]).strip() for p in prompts],
            [tokenizer.decode(ids).strip() for ids in texts],
            sum(len(ids) == max_new for ids in texts))


@torch.inference_mode()
def log_likelihoods(model, examples, task, device, amp):
    """[log P(target | prompt)] of examples of a Write task, in nats."""
    model.eval()
    sums = torch.zeros(len(examples))
    for rows in decoding.by_length([ids for ids, _ in examples], EVAL_BATCH):
        idx, targets, _ = task.collate([examples[i] for i in rows])
        # (N,): whose token it is
        which = torch.arange(len(rows))[:, None].expand_as(targets)[targets != -100]
        with amp:
            x, asked = with_targets(model.hidden(to_device(idx, device)), targets)
            nats = F.cross_entropy(model.head(x).float(), asked, reduction="none").cpu()
        sums[rows] = sums.new_zeros(len(rows)).index_add(0, which, -nats)
    model.train()
    return sums.tolist()


def choose(model, dataset, pairs, device, amp):
    """{"acc_norm", "acc"}: how often the right one of several texts is the likeliest, by the sum of
    its tokens' log probabilities, and by that sum divided by its characters."""
    rows = [(prompt, *dataset.module.options[prompt]) for prompt, _ in pairs]
    encoded, _ = dataset.task.encode([(prompt, text) for prompt, texts, _ in rows
                                      for text in texts])
    encoded = [(ids[:-1] if ids[-1] == dataset.tokenizer.eos else ids, start)
               for ids, start in encoded]
    scores = iter(log_likelihoods(model, encoded, dataset.task, device, amp))
    right = {"acc_norm": 0, "acc": 0}
    for _, texts, label in rows:
        sums = [next(scores) for _ in texts]
        by_character = [s / len(text) for s, text in zip(sums, texts, strict=True)]
        right["acc_norm"] += by_character.index(max(by_character)) == label
        right["acc"] += sums.index(max(sums)) == label
    return {name: hits / len(rows) for name, hits in right.items()}


def measure(model, dataset, split, device, amp, first=None, scored=None, exact=None, tell=False):
    """{metric: value} on a split, or on its `first` examples; metrics of decoded texts on its first
    `scored` rows. exact: another context than amp, for the loss and for what is not decoded. tell:
    print how many decoded texts were cut."""
    examples, pairs = dataset.examples[split][:first], dataset.pairs[split]
    loss, logits = evaluate(model, examples, dataset.task, device, exact or amp)
    if dataset.labels:
        predicted = logits.squeeze(1) if len(dataset.labels) == 1 else logits.argmax(1)
        truth = torch.tensor([label for _, label in examples], dtype=predicted.dtype)
        return {"loss": loss, **{name: metrics.METRICS[name](predicted.numpy(), truth.numpy())
                                 for name in dataset.metrics}}
    # of a RoBERTa: for masked tokens
    values = {"loss": loss, "perplexity": metrics.perplexity(loss)}
    scorer = getattr(dataset.module, "score", None)
    scored = SCORED if scored is None else scored
    if hasattr(dataset.module, "options") and scored:
        values.update(choose(model, dataset, pairs[:scored], device, exact or amp))
    if scorer and scored:
        _, texts, cut = decode(model, pairs[:scored], dataset.task, amp, dataset.max_new)
        if cut and tell:
            print(f"evaluate {cut} of {len(texts)} texts have no end after {dataset.max_new} "
                  "tokens, where they were cut")
        values.update(scorer(pairs[:scored], texts))
    return values


def validate(model, dataset, device, amp):
    """{metric: value} for a point of the curve."""
    first = EVAL_LABELLED if dataset.labels else EVAL_EXAMPLES
    return measure(model, dataset, "validation", device, amp, first,
                   VALIDATED if dataset.metrics else 0)


def report(model, dataset, device, amp, stage=None):
    """{metric: value} on the test split, and on a second test split if there is one. Prints what is
    evaluated first, if `stage` says it in words."""
    every = len(dataset.pairs["test"])
    if stage:
        decodes = 0
        if getattr(dataset.module, "score", None):
            decodes = every if dataset.metrics else SCORED
        also = f", and {min(decodes, every)} texts are decoded" * bool(decodes)
        print(f"evaluate {stage}: the loss of {len(dataset.examples['test'])} test examples{also}",
              flush=True)
    exact = InFp32() if isinstance(amp, torch.autocast) else amp
    values = measure(model, dataset, "test", device, amp, scored=every if dataset.metrics else None,
                     exact=exact, tell=bool(stage))
    for split in dataset.examples.keys() - {"train", "validation", "test"}:
        more = measure(model, dataset, split, device, amp, exact=exact)
        values.update({f"{name} ({split})": value for name, value in more.items()})
    return values


def by_class(model, dataset, device, amp):
    """{label: {precision, recall, f1, texts}} on the test split, of a classifier."""
    examples = dataset.examples["test"]
    logits = evaluate(model, examples, dataset.task, device, amp)[1]
    return metrics.by_class(logits.argmax(1).numpy(),
                            np.array([label for _, label in examples]), dataset.labels)


def calibration(model, examples, task, batch_size, seed, device, amp):
    """What `reslora.calibrate` takes: training batches, how one of them goes through the model,
    which of its tokens are real, and the margin of a classifier."""
    label = isinstance(task, Label)
    order = epoch_batches(examples, batch_size,
                          f"{seed}/0")[:CALIBRATION_LABELLED if label else CALIBRATION]

    def run(batch):
        with amp:  # of a language model, all that the layers read, without the vocabulary
            return (model if label else model.hidden)(to_device(batch[0], device))

    def margin(output):  # top logit minus mean, or a regression's prediction
        logits = output[0]  # (B, L)
        return (logits if logits.size(1) == 1 else logits.amax(1) - logits.mean(1)).sum()
    return dict(batches=(task.collate([examples[i] for i in indices], f"{seed}/0/{number}")
                         for number, indices in enumerate(order)),
                run=run, real=lambda batch: batch[2].to(device), margin=margin if label else None)
