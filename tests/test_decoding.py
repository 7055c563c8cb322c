"""Decoding: with the cache as without it, and as `transformers` decodes."""
import itertools
import math

import pytest
import torch
from conftest import adapt, tiny_gpt, tiny_llama, variants

from checkpoints.pretrained import save_pretrained
from evaluation.decoding import beam_search, generate, stream
from model import GPT, GPTConfig

causal = pytest.mark.parametrize("tiny", [tiny_gpt, tiny_llama], ids=["gpt", "llama"])


def until(stop, ids):
    return ids[:ids.index(stop)] if stop in ids else ids


def slowly(model, prompt, max_new, stop):
    """Greedy, every step a whole forward of everything."""
    ids = list(prompt)
    for _ in range(min(max_new, model.context - len(prompt))):
        ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
    return until(stop, ids[len(prompt):])


@pytest.mark.parametrize("method, hparams, tiny", [
    pytest.param(*one.values, tiny, id=f"{one.id}-{tiny.__name__}") for one in variants()
    for tiny in (tiny_gpt, tiny_llama) if tiny == tiny_gpt or one.values[0] in ("lora", "reslora")])
def test_decoding_with_the_cache_is_decoding_without(method, hparams, tiny):
    """Prompts of different lengths, decoded together, by the base and by unmerged adapters, which
    write another text. ResLoRA's shortcuts read other layers' activations of the same positions."""
    model = tiny()
    prompts = [[1], [5, 4, 3, 2], [7, 7, 9, 11, 13, 2]]
    base = generate(model, prompts, 9, stop=60)
    assert method != "lora" or base == [slowly(model, prompt, 9, 60) for prompt in prompts]
    adapt(model, method, hparams, targets=("q", "v", "up"))
    model.eval()
    found = generate(model, prompts, 9, stop=60)
    assert found == [slowly(model, prompt, 9, 60) for prompt in prompts] and found != base


def test_decoding_stops_at_the_stop_token():
    """A row ends before its stop token; others go on."""
    model = tiny_gpt()
    free = generate(model, [[3], [8]], 10, stop=-1)
    for stop in free[0]:
        assert generate(model, [[3], [8]], 10, stop) == [until(stop, row) for row in free]


@causal
def test_no_text_goes_beyond_the_context(tiny):
    """Greedy, sampled, or with beams: every row gets max_new tokens or as many as there is room for
    behind its prompt, whatever is decoded beside it; and so where some rows end before."""
    model, prompts = tiny(), [[3], [8] * 14, [5, 6], [1] * 15, [2] * 9]  # a context of 16
    ways = [lambda prompts, n, stop: generate(model, prompts, n, stop),
            lambda prompts, n, stop: generate(model, prompts, n, stop, temperature=2.0, seed=5)]
    ways += [lambda *given, K=K: beam_search(model, *given, K) for K in (1, 3, 7)]
    for way, n in itertools.product(ways, (1, 9, 100)):
        together, room = way(prompts, n, -1), [min(n, 16 - len(p)) for p in prompts]
        assert [len(row) for row in together] == room
        if way is not ways[1]:  # which draws for all rows at once
            assert together == [way([prompt], n, -1)[0] for prompt in prompts]
        for stop in together[0][:2]:
            rows = way(prompts, n, stop)
            assert all(len(row) <= most and stop not in row
                       for row, most in zip(rows, room, strict=True))
    for bad, message in (([[1] * 16], "a prompt of 16 tokens leaves no room"),
                         ([[]], "an empty prompt cannot"), ([[1], []], "an empty prompt cannot")):
        for way in ways[::2]:
            with pytest.raises(ValueError, match=message):
                way(bad, 9, -1)
    with pytest.raises(ValueError, match="max_new 0"):
        ways[0](prompts, 0, -1)


