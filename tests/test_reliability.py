"""Nothing that happens to a run, and nothing that is typed or read, breaks it: it succeeds or says
in a line why not.

    python -m pytest tests/test_reliability.py --long       80 kills, a thousand cases of each fuzz
"""
import json
import os
import random
import resource
import shutil
import signal
import sys
import time

import pytest
import torch
from conftest import ROOT, adapt, tiny_gpt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_checkpoint import optimizer_of
from test_train import command, cut_down, few_records  # noqa: F401

import data
import generate
import train
from checkpoints import adapters, files, tokenizers
from evaluation import evaluate
from methods import METHODS
from run.flags import Parser
from run.folder import load_state, save_state
from run.owner import LOG, STATE


def cases(test):
    """Run a hypothesis test over 40 cases, always the same ones, or with --long over a thousand."""
    long = "--long" in sys.argv
    return settings(max_examples=1000 if long else 40, derandomize=not long, deadline=None,
                    database=None, suppress_health_check=list(HealthCheck))(test)


# Killed, and a full disk

RUN = "--steps", "24", "--eval-every", "2"


@pytest.fixture
def finished(base, tmp_path):
    """A finished run."""
    train.main(command(base, tmp_path / "finished"))
    return tmp_path / "finished"


def child(main, argv, log, before, *given):
    """The exit code of before(*given), main(argv) in a fork of this process, negative where a
    signal killed it. What it prints goes to `log`."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        before(*given)
        main(argv)
        code = 0
    except SystemExit as e:
        code = e.code
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def die_in_write(number, share=0.5, how="kill"):
    """Have this process killed inside the write of its first, second, ... file, when a share of the
    bytes is there; or let the disk be full then."""
    written, write = [], files.write

    def dying(path, write_to):
        def partly(part):
            write_to(part)
            written.append(path)
            if len(written) == number:
                os.truncate(part, int(share * part.stat().st_size))
                if how == "full":
                    raise OSError("No space left on device")
                os.kill(os.getpid(), signal.SIGKILL)
        write(path, partly)
    for module in list(sys.modules.values()):
        if vars(module).get("write") is write:
            module.write = dying


def limit(size):
    """Let no file of this process grow beyond so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def check_readable(folder, flags):
    """Whatever stands in a run folder is whole: states, adapters and models load, the JSON is JSON,
    and the log ends with a whole line."""
    for path in folder.rglob("*"):
        if path.suffix == ".json":
            json.loads(path.read_text())
        if path.suffix == ".safetensors":
            files.read_safetensors(path)
        assert path.suffix != ".csv" or path.read_text().endswith("\n")
    if (folder / "result.json").exists() and "dylora" not in flags:
        generate.load_run(folder)


def on(base, folder, flags):
    """The command line of a run that goes on from what a folder holds, or begins."""
    return command(base, folder, *flags, *["--resume"] * (folder / STATE).exists())


@pytest.mark.parametrize("how, method", [("kill", "reslora"), ("full", "lora")])
def test_stopped_inside_the_write_of_each_file_and_resumed(tmp_path, base, how, method):
    """kill -9, or a full disk, with half of a file written, for every file of a run: state and log
    again and again, adapter, merged model, result. What stands in the folder is whole, and the run
    that goes on from there has the metrics, the log and the files of an undisturbed one."""
    flags, stopped = ["--method", method, "--save-merged"], 0
    whole = train.main(command(base, tmp_path / "whole", *flags))

    def names_and_log(folder):
        rows = [{**row, "seconds": None} for row in files.read_csv(folder / LOG)]
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")), rows
    while code := child(train.main, on(base, tmp_path / str(stopped), flags), tmp_path / "said",
                        die_in_write, stopped + 1, 0.5, how):
        folder, stopped = tmp_path / str(stopped), stopped + 1
        assert code == {"kill": -signal.SIGKILL, "full": 2}[how]
        assert bool(list(folder.rglob("*.part"))) == (how == "kill")
        check_readable(folder, flags)
        assert train.main(on(base, folder, flags))["metrics"] == whole["metrics"]
        assert names_and_log(folder) == names_and_log(tmp_path / "whole")
    assert stopped > 10


def test_killed_again_and_again_and_resumed(tmp_path, base, long):
    """Killed in turn inside a random write and at a random moment: the folder is readable after
    each, and the run that comes through in the end has the metrics of an undisturbed one."""
    rng, flags = random.Random(0), [*RUN, "--method", "adalora", "--save-merged"]
    whole, begun = train.main(command(base, tmp_path / "whole", *flags)), time.time()
    train.main(command(base, tmp_path / "warm", *flags))
    seconds, kills, folder = time.time() - begun, 0, tmp_path / "run"
    while kills < (80 if long else 4):
        if (folder / "result.json").exists():
            shutil.rmtree(folder)
        dying = (die_in_write, rng.randint(1, 20), rng.random()) if kills % 2 == 0 else (
            signal.setitimer, signal.ITIMER_REAL, rng.uniform(0.01, 1.1 * seconds))
        kills += child(train.main, on(base, folder, flags), tmp_path / "said", *dying) < 0
        check_readable(folder, flags)
    if not (folder / "result.json").exists():
        train.main(on(base, folder, flags))
    assert json.loads((folder / "result.json").read_text())["metrics"] == whole["metrics"]


