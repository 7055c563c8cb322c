"""Nothing of the user's is lost: what a run may replace, who may write to a folder, and which files
and numbers are taken for which."""
import gzip
import json
import random
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_own_data import PAIRS, jsonl
from test_reliability import child, die_in_write
from test_train import command, few_records, refused  # noqa: F401

import compare
import generate
import train
from checkpoints import files
from data.files import read_rows
from data.labels import Labels
from data.pairs import Pairs
from run import owner
from run.flags import Parser, without_comment
from run.owner import AGAIN, LIST, LOG, RESULTS, STATE, RunFolder


def bytes_of(folder):
    """{name: content or target of every file and link that is not hidden}"""
    return {str(p.relative_to(folder)): p.readlink() if p.is_symlink() else p.read_bytes()
            for p in folder.rglob("*") if (p.is_symlink() or p.is_file())
            and not p.name.startswith(".")}


@pytest.mark.parametrize("name", ["result.json", "README.md", "log.csv", "merged/config.json",
                                  "adapter_model.safetensors", "predictions-test.jsonl", AGAIN])
def test_a_folder_with_a_file_of_somebody_else_is_refused(tmp_path, base, capsys, name):
    """Under any name that a run would use, whatever it holds; and it stays as it is."""
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    before = bytes_of(tmp_path)
    said = refused(capsys, command(base, tmp_path / "out"))
    assert f"{name.partition('/')[0]}" in said and "is kept: choose another --out" in said
    assert bytes_of(tmp_path) == before and path.read_text() == "mine"


@pytest.mark.parametrize("name", ["merged", "result.json", "log.csv"])
def test_no_link_inside_a_run_folder_is_followed_or_removed(tmp_path, base, capsys, name):
    """To a model, a file, or nothing. The run folder itself may be a link."""
    model = shutil.copytree(base, tmp_path / "model")
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    train.main(command(base, tmp_path / "out"))
    (tmp_path / "disk" / name).unlink(missing_ok=True)
    (tmp_path / "disk" / name).symlink_to(model if name == "merged" else tmp_path / "nothing")
    before = bytes_of(tmp_path)
    assert "is a link" in refused(capsys, command(base, tmp_path / "out", "--save-merged"))
    assert bytes_of(tmp_path) == before


def test_a_file_that_is_nobodys_name_survives_everything(tmp_path, base):
    """notes, an unrelated .part, a checkpoint beside ours: after runs, resuming, merging anew."""
    out = tmp_path / "out"
    train.main(command(base, out))
    mine = {"notes.txt": "a", "result.json.part": "b", "merged/vocab.bin": "c", "log.csv.bak": "d"}
    for name, content in mine.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(content)
    train.main(command(base, out, "--save-merged"))
    train.main(command(base, out))
    train.main(["--resume", "--out", str(out), "--steps", "8"])
    assert {name: (out / name).read_text() for name in mine} == mine


def test_only_what_generate_wrote_is_replaced_by_it(tmp_path, base, capsys):
    """Its predictions are; the data, a file of the run, a link and a folder are not."""
    out, texts = tmp_path / "out", tmp_path / "texts.jsonl"
    train.main(command(base, out))
    for _ in range(2):
        generate.main([str(out), "--max-new", "1", "--first", "1", "--out", str(texts)])
    (tmp_path / "link.jsonl").symlink_to(texts)
    (tmp_path / "mine.jsonl").write_text('{"record": "a", "text": "b"}\n')
    before = bytes_of(tmp_path)
    for name in ("mine.jsonl", "link.jsonl", "out/log.csv", "out/adapter_config.json"):
        with pytest.raises(SystemExit) as e:
            generate.main([str(out), "--max-new", "1", "--out", str(tmp_path / name)])
        assert e.value.code == 2
    assert bytes_of(tmp_path) == before


def test_a_table_replaces_no_csv_or_picture_of_others(tmp_path, capsys):
    grid = ["--row", "x: --method lora", "--lr", "1e-3", "--", "--steps", "1"]
    for ending, content in ((".csv", "prompt,completion\na,b\n"), (".png", "a picture")):
        path = tmp_path / ("table" + ending)
        path.write_text(content)
        with pytest.raises(SystemExit):
            compare.main([str(tmp_path / "table"), *grid])
        assert f"{path} was not written by this program" in capsys.readouterr().err
        assert path.read_text() == content
        path.unlink()


def test_a_folder_has_one_owner_at_a_time(tmp_path, base, capsys):
    """A second run is refused while the first one holds it, and may begin when that has ended,
    however it ended."""
    out = tmp_path / "out"
    held = RunFolder(out)
    held.claim()
    assert "another run is writing" in refused(capsys, command(base, out))
    held.release()
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from run import owner; import time; "
            "held = owner.lock(sys.argv[2]); print('held', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code, str(ROOT), str(out)],
                             stdout=subprocess.PIPE)
    other.stdout.readline()
    assert "another run is writing" in refused(capsys, command(base, out))
    other.send_signal(signal.SIGKILL)
    other.wait()
    other.stdout.close()
    train.main(command(base, out))


