"""Tokenizers. A checkpoint folder with `tokenizer.tiktoken` brings its own; a GPT-2 vocabulary is tiktoken's "gpt2".

The embedded base uses a byte-level BPE of 2,048 tokens (Sennrich et al. 2016, arXiv:1508.07909, on bytes as in GPT-2):
every text can be encoded, since all 256 bytes are tokens. The file is in tiktoken's format, a line per token: base64 of
its bytes, a space, its rank. tiktoken does the encoding; the training is below, 20 lines.
"""
import base64
import os
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken

FILE = "tokenizer.tiktoken"
# A word with its leading space, one digit at a time, a run of punctuation, white space.
PATTERN = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train(texts, size):
    """The `size` byte strings of a BPE vocabulary: 256 bytes, then the most frequent pair merged again and again."""
    counts = Counter(word for text in texts for word in regex.findall(PATTERN, text))
    words = [[bytes([b]) for b in word.encode()] for word in counts]
    counts = list(counts.values())
    pairs, where = Counter(), defaultdict(set)  # pair -> how often, pair -> indices of the words that may hold it

    def count(i, sign):
        for pair in pairwise(words[i]):
            pairs[pair] += sign * counts[i]
            where[pair].add(i)

    for i in range(len(words)):
        count(i, 1)
    vocabulary = [bytes([b]) for b in range(256)]
    while len(vocabulary) < size:
        best = max(pairs, key=lambda p: (pairs[p], p))  # ties by bytes: the same text gives the same vocabulary
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


def save(vocabulary, folder):
    """Write folder/tokenizer.tiktoken."""
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(vocabulary)]
    part = Path(folder) / (FILE + ".part")
    part.write_text("".join(lines))
    os.replace(part, Path(folder) / FILE)


def load(folder, vocab_size):
    """A tiktoken.Encoding for a checkpoint with `vocab_size` embeddings; <|endoftext|> comes after the ranks."""
    path = Path(folder) / FILE
    if path.exists():
        try:
            pairs = [line.split() for line in path.read_text().splitlines()]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
        except ValueError as e:
            raise ValueError(f"{path} is damaged: {e}") from None
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError(f"{path} is damaged: its ranks are not 0..{len(ranks) - 1}, each once")
        if any(bytes([b]) not in ranks for b in range(256)):
            raise ValueError(f"{path} is damaged: some of the 256 bytes are no token")
        if len(ranks) + 1 != vocab_size:
            raise ValueError(f"{path} has {len(ranks)} ranks, the model's {vocab_size} embeddings need "
                             f"{vocab_size - 1}")
        return tiktoken.Encoding("tiny", pat_str=PATTERN, mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": len(ranks)})
    if vocab_size != 50257:
        raise ValueError(f"{folder} has no {FILE}, and {vocab_size} embeddings are not GPT-2's vocabulary of 50257")
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as e:
        raise ValueError(f"GPT-2's vocabulary cannot be downloaded ({type(e).__name__}): "
                         "set TIKTOKEN_CACHE_DIR to a folder that holds it") from None