def test_texts_outlive_a_kill_inside_the_write_of_others(finished, tmp_path):
    """generate.py too writes a file whole or not at all."""
    argv, file = [str(finished), "--max-new", "3", "--first"], finished / "predictions-test.jsonl"
    generate.main([*argv, "2"])
    before = file.read_text()
    assert child(generate.main, [*argv, "3"], tmp_path / "said", die_in_write, 1) == -9
    assert file.read_text() == before


def test_a_file_that_may_not_grow_is_one_line(tmp_path, base):
    """As the system and safetensors say it of a disk that is full: exit code 2, no part of a file,
    and a run that goes on."""
    flags, said = ["--method", "lora"], tmp_path / "said"
    whole = train.main(command(base, tmp_path / "whole", *flags))
    most = (tmp_path / "whole" / STATE).stat().st_size
    for folder, size in ((tmp_path / "a", most // 2), (tmp_path / "b", most * 9 // 10)):
        assert child(train.main, command(base, folder, *flags), said, limit, size) == 2
        assert f"{STATE} cannot be written" in said.read_text().splitlines()[-1]
        assert not list(folder.rglob("*.part"))
        assert train.main(on(base, folder, flags))["metrics"] == whole["metrics"]


# Fuzz

# Of each kind of flag values that may do, and for all of them what seldom does
INTS, FLOATS = ["1", "2", "3", "4", "8", "0", "-1"], ["0.1", "1", "1e-3", "2.5", "0", "-1", "nan",
                                                      "1e30"]
WORDS = ["q", "q,v", "v,q,k,o,up,down", "q,q", "1,2", "input", "weight", "regression,none", "cpu",
         "restaurants", "stdlib", *METHODS]
JUNK = ["", "x", ",", "½", "0x10", "inf", "-inf", "1e400", "99999999999999999999", "/", ".", "..",
        "\0", "é", "--rank", "@nowhere", "cuda", "reviews"]
# left alone: what would take minutes, or write elsewhere
LEFT = {"--steps", "--epochs", "--grad-accum", "--compile", "--max-new", "--beams", "--out",
        "--help"}


def flags_of(parse):
    """A strategy for lists of flags with values, from a command's own parser."""
    some, parse_args = {}, Parser.parse_args

    def look(parser, *_):
        for action in parser._actions:
            for name in set(action.option_strings) - LEFT - {"-h"}:
                good = list(action.choices or {int: INTS, float: FLOATS}.get(action.type, WORDS))
                values = st.sampled_from(good) | st.sampled_from(good + JUNK)
                some[name] = st.just(None) if action.nargs == 0 else values
        raise KeyboardInterrupt
    Parser.parse_args = look
    with pytest.raises(KeyboardInterrupt):
        parse([])
    Parser.parse_args = parse_args
    one = st.sampled_from(sorted(some)).flatmap(lambda name: some[name].map(
        lambda value: name if value is None else f"{name}={value}"))
    return st.lists(one, max_size=3)


def ends_well(main, argv, capsys):
    """Success, or one line on stderr and exit code 2."""
    capsys.readouterr()
    try:
        main(argv)
        return True
    except SystemExit as e:
        err = capsys.readouterr().err
        assert (e.code == 2 and err.count("\n") == 1
                and err.split(":")[0] in ("train.py", "generate.py")), (argv, err)
        return False


@cases
@given(flags=flags_of(train.parse), method=st.sampled_from(sorted(METHODS)))
def test_any_flags_of_train(flags, method, base, tmp_path, capsys, monkeypatch):
    """A method and up to three random flags: a whole run in two steps, or a line."""
    monkeypatch.setattr(evaluate, "SCORED", 0)
    before = set((tmp_path / "out").glob("*"))
    if not ends_well(train.main,
                     command(base, tmp_path / "out", "--steps", "2", "--method", method, *flags),
                     capsys):
        assert ({p.name for p in set((tmp_path / "out").glob("*")) - before}
                <= {"log.csv", "resume.safetensors"})
    assert not list(tmp_path.rglob("*.part"))


@cases
@given(flags=flags_of(generate.parse), texts=st.lists(st.text(max_size=30), max_size=2))
def test_any_flags_and_texts_of_generate(flags, texts, finished, capsys):
    """Random flags, values and prompts: texts, or a line."""
    some = [] if texts else ["--first", "2", "--out", finished / "texts.jsonl"]
    ends_well(generate.main, [str(a) for a in (finished, "--max-new", "3", *some, *flags, "--",
                                               *texts)], capsys)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.text(max_size=5), inner, max_size=3), max_leaves=6)