def test_a_new_run_that_is_killed_while_it_takes_the_place_is_completed(tmp_path, base):
    """At each of its moves: the next start finishes them, and every file is of the second run."""
    flags = command(base, tmp_path / "whole", "--save-merged")
    train.main(flags)
    number = len(json.loads((tmp_path / "whole" / LIST).read_text())["files"])
    for stop in range(number):
        out = tmp_path / str(stop)
        train.main(command(base, out))
        assert child(train.main, command(base, out, "--save-merged"), tmp_path / "said",
                     die_in_move, stop) == -signal.SIGKILL
        folder = RunFolder(out)
        folder.claim()
        folder.release()
        assert not (out / AGAIN).exists()
        assert set(bytes_of(out)) == set(bytes_of(tmp_path / "whole"))
        generate.load_run(out, unmerged=True)


def die_in_move(stop):
    """Kill this process in its move number `stop` of a file out of .again."""
    import os
    from pathlib import Path
    real, moves = Path.replace, []

    def replace(self, target):
        if AGAIN in self.parts:
            moves.append(target)
            if len(moves) > stop:
                os.kill(os.getpid(), signal.SIGKILL)
        return real(self, target)
    Path.replace = replace


@given(st.lists(st.sampled_from(["train", "resume", "longer", "kill", "generate", "merged", "file",
                                 "link", "note"]), min_size=2, max_size=5), st.integers(0, 99))
def sequence(base, tmp, whole, actions, seed):
    """Any order of commands, kills and files of the user's: no byte of the user's changes, and
    every state is refused in a line or ends with the numbers of an undisturbed run."""
    rng, out, mine = random.Random(seed), tmp / str(len(list(tmp.iterdir()))), {}
    names = [*RESULTS, STATE, LOG, "notes.txt"]
    for action in actions:
        flags = command(base, out, *["--save-merged"] * (action == "merged"))
        if action in ("resume", "longer"):
            flags = ["--resume", "--out", str(out), *["--steps", "8"] * (action == "longer")]
        if action in ("file", "link", "note"):
            name = "notes.txt" if action == "note" else rng.choice(names)
            path = out / name
            if path.exists() or path.is_symlink() or path.parent.is_symlink():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if action == "link":
                path.symlink_to(base / "config.json")
            else:
                path.write_text("mine")
            mine[path] = path.read_bytes()
        elif action == "kill":
            child(train.main, flags, tmp / "said", die_in_write, rng.randrange(1, 9), 0.5, "kill")
        else:
            try:
                if action == "generate":
                    generate.main([str(out), "--max-new", "1", "--first", "1"])
                else:
                    train.main(flags)
            except SystemExit as e:
                assert e.code == 2
        assert {path: path.read_bytes() for path in mine} == mine
    if not mine.keys() - {out / "notes.txt"} and "longer" not in actions:
        result = train.main(command(base, out))
        assert result["metrics"] == whole


def test_no_sequence_of_commands_loses_a_byte(tmp_path, base, long):
    whole = train.main(command(base, tmp_path / "whole"))["metrics"]
    run = settings(max_examples=200 if long else 10, deadline=None, derandomize=not long,
                   suppress_health_check=list(HealthCheck))(sequence)
    run(base, tmp_path, whole)


# Which file is it

