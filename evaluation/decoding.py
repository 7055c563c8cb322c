"""Text generation with a GPT: one token at a time, greedily, by sampling, or with beam search.

Keys and values of earlier tokens stay in a cache, so each new token costs one forward of one
position. Prompts of different lengths are decoded together, padded on the right. What the padding
wrote into the cache is overwritten by the tokens generated at these positions before any token
attends to them. Every layer sees the same positions in a forward, which ResLoRA's shortcuts need.

Shapes: B prompts, K beams, T tokens of the longest prompt, V vocabulary, S length of the cache.
"""
import torch
import torch.nn.functional as F


class Cached:
    """A GPT that has read B prompts, lists of token ids, and predicts the next token of each.

    ValueError for a prompt that is empty or leaves no room for an answer. `room` (B): how many
    tokens each row may still get, at most max_new.
    """

    def __init__(self, model, prompts, max_new):
        if not all(prompts):
            raise ValueError("an empty prompt cannot be continued: begin with <|endoftext|>")
        T, device = max(map(len, prompts)), model.wte.weight.device
        if T >= model.context:
            raise ValueError(f"a prompt of {T} tokens leaves no room in a context of "
                             f"{model.context}")
        if max_new < 1:
            raise ValueError(f"max_new {max_new} is not a number of tokens, 1 or more")
        self.model, self.seen = model, T
        self.S = min(T + max_new, model.context)
        self.room = [min(max_new, self.S - len(p)) for p in prompts]
        config, B = model.config, len(prompts)
        self.cache = model.wte.weight.new_zeros(config.n_layer, 2, B, self.S, config.n_kv_head,
                                                config.head_dim)
        self.equal = len(set(map(len, prompts))) == 1  # then all rows stand at the same place
        # (B, 1): where the next token belongs
        self.pos = torch.tensor([[len(p)] for p in prompts], device=device)
        idx = torch.tensor([p + [0] * (T - len(p)) for p in prompts], device=device)
        x = model.hidden(idx, self.cache[:, :, :, :T], 0)
        # (B, C), the last real tokens
        self.x = x.gather(1, (self.pos - 1)[..., None].expand(-1, -1, x.size(2)))[:, 0]

    def logits(self):
        """(B, V), of the next tokens"""
        return self.model.head(self.x)

    def read(self, token):
        """Read the next tokens (B,). A row that has ended overwrites its last position, which it no
        longer uses."""
        place = self.seen if self.equal and self.seen < self.S else self.pos
        self.seen = min(self.seen + 1, self.S)
        self.x = self.model.hidden(token[:, None], self.cache[:, :, :, :self.seen], place)[:, 0]
        self.pos = (self.pos + 1).clamp(max=self.S - 1)

    def repeat(self, K):
        """Every row K times, side by side: B becomes B K."""
        self.cache, self.pos, self.x = (t.repeat_interleave(K, dim) for t, dim in
                                        ((self.cache, 2), (self.pos, 0), (self.x, 0)))

    def overwrite(self, rows, sources):
        """Copy the cache of the rows `sources` to the rows `rows`, both lists of row numbers of the
        same prompt."""
        self.cache[:, :, rows, :self.seen] = self.cache[:, :, sources, :self.seen]


@torch.no_grad()
def stream(model, prompts, max_new, stop, temperature=0.0, top_k=0, seed=0):
    """Yield a list of B token ids for each step, None where a row has ended: by `stop`, an id or
    several, which is not given out, after max_new tokens, or at the end of the context.

    temperature 0 takes the likeliest token; else tokens are drawn with the probability
    softmax(logits / temperature), of the top_k likeliest ones (0: of all).
    """
    cached, stops = Cached(model, prompts, max_new), ids_of(stop)
    chance = torch.Generator(model.wte.weight.device).manual_seed(seed)
    done = [False] * len(prompts)
    for t in range(max_new):
        logits = cached.logits()
        if temperature:
            # at most 0, so that a small temperature overflows nothing; below 1e-30 fp32 has 0
            logits = (logits.float() - logits.amax(1, keepdim=True)) / max(temperature, 1e-30)
            if top_k:
                least = logits.topk(min(top_k, logits.size(1))).values[:, -1:]
                logits = logits.masked_fill(logits < least, -torch.inf)
            token = torch.multinomial(F.softmax(logits, 1), 1, generator=chance)[:, 0]
        else:
            token = logits.argmax(1)  # (B,)
        ids = token.tolist()
        done = [over or i in stops for over, i in zip(done, ids, strict=True)]
        yield [None if over else i for over, i in zip(done, ids, strict=True)]
        done = [over or t + 1 >= room for over, room in zip(done, cached.room, strict=True)]
        if all(done):
            return
        cached.read(token)


