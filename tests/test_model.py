"""model.py against `transformers`: logits, loss, both directions of the checkpoint, decoding."""
import json

import pytest
import torch
from conftest import tiny_gpt, tokens
from safetensors.torch import load_file, save_file

from model import GPT, GPTConfig, from_pretrained

transformers = pytest.importorskip("transformers", reason="the oracle; pip install -r requirements-dev.txt")


def their_gpt2(folder, **config):
    """A random tiny GPT2LMHeadModel, saved by transformers, with biases and LayerNorms that matter."""
    shape = dict(vocab_size=97, n_positions=32, n_embd=24, n_layer=3, n_head=4)
    config = transformers.GPT2Config(**{**shape, **config})
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("config", [{}, dict(n_inner=40), dict(layer_norm_epsilon=1e-3), dict(n_head=1)])
def test_logits_and_loss_equal_transformers(tmp_path, config):
    """A checkpoint saved by transformers gives the same logits here, within 1e-5, and the same loss."""
    theirs, ours = their_gpt2(tmp_path, **config), from_pretrained(tmp_path)
    idx = torch.randint(0, 97, (3, 32))
    with torch.no_grad():
        expected = theirs(idx, labels=idx)
    torch.testing.assert_close(ours(idx)[0], expected.logits, rtol=0, atol=1e-5)
    shifted = torch.cat([idx[:, 1:], torch.full((3, 1), -100)], 1)
    torch.testing.assert_close(ours(idx, shifted)[1], expected.loss)


def test_what_we_save_is_what_transformers_reads(tmp_path):
    """save_pretrained -> GPT2LMHeadModel and GPT2Model give our logits; and we read our own file back exactly."""
    model = tiny_gpt(torch.float32)
    model.save_pretrained(tmp_path)
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    idx = tokens()[0]
    torch.testing.assert_close(theirs.eval()(idx).logits, model(idx)[0], rtol=0, atol=1e-5)
    assert torch.equal(from_pretrained(tmp_path)(idx)[0], model(idx)[0])


def test_both_prefixes_and_old_masks_are_read(tmp_path):
    """Keys with and without `transformer.`, a stored causal mask and a stored tied head load to the same model."""
    their_gpt2(tmp_path)
    expected = from_pretrained(tmp_path).state_dict()
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    bare = {k.removeprefix("transformer."): v for k, v in state.items()}
    bare["h.0.attn.bias"], bare["h.0.attn.masked_bias"] = torch.ones(1, 1, 32, 32), torch.tensor(-1e4)
    headed = {**state, "lm_head.weight": state["transformer.wte.weight"].clone()}
    for variant in (bare, headed):
        save_file(variant, file)
        found = from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(found[k], v) for k, v in expected.items())


def test_only_positions_with_a_target_are_projected():
    """With targets the logits are those of the (N, V) marked positions, in order, and the loss is their mean."""
    model, (idx, targets) = tiny_gpt(), tokens()
    everywhere, (logits, loss) = model(idx)[0], model(idx, targets)
    where = targets != -100
    assert logits.shape == (where.sum(), 61)
    torch.testing.assert_close(logits, everywhere[where])
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(everywhere[where], targets[where]))
    smooth = torch.nn.functional.cross_entropy(everywhere[where], targets[where], label_smoothing=0.1)
    torch.testing.assert_close(model(idx, targets, label_smoothing=0.1)[1], smooth)


def test_padding_on_the_right_changes_nothing():
    """Causal attention: real tokens do not see what stands behind them."""
    model, idx = tiny_gpt(), tokens()[0]
    padded = torch.cat([idx, torch.zeros(3, 4, dtype=torch.long)], 1)
    torch.testing.assert_close(model(padded)[0][:, :10], model(idx)[0])


def test_greedy_decoding_with_the_cache_is_decoding_without():
    """Prompts of different lengths, decoded together with a cache, give what one at a time, recomputed, gives."""
    model = tiny_gpt()
    prompts = [[1], [5, 4, 3, 2], [7, 7, 9, 11, 13, 2]]
    together = model.generate(prompts, 10, stop=60)
    for prompt, found in zip(prompts, together, strict=True):
        ids = list(prompt)
        for _ in range(10):
            ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
        expected = ids[len(prompt):]
        assert found == (expected[:expected.index(60)] if 60 in expected else expected)