def test_tables_are_found_under_the_names_that_people_give_them(tmp_path):
    """Capitals, .gz, an object with one list; what stands beside them and is no table is not
    taken."""
    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(12)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    expected = Pairs().load(jsonl(tmp_path / "a.jsonl", rows))
    (tmp_path / "b.JSON").write_text(json.dumps({"version": 2, "rows": rows}))
    (tmp_path / "c.csv.GZ").write_bytes(gzip.compress(
        "".join(["prompt,completion\n", *(f"p{i},c{i}\n" for i in range(12))]).encode()))
    (tmp_path / "d").mkdir()
    (tmp_path / "d/train.Jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "d/dataset_info.json").write_text("{}")
    for name in ("b.JSON", "c.csv.GZ", "d"):
        assert Pairs().load(tmp_path / name) == expected, name
    (tmp_path / "e.jsonl.gz").write_bytes(b"\x1f\x8b damaged")
    for name, message in (("e.jsonl.gz", "is damaged"), ("f.jsonl", "does not exist")):
        with pytest.raises(ValueError, match=message):
            Pairs().load(tmp_path / name)


@pytest.mark.parametrize("names, message", [
    (("train.csv", "train.jsonl"), "which one is train"),
    (("train.csv", "val.csv", "validation.csv"), "which one is validation"),
    (("train-00000-of-00002.csv",), "1 of the 2 parts"),
    (("train-00000-of-00002.csv", "train-00001-of-00003.csv"), "1 of the"),
    (("train/a.arrow",), "save_to_disk")])
def test_what_could_be_one_of_two_is_asked(tmp_path, names, message):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("prompt,completion\n" + "a,b\n" * 3)
    with pytest.raises(ValueError, match=message):
        Pairs().load(tmp_path)


def test_quotes_between_tabs_are_letters_where_they_would_swallow_rows(tmp_path):
    (tmp_path / "train.tsv").write_text('a\tb\nhe said "no\tx\n5" wide\ty\nz "\tw\n')
    assert [row for _, row in read_rows(tmp_path, "train")] == [
        {"a": 'he said "no', "b": "x"}, {"a": '5" wide', "b": "y"}, {"a": 'z "', "b": "w"}]


def test_a_rare_class_is_in_every_split(tmp_path):
    """A tenth of each class is held out, twelve rows or a thousand; the same ones every time. One
    that has too few rows stays in train, and a line says so."""
    rows = [{"text": f"t{i}", "label": "rare" if i % 50 == 0 else "often"} for i in range(600)]
    for split, number in Labels().load(jsonl(tmp_path / "a.jsonl", rows)).items():
        rare = sum(label == 1 for _, label in number)
        assert rare == {"train": 10, "validation": 1, "test": 1}[split]
    few = rows[:60] + [{"text": "single", "label": "once"}]
    labels = Labels()
    splits = labels.load(jsonl(tmp_path / "b.jsonl", few))
    assert "once" in labels.SPLITS["test"] and any(label == 2 or "once" in labels.LABELS
                                                   for _, label in splits["train"])
    two = [{"text": f"t{i}", "label": "often"} for i in range(40)] + [
        {"text": text, "label": "twice"} for text in ("a", "b")]
    train = labels.load(jsonl(tmp_path / "c.jsonl", two))["train"]
    assert [text for (text,), label in train if labels.LABELS[label] == "twice"] == ["a", "b"]


def test_one_class_is_one_class_however_it_is_spelled(tmp_path):
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate(
        [1, "1.0", 1.0, "0", 0, "0.00"] * 6)]
    labels = Labels()
    labels.load(jsonl(tmp_path / "a.jsonl", rows))
    assert labels.LABELS == ("0", "1")
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate(
        [True, "True", "true", "FALSE", False] * 6)]
    labels.load(jsonl(tmp_path / "b.jsonl", rows))
    assert labels.LABELS == ("false", "true")


# Paths, flags, identity

def test_a_comment_begins_with_a_word_outside_of_quotes():
    for line, rest in (("--out 'a #1' # b", "--out 'a #1' "), ("# all", ""), ("a#b", "a#b"),
                       ('--x "it\'s # here"', '--x "it\'s # here"')):
        assert without_comment(line) == rest


def test_files_of_flags_end_and_are_named(tmp_path):
    """Eight files that each include the next eight times, and an open quote."""
    for i in range(8):
        (tmp_path / f"{i}.args").write_text(f"@{tmp_path}/{i + 1}.args\n" * 8)
    (tmp_path / "8.args").write_text("--rs --rs")
    (tmp_path / "open.args").write_text("--rs\n--out 'x\n")
    for name, message in (("0.args", "thousands of flags"), ("open.args", "open.args, line 2")):
        with pytest.raises(ValueError, match=message):
            Parser("x", None).from_files([f"@{tmp_path / name}"])


def test_a_run_of_a_grid_is_known_by_its_bytes(tmp_path):
    """Other data, another base, another file of flags under the same path: another run. The order
    of the flags and where a file lies in time do not count."""
    data, flags = tmp_path / "d.jsonl", tmp_path / "f.args"
    data.write_text("1")
    flags.write_text("--steps 4")
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text("{}")

    def name():
        return compare.folder(compare.words(["--data-dir", str(data), f"@{flags}", "--model",
                                             str(tmp_path / "m")]))
    seen = [name()]
    assert name() == seen[0]
    for path, content in ((data, "2"), (flags, "--steps 9"), (tmp_path / "m/config.json", "[]")):
        path.write_text(content)
        seen.append(name())
    assert len(set(seen)) == 4


def test_a_pipe_or_a_device_is_no_file(tmp_path):
    import os
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (tmp_path / "pipe.jsonl", tmp_path):
        with pytest.raises(ValueError, match="is not a file"):
            files.read_text(path)
    assert PAIRS and owner.STATE == STATE