def ids_of(stop):
    """{id} of an id or several."""
    return {stop} if isinstance(stop, int) else set(stop)


def generate(model, prompts, max_new, stop, **options):
    """[token ids] of each prompt's continuation; `options` as in `stream`."""
    steps = list(stream(model, prompts, max_new, stop, **options))
    return [[i for i in row if i is not None] for row in zip(*steps, strict=True)]


@torch.no_grad()
def beam_search(model, prompts, max_new, stop, beams, length_penalty=1.0):
    """[token ids] of the continuation y with the largest score

        log P(y | prompt) / |y|^length_penalty        |y| counts the token that ends y

    that a search with K = beams finds: of all one-token extensions of the K best beginnings the K
    best go on; those among them that end are kept apart, as are the ones that come to the end of
    their room. A row is finished when it has K endings, none worse than what its best beginning
    would score if it ended now.
    """
    cached, B, K = Cached(model, prompts, max_new), len(prompts), beams
    stops = ids_of(stop)
    device = cached.x.device
    cached.repeat(K)
    scores = torch.full((B, K), -torch.inf, device=device)
    scores[:, 0] = 0.0  # at first all beams are equal
    going = [[[] for _ in range(K)] for _ in prompts]  # [B][K] token lists
    ended = [[] for _ in prompts]  # [B] lists of (score, token list), at most K
    open_rows = set(range(B))
    for length in range(1, max_new + 1):
        logp = F.log_softmax(cached.logits().float(), 1).view(B, K, -1)
        V = logp.size(2)
        # of K beams at most K extensions end by each stop token, so K of these go on
        best, where = (scores[..., None] + logp).flatten(1).topk(min((1 + len(stops)) * K, K * V))
        best, parents, tokens = best.tolist(), (where // V).tolist(), (where % V).tolist()
        chosen, rows, sources = [], [], []
        for b in range(B):
            ranked = [(p, i, going[b][k], k)
                      for p, i, k in zip(best[b], tokens[b], parents[b], strict=True)]
            alive = [(p, i, [*y, i], k) for p, i, y, k in ranked if i not in stops][:K]
            alive += alive[-1:] * (K - len(alive))
            if b in open_rows:
                over = [(p, y) for p, i, y, _ in ranked[:K] if i in stops]
                if length == cached.room[b]:
                    over += [(p, y) for p, _, y, _ in alive]
                ended[b] += [(p / length ** length_penalty, y) for p, y in over]
                ended[b] = sorted(ended[b], key=lambda ending: -ending[0])[:K]
                full = (len(ended[b]) == K and ended[b][-1][0] >= alive[0][0] / length
                        ** length_penalty)
                if full or length == cached.room[b]:
                    open_rows.discard(b)
            # the first child of a beam takes its place, so that only the others' pasts must be
            # copied
            firsts, others = {}, []
            for beam in alive:
                if beam[3] in firsts:
                    others.append(beam)
                else:
                    firsts[beam[3]] = beam
            placed = [firsts[k] if k in firsts else others.pop(0) for k in range(K)]
            rows += [b * K + k for k in range(K) if k not in firsts]
            sources += [b * K + placed[k][3] for k in range(K) if k not in firsts]
            going[b] = [y for _, _, y, _ in placed]
            chosen.append([(p, i) for p, i, _, _ in placed])
        if not open_rows:
            break
        scores = torch.tensor([[p for p, _ in row] for row in chosen], device=device)
        if rows:
            cached.overwrite(rows, sources)
        cached.read(torch.tensor([[i for _, i in row] for row in chosen], device=device).flatten())
    return [endings[0][1] for endings in ended]


def by_length(rows, size):
    """[[number of a row, …], …], batches of `size` rows of similar length: little is padding."""
    near = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return [near[i:i + size] for i in range(0, len(near), size)]


def in_batches(prompts, size, write, bar=iter):
    """[token ids] of each prompt's continuation. write: prompts -> [token ids], for `size` of them
    at a time. bar: shows progress through the batches."""
    written = {}
    for rows in bar(by_length(prompts, size)):
        written.update(zip(rows, write([prompts[i] for i in rows]), strict=True))
    return [written[i] for i in range(len(prompts))]
