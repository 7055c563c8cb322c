"""bench.py measures what it says."""
import contextlib
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from checkpoints.pretrained import save_pretrained
from experiments import bench, gpu
from model import GPT, GPTConfig, Llama, LlamaConfig, RoBERTa, RobertaConfig

TINY = {"tiny": (GPTConfig(vocab_size=80, n_positions=16, n_embd=16, n_layer=2, n_head=2), 2, 8),
        "smollm2-135m": (LlamaConfig(80, 16, 24, 2, 4, 2, 8, 16), 2, 8),
        "roberta-base": (RobertaConfig(vocab_size=80, max_position_embeddings=18, hidden_size=16,
                                       num_hidden_layers=2, num_attention_heads=2,
                                       intermediate_size=24), 2, 8)}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bench, "STARTS", 1)
    for name, preset in TINY.items():
        monkeypatch.setitem(bench.PRESETS, name, preset)


def made(preset, *flags):
    args = bench.parse(["--preset", preset, "--rank", "3", *flags])
    return args, model_of(args.config).requires_grad_(False)


def model_of(config):
    return RoBERTa(config, 2) if isinstance(config, RobertaConfig) else (
        GPT if isinstance(config, GPTConfig) else Llama)(config)


@pytest.mark.parametrize("preset, heads, parameters, shape", [
    ("gpt2-small", 12, 124_439_808, (8, 256)), ("gpt2-medium", 16, 354_823_168, (8, 256)),
    ("roberta-large", 16, 355_359_744 - 1024 * 1025, (8, 128)),
    ("llama-1b", 32, 1_235_814_400, (4, 1024)), ("llama-7b", 32, 6_738_415_616, (1, 1024))])
def test_presets_have_the_sizes_of_the_published_models(preset, heads, parameters, shape):
    """As counted for the hub's checkpoints: GPT-2, GPT-2 medium, RoBERTa large without its pooler,
    Llama 3.2 1B and Llama 2 7B; texts and tokens are those that RESULTS.md times."""
    config, *timed = bench.PRESETS[preset]
    with torch.device("meta"):
        model = model_of(config)
    counted = sum(p.numel() for name, p in model.named_parameters()
                  if not name.startswith("classifier"))
    assert (config.n_head, counted, *timed) == (heads, parameters, *shape)


@pytest.mark.parametrize("preset", TINY)
def test_the_floor_is_what_a_lora_step_multiplies_and_no_more(preset):
    """Torch's count of the operations of a step is the floor's, attention aside (its kernel counts
    no causal half), and the head of a classifier. The timed floor has every shape up to four times,
    one that is counted half once."""
    args, base = made(preset)
    one, _ = bench.our_step(*bench.adapted(base, {}, args), args)
    idx, targets = bench.batch_of(args)
    with FlopCounterMode(display=False) as counter:
        one([(idx, targets, 1.0)])
    counts = counter.get_flop_counts()["Global"].items()
    counted = sum(n for op, n in counts if "attention" not in str(op))
    floor = bench.floor(args)
    linear = [(often, a, b) for often, a, b in floor if len(a) == 2]
    expected = sum(often * 2 * m * k * b[-1] for often, (m, k), b in linear)
    if not args.causal:  # linears 16 -> 16 and 16 -> 2, for 2 texts: forward and both gradients
        expected += 3 * 2 * (2 * 16 * 16 + 2 * 16 * 2)
    assert counted == expected
    timers = bench.floor_timers(base, args)
    with FlopCounterMode(display=False) as counter:
        seconds = timers["floor"]()
    times = [(min(4, math.ceil(often)), a, b) for often, a, b in floor]
    assert counter.get_total_flops() == sum(n * 2 * math.prod(a) * b[-1] for n, a, b in times)
    assert seconds > 0 and timers["weights"]() > 0


