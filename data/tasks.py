"""From texts to batches, one class for each kind of task: `Write` the next token, `Label` a text,
fill in a `Mask`.

    task.encode(pairs) -> examples, how many of their texts had to be cut
    task.collate(examples, seed) -> idx (B, T), targets (B, T) or of Label (B,), real (B, T)

real is False at padding.

An example is (ids, target). T is that of the longest example of the batch; `seed`, a text, is for
Mask.
"""
from zlib import crc32

import torch


class Write:
    """A GPT predicts the next token: of the target after a prompt, or of everything in a plain text
    (prompt ""). Of an example's ids, ids[:-1] are the input and ids[1:] are predicted.

    A record becomes <bos> prompt || target <eos>, in GPT-2 both <|endoftext|>, and its target is
    cut at the context. Plain text is cut into consecutive pieces. Each overlaps the last by one
    token, so every token but the first is predicted once. between: what stands between record and
    text.
    """

    between = " ||"

    def __init__(self, tokenizer, context, between=between):
        self.tokenizer, self.context, self.between = tokenizer, context, between

    def encode(self, pairs):
        """[(prompt, target)] -> [(ids, start)]: ids[start:] carry the loss. None for a record that
        leaves no room."""
        tokenizer, context, examples, cut = self.tokenizer, self.context, [], 0
        prompts = tokenizer.encode_ordinary_batch([p + self.between if p else "" for p, _ in pairs])
        # a text is encoded as a whole: some tokenizers put a space before whatever they are given
        texts = tokenizer.encode_ordinary_batch([f"{p}{self.between} {t}" if p else t
                                                 for p, t in pairs])
        for prompt, text, pair in zip(prompts, texts, pairs, strict=True):
            ids, start = [tokenizer.bos, *text, tokenizer.eos], 1 + len(prompt)
            if not pair[0]:
                examples += [(ids[i:i + context + 1], 1) for i in range(0, len(ids) - 1, context)]
                continue
            if text[:len(prompt)] != prompt:
                raise ValueError("this tokenizer joins the end of a record with the text behind "
                                 "it, so that no token is the first to predict: "
                                 f"{pair[0][-30:]!r}{self.between} {pair[1][:30]!r}")
            if start >= context:
                examples.append(None)
                continue
            cut += len(ids) > context + 1
            examples.append((ids[:context + 1], start))
        return examples, cut

    def collate(self, examples, seed=""):
        """targets (B, T), -100 where nothing is predicted. Padding is token 0, at the end, unseen
        by real tokens."""
        idx = padded([ids[:-1] for ids, _ in examples], 0)
        targets = torch.full_like(idx, -100)
        for i, (ids, start) in enumerate(examples):
            targets[i, start - 1:len(ids) - 1] = torch.tensor(ids[start:])
        lengths = torch.tensor([len(ids) - 1 for ids, _ in examples])
        return idx, targets, torch.arange(idx.size(1)) < lengths[:, None]


class Label:
    """A RoBERTa classifies a text or a pair of texts; for `labels` 1 it predicts a number."""

    def __init__(self, tokenizer, context, labels):
        self.tokenizer, self.context, self.labels = tokenizer, context, labels

    def encode(self, rows):
        """[((text,) or (a, b), label)] -> [(ids, label)]; what is too long loses the end of its
        longer text"""
        columns = zip(*(texts for texts, _ in rows), strict=True)
        parts = [self.tokenizer.encode_ordinary_batch(texts) for texts in columns]
        examples, cut = [], 0
        for *texts, (_, label) in zip(*parts, rows, strict=True):
            room = self.context - 2 * len(texts)  # <s> a </s>, <s> a </s></s> b </s>
            if room < 2 * len(texts):
                raise ValueError(f"a context of {self.context} tokens is too short for "
                                 f"{len(texts)} texts: {4 * len(texts)} are the least")
            cut += sum(map(len, texts)) > room
            # shorten the longer text to the length of the other, then both in turn
            while (over := sum(map(len, texts)) - room) > 0:
                longer, shorter = sorted(texts, key=len)[::-1] if len(texts) > 1 else (*texts, [])
                del longer[-min(over, max(1, len(longer) - len(shorter))):]
            examples.append((self.tokenizer.build(*texts), label))
        return examples, cut

    def collate(self, examples, seed=""):
        """targets (B,)"""
        idx = padded([ids for ids, _ in examples], self.tokenizer.pad)
        targets = torch.tensor([label for _, label in examples],
                               dtype=torch.float if self.labels == 1 else torch.long)
        return idx, targets, idx != self.tokenizer.pad


class Mask:
    """A RoBERTa fills in masked tokens of plain texts (Devlin et al. 2018, arXiv:1810.04805),
    chosen anew every time.

    30 % of the tokens are predicted, twice BERT's share, for more signal a step (our choice, not
    tuned). Of these 80 % are shown as <mask>, 10 % as another token and 10 % as themselves.
    """
    ASKED = 0.3

    def __init__(self, tokenizer, context):
        self.tokenizer, self.context = tokenizer, context

    def encode(self, pairs):
        """[("", text)] -> [(ids, None)], cut into pieces that fit"""
        room, examples = self.context - 2, []
        for ids in self.tokenizer.encode_ordinary_batch([text for _, text in pairs]):
            examples += [(self.tokenizer.build(ids[i:i + room]), None)
                         for i in range(0, len(ids), room)]
        return examples, 0

    def collate(self, examples, seed=""):
        """targets (B, T), -100 where nothing is predicted. The same seed masks the same tokens."""
        tok, rng = self.tokenizer, torch.Generator().manual_seed(crc32(seed.encode()))
        idx = padded([ids for ids, _ in examples], tok.pad)
        real = idx != tok.pad
        chance, kind = torch.rand(2, *idx.shape, generator=rng)
        chosen = (chance < self.ASKED) & real & (idx != tok.bos) & (idx != tok.eos)
        chosen[:, 1] |= ~chosen.any(1)  # at least one a row
        other = torch.tensor(tok.ids)[torch.randint(len(tok.ids), idx.shape, generator=rng)]
        shown = torch.where(kind < 0.8, tok.mask, torch.where(kind < 0.9, other, idx))
        return torch.where(chosen, shown, idx), torch.where(chosen, idx, -100), real


def padded(rows, pad):
    """[[id, …], …] -> (B, T), filled up on the right"""
    idx = torch.full((len(rows), max(map(len, rows))), pad)
    for i, ids in enumerate(rows):
        idx[i, :len(ids)] = torch.tensor(ids)
    return idx