row = st.fixed_dictionaries({}, optional={"meaning_representation": anything,
                                          "human_reference": anything, "more": anything})
line = (st.binary(max_size=20) | row.map(lambda r: json.dumps(r).encode())
        | st.builds(lambda a, b: json.dumps({"meaning_representation": a,
                                             "human_reference": b}).encode(), st.text(), st.text()))


@cases
@given(lines=st.lists(line, max_size=4))
def test_any_lines_of_jsonl(lines, base, tmp_path):
    """Bytes, JSON, rows with anything in them: examples, or a ValueError that names the file."""
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_bytes(b"\n".join(lines))
    try:
        pairs = data.load("e2e", tmp_path)
    except ValueError as e:
        assert "jsonl" in str(e) and "\n" not in str(e)
        return
    task = data.tasks.Write(tokenizers.load(base, 320), 64)
    examples = [example for example in task.encode(pairs["train"])[0] if example]
    if not examples:
        return
    idx, targets, _ = task.collate(examples)
    assert idx.shape == targets.shape and 0 <= idx.min() and idx.max() < 320


def damaged(content, where, how):
    """Bytes with some of their beginning, where the header is, changed."""
    content = bytearray(content)
    for place, byte in zip(where, how, strict=False):
        content[place % min(len(content), 600)] = byte
    return bytes(content)


def unchanged(model, act):
    """True if act() works; a ValueError must leave the model as it was."""
    modules, before = list(model.modules()), {k: v.clone() for k, v in model.state_dict().items()}
    try:
        act()
        return True
    except ValueError:
        assert list(model.modules()) == modules
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        return False


bytes_of_a_header = dict(where=st.lists(st.integers(0, 10**6), max_size=4),
                         how=st.lists(st.integers(0, 255), max_size=4))


@cases
@given(**bytes_of_a_header,
       change=st.dictionaries(st.sampled_from(["peft_type", "r", "lora_alpha", "use_rslora",
                                               "rank_pattern", "alpha_pattern", "target_modules",
                                               "bias", "use_dora", "fan_in_fan_out",
                                               "init_lora_weights"]), anything, max_size=2),
       cut=st.integers(0, 3000) | st.none())
def test_any_adapter_folder(where, how, change, cut, tmp_path):
    """Random values in adapter_config.json, random bytes in the header, a file cut short: a whole
    adapter that computes something finite, or a ValueError and the model untouched."""
    model = tiny_gpt(torch.float32, n_layer=1)
    adapt(model, "lora", {})
    adapters.save_adapter(tmp_path, model, "some/base")
    config, tensors = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    tensors.write_bytes(damaged(tensors.read_bytes(), where, how)[:cut])
    fresh = tiny_gpt(torch.float32, n_layer=1)
    if unchanged(fresh, lambda: adapters.load_adapter(fresh, tmp_path)):
        assert fresh(torch.arange(5)[None])[0].shape == (1, 5, 61)


@cases
@given(**bytes_of_a_header, cut=st.integers(0, 6000) | st.none())
def test_any_state(where, how, cut, tmp_path):
    """The same for resume.safetensors."""
    model = tiny_gpt(torch.float32, n_layer=1)
    adapt(model, "lora", {})
    optimizer, file = optimizer_of(model), tmp_path / "resume.safetensors"
    model(torch.arange(5)[None])[0].sum().backward()
    optimizer.step()
    save_state(file, model, optimizer, 1, {"rank": 3}, [dict(step=1, val_loss=1.0, seconds=1.0)])
    file.write_bytes(damaged(file.read_bytes(), where, how)[:cut])
    unchanged(model, lambda: load_state(file, model, optimizer))


@cases
@given(change=st.dictionaries(st.sampled_from(["model", "method", "dataset", "rank", "alpha",
                                               "targets", "dropout", "rs", "base_weights",
                                               "context", "data_dir", "init_from"]), anything,
                              max_size=2))
def test_any_result_json(change, finished, capsys):
    """Settings that nobody wrote: texts, or a line."""
    file = finished / "result.json"
    good = file.read_text()
    try:
        file.write_text(json.dumps({"settings": {**json.loads(good)["settings"], **change}}))
        for flags in ((), ("--unmerged",)):
            ends_well(generate.main, [str(finished), "--max-new", "3", "a text", *flags], capsys)
    finally:
        file.write_text(good)


def test_nothing_that_is_read_can_run_code(tmp_path):
    """A pickle, as torch.save makes it, is no state under that name either, and what would read
    one, or run what it reads, is called nowhere."""
    torch.save({"a": torch.zeros(3)}, tmp_path / STATE)
    with pytest.raises(ValueError, match="damaged"):
        files.read_safetensors(tmp_path / STATE)
    product = [path for path in ROOT.rglob("*.py") if path.parent != ROOT / "tests"]
    assert len(product) > 50
    for path in product:
        text = path.read_text().replace(".eval()", "")
        assert not any(word in text
                       for word in ("torch.load", "pickle.load", "eval(", "exec(",
                                    "yaml.load")), path