def test_ratios_are_medians_over_the_rounds_by_hand(monkeypatch):
    """Round by round, so not the ratio of medians: rsLoRA at 2, 2, 12 s beside LoRA at 1, 2, 4 s
    takes 2, 1, 3 times as long, in the median 2, though its median is LoRA's. So is the floor's
    share."""
    seconds = {"lora": [1, 2, 4], "rslora": [2, 2, 12], "full": [3, 3, 3],
               "forward only": [0.5, 1, 1], bench.PEER: [2, 4, 4], "floor": [0.5, 0.5, 2],
               "weights": [0.1, 0.1, 0.1]}
    args, base = made("tiny", "--rows", "forward only,lora,rslora,full")
    args.peer, trained = "peft", torch.nn.Linear(3, 1)
    monkeypatch.setattr(bench, "their_step", lambda *_: (None, None, trained))
    monkeypatch.setattr(bench, "take_turns", lambda rows, args, label, other: seconds)
    monkeypatch.setattr(bench, "peak", lambda *_: (3e9, None))
    found = {row["row"]: row for row in bench.steps(base, args, None)}
    columns = "ms", "tokens/s", "of lora", "of peer", "of floor"
    assert {name: tuple(row[c] for c in columns) for name, row in found.items()} == {
        "lora": (2000, 8, 1, 0.5, 0.5), "rslora": (2000, 8, 2, 1, 0.25),
        "full": (3000, 16 / 3, 1.5, 0.75, None), "forward only": (1000, None, 0.5, 0.25, None),
        bench.PEER: (4000, 4, 2, 1, 0.25), "floor": (500, None, 0.5, 0.25, None),
        "weights": (100, None, 0.05, 0.025, None)}
    assert found["lora"]["peak GB"] == 3 and found["floor"]["peak GB"] is None
    assert found[bench.PEER]["trained"] == 4 and found["forward only"]["trained"] is None
    axis = Figure().add_subplot()
    monkeypatch.setattr(bench, "picture", lambda *_, **__: contextlib.nullcontext((None, axis)))
    bench.draw(None, "t", list(found.values()))  # the rows that train, and the floor across
    names = [text.get_text() for text in axis.get_yticklabels()]
    drawn = dict(zip(names, (bar.get_width() for bar in axis.patches), strict=True))
    assert drawn == {"lora": 2000, "rslora": 2000, "full": 3000, bench.PEER: 4000}
    assert list(axis.lines[0].get_xdata()) == [500, 500]


