"""Datasets: one file each, with `load(data_dir) -> {"train": [(prompt, target), …], "validation": …, "test": …}`.

A prompt of "" means plain text to be modelled as it is. Here: the registry, the encoding and the batches.
"""
import importlib
import random

import torch

DATASETS = "restaurants", "e2e", "text", "stdlib", "world"
EMBEDDED = "restaurants", "world", "stdlib"  # need no files


def module(name):
    """The file of a dataset; imported when asked for, most runs need one."""
    return importlib.import_module(f"data.{name}")


def load(name, data_dir=None):
    """The splits of a dataset; ValueError for what is missing, empty or malformed, naming file and line."""
    if data_dir and name in EMBEDDED:
        raise ValueError(f"dataset {name} is generated here: --data-dir {data_dir} is not for it")
    splits = module(name).load() if name in EMBEDDED else module(name).load(data_dir)
    for split, pairs in splits.items():
        if not pairs:
            raise ValueError(f"dataset {name}: the {split} split is empty")
    return splits


def encode(pairs, tokenizer, context):
    """[(ids, start)] and how many targets had to be cut: ids[start:] carry the loss, ids[0] is <|endoftext|>.

    A record becomes <|endoftext|> prompt || target <|endoftext|>, its target cut at the context. Plain text is cut into
    consecutive pieces, each overlapping the last by one token so that every token but the first is predicted once.
    """
    eot, examples, cut = tokenizer.eot_token, [], 0
    prompts = tokenizer.encode_ordinary_batch([p + " ||" if p else "" for p, _ in pairs])
    targets = tokenizer.encode_ordinary_batch([" " + t if p else t for p, t in pairs])
    for prompt, target in zip(prompts, targets, strict=True):
        ids, start = [eot, *prompt, *target, eot], 1 + len(prompt)
        if not prompt:
            examples += [(ids[i:i + context + 1], 1) for i in range(0, len(ids) - 1, context)]
            continue
        if start >= context:
            raise ValueError(f"a record of {start} tokens leaves no room for its text in a context of {context}: "
                             f"{tokenizer.decode(prompt)[:60]!r}…")
        cut += len(ids) > context + 1
        examples.append((ids[:context + 1], start))
    return examples, cut


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


def collate(examples):
    """[(ids, start)] -> idx (B, T) padded with 0 and targets (B, T), -100 where nothing is asked."""
    T = max(len(ids) for ids, _ in examples) - 1
    idx = torch.zeros(len(examples), T, dtype=torch.long)
    targets = torch.full_like(idx, -100)
    for i, (ids, start) in enumerate(examples):
        ids = torch.tensor(ids)
        idx[i, :len(ids) - 1] = ids[:-1]
        targets[i, start - 1:len(ids) - 1] = ids[start:]
    return idx, targets
