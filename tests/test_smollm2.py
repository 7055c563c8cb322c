"""A real pretrained Llama, SmolLM2-135M, as `python -m experiments.smollm2 FOLDER` makes it: set
SMOLLM2 to it."""
import json
import os

import pytest
import torch
from conftest import ROOT
from test_checkpoint import oracle
from test_llama import lines_of

from checkpoints import adapters, tokenizers
from checkpoints.pretrained import from_pretrained
from evaluation.decoding import beam_search, generate
from lora import LoRALinear, apply

FOLDER = os.environ.get("SMOLLM2")
pytestmark = pytest.mark.skipif(not FOLDER, reason="a real checkpoint: set SMOLLM2 to its folder")
PROMPTS = ["The capital of France is", "name : The Mill | food : Italian ||", "Low-rank adaptation "
           "of a language model", "Once upon a time, in a small village by the sea,"]


@pytest.fixture(scope="module")
def models():
    """(ours, theirs), in fp32"""
    Theirs = oracle("transformers").AutoModelForCausalLM
    theirs = Theirs.from_pretrained(FOLDER, dtype=torch.float32)
    return from_pretrained(FOLDER).eval(), theirs.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.for_model(FOLDER, from_pretrained(FOLDER).config)


@torch.no_grad()
def test_logits_on_real_text_are_those_of_transformers(models, tokenizer):
    """Within 1e-4 of the largest, over 300 tokens of this repository's README; and the loss."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    idx = torch.tensor([tokenizer.encode_ordinary(page)[:300]])
    ours, theirs = (m(idx) for m in models)
    assert (ours[0] - theirs.logits).abs().max() < 1e-4 * theirs.logits.abs().max()
    loss = models[0](idx[:, :-1], idx[:, 1:])[1]
    torch.testing.assert_close(loss, models[1](idx, labels=idx).loss, rtol=1e-4, atol=0)


def test_token_ids_are_those_of_transformers(tokenizer, texts_folder):
    """On every line of E2E, GSM8K and SST-2."""
    texts = list(lines_of(texts_folder))
    assert len(texts) > 5000
    theirs = oracle("transformers").AutoTokenizer.from_pretrained(FOLDER)
    assert (tokenizer.encode_ordinary_batch(texts)
            == theirs(texts, add_special_tokens=False).input_ids)


@torch.no_grad()
def test_decoding_is_that_of_transformers_and_that_without_a_cache(models, tokenizer):
    """Token for token, greedily and with four beams, prompts of different lengths together."""
    ours, theirs = models
    prompts, stop, new = [tokenizer.encode_ordinary(text) for text in PROMPTS], tokenizer.eos, 24
    for beams in (1, 4):
        found = generate(ours, prompts, new, stop) if beams == 1 else beam_search(ours, prompts,
                                                                                  new, stop, beams,
                                                                                  0.9)
        for prompt, ids in zip(prompts, found, strict=True):
            idx = torch.tensor([prompt])
            out = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=new,
                                  num_beams=beams, do_sample=False, length_penalty=0.9,
                                  early_stopping=False, eos_token_id=stop,
                                  pad_token_id=stop)[0, len(prompt):].tolist()
            assert ids == (out[:out.index(stop)] if stop in out else out)
            if beams == 1:
                slow = list(prompt)
                for _ in ids:
                    slow.append(ours(torch.tensor([slow]))[0][0, -1].argmax().item())
                assert slow[len(prompt):] == ids


@torch.no_grad()
def test_peft_loads_an_adapter_over_the_same_folder(models, tokenizer, tmp_path):
    """An adapter on all linears: our logits are PEFT's, within 1e-4 of the largest."""
    model = from_pretrained(FOLDER).eval()
    for layer in apply(model, LoRALinear, ["q", "k", "v", "o", "gate", "up", "down"], r=4, alpha=8):
        layer.lora_B.normal_(std=0.01)
    adapters.save_adapter(tmp_path, model, FOLDER)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    idx = torch.tensor([tokenizer.encode_ordinary(PROMPTS[3])])
    theirs = oracle("peft").PeftModel.from_pretrained(models[1], tmp_path).eval()(idx).logits
    assert (model(idx)[0] - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert (models[0](idx)[0] - theirs).abs().max() > 0.01 * theirs.abs().max()