def test_rows_take_turns_and_the_first_rounds_do_not_count():
    """In every round each row runs once, in changing order; seconds that a row says are kept."""
    ran, args = [], SimpleNamespace(compile=False, device=torch.device("cpu"), rounds=5)
    found = bench.take_turns({name: lambda name=name: ran.append(name) for name in "ab"}, args, "",
                             {"c": lambda: ran.append("c") or len(ran)})
    rounds = [tuple(ran[i:i + 3]) for i in range(0, len(ran), 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds) and len(set(rounds)) > 1
    assert len(rounds) == 6 and [len(found[name]) for name in "abc"] == [5, 5, 5]
    assert found["c"] == [3 * i + names.index("c") + 1 for i, names in enumerate(rounds)][1:]


@pytest.mark.parametrize("preset", TINY)
def test_the_peer_has_our_scale_and_trains_as_many_numbers(preset, tmp_path):
    """LoRA of the same rank and alpha, on c_attn in place of q and v of a GPT: there it trains as
    many."""
    args, base = made(preset)
    save_pretrained(base, tmp_path)
    _, _, theirs = bench.their_step(tmp_path, args)
    model, _, layers = bench.adapted(base, {}, args)
    scales = {module.scaling["default"] for module in theirs.modules() if hasattr(module, "lora_A")}
    assert scales == {layers[0].scaling} == {16 / args.rank}
    numbers = [sum(p.numel() for name, p in m.named_parameters() if "lora_" in name)
               for m in (theirs, model)]
    assert numbers[0] == numbers[1]


def test_rows_share_the_base_and_leave_it_alone():
    """Adapters of all rows stand on one copy of the weights; what moves weights has its own. Those
    of Delta-LoRA move in the first step, else it would be plain LoRA. What trains whole is fp32."""
    args, base = made("tiny")
    before = {name: p.clone() for name, p in base.named_parameters()}
    idx, targets = bench.batch_of(args)
    for name, change in bench.ROWS.items():
        if change is None:
            continue
        model, adapter, layers = bench.adapted(base, change, args)
        if name != "lora 4 bits":  # its linears are other ones
            shared = model.h[0].attn.q.weight.data_ptr() == base.h[0].attn.q.weight.data_ptr()
            assert shared == (name not in ("deltalora", "full"))
        start = {key: p.clone() for key, p in model.named_parameters()}
        one, _ = bench.our_step(model, adapter, layers, args)
        for _ in range(1 if name == "deltalora" else 2):
            one([(idx, targets, 1.0)])
        moved = {key for key, p in model.named_parameters() if not torch.equal(p, start[key])}
        assert len(moved) > 0 and (name != "deltalora" or {
            f"h.{i}.attn.{target}.weight" for i in (0, 1) for target in "qv"} <= moved), name
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    for name, dtype in (("full", torch.float32), ("lora", torch.bfloat16)):
        model, _, _ = bench.adapted(base.bfloat16(), bench.ROWS[name], args)
        assert model.h[0].mlp.up.weight.dtype == dtype


def test_the_peak_is_the_highest_point_of_what_stands_in_memory():
    """Two tensors of 4 MB at once on a model of 400 bytes are 8 MB and 400 bytes, however many come
    one by one."""
    args, _ = made("tiny")
    model = torch.nn.Linear(99, 1).requires_grad_(False)

    def step():
        for _ in range(5):
            a = torch.empty(10**6)
            b = torch.empty(10**6)
            del a, b
    found = bench.peak(step, model, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), args)
    assert found == (8_000_000 + 400, None)


@pytest.mark.parametrize("preset", TINY)
def test_the_report_has_every_row(tmp_path, capsys, monkeypatch, preset):
    """One entry for each preset, kept beside those of other presets; ratios of a row to itself are
    1; a picture."""
    pytest.importorskip("peft", reason="the peer, in [dev]")
    if preset != "tiny":
        monkeypatch.setattr(bench, "first_steps", lambda *_: {})  # fresh processes once are enough
    out = tmp_path / "bench-x.json"
    out.write_text('{"gpt2-small": 1}')
    bench.main(["--preset", preset, "--rank", "3", "--rounds", "1", "--peer", "peft", "--out",
                str(out)])
    found = json.loads(out.read_text())
    assert found.keys() == {"gpt2-small", preset}
    rows = {row["row"]: row for row in found[preset]["steps"]}
    assert rows.keys() == {*bench.ROWS, bench.PEER, "floor", "weights"}
    assert rows["lora"]["of lora"] == 1 == rows[bench.PEER]["of peer"]
    # q and v of ours have as many numbers as c_attn of GPT-2 has there
    assert rows["lora"]["trained"] == rows[bench.PEER]["trained"]
    assert (tmp_path / f"bench-x-{preset}.png").exists()
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*rows, "inference merged"))


def test_the_peer_reads_the_same_texts(tmp_path, monkeypatch):
    """Ours and theirs see each text once, the peer without its labels on the record; too few are
    refused."""
    monkeypatch.setitem(bench.PRESETS, "tiny", (GPTConfig(2048, 256, 16, 1, 2), 2, 8))
    rows = [{"meaning_representation": f"name : {i}", "human_reference": "good " * (i % 9 + 1)}
            for i in range(70)]
    rows = list(map(json.dumps, rows))
    for folder, n in ((tmp_path, 70), (tmp_path / "few", 9)):
        folder.mkdir(exist_ok=True)
        for split in ("train", "validation", "test"):
            (folder / f"{split}.jsonl").write_text("\n".join(rows[:n]))
    args, base = made("tiny", "--e2e", str(tmp_path))
    seen = {"ours": [], bench.PEER: []}
    monkeypatch.setattr(bench, "our_step", lambda *_: (
        lambda dealt: seen["ours"].append((dealt[0][0] != 0).sum().item()), None))
    monkeypatch.setattr(bench, "their_step", lambda *_: (lambda given: seen[bench.PEER].append(
        ((given["input_ids"] != 0).sum() - 32).item()), None, None))
    args.peer = "peft"
    found = bench.end_to_end(base, args, tmp_path)
    assert found.keys() == seen.keys()
    assert all(len(s) == 3 for s in seen.values())  # a warm-up and two batches of 32
    assert sum(seen["ours"][1:]) == sum(seen[bench.PEER][1:])
    args.e2e = str(tmp_path / "few")
    with pytest.raises(ValueError, match="texts to train on, a batch is of 32"):
        bench.end_to_end(base, args, tmp_path)


