"""From texts to batches, one class for each kind of task: `Write` the next token, `Converse`,
`Label` a text, fill in a `Mask`.

    task.encode(pairs) -> examples, how many of their texts had to be cut
    task.collate(examples, seed) -> idx (B, T), targets (B, T) or of Label (B,), real (B, T)

real is False at padding.

An example is (ids, target). T is that of the longest example of the batch; `seed`, a text, is for
Mask.
"""
from bisect import bisect_left, bisect_right
from zlib import crc32

import torch

from data.chat import answers


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

    @property
    def stops(self):
        """The ids that end a text."""
        return {self.tokenizer.eos}

    def prompt(self, record):
        """The ids after which a text is written: of a record, or of a plain text's beginning."""
        return [self.tokenizer.bos, *self.tokenizer.encode_ordinary(record + self.between)]

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
        for i, (ids, trained) in enumerate(examples):
            for start, end in spans(ids, trained):
                targets[i, start - 1:end - 1] = torch.tensor(ids[start:end])
        lengths = torch.tensor([len(ids) - 1 for ids, _ in examples])
        return idx, targets, torch.arange(idx.size(1)) < lengths[:, None]


def spans(ids, trained):
    """[(start, end)] of the ids that carry the loss. trained: where they start, if they go to the
    end, or such a list."""
    return [(trained, len(ids))] if isinstance(trained, int) else trained


class Converse(Write):
    """A GPT answers in a conversation. The checkpoint's chat template writes the turns, and all
    that it writes for the assistant is predicted, its end of turn too; with last_turn only in the
    last answer.

    An answer is what the template adds to the turns before it. So these must be the beginning of
    the whole conversation. A template may drop earlier thinking, or move the system's text: then
    each answer is an example of its own. end: what ends a turn. ends: more ids at which a text
    ends. where: {conversation: its file and line}. known: {row: its example}, of `rows`; apart,
    lost: for `tell`, how many conversations were taken apart, and [(where, answers left out)].
    """

    def __init__(self, tokenizer, context, template, last_turn=False, where=(), ends=()):
        super().__init__(tokenizer, context)
        self.template, self.last_turn, self.where = template, last_turn, dict(where)
        self.known, self.apart, self.lost = {}, 0, []
        turns = ("user", "a"), ("assistant", "b")
        try:
            text = template.render(turns)
        except ValueError:  # some want a system's turn
            text = template.render((("system", "s"), *turns))
        ids, _ = tokenizer.encode_rendered(text.rstrip())
        special = [token for token in ids[-1:] if token in tokenizer.special]
        self.end, self.ends = tokenizer.decode(special), {*special, *ends}

    @property
    def stops(self):
        return super().stops | self.ends

    def prompt(self, record):
        return self.tokenizer.encode_rendered(self.template.render(record, ask=True))[0]

    def rows(self, pairs):
        """Conversations -> those that are trained on, which `encode` then knows: cut to the
        context, or taken apart. One of which nothing is left stays as it is."""
        found = []
        for pair in pairs:
            try:
                found += self.parts(*pair)
            except ValueError as e:
                raise ValueError(f"{self.where.get(pair, 'a conversation')}: {e}") from None
        return found

    def parts(self, prompt, completion):
        """[(prompt, completion)] of one conversation."""
        places = answers(prompt, completion)
        whole = self.read(places[-1:] if self.last_turn else places)
        if whole is None and len(places) > 1 and not self.last_turn:
            self.apart += 1
            whole = [self.read([place], alone=True) for place in places]
        elif whole is None:
            whole = [self.read(places[-1:], alone=True)]
        else:
            whole = [whole]
        found = []
        for ids, trained, of in whole:
            # as in `Write`: a text needs room for its first token
            fit = [span for span in trained if span[0] < self.context]
            row = of[len(fit) - 1] if fit else of[-1]
            if len(fit) < len(trained):
                self.lost.append((self.where.get((prompt, completion)), len(trained) - len(fit)))
            ids = ids[:fit[-1][1]] if fit else []
            self.known[row] = (ids, fit[0][0] if len(fit) == 1 else fit) if fit else None
            found.append(row)
        return found

    def read(self, places, alone=False):
        """(ids, [(start, end)] of the answers in them, the places of these) of a conversation that
        ends with the last place. places: [(turns before, answer)] that are trained on. None where
        what the template writes of a beginning is no beginning of the whole. alone: of a single
        place, also where the turns before it are written otherwise once the answer is there."""
        history, answer = places[-1]
        text, trained = self.template.render((*history, ("assistant", answer))), []
        for before, content in places:
            asked = self.template.render(before, ask=True)
            answered = self.template.render((*before, ("assistant", content)))
            if alone and not answered.startswith(asked):
                text = answered = asked + content + self.end
            if not (text.startswith(asked) and text.startswith(answered)):
                return None
            trained.append((len(asked), len(answered.rstrip())))
        ids, offsets = self.tokenizer.encode_rendered(text)
        # a token that begins before an answer and ends in it is of the answer
        first, behind = [start for start, _ in offsets], [end for _, end in offsets]
        trained = [(bisect_right(behind, start), bisect_left(first, end)) for start, end in trained]
        said = [i for i, (start, end) in enumerate(trained) if start < end]
        return ids, [trained[i] for i in said], [places[i] for i in said] or places

    def encode(self, pairs):
        """Rows of `rows` -> [(ids, where the answers are, see `spans`)]"""
        examples, cut = [self.known[pair] for pair in pairs], 0
        for i, example in enumerate(examples):
            if example and len(example[0]) > self.context + 1:
                ids, trained = example[0][:self.context + 1], example[1]
                if not isinstance(trained, int):
                    trained = [(start, min(end, len(ids))) for start, end in trained]
                examples[i], cut = (ids, trained), cut + 1
        return examples, cut

    def tell(self, examples):
        """Print which template writes the turns, how many answers are trained on, and the first
        example, its answers in [[ ]]."""
        turns = sum(len(spans(*example)) for example in examples)
        print(f"chat     turns as {self.template.where} writes them; {turns} answers of "
              f"{len(examples)} examples train")
        if self.apart:
            print(f"chat     it writes earlier turns otherwise once more follow: each answer of "
                  f"{self.apart} conversations is an example of its own")
        if not self.end:
            print("chat     it ends no turn with a token: answers go on to the end of their room")
        if self.lost:
            where, number = self.lost[0]
            print(f"chat     {sum(number for _, number in self.lost)} answers are left out, since "
                  f"they begin behind --context {self.context}: first the last {number} of {where}")
        ids, trained = examples[0]
        starts, ends = zip(*spans(ids, trained), strict=True)
        shown = "".join("[[" * (i in starts) + self.letters(token) + "]]" * (i + 1 in ends)
                        for i, token in enumerate(ids[:300]))
        print(f"chat     the first, token·by·token·, trained in [[ ]]: {shown}"
              + " …" * (len(ids) > 300))

    def letters(self, token):
        return self.tokenizer.decode([token]).replace("\n", "\\n") + "·"


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