def test_decoding_stops_at_the_stop_token():
    """A row ends before its stop token; others go on."""
    model = tiny_gpt()
    free = model.generate([[3], [8]], 10, stop=-1)
    stop = free[0][2]
    short = model.generate([[3], [8]], 10, stop=stop)
    assert short[0] == free[0][:free[0].index(stop)]
    assert short[1] == (free[1][:free[1].index(stop)] if stop in free[1] else free[1])


def test_a_fresh_model_predicts_nothing_yet():
    """GPT-2's init: the loss of a fresh model is log V."""
    model = GPT(GPTConfig(vocab_size=500, n_positions=16, n_embd=32, n_layer=4, n_head=2))
    idx = torch.randint(0, 500, (8, 16))
    assert model(idx, idx.roll(1))[1].item() == pytest.approx(torch.tensor(500.0).log().item(), abs=0.05)


def breaking(tmp_path, change):
    """The message of loading a checkpoint after `change(folder)`."""
    their_gpt2(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError) as e:
        from_pretrained(tmp_path)
    return str(e.value)


def edit_config(**values):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))
    return change


def edit_weights(edit):
    def change(folder):
        state = load_file(folder / "model.safetensors")
        edit(state)
        save_file(state, folder / "model.safetensors")
    return change


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("change, message", [
    (edit_config(model_type="llama"), "model_type 'llama' is not supported, only 'gpt2' or 'roberta'"),
    (edit_config(activation_function="relu"), "activation_function 'relu'"),
    (edit_config(tie_word_embeddings=False), "tie_word_embeddings False"),
    (edit_config(n_head=5), "24 channels are no multiple of 5 heads"),
    (edit_config(n_layer=4), "lacks h.3.attn.k.bias and 15 more"),
    (edit_config(n_layer=2), "holds unexpected h.2.attn.k.bias and 15 more"),
    (edit_config(n_positions=16), r"wpe.weight has shape (32, 24), not (16, 24)"),
    (edit_config(n_embd="24"), "n_embd"), (edit_config(n_layer=-1), "n_layer"), (edit_config(n_head=True), "n_head"),
    (edit_config(n_layer=10**7), "n_layer must be a whole number in 1..1000"),
    (edit_config(vocab_size=10**12), "vocab_size must be"),
    (edit_config(layer_norm_epsilon=1e300), "must be in (0, 1)"), (edit_config(n_inner=10), "has shape"),
    (edit_weights(lambda s: s.update({"transformer.h.0.attn.c_attn.bias": torch.ones(7)})), "lacks h.0.attn.k.bias"),
    (edit_weights(lambda s: s.pop("transformer.ln_f.bias")), "lacks ln_f.bias"),
    (edit_weights(lambda s: s.update({"extra": torch.ones(1)})), "holds unexpected extra"),
    (edit_weights(lambda s: s.update({"lm_head.weight": torch.ones(97, 24)})), "lm_head.weight differs"),
    (truncate, "damaged"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"\x80\x04pickle"), "damaged or no safetensors"),
    (lambda folder: (folder / "model.safetensors").unlink(), "does not exist"),
    (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    (lambda folder: (folder / "config.json").write_text("[]"), "not a JSON object"),
    (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
])
def test_a_bad_checkpoint_is_refused_with_its_reason(tmp_path, change, message):
    """Nothing is loaded halfway: each defect is named, with the file."""
    assert message in breaking(tmp_path, change)


def test_a_folder_that_is_not_there(tmp_path):
    """A path that looks like a folder is never looked up on the hub."""
    with pytest.raises(ValueError, match="does not exist"):
        from_pretrained(tmp_path / "nowhere")


def test_a_text_longer_than_the_context_is_refused():
    """17 tokens do not fit 16 positions: an error, not an index out of range."""
    with pytest.raises(ValueError, match="17 tokens do not fit the model's context of 16"):
        tiny_gpt()(torch.zeros(1, 17, dtype=torch.long))