@pytest.mark.parametrize("main, flags, message", [
    (bench.main, ["--preset", "gpt3"], "unknown preset 'gpt3'"),
    (bench.main, ["--rows", "lora,qlora"], "unknown row 'qlora'"),
    (bench.main, ["--rows", "full"], "needs lora"),
    (bench.main, ["--rounds", "0"], "--rounds 0 is not in"),
    (bench.main, ["--context", "99"], "in 4..16"),
    (bench.main, ["--preset", "roberta-base", "--e2e", "x"], "--e2e is for a GPT"),
    (bench.main, ["--e2e", "nowhere"], "nowhere"),
    (gpu.main, [], "--device cuda: this machine or this build of torch has none"),
    (gpu.main, ["--dry", "speed"], "unknown part 'speed'"),
    (gpu.main, ["--dry", "--weights", "nowhere"], "nowhere is no folder")])
def test_bad_input_is_one_line(capsys, main, flags, message):
    with pytest.raises(SystemExit) as e:
        main(flags)
    said = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2 and len(said) == 1 and message in said[0]


def test_the_plan_for_a_gpu_is_whole_at_toy_size(tmp_path, capsys, monkeypatch):
    """Each measurement has a file of its own; one that is there is not repeated, one that fails is
    named at the end and leaves what the others have; the tables are of what is there."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    args = gpu.parse(["--dry"])
    files = [gpu.file_of(args, part, name) for part in args.plan for name in args.plan[part]]
    assert len(set(files)) == len(files) > 15
    assert list(args.plan) == re.findall(r"^    (\w+)  +[a-z]", gpu.__doc__, re.MULTILINE)
    real = {name: row for name, row in bench.PRESETS.items()
            if not name.startswith(("toy", "tiny"))}
    for function, *rest in (each for name in ("bench", "memory")
                            for each in args.plan[name].values()):
        assert function in (gpu.benched, gpu.fits) and rest[0] in real
    args.to.mkdir(parents=True)
    for part, name in (("parity", "rounding"), ("memory", "llama-7b, 1 x 1024, checkpointing"),
                       ("syncs", "profile, lora")):
        gpu.gpu(SimpleNamespace(**{**vars(args), "measure": (part, name)}))
    found = json.loads(gpu.file_of(args, "parity", "rounding").read_text())["found"]
    assert all(abs(row["ours"]) < 1e-5 < abs(row["logits in bf16"]) for row in found)
    asked = []
    monkeypatch.setattr(gpu, "measured",
                        lambda args, part, name, end: asked.append(name) or name != "texts")
    monkeypatch.setattr(gpu.shutil, "rmtree", lambda *_, **__: None)  # a dry run begins anew
    with pytest.raises(ValueError, match="1 not measured, call again for these: methods: texts"):
        gpu.gpu(SimpleNamespace(**{**vars(args), "parts": ["parity", "memory", "methods"]}))
    assert ("rounding" not in asked and "llama-7b, 1 x 1024, checkpointing" not in asked
            and "E2E" in asked)
    said = capsys.readouterr().out
    assert "| rounding | -70 |" in said and (tmp_path / "out/gpu-dry.tar.gz").exists()
    assert {"memory.csv", "parity.csv", "syncs.csv"} <= {file.name for file in args.to.iterdir()}
