"""Decoding: with the cache as without it, and as `transformers` decodes."""
import itertools
import math

import pytest
import torch
from conftest import adapt, every_variant, tiny_gpt, tiny_llama

from checkpoints.pretrained import save_pretrained
from evaluation.decoding import beam_search, generate, stream
from model import GPT, GPTConfig

causal = pytest.mark.parametrize("tiny", [tiny_gpt, tiny_llama], ids=["gpt", "llama"])


def slowly(model, prompt, max_new, stop):
    """Greedy, every step a whole forward of everything."""
    ids = list(prompt)
    for _ in range(min(max_new, model.context - len(prompt))):
        ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
    found = ids[len(prompt):]
    return found[:found.index(stop)] if stop in found else found


@causal
def test_greedy_decoding_with_the_cache_is_decoding_without(tiny):
    """Prompts of different lengths, decoded together with a cache, give what one at a time, recomputed, gives."""
    model = tiny()
    prompts = [[1], [5, 4, 3, 2], [7, 7, 9, 11, 13, 2]]
    together = generate(model, prompts, 10, stop=60)
    for prompt, found in zip(prompts, together, strict=True):
        ids = list(prompt)
        for _ in range(10):
            ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
        expected = ids[len(prompt):]
        assert found == (expected[:expected.index(60)] if 60 in expected else expected)


def test_decoding_stops_at_the_stop_token():
    """A row ends before its stop token; others go on."""
    model = tiny_gpt()
    free = generate(model, [[3], [8]], 10, stop=-1)
    stop = free[0][2]
    short = generate(model, [[3], [8]], 10, stop=stop)
    assert short[0] == free[0][:free[0].index(stop)]
    assert short[1] == (free[1][:free[1].index(stop)] if stop in free[1] else free[1])


@causal
def test_every_prompt_has_its_own_room(tiny):
    """A prompt near the end of the context cuts its own answer, not those decoded beside it."""
    model = tiny()
    prompts = [[3], [8] * 14, [5, 6]]  # a context of 16
    together = generate(model, prompts, 9, stop=-1)
    assert [len(row) for row in together] == [9, 2, 9]
    assert together == [generate(model, [prompt], 9, stop=-1)[0] for prompt in prompts]
    with pytest.raises(ValueError, match="a prompt of 16 tokens leaves no room"):
        generate(model, [[1] * 16], 9, stop=-1)


@causal
@every_variant
def test_unmerged_adapters_decode_with_the_cache_as_without(method, hparams, tiny):
    """ResLoRA's shortcuts read other layers' activations of the same positions: token for token the same text, which
    is another one than the base's."""
    model = tiny()
    prompts = [[1], [5, 4, 3, 2], [7, 7, 9, 11, 13, 2]]
    base = generate(model, prompts, 9, stop=60)
    adapt(model, method, hparams, targets=("q", "v", "up"))
    model.eval()
    found = generate(model, prompts, 9, stop=60)
    assert found == [slowly(model, prompt, 9, 60) for prompt in prompts]
    assert found != base


def test_an_empty_prompt_is_refused_wherever_it_stands():
    """Nothing says what comes first: a text begins with <|endoftext|>."""
    for prompts in ([[]], [[1], []], [[], [1, 2]]):
        with pytest.raises(ValueError, match="an empty prompt cannot be continued"):
            generate(tiny_gpt(), prompts, 3, 60)


def test_sampling_from_one_token_is_greedy():
    """--top-k 1 leaves the likeliest token alone, at any temperature."""
    model, prompts = tiny_gpt(), [[1, 2, 3], [4]]
    for seed in range(3):
        assert generate(model, prompts, 8, 60, temperature=5.0, top_k=1, seed=seed) == generate(
            model, prompts, 8, 60)


def test_sampling_draws_from_the_softmax():
    """Frequencies of the first token over 4,000 draws are the probabilities at that temperature, among the top k;
    a seed repeats its draws."""
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
    one, two, other = (generate(model, [[5, 4]], 9, -1, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert one == two != other


def few_words(vocabulary, llama=False):
    """A GPT, or a Llama, of so few words that each of them, taken as the stop token, ends some texts early."""
    torch.manual_seed(4)
    model = (tiny_llama(n_layer=2, vocab_size=vocabulary) if llama else
             GPT(GPTConfig(vocab_size=vocabulary, n_positions=16, n_embd=8, n_layer=2, n_head=2)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.4)
    return model.double()


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 2.0])
def test_enough_beams_find_the_best_of_all_texts(penalty):
    """5 words, up to 4 of them, each in turn the stop token: with a beam for every beginning it is the best of all by
    exhaustion, early endings and late ones."""
    model, prompt, lengths = few_words(5), [1, 2], set()

    def score(y):
        logp = model(torch.tensor([prompt + y]))[0][0].log_softmax(1)
        return sum(logp[len(prompt) - 1 + i, t].item() for i, t in enumerate(y)) / len(y) ** penalty
    for stop in range(5):
        texts = [list(y) for n in (1, 2, 3, 4) for y in itertools.product(range(5), repeat=n)
                 if stop not in y[:-1] and (y[-1] == stop or n == 4)]
        best = max(texts, key=score)
        lengths.add(len(best))
        found, = beam_search(model, [prompt], 4, stop, beams=64, length_penalty=penalty)
        assert found == [t for t in best if t != stop]
    assert len(lengths) > 1 or penalty == 2.0  # which prefers the longest texts


@pytest.mark.parametrize("llama", [False, True], ids=["gpt", "llama"])
@pytest.mark.parametrize("beams, penalty", [(1, 1.0), (2, 0.0), (3, 0.9), (5, 0.9), (4, 2.0)])
def test_beam_search_is_that_of_transformers(tmp_path, beams, penalty, llama):
    """Token for token, for prompts of different lengths decoded together, texts that end early and texts that are cut;
    one beam is greedy decoding."""
    transformers = pytest.importorskip("transformers", reason="the oracle; pip install -r requirements-dev.txt")
    prompts, lengths, model = [[1, 3], [5, 4, 3, 2], [2, 7, 1, 4, 3, 2], [3], [8, 8]], set(), few_words(9, llama)
    save_pretrained(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    for stop in range(9):
        found = beam_search(model, prompts, 9, stop, beams, penalty)
        if beams == 1:
            assert found == generate(model, prompts, 9, stop)
        for prompt, y in zip(prompts, found, strict=True):
            idx = torch.tensor([prompt])
            out = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=9, num_beams=beams,
                                  length_penalty=penalty, early_stopping=False, do_sample=False, eos_token_id=stop,
                                  pad_token_id=stop)[0, len(prompt):].tolist()
            assert y == (out[:out.index(stop)] if stop in out else out)
            lengths.add(len(y))
    assert len(lengths) > 2 or penalty == 2.0
