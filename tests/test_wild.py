"""Checkpoints, adapters and files as other people's tools write them.

The public thread behind a case stands beside it: HF is huggingface/transformers, PEFT
huggingface/peft.
"""
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DATA, ROOT
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file, save_model
from test_checkpoint import relative
from test_train import FAST, command, few_records, refused  # noqa: F401

import data
import generate
import train
from checkpoints import adapters, tokenizers
from checkpoints.files import read_csv
from checkpoints.pretrained import from_pretrained, load, locate, save_merged
from checkpoints.weights import fingerprint_weights, weight_files
from data import sets, text
from data.files import read_rows
from data.tasks import Write
from evaluation import decoding
from run.report import print_table

transformers = pytest.importorskip("transformers", reason="the oracle, in [dev]")
peft = pytest.importorskip("peft", reason="the oracle, in [dev]")

RECORD = "name : The Mill | food : Italian"
TEXTS = ["a stirring , funny film", " two  spaces\n\nand <|endoftext|> <mask> </s>",
         "naïve 日本語 🙂", "", "it's 007"]


def made(cls, config, folder):
    """A model of transformers, always the same, saved if a folder is given."""
    torch.manual_seed(0)
    model = getattr(transformers, cls)(config).eval()
    if folder:
        model.save_pretrained(folder)
    return model


def their_gpt2(folder=None, cls="GPT2LMHeadModel", vocab_size=320, **more):
    shape = dict(vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=2, n_positions=256)
    return made(cls, transformers.GPT2Config(**{**shape, **more}), folder)


def their_roberta(folder=None, cls="RobertaForMaskedLM", vocab_size=325, **more):
    return made(cls, transformers.RobertaConfig(vocab_size=vocab_size, hidden_size=32,
                                                num_hidden_layers=2, num_attention_heads=2,
                                                intermediate_size=64, max_position_embeddings=130,
                                                type_vocab_size=1, layer_norm_eps=1e-5, **more),
                folder)


def their_classifier(folder, names):
    """A RoBERTa whose config.json gives its classes these names."""
    return their_roberta(folder, "RobertaForSequenceClassification", num_labels=len(names),
                         id2label=names,
                         label2id={name: i for i, name in names.items()})


def vocab_and_merges(folder, size=300, special=("<|endoftext|>",)):
    """What ByteLevelBPETokenizer.save_model writes: a vocabulary of its own, its special tokens
    first."""
    from tokenizers import ByteLevelBPETokenizer
    theirs = ByteLevelBPETokenizer()
    theirs.train_from_iterator([sentence for _, sentence in data.load("restaurants")["validation"]],
                               size, special_tokens=list(special), show_progress=False)
    theirs.save_model(str(folder))


ROBERTA = "<s>", "<pad>", "</s>", "<unk>", "<mask>"


# The tokenizer is part of the checkpoint

