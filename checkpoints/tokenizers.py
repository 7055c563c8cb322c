"""Tokenizers. A checkpoint folder with `tokenizer.tiktoken` brings its own; a GPT-2 vocabulary is tiktoken's "gpt2",
and so is RoBERTa's, with other numbers for the tokens.

The embedded bases use a byte-level BPE of 2,048 tokens (Sennrich et al. 2016, arXiv:1508.07909, on bytes as in GPT-2):
every text can be encoded, since all 256 bytes are tokens. The file is in tiktoken's format, a line per token: base64 of
its bytes, a space, its rank. tiktoken does the encoding; the training is below.
"""
import base64
import json
import os
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken

FILE = "tokenizer.tiktoken"
FILES = FILE, "vocab.json", "merges.txt"  # the last two are what `transformers` reads
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


def for_model(folder, config):
    """The tokenizer of a checkpoint folder, of the kind that its model_type needs."""
    return (load if config.model_type == "gpt2" else RobertaTokenizer)(folder, config.vocab_size)


def load(folder, vocab_size):
    """GPT-2's way, a tiktoken.Encoding for `vocab_size` embeddings: the ranks, then <|endoftext|>."""
    if (Path(folder) / FILE).exists():
        ranks = read_ranks(folder, vocab_size - 1, vocab_size)
        return tiktoken.Encoding("tiny", pat_str=PATTERN, mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": len(ranks)})
    if vocab_size != 50257:
        raise ValueError(f"{folder} has no {FILE}, and {vocab_size} embeddings are not GPT-2's vocabulary of 50257")
    return gpt2()


def gpt2():
    """tiktoken's gpt2, from its cache or the network."""
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as e:
        raise ValueError(f"GPT-2's vocabulary cannot be downloaded ({type(e).__name__}): "
                         "set TIKTOKEN_CACHE_DIR to a folder that holds it") from None


def read_ranks(folder, wanted, vocab_size):
    """{bytes: rank} of folder/tokenizer.tiktoken, `wanted` of them for a model of `vocab_size` embeddings."""
    path = Path(folder) / FILE
    try:
        pairs = [line.split() for line in path.read_text().splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError as e:
        raise ValueError(f"{path} is damaged: {e}") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path} is damaged: its ranks are not 0..{len(ranks) - 1}, each once")
    if any(bytes([b]) not in ranks for b in range(256)):
        raise ValueError(f"{path} is damaged: some of the 256 bytes are no token")
    if len(ranks) != wanted:
        raise ValueError(f"{path} has {len(ranks)} ranks, the model's {vocab_size} embeddings need {wanted}")
    return ranks


class RobertaTokenizer:
    """RoBERTa's way: <s> text </s>, or <s> a </s></s> b </s>, with <s> 0, <pad> 1, </s> 2, <unk> 3 and <mask> last.

    With tokenizer.tiktoken a token's id is 4 + its rank. The real RoBERTa cuts text as GPT-2 does, but numbers the
    tokens anew: vocab.json says how, in letters that stand for bytes.
    """
    SPECIAL = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}

    def __init__(self, folder, vocab_size):
        self.bos, self.pad, self.eos, unk = self.SPECIAL.values()
        self.mask = vocab_size - 1
        path = Path(folder) / "vocab.json"
        if (Path(folder) / FILE).exists():
            ranks = read_ranks(folder, vocab_size - 5, vocab_size)
            self.encoding = tiktoken.Encoding("tiny", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
            self.ids = [rank + 4 for rank in range(len(ranks))]
            return
        if not path.exists():
            raise ValueError(f"{folder} has neither {FILE} nor vocab.json: which tokens do its embeddings stand for?")
        try:
            vocab = json.loads(path.read_text())
            ids = sorted(vocab.values())
        except (ValueError, RecursionError, AttributeError, TypeError) as e:
            raise ValueError(f"{path} is damaged: {e}") from None
        special = {**self.SPECIAL, "<mask>": self.mask}
        if ids != list(range(vocab_size)) or any(vocab.get(token) != i for token, i in special.items()):
            raise ValueError(f"{path} must number as many tokens as the model has embeddings, 0..{vocab_size - 1}: "
                             + ", ".join(f"{token} {i}" for token, i in special.items()))
        self.encoding, letters = gpt2(), byte_letters()
        self.ids = [unk] * self.encoding.n_vocab  # rank -> id
        for token in self.encoding.token_byte_values():
            self.ids[self.encoding.encode_single_token(token)] = vocab.get("".join(letters[b] for b in token), unk)
        if (lacking := self.ids.count(unk)) > 1:  # RoBERTa's own lacks <|endoftext|>
            raise ValueError(f"{path} lacks {lacking} of GPT-2's tokens: its texts are cut into other ones")

    def encode_ordinary(self, text):
        """text -> ids, without special tokens"""
        return [self.ids[rank] for rank in self.encoding.encode_ordinary(text)]

    def encode_ordinary_batch(self, texts):
        return [[self.ids[rank] for rank in ranks] for ranks in self.encoding.encode_ordinary_batch(texts)]

    def build(self, a, b=None):
        """ids of one text or of two -> <s> a </s>, <s> a </s></s> b </s>"""
        return [self.bos, *a, self.eos] + ([] if b is None else [self.eos, *b, self.eos])


def byte_letters():
    """{byte: the letter that stands for it} in GPT-2's vocab.json: itself if it can be seen, else one from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in seen]
    return {b: chr(b) for b in seen} | {b: chr(256 + i) for i, b in enumerate(hidden)}
