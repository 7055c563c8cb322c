"""The vocabulary of the shipped bases: a byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909, on
bytes as in GPT-2).

Every text can be encoded, since all 256 bytes are tokens. base.sh and base_roberta.sh call `make`.
"""
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import regex

from checkpoints.tokenizers import PATTERN, Tokenizer, from_ranks


def train(texts, size):
    """The `size` byte strings of a BPE vocabulary: 256 bytes, then the most frequent pair merged
    again and again."""
    counts = Counter(word for text in texts for word in regex.findall(PATTERN, text))
    words = [[bytes([b]) for b in word.encode()] for word in counts]
    counts = list(counts.values())
    # pair -> how often, pair -> indices of the words that may hold it
    pairs, where = Counter(), defaultdict(set)

    def count(i, sign):
        for pair in pairwise(words[i]):
            pairs[pair] += sign * counts[i]
            where[pair].add(i)

    for i in range(len(words)):
        count(i, 1)
    vocabulary = [bytes([b]) for b in range(256)]
    while len(vocabulary) < size:
        # ties by bytes: the same text gives the same vocabulary
        best = max(pairs, key=lambda p: (pairs[p], p))
        vocabulary.append(best[0] + best[1])
        for i in where.pop(best):
            count(i, -1)
            old, new = words[i], []
            while old:
                n = 2 if tuple(old[:2]) == best else 1
                new.append(b"".join(old[:n]))
                old = old[n:]
            words[i] = new
            count(i, 1)
        del pairs[best]
    return vocabulary


def make(texts, size, folder, roberta=False):
    """Write tokenizer.json and tokenizer_config.json with `size` tokens beside the special ones
    into a folder."""
    tokenizer = Tokenizer(from_ranks(train(texts, size), roberta), folder, size + 5)
    tokenizer.save(Path(folder), roberta)