KINDS = ("vocab.json and merges.txt", "tokenizer.json of transformers", "tokenizer.json of ours",
         "added words", "truncation and padding", "a space before a text")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory, base):
    """{kind of tokenizer: (folder of a GPT-2 with it, its rows)}; most have more rows than
    tokens"""
    rows = {kind: 320 if "tokenizer.json" in kind else 512 for kind in KINDS}
    kinds = {kind: (tmp_path_factory.mktemp("kinds") / "base", rows[kind]) for kind in KINDS}
    plain, saved, ours, added, cut, space = (folder for folder, _ in kinds.values())
    for folder, size in kinds.values():
        their_gpt2(folder, vocab_size=size)
    for folder in (plain, added, cut, space):
        vocab_and_merges(folder)
    (space / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}))
    transformers.GPT2TokenizerFast.from_pretrained(plain).save_pretrained(saved)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, ours / name)
    # HF 912, 7897: words added to the vocabulary
    (added / "added_tokens.json").write_text(json.dumps({"Cotto": 300, "[PAD]": 301}))
    (added / "special_tokens_map.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    # HF 25053, daulet/tokenizers 30: a tokenizer.json remembers both
    theirs = transformers.GPT2TokenizerFast.from_pretrained(cut, pad_token="<|endoftext|>")
    theirs(["a b", "a"], padding="max_length", truncation=True, max_length=4)
    theirs.save_pretrained(cut)
    assert json.loads((cut / "tokenizer.json").read_text())["truncation"]
    return kinds


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(kinds, kind):
    """Whatever the files, a text has the ids that AutoTokenizer gives it, but that special tokens
    are no text: their letters are ordinary ones."""
    folder, rows = kinds[kind]
    ours, theirs = tokenizers.load(folder, rows), transformers.AutoTokenizer.from_pretrained(folder)
    for sample in [*TEXTS, "the Cotto and Cottos"]:
        expected = theirs(sample, split_special_tokens=True, truncation=False)["input_ids"]
        assert ours.encode_ordinary(sample) == ours.encode_ordinary_batch([sample])[0] == expected
        read = ours.decode(expected)
        assert read == sample or kind == KINDS[-1] and read == f" {sample}"
    assert theirs.decode([ours.eos]) == "<|endoftext|>"
    if kind == "added words":
        assert 300 in ours.encode_ordinary("the Cotto") and 301 not in ours.encode_ordinary("[PAD]")


def pipeline_text(folder, tokenizer, prompt):
    """What transformers' pipeline writes from the ids of a prompt, greedily."""
    pipe = transformers.pipeline("text-generation", model=str(folder), device="cpu")
    beginning = pipe.tokenizer.decode([tokenizer.eos]) + prompt
    assert pipe.tokenizer(beginning)["input_ids"] == [tokenizer.eos,
                                                      *tokenizer.encode_ordinary(prompt)]
    return pipe(beginning, max_new_tokens=12, do_sample=False,
                return_full_text=False)[0]["generated_text"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_on_merged_writes_what_generate_writes(kinds, kind, tmp_path, capsys):
    """Every tokenizer file travels into merged/: a pipeline works on the folder as it stands, and
    stops where generate.py stops."""
    folder, rows = kinds[kind]
    train.main(command(folder, tmp_path, "--context", 256, "--save-merged"))
    with pytest.raises(SystemExit):
        # bytes that are no UTF-8, as Python reads them
        generate.main([str(tmp_path), "\udcff caf\udce9"])
    assert "half a surrogate pair" in capsys.readouterr().err
    files = {name for name in tokenizers.FILES if (folder / name).exists()}
    assert all((tmp_path / "merged" / name).read_bytes() == (folder / name).read_bytes()
               for name in files)
    capsys.readouterr()
    generate.main([str(tmp_path), RECORD, "--max-new", "12"])
    ours = capsys.readouterr().out.strip()
    theirs = pipeline_text(tmp_path / "merged", tokenizers.load(folder, rows),
                           RECORD + " ||").strip()
    assert theirs.replace("�", "") == ours.replace("�", "")
    assert (json.loads((tmp_path / "merged/config.json").read_text())["eos_token_id"]
            == tokenizers.load(folder, rows).eos)


def test_gpt2s_own_vocabulary_reaches_merged(tmp_path, capsys):
    """A GPT-2 without a tokenizer, with rows to spare, and one with vocab.json alone: merged/ gets
    a tokenizer.json."""
    bare = tmp_path / "bare"
    their_gpt2(bare, vocab_size=50304, n_embd=16)
    alone = tmp_path / "alone"
    shutil.copytree(bare, alone)
    names = tokenizers.name_tokens(tokenizers.gpt2_tokens())
    (alone / "vocab.json").write_text(json.dumps({**names, "<|endoftext|>": 50256}))
    for folder, line in ((bare, "50304 embeddings are taken for GPT-2's vocabulary"), (alone, "")):
        merged, model = tmp_path / f"out-{folder.name}", from_pretrained(folder)
        tokenizer = tokenizers.load(folder, 50304)
        assert line in capsys.readouterr().out
        save_merged(merged, model, folder, tokenizer)
        theirs = transformers.AutoTokenizer.from_pretrained(merged)
        assert theirs("Hello there")["input_ids"] == tokenizer.encode_ordinary("Hello there")
        assert theirs.eos_token_id == 50256
        assert not DATA or tokenizer.encode_ordinary("Hello there") == [15496, 612]
        ids = decoding.generate(model, [[50256, *tokenizer.encode_ordinary(RECORD)]], 12, 50256)[0]
        assert pipeline_text(merged, tokenizer, RECORD) == tokenizer.decode(ids)


@pytest.mark.parametrize("files", ["vocab.json", "tokenizer.json", "own vocab.json and merges.txt",
                                   "ours"])
def test_a_classifiers_pipeline_on_merged_gives_the_same_labels(files, tmp_path, small_roberta,
                                                                texts_folder):
    """By name, for every kind of tokenizer that a RoBERTa may have, and a text has AutoTokenizer's
    ids."""
    folder, merged = tmp_path / "base", tmp_path / "out/merged"
    if files == "ours":
        shutil.copytree(small_roberta, folder)
    elif "own" in files:
        their_roberta(folder, vocab_size=400)
        # <mask> is 4 there, as in the tutorials, not the last token
        vocab_and_merges(folder, 300, ROBERTA)
        tokenizer = tokenizers.RobertaTokenizer(folder, 400)
        # words shown in place of masked ones
        assert tokenizer.mask == 4 and set(tokenizer.ids) == set(range(5, 300))
    else:
        their_roberta(folder, vocab_size=50266)
        shutil.copyfile(texts_folder / "roberta-base-vocab/vocab.json", folder / "vocab.json")
        if files == "tokenizer.json":
            tokenizers.RobertaTokenizer(folder, 50265).save(folder, roberta=True)
            (folder / "vocab.json").unlink()
    train.main(command(folder, tmp_path / "out", "--dataset", "reviews", "--context", 64,
                       "--save-merged", "--lr", .1))
    model = from_pretrained(merged)
    ours = tokenizers.for_model(merged, model.config)
    pipe = transformers.pipeline("text-classification", model=str(merged), device="cpu")
    texts = [texts[0] for texts, _ in data.load("reviews")["test"]]
    for sample, answer in zip(texts, pipe(texts), strict=True):
        ids = ours.build(ours.encode_ordinary(sample))
        assert pipe.tokenizer(sample)["input_ids"] == ids
        number = model(torch.tensor([ids]))[0].argmax()
        assert answer["label"] == data.about("reviews", "LABELS")[number]


@pytest.mark.parametrize("files, vocab_size, message", [
    ({}, 320, "needs a tokenizer.json, or a vocab.json and a merges.txt, and has none"),
    ({"merges.txt": "a b\n"}, 60000, "has only merges.txt"),
    ({"vocab.txt": "[PAD]\n"}, 60000, "has only vocab.txt"),  # a Chinese GPT-2 with BERT's tokens
    ({"spiece.model": "x"}, 60000, "has only spiece.model"),  # a Japanese one
    ({"tokenizer.json": "{"}, 320, "tokenizer.json is damaged"),
    ({"tokenizer.json": '{"model": {"type": "Unheard"}}'}, 320, "tokenizer.json is damaged"),
    ({"vocab.json": '{"a": 0, "b": 1}', "merges.txt": "#version: 0.2\na c\n"}, 320,
     "vocab.json is damaged"),
    ({"vocab.json": '{"a": 0, "b": 1}', "merges.txt": "#version: 0.2\na\n"}, 320,
     "vocab.json is damaged"),
    ({"vocab.json": '{"a": 0, "b": 900}', "merges.txt": ""}, 320,
     "up to 900, and the model has 320 embeddings"),
    ({"vocab.json": '{"a": 0, "b": 0}', "merges.txt": ""}, 320,
     "two of its tokens have one number"),
    ({"vocab.json": '{"a": 0, "b": 1}', "merges.txt": ""}, 320,
     "has no <|endoftext|>, and neither"),
    ({"vocab.json": '{"a": 0}', "merges.txt": "", "added_tokens.json": '{"x": 7}'}, 320,
     "x cannot have the number 7"),
])
def test_what_no_file_explains_is_refused_in_a_sentence(tmp_path, files, vocab_size, message):
    """No tokenizer, one of a kind that is not read, a damaged one, one that does not fit."""
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as e:
        tokenizers.load(tmp_path, vocab_size)
    assert message in str(e.value) and str(tmp_path) in str(e.value)


def test_a_gpt2_may_end_its_texts_otherwise(tmp_path):
    """The end of a text is what the vocabulary calls <|endoftext|>, else what the tokenizer's
    config names, else what config.json does; a number that is no token, GPT2Config's default of
    50256, is not."""
    (tmp_path / "merges.txt").write_text("")
    for vocab, names, config, eot in (({"a": 0, "<|endoftext|>": 1}, {"eos_token": "a"}, {}, 1),
                                      ({"a": 0, "</s>": 1}, {"eos_token": "</s>"},
                                       {"eos_token_id": 50256}, 1),
                                      ({"a": 0, "</s>": 1}, {"eos_token": {"content": "</s>"}}, {},
                                       1), ({"a": 0, "</s>": 1}, {}, {"eos_token_id": 1}, 1)):
        for name, content in (("vocab", vocab), ("tokenizer_config", names), ("config", config)):
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        assert tokenizers.load(tmp_path, 5).eos == eot


# Containers of weights

def difference(folder, theirs):
    """Of our logits and theirs, as a share of the largest."""
    idx = torch.randint(3, 300, (2, 9))
    return relative(from_pretrained(folder)(idx)[0], theirs(idx).logits.detach())


def rewrite(folder, change, file="model.safetensors"):
    """Save the weights again with other names: change(name) -> name, or None to leave one out."""
    state = load_file(folder / file)
    save_file({change(k): v.contiguous().clone() for k, v in state.items() if change(k)},
              folder / file)


HEAD_NAMES = {"transformer.wte.weight": "lm_head.weight", "lm_head.bias": "lm_head.decoder.bias",
              "roberta.embeddings.word_embeddings.weight": "lm_head.decoder.weight"}
# {container: the name of a tensor in it}
NAMES_OF = {"the head's name": lambda name: HEAD_NAMES.get(name, name),
            "DataParallel": lambda name: "module." + name,
            "torch.compile": lambda name: "_orig_mod." + name,
            "gamma and beta": lambda name: name.replace("orm.weight",
                "orm.gamma").replace("orm.bias", "orm.beta")}


@pytest.mark.parametrize("make", [their_gpt2, their_roberta])
@pytest.mark.parametrize("container", ["shards", "save_model", "half", *NAMES_OF])
def test_every_container_gives_the_same_model(tmp_path, make, container):
    """Shards with an index; safetensors' save_model, which keeps one of two tied tensors (HF
    38870); the prefixes of DataParallel and torch.compile (pytorch 101107, nanoGPT 325);
    TensorFlow's gamma and beta (HF 11809); halves."""
    theirs = make(tmp_path)
    if container == "shards":
        (tmp_path / "model.safetensors").unlink()
        theirs.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    elif container == "save_model":
        save_model(theirs, str(tmp_path / "model.safetensors"))
    elif container == "half":
        theirs.half().save_pretrained(tmp_path)
        theirs.float()
    else:
        rewrite(tmp_path, NAMES_OF[container])
    assert difference(tmp_path, theirs) < 1e-5


@pytest.mark.parametrize("cls, left", [
    ("GPT2ForSequenceClassification", "score"), ("GPT2Model", None),
    ("GPT2ForTokenClassification", "classifier"),
    ("GPT2ForQuestionAnswering", "qa_outputs"), ("RobertaForQuestionAnswering", "qa_outputs"),
    ("RobertaModel", None),
    ("RobertaForTokenClassification", "classifier"), ("RobertaForMultipleChoice", "classifier")])
def test_the_head_of_another_task_is_left_out(tmp_path, cls, left, capsys):
    """With a line, and the body is the body; a RoBERTa gets a fresh one, and the same line says
    so."""
    gpt = cls.startswith("GPT2")
    theirs = (their_gpt2 if gpt else their_roberta)(tmp_path, cls)
    (model, found), idx = load(tmp_path, None if gpt else 2), torch.randint(3, 300, (2, 9))
    fresh = "has no head for 2 labels: a fresh one is trained from scratch"
    fresh += f" (left out: {left})" * bool(left)
    said = f"left out is {left}, the head of another task" * bool(left) if gpt else fresh
    out = capsys.readouterr().out
    assert (said + "\n" in out and out.startswith("head ")) if said else not out
    assert found.fresh_head != gpt
    body = theirs.base_model(idx).last_hidden_state.detach()
    assert relative(model.ln_f(model.hidden(idx)) if gpt else model.hidden(idx), body) < 1e-5


def shards(folder):
    theirs = their_gpt2(folder)
    (folder / "model.safetensors").unlink()
    theirs.save_pretrained(folder, max_shard_size="20KB")
    return folder / "model.safetensors.index.json"


def test_a_folder_without_readable_weights_says_what_it_has(tmp_path):
    """Pickles and how to convert them; shards that are missing, or lie elsewhere; an adapter that
    is no model; a file of another name; in the names of the files."""
    def says(message):
        with pytest.raises(ValueError) as e:
            from_pretrained(tmp_path)
        assert message in str(e.value)
    index = shards(tmp_path)
    shard, table = sorted(tmp_path.glob("model-*.safetensors"))[1], json.loads(index.read_text())
    held, weights = shard.read_bytes(), table["weight_map"]
    shard.unlink()
    says(f"index.json names {shard.name}, which does not exist")
    shard.write_bytes(held)
    for bad in (None, {"a": "../model.safetensors"}, [], {"a": 1}):
        index.write_text(json.dumps({**table, "weight_map": bad}))
        says("index.json is damaged")
    index.write_text(json.dumps({"weight_map": dict(sorted(weights.items())[1:])}))
    says(f"index.json and its files have different tensors: {min(weights)}")
    index.unlink()
    says(f"has no model.safetensors, only {min(weights.values())}")
    for name in ("pytorch_model.bin", "tf_model.h5", "model.ckpt", "flax_model.msgpack",
                 "pytorch_model-01-of-2.bin"):
        (tmp_path / name).write_bytes(b"x")
        says(f"has its weights in {name}, and only safetensors are read here")
        says("save_pretrained(folder) writes model.safetensors")
        (tmp_path / name).unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    says("is an adapter and no model: give its base as --model, and the adapter as --init-from")


def test_the_download_asks_for_all_that_can_be_read(monkeypatch, tmp_path):
    """Single files, shards and their index, and every file of a tokenizer."""
    asked = []
    monkeypatch.setattr("checkpoints.hub.fetch",
                        lambda repo, patterns: asked.extend(patterns) or tmp_path)
    locate("some/model")
    for name in ("config.json", "model.safetensors", "model.safetensors.index.json",
                 "tokenizer.json", "vocab.json", "model-00001-of-00002.safetensors", "merges.txt",
                 "tokenizer_config.json", "added_tokens.json"):
        assert any(Path(name).match(pattern) for pattern in asked)
    assert not any(Path(name).match(pattern) for pattern in asked
                   for name in ("pytorch_model.bin", "onnx/model.onnx"))


# Labels

MNLI, RTE = {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}, {0: "not_entailment",
                                                                  1: "entailment"}
MATCHED = "its head is matched by name"


@pytest.mark.parametrize("task, names, order, line", [
    ("mnli", MNLI, [2, 1, 0], MATCHED),  # roberta-large-mnli's (HF 10386, 10401)
    ("mnli", {0: "entailment", 1: "neutral", 2: "contradiction"}, [0, 1, 2], ""),
    ("mnli", {i: f"LABEL_{i}" for i in range(3)}, [0, 1, 2], ""),
    ("mnli", {0: "0", 1: "1", 2: "2"}, [0, 1, 2], ""),
    ("mnli", {0: "joy", 1: "anger", 2: "fear"}, [0, 1, 2], "calls them joy, anger, fear"),
    ("mnli", {0: "Neutral", 1: " contradiction", 2: "Entailment"}, [2, 0, 1], MATCHED),
    # nyu-mll/glue's own names, in whatever spelling
    ("rte", RTE, [1, 0], MATCHED), ("sst2", {0: "POSITIVE", 1: "NEGATIVE"}, [1, 0], MATCHED),
    ("mrpc", {0: "equivalent", 1: "not_equivalent"}, [1, 0], MATCHED),
    ("qqp", {0: "duplicate", 1: "not_duplicate"}, [1, 0], MATCHED)])
def test_labels_are_matched_by_name(tmp_path, task, names, order, line, capsys):
    """Where names mean something the rows of the head take the order of the dataset's, and a line
    says so; where they say nothing, or differ, the order stays."""
    theirs = their_classifier(None, names)
    torch.nn.init.normal_(theirs.classifier.out_proj.bias)
    theirs.save_pretrained(tmp_path)
    labels = data.about(f"glue/{task}", "LABELS")
    capsys.readouterr()
    (model, found), idx = load(tmp_path, labels=labels), torch.randint(3, 300, (4, 9))
    out = capsys.readouterr().out
    assert (line in out) if line else not out
    assert relative(model(idx)[0],
                    theirs(idx).logits.detach()[:, order]) < 1e-5 and found.labels == labels


def test_a_head_that_does_not_fit_its_labels_is_refused(tmp_path):
    """An id2label that names other labels than the head has; a classifier without its output, with
    names of labels or without."""
    their_classifier(tmp_path, MNLI)
    config = json.loads((tmp_path / "config.json").read_text())
    for bad in ({"0": "a", "1": "b"}, {"1": "a", "2": "b", "3": "c"}, ["a", "b", "c"],
                {"0": 1, "1": 2, "x": 3}):
        (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": bad}))
        with pytest.raises(ValueError, match="id2label .* does not name the 3 labels of the head"):
            from_pretrained(tmp_path, labels=("a", "b", "c"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    rewrite(tmp_path, lambda name: None if name == "classifier.out_proj.weight" else name)
    for more in (dict(labels=data.about("glue/mnli", "LABELS")), dict(num_labels=3)):
        with pytest.raises(ValueError, match="lacks classifier.out_proj.weight"):
            from_pretrained(tmp_path, **more)


def test_label_names_and_the_bases_name_are_written(tmp_path, small_roberta, monkeypatch):
    """merged/ and the run folder, which is the adapter's, know what the classes are called; the
    adapter names its base by its whole path. Keys of config.json that we do not read are kept;
    dtype is that of the new file."""
    shutil.copytree(small_roberta, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps({**config, "dtype": "float16", "mine": [1]}))
    result = train.main(command("base", "out", "--dataset", "reviews", "--save-merged"))
    merged = json.loads(Path("out/merged/config.json").read_text())
    assert merged["id2label"] == {"0": "bad", "1": "good"} and merged["label2id"] == {"bad": 0,
                                                                                      "good": 1}
    assert merged["mine"] == [1] and "dtype" not in merged
    assert merged["architectures"] == ["RobertaForSequenceClassification"]
    assert (result["labels"] == json.loads(Path("out/result.json").read_text())["labels"]
            == ["bad", "good"])
    assert (json.loads(Path("out/adapter_config.json").read_text())["base_model_name_or_path"]
            == str(tmp_path / "base"))


# Paths are not identity

def test_a_resumed_run_has_its_own_flags(tmp_path, base):
    """--resume --out FOLDER alone: every flag of the run comes from its folder, those that are 0 or
    a list too."""
    whole = train.main(command(base, tmp_path, "--method", "reslora", "--shortcut", "middle",
                               "--merge", "regression,bi", "--clip", "0", "--warmup", "0",
                               "--weight-decay", "0", "--save-merged", "--rs", "--seed", "3"))
    shutil.rmtree(tmp_path / "merged")
    resumed = train.main(["--resume", "--out", str(tmp_path)])
    assert resumed["metrics"] == whole["metrics"] and "merged by bi" in whole["metrics"]
    assert resumed["settings"] == whole["settings"] and (tmp_path / "merged/config.json").exists()


@pytest.mark.parametrize("method", ["lora", "deltalora", "dylora", "full"])
def test_a_finished_run_goes_on_for_more_steps(tmp_path, base, method, capsys):
    """With a constant rate and a warm-up in steps, 4 steps and then 4 more are the run of 8 steps
    (as is asked in milesial/Pytorch-UNet 326)."""
    flags = ["--method", method, "--schedule", "constant", "--warmup", "2"]
    flags += ["--delta-start", "1"] if method == "deltalora" else []
    whole = train.main(command(base, tmp_path / "a", *flags, "--steps", 8))
    train.main(command(base, tmp_path / "b", *flags, "--steps", 4))
    capsys.readouterr()
    longer = train.main(["--resume", "--out", str(tmp_path / "b"), "--steps", "8"])
    line = ("after step 4, for 8 steps instead of 4: from here on the learning rate is that of the "
            "constant schedule")
    assert line in capsys.readouterr().out
    assert longer["metrics"] == whole["metrics"] and longer["settings"] == whole["settings"]


def test_a_longer_run_follows_the_schedule_of_all_its_steps(tmp_path, base):
    """Linear decay: the rate after the 4th step is that of a run of 8 steps, as the line says."""
    train.main(command(base, tmp_path, "--steps", 4))
    train.main(["--resume", "--out", str(tmp_path), "--steps", "8"])
    rates = [float(row["lr"]) for row in read_csv(tmp_path / "log.csv")]  # the log has both halves
    settings = train.parse(command(base, tmp_path / "x"))
    assert rates == [train.lr_at(step, settings.but(steps=steps))
                     for step, steps in ((2, 4), (4, 4), (6, 8), (8, 8))]


def test_a_refusal_to_resume_names_what_the_user_gave(tmp_path, base, capsys):
    """Never a setting that was not given, and no fingerprints; a run cannot be made shorter than
    it is, nor AdaLoRA's plan longer."""
    train.main(command(base, tmp_path / "a"))
    for flags, message in ((["--lr", "1"], "lr is 1.0 now, and it began with 0.01. Start a new run "
                            "with another --out"), (["--seed", "1"], "seed is 1 now, and it began "
                                                    "with 0"),
                           (["--steps", "4"], "it has done 6 already"),
                           (["--method", "rslora"], "with method rslora: it began with"),
                           (["--dataset", "stdlib"], "with dataset stdlib: it began with "
                            "restaurants"), (["--batch-size", "4"], "batch_size is 4 now, and it "
                                             "began with 8"),
                           (["--model", "tiny-gpt"], "the model tiny-gpt has other weights than it "
                            "began with")):
        line = refused(capsys, ["--resume", "--out", tmp_path / "a", *flags])
        assert message in line and "eval_every" not in line and "base_weights" not in line
    train.main(command(base, tmp_path / "b", "--method", "adalora", "--budget-warmup", 1,
                       "--budget-final", 2))
    assert "adalora has planned its ranks for 6" in refused(capsys, ["--resume", "--out",
                                                                     tmp_path / "b", "--steps", 9])


def test_a_moved_base_and_moved_data_are_the_same(tmp_path, base, capsys):
    """Weights, tokenizer and data at another place: fingerprints decide. --model tells train.py and
    generate.py."""
    shutil.copytree(base, tmp_path / "base")
    for split in sets.NAMES:
        rows = [dict(meaning_representation=RECORD, human_reference=f"The Mill is number {i} .")
                for i in range(9)]
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / f"data/{split}.jsonl").write_text("".join(json.dumps(row) + "\n"
                                                              for row in rows))
    flags = ["--dataset", "e2e", "--data-dir", tmp_path / "data"]
    whole = train.main(command(tmp_path / "base", tmp_path / "out", *flags))
    (tmp_path / "base").rename(tmp_path / "base-2")
    (tmp_path / "data").rename(tmp_path / "data-2")
    moved = ["--model", tmp_path / "base-2", "--data-dir", tmp_path / "data-2"]
    again = train.main([str(a) for a in ["--resume", "--out", tmp_path / "out", *moved]])
    assert again["metrics"] == whole["metrics"]
    (tmp_path / "base-2").rename(tmp_path / "base-3")
    for more, message in (([], "if the base has moved, --model gives its new place"),
                          (["--model", str(tmp_path / "nowhere")], "nowhere does not exist\n"),
                          (["--model", "tiny-gpt"], "has other weights than those that")):
        with pytest.raises(SystemExit):
            generate.main([str(tmp_path / "out"), RECORD, *more])
        assert message in capsys.readouterr().err
    generate.main([str(tmp_path / "out"), RECORD, "--max-new", "3", "--model",
                   str(tmp_path / "base-3")])


def test_a_large_file_is_known_by_its_size_its_header_and_samples(tmp_path):
    """All of one of 14 GB would be read for half a minute."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    prints = set()
    for size, at in ((2**27, None), (2**27 + 4096, None), (2**27, 20), (2**27, 2**27 - 1)):
        with open(path, "r+b") as f:
            f.truncate(size)  # a hole, which takes no space
            if at:
                f.seek(at)
                f.write(b"?")
        prints.add(fingerprint_weights(tmp_path))
    assert len(prints) == 4


def test_a_saved_again_base_in_shards_is_fingerprinted(tmp_path):
    """The fingerprint is that of all files of the weights: a changed byte in any shard changes
    it."""
    shards(tmp_path)
    before = fingerprint_weights(tmp_path)
    for file in weight_files(tmp_path):
        held = file.read_bytes()
        file.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
        assert fingerprint_weights(tmp_path) != before
        file.write_bytes(held)
    assert fingerprint_weights(tmp_path) == before


# Text

WINDOWS = "\ufeffHello there.\r\nSecond line.\r\n"


def test_parquet_as_the_hub_names_it(tmp_path):
    """SPLIT-00000-of-00002.parquet in the folder or in data/, SPLIT/0000.parquet; a missing part is
    named."""
    def put(name, label):
        import pyarrow.parquet
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"label": label}]), tmp_path / name)
    for part in range(2):
        put(f"train-0000{part}-of-00002.parquet", part)
        put(f"data/validation-0000{part}-of-00002.parquet", part)
        put(f"test/000{part}.parquet", part)
    for split in ("train", "validation", "test"):
        assert [row["label"] for _, row in read_rows(tmp_path, split)] == [0, 1]
    (tmp_path / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="has 1 of the 2 parts of train"):
        read_rows(tmp_path, "train")


def test_one_policy_for_marks_and_line_ends(tmp_path):
    """jsonl, csv, parquet and plain text give the same text: without a byte order mark, lines
    ending in a line feed."""
    import pyarrow
    import pyarrow.parquet
    expected = "Hello there.\nSecond line.\n"
    row = {"meaning_representation": "a\r\nb", "human_reference": WINDOWS}
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(row).encode()
                                           + b"\r\n\xef\xbb\xbf" + json.dumps(row).encode() + b"\r")
    line = '"a\r\nb","Hello there.\rSecond line.\r\n"\r\n'
    (tmp_path / "validation.csv").write_bytes(
        f"\ufeffmeaning_representation,human_reference\r\n{line * 2}".encode())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), tmp_path / "test.parquet")
    assert data.load("e2e", tmp_path) == {split: [("a\nb", expected)] * 2 for split in sets.NAMES}
    (tmp_path / "book.txt").write_bytes((WINDOWS * 9).encode())
    assert (text.read(tmp_path / "book.txt").startswith(expected)
            and "\r" not in text.read(tmp_path / "book.txt"))
    (tmp_path / "book.txt").write_text("Hello", encoding="utf-16")
    with pytest.raises(ValueError, match=r"line 1: not UTF-8 \(it begins as UTF-16 does\)"):
        text.read(tmp_path / "book.txt")


@pytest.mark.parametrize("between, ending", [(",", "csv"), (";", "csv"), ("|", "csv"),
                                             ("\t", "tsv"), (";", "tsv")])
def test_csv_as_people_have_it(tmp_path, between, ending):
    """Other separators, fields of any length (orange3 2404, csvw 69), several lines in a field,
    empty lines; an error names the line where its row begins."""
    long, file = "x" * 200000, tmp_path / f"train.{ending}"
    lines = ["sentence@label", '"a @ b"@1', "", '"two\nlines"@0', f"{long}@1"]
    file.write_text("\n".join([*lines, ""]).replace("@", between))
    rows = [(where.rpartition(" ")[2], row["sentence"]) for where,
            row in read_rows(tmp_path, "train")]
    assert rows == [("2", f"a {between} b"), ("4", "two\nlines"), ("6", long)]
    file.write_text("\n".join([*lines[:4], '"two\nmore"@0@3', ""]).replace("@", between))
    with pytest.raises(ValueError, match="line 6: 3 fields, the first line has 2 columns"):
        read_rows(tmp_path, "train")


@pytest.mark.parametrize("sample",
                         [" " * 10**6, "\n" * 10**6, "a" * 10**6, "\u0301" * 10**5, "\x00" * 1000])
def test_a_million_blanks_in_a_row(base, sample):
    """What makes other tokenizers run out of their stack (tiktoken 15, 195, 400) is a text like any
    other."""
    tokenizer = tokenizers.load(base, 320)
    assert tokenizer.decode(tokenizer.encode_ordinary(sample)) == sample


@pytest.mark.parametrize("kind", KINDS)
def test_a_book_in_pieces_has_the_ids_of_the_book(kinds, kind, monkeypatch):
    """Long texts are cut behind a letter where a line ends, where the tokenizer cuts too, whatever
    stands around it."""
    tokenizer = tokenizers.load(*kinds[kind])
    rng, letters = random.Random(0), "ab éÉ日1.,'\n\n\t  \u0301🙂"
    texts = ["".join(rng.choice(letters) for _ in range(400)) for _ in range(50)]
    texts += [(ROOT / name).read_text() for name in ("README.md", "lora.py")]
    whole = tokenizer.encode_ordinary_batch(texts)
    monkeypatch.setattr(tokenizers, "PIECE", 40)
    assert tokenizer.encode_ordinary_batch(texts) == whole
    assert all("".join(tokenizers.pieces(text)) == text for text in texts)
    assert len(list(tokenizers.pieces(texts[-1]))) > 3


def test_special_tokens_in_a_text_are_ordinary_text(base, small_roberta):
    """<|endoftext|>, <mask> and </s> in texts and records are letters."""
    gpt = tokenizers.load(base, 320)
    (ids, start), = Write(gpt, 64).encode([("a <|endoftext|>", "b <|endoftext|>")])[0]
    assert [i for i, token in enumerate(ids) if token == gpt.eos] == [0, len(ids) - 1]
    assert gpt.decode(ids[start:-1]) == " b <|endoftext|>"
    roberta = tokenizers.RobertaTokenizer(small_roberta, 325)
    assert set(roberta.encode_ordinary("<s> a </s> <pad><mask>")) <= set(roberta.ids)


def test_a_locale_that_is_not_utf8_changes_nothing(tmp_path, small_roberta):
    """Files of flags, vocabularies, texts and results are UTF-8 in a C locale too."""
    folder = tmp_path / "naïve"
    folder.mkdir()
    (folder / "flags.args").write_text("--steps 2  # naïve\n", encoding="utf-8")
    for split in ("train", "validation"):
        (folder / f"{split}.csv").write_text("sentence,label\n" + "schön 日本,1\nnaïve,0\n" * 9,
                                             encoding="utf-8")
    run = subprocess.run([sys.executable, "train.py", f"@{folder / 'flags.args'}", *FAST[4:],
                          "--rank", "2", "--model", small_roberta, "--dataset", "glue/sst2",
                          "--data-dir", folder, "--out", tmp_path / "out"],
                         env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0",
                              "PYTHONCOERCECLOCALE": "0"}, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert {texts[0] for texts, _ in data.load("glue/sst2", folder)["train"]} == {"schön 日本",
                                                                                  "naïve"}


# Adapters

def adapter(folder, theirs, change=lambda name: name, **config):
    """Save an adapter of PEFT's with random factors, under names that `change` gives; returns
    PEFT's model."""
    torch.manual_seed(1)
    model = peft.get_peft_model(theirs, peft.LoraConfig(**{"r": 2, **config})).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            p.data += 0.3 * torch.randn_like(p)
    model.save_pretrained(folder)
    rewrite(folder, change, "adapter_model.safetensors")
    return model


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("change", [
    lambda name: name,
    lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    lambda name: name.replace(".weight", ".default.weight"), lambda name: "module." + name])
def test_adapters_under_the_names_of_raw_state_dicts_load(tmp_path, change):
    """A compiled model inside PEFT's, the adapter's name left in (YiyangZhou/POVID 13),
    DataParallel."""
    theirs = adapter(tmp_path / "a", their_gpt2(tmp_path), change, target_modules=["c_attn"])
    assert loaded_difference(tmp_path, theirs) < 1e-5


def loaded_difference(folder, theirs, num_labels=None):
    """Of our logits with the adapter in folder / "a" and PEFT's."""
    model, idx = from_pretrained(folder, num_labels), torch.randint(3, 300, (2, 9))
    adapters.load_adapter(model, folder / "a")
    return relative(model(idx)[0], theirs(idx).logits.detach())


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("make, cls, target", [(their_gpt2, "GPT2Model", "c_attn"),
                                               (their_roberta, "RobertaModel", "query")])
def test_adapters_of_bare_models_load(tmp_path, make, cls, target, capsys):
    """Made on GPT2Model or RobertaModel: no prefix in the names, and no head (PEFT 3110)."""
    theirs = adapter(tmp_path / "a", make(tmp_path, cls), target_modules=[target])
    model, idx = from_pretrained(tmp_path,
                                 None if make is their_gpt2 else 3), torch.randint(3, 300, (2, 9))
    capsys.readouterr()
    adapters.load_adapter(model, tmp_path / "a")
    bare = theirs(idx).last_hidden_state.detach()
    assert relative(model.ln_f(model.hidden(idx)) if model.causal else model.hidden(idx),
                    bare) < 1e-5
    assert ("has no head for this task: the model's own stays" in capsys.readouterr().out) == (
        not model.causal)


def test_an_adapter_without_a_head_keeps_the_models(tmp_path, capsys):
    """The base's own head stays and a line says so; it trains. A head of another task is left
    out."""
    base = their_roberta(tmp_path, "RobertaForSequenceClassification", num_labels=3)
    theirs = adapter(tmp_path / "a", base, target_modules=["query"])
    assert loaded_difference(tmp_path, theirs, 3) < 1e-5
    assert "has no head for this task: the model's own stays" in capsys.readouterr().out
    adapter(tmp_path / "b", their_roberta(None, "RobertaForTokenClassification", num_labels=5),
            target_modules=["query"], task_type="TOKEN_CLS")
    adapters.load_adapter(model := from_pretrained(tmp_path, 3), tmp_path / "b")
    assert "the model's own stays (left out: classifier)" in capsys.readouterr().out
    assert all(p.requires_grad for p in model.classifier.parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flag", ["lora_bias", "use_dora", "kasa_config", "use_bdlora",
                                  "init_lora_weights",
                                  "modules_to_save", "trainable_token_indices",
                                  "layer_replication"])
def test_an_adapter_that_is_no_plain_lora_is_refused_by_its_flag(tmp_path, flag):
    """The config's flag is named, not a tensor's shape (PEFT's configs of today; one that does not
    run on this model is written by hand)."""
    from peft.tuners.lora import config as c
    values = {"kasa_config": c.KasaConfig(), "init_lora_weights": "pissa",
              "modules_to_save": ["word_embeddings"],
              "use_bdlora": c.BdLoraConfig(target_modules_bd_a=["query"], nblocks=2),
              "trainable_token_indices": {"word_embeddings": [1, 2]}, "layer_replication": None}
    try:
        adapter(tmp_path / "a", their_roberta(tmp_path), target_modules=["query"],
                **{flag: values.get(flag, True)})
    except (TypeError, ValueError, RuntimeError, NotImplementedError):
        pytest.skip(f"this PEFT makes no {flag}")
    if flag == "layer_replication":
        config = json.loads((tmp_path / "a/adapter_config.json").read_text())
        (tmp_path / "a/adapter_config.json").write_text(json.dumps({**config, flag: [[0, 2]]}))
    with pytest.raises(ValueError, match="word_embeddings" if flag == "modules_to_save" else flag):
        adapters.load_adapter(from_pretrained(tmp_path), tmp_path / "a")


@pytest.mark.parametrize("flag", ["velora_config", "monteclora_config", "use_rslora",
                                  "init_lora_weights"])
def test_variants_that_are_plain_lora_in_the_end_load(tmp_path, flag):
    """VeLoRA compresses what backward keeps, MonteCLoRA draws noise while it trains: evaluated,
    both are B A x."""
    from peft.tuners.lora import config as c
    values = {"velora_config": c.VeloraConfig(num_groups=4), "use_rslora": True,
              "init_lora_weights": "gaussian",
              "monteclora_config": c.MontecloraConfig()}
    theirs = adapter(tmp_path / "a", their_roberta(tmp_path), r=4, target_modules=["query"],
                     **{flag: values[flag]})
    assert loaded_difference(tmp_path, theirs) < 1e-5


def test_an_adapter_that_is_none_says_so(tmp_path):
    """A pickled adapter and how to convert it; a model in the place of an adapter."""
    adapter(tmp_path / "a", their_gpt2(tmp_path), target_modules=["mlp.c_proj"],
            fan_in_fan_out=True)
    (tmp_path / "a/adapter_model.safetensors").rename(tmp_path / "a/adapter_model.bin")
    for folder, message in ((tmp_path / "a", "adapter_model.bin, and only safetensors are read "
                             "here: PEFT's"), (tmp_path, "is a model and no adapter: give it as "
                                               "--model")):
        with pytest.raises(ValueError, match=message):
            adapters.load_adapter(from_pretrained(tmp_path), folder)


def test_columns_of_a_table_stand_apart(capsys):
    row = {"loss": 1.0, "accuracy (mismatched)": 0.5}
    print_table("t", {"base": row, "merged": row})
    header, base, _ = capsys.readouterr().out.strip("\n").splitlines()
    assert header.split("  ")[-1].strip() == "accuracy (mismatched)" and len(header) == len(base)


# A thousand folders

def test_any_folder_ends_well(tmp_path, base, small_roberta, long):
    """Files removed, renamed, cut short, shuffled, keys renamed, values replaced: success, or one
    line."""
    rng, bases = random.Random(0), [base, small_roberta, tmp_path / "gpt2", tmp_path / "roberta",
                                    tmp_path / "shards"]
    their_gpt2(bases[2], vocab_size=400)
    their_roberta(bases[3], vocab_size=400)
    shards(bases[4])
    for folder, special in zip(bases[2:], (("<|endoftext|>",), ROBERTA, ("<|endoftext|>",)),
                               strict=True):
        vocab_and_merges(folder, 300, special)
    ends = {True: 0, False: 0}
    for case in range(1000 if long else 40):
        folder = tmp_path / f"case{case}"
        shutil.copytree(rng.choice(bases), folder)
        for _ in range(rng.choice((1, 1, 2))):
            damage(rng, rng.choice(sorted(folder.iterdir())))
        try:
            model = from_pretrained(folder, rng.choice((None, None, 0, 2, 3)))
            tokenizer = tokenizers.for_model(folder, model.config)
            ids = tokenizer.encode_ordinary("Hello there, naïve 日本 <mask>")
            assert all(0 <= i < model.config.vocab_size for i in ids)
            ends[True] += 1
        except (ValueError, OSError) as e:
            assert str(e).strip()
            ends[False] += 1
        shutil.rmtree(folder)
    assert min(ends.values()) > 5


def damage(rng, file):
    """Do one thing to a file that people or programs do to files."""
    content, kind = file.read_bytes(), rng.randrange(7)
    if kind == 0:
        file.unlink()
    elif kind == 1:
        file.rename(file.with_name(rng.choice(["model.bin", "x.safetensors", "vocab.txt",
                                               "tokenizer.json", "a.json"])))
    elif kind == 2:
        file.write_bytes(content[:rng.randrange(len(content) + 1)])
    elif kind == 3:
        a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        file.write_bytes(b"".join(rng.sample([content[:a], content[a:b], content[b:]], 3)))
    elif file.suffix == ".safetensors":
        try:
            state = load_file(file)
        except SafetensorError:  # damaged already
            return
        name = rng.choice(sorted(state))
        t = state.pop(name)
        other = rng.choice([name + "x", name.replace(".", "_", 1),
                            rng.choice(sorted(state) or ["a"]), "h", name])
        state[other] = rng.choice([t, t.flatten(), t[:1].clone(), t.to(torch.int8),
                                   t.mT if t.dim() == 2 else t])
        save_file({key: t.contiguous() for key, t in state.items()}, file)
    else:
        try:
            table = json.loads(content)
            key = rng.choice(sorted(table))
            value = table.pop(key)
            table[rng.choice([key, key + "x"])] = rng.choice([value, None, -1, 10**6, "", [],
                                                              {"a": 1}, True, 0.5])
            file.write_text(json.dumps(table))
        except (ValueError, TypeError, IndexError):
            file.write_bytes(content.replace(b"1", b"9"))