def test_sampling_draws_from_the_softmax():
    """Frequencies of the first token over 4,000 draws are the probabilities at that temperature,
    among the top k; of one token they are greedy; a seed repeats its draws."""
    model = tiny_gpt()
    logits = model(torch.tensor([[5, 4]]))[0][0, -1]
    for temperature, k in ((1.0, 0), (0.5, 4)):
        first = next(stream(model, [[5, 4]] * 4000, 1, -1, temperature=temperature, top_k=k))
        p = (logits / temperature).softmax(0)
        if k:
            p = torch.where(p >= p.topk(k).values[-1], p, 0.0)
            assert len(set(first)) <= k
        p /= p.sum()
        frequency = torch.bincount(torch.tensor(first), minlength=61) / 4000
        assert (frequency - p).abs().max() < 4 * math.sqrt(0.25 / 4000)
    prompts = [[1, 2, 3], [4]]
    for seed in range(3):
        one = generate(model, prompts, 8, 60, temperature=5.0, top_k=1, seed=seed)
        assert one == generate(model, prompts, 8, 60)
    one, two, other = (generate(model, [[5, 4]], 9, -1, temperature=1.0, seed=s) for s in (1, 1, 2))
    assert one == two != other


def few_words(vocabulary, llama=False):
    """A GPT or Llama of so few words that each, as the stop token, ends some texts early."""
    torch.manual_seed(4)
    model = (tiny_llama(n_layer=2, vocab_size=vocabulary) if llama else
             GPT(GPTConfig(vocab_size=vocabulary, n_positions=16, n_embd=8, n_layer=2, n_head=2)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.4)
    return model.double()


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 2.0])
def test_enough_beams_find_the_best_of_all_texts(penalty):
    """5 words, up to 4 of them, each in turn the stop token: with a beam for every beginning it is
    the best of all by exhaustion, ending early and late; also where the context ends first."""
    model, lengths = few_words(5), set()
    options = {} if penalty == 1 else {"length_penalty": penalty}  # what it is unless told
    for prompt, room in (([1, 2], 4), ([1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3], 3)):
        texts = list(itertools.product(range(5), repeat=room))
        idx = torch.tensor([[*prompt, *text] for text in texts])
        logp = model(idx)[0][:, len(prompt) - 1:-1].log_softmax(2)
        sums = logp.gather(2, idx[:, len(prompt):, None])[..., 0].cumsum(1)
        for stop in range(5):
            ends = [text.index(stop) + 1 if stop in text else room for text in texts]
            best = max(range(len(texts)), key=lambda i: sums[i, ends[i] - 1] / ends[i] ** penalty)
            lengths.add(ends[best])
            found, = beam_search(model, [prompt], 4, stop, beams=64, **options)
            assert found == until(stop, list(texts[best][:ends[best]]))
    assert len(lengths) > 1


@pytest.mark.parametrize("beams, penalty, llama", [
    (1, 1.0, False), (3, 0.9, False), (5, 0.9, False), (2, 0.0, True), (4, 2.0, True)])
def test_beam_search_is_that_of_transformers(tmp_path, beams, penalty, llama):
    """Token for token, for prompts of different lengths decoded together, texts that end early and
    texts that max_new or the context cuts; one beam is greedy decoding."""
    transformers = pytest.importorskip("transformers", reason="the oracle, in [dev]")
    prompts = [[1, 3], [5, 4, 3, 2], [2, 7, 1, 4, 3, 2], [3], [8, *range(8), 1, 2, 3, 4]]
    model, lengths = few_words(9, llama), set()
    save_pretrained(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    for stop in range(9):
        found = beam_search(model, prompts, 9, stop, beams, penalty)
        if beams == 1:
            assert found == generate(model, prompts, 9, stop)
        for prompt, y in zip(prompts, found, strict=True):
            idx = torch.tensor([prompt])
            out = theirs.generate(
                idx, attention_mask=torch.ones_like(idx), max_new_tokens=min(9, 16 - len(prompt)),
                num_beams=beams, length_penalty=penalty, early_stopping=False, do_sample=False,
                eos_token_id=stop, pad_token_id=stop)[0, len(prompt):].tolist()
            assert y == until(stop, out)
            lengths.add(len(y))
    assert len(lengths) > 2


def test_a_tiny_temperature_is_greedy():
    """No overflow: the likeliest token."""
    model = tiny_gpt()
    one, two = (generate(model, [[5, 4]], 5, -1, temperature=t) for t in (0.0, 1e-40))
    assert one == two
