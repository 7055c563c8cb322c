"""Conversations: every token id is that of `transformers`, and the loss is on the answers."""
import json
import random
import shutil

import pytest
import torch

import data
import generate
import train
from checkpoints import pretrained, templates, tokenizers
from checkpoints.pretrained import from_pretrained
from data import chat
from data.pairs import Pairs
from data.tasks import spans
from model import Llama, LlamaConfig

transformers = pytest.importorskip("transformers", reason="the oracle, in [dev]")
# as the checkpoints of the hub write turns: each is one way to do it, cut down to what matters
WAYS = {
    "chatml": """\
{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    # Llama 3: it writes the first token itself, and cuts white space off
    "begins": """\
{{- bos_token }}{% for m in messages %}
{{- '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|im_end|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}""",
    # Llama 2: no beginning of an answer, a turn ends as a text
    "inst": """\
{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}
{%- elif m.role == 'system' %}{{ '<<SYS>>' + m.content }}
{%- else %}{% generation %}{{ ' ' + m.content + ' ' + eos_token }}{% endgeneration %}{% endif %}
{%- endfor %}""",
    # Qwen 3: the last answer alone keeps its place to think
    "thinks": """\
{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{{- m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    # DeepSeek R1: the beginning of an answer is not written once the answer is there
    "starts": """\
{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}""",
    # Mistral: the system's text stands before the last question
    "moves": """\
{% set ns = namespace(system='', last=-1) %}{% for m in messages %}
{%- if m.role == 'system' %}{% set ns.system = m.content + '\n' %}{% endif %}
{%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages if m.role != 'system' %}{% set at = loop.index0 + (1 if ns.system else 0) %}
{{- '<|im_start|>' + (ns.system if at == ns.last else '') + m.content + '<|im_end|>' }}
{%- endfor %}""",
    "date": """\
{{- '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    # no token ends a turn
    "open": """\
{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif %}""",
    "strict": """\
{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}{% endif %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}""",
}
# what is trained of an answer, where it is not the answer and <|im_end|>
TRAINED = {"inst": " {} </s>", "thinks": "<think>\n\n</think>\n\n{}<|im_end|>", "open": " {}",
           "moves": "<|im_start|>{}<|im_end|>", "strict": "<|im_start|>assistant\n{}<|im_end|>"}


@pytest.fixture(scope="session")
def chat_base(tmp_path_factory, small_llama):
    """A checkpoint folder with the tokens of turns, without a template."""
    folder = tmp_path_factory.mktemp("chat")
    torch.manual_seed(0)
    pretrained.save_pretrained(Llama(LlamaConfig(324, 32, 48, 2, 4, 2, 8, 256)), folder)
    tokenizer = tokenizers.load(small_llama, 320)
    tokenizer.backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>", "</s>"])
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>",
        "bos_token": {"content": "<s>", "__type": "AddedToken"}}))
    return folder


@pytest.fixture
def folder_of(chat_base, tmp_path):
    def make(template):
        folder = tmp_path / "base"
        shutil.copytree(chat_base, folder, dirs_exist_ok=True)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return folder
    return make


def conversation(n, system=None, seed=0):
    """n turns of the user and the assistant, some with spaces, several lines, or nothing in them.
    """
    rng = random.Random(f"{n} {seed}")
    texts = "Hello", "the pub is cheap\n\nand near", "été ☕, no 7", " a space", "ends \n", ""
    turns = [("user" if i % 2 == 0 else "assistant", rng.choice(texts)) for i in range(n)]
    return tuple(([("system", system)] if system is not None else []) + turns)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def messages(turns):
    return [{"role": role, "content": content} for role, content in turns]


def encoder(folder, context=256, **flags):
    """The task of a run on conversations."""
    return data.task("chat", folder, from_pretrained(folder), context,
                     Pairs(chat=True, **flags))[1]


def encoded(folder, pairs, context=256, **flags):
    """(examples, task) of conversations, as a run has them."""
    task = encoder(folder, context, **flags)
    rows = task.rows(pairs)
    return task.encode(rows)[0], task


def their_ids(tokenizer, turns, ask=False):
    """What `transformers` makes of the turns."""
    return tokenizer.apply_chat_template(messages(turns), add_generation_prompt=ask,
                                         return_dict=False)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("system", [None, "", "Be brief."])
def test_the_ids_of_a_conversation_are_those_of_transformers(folder_of, way, system):
    """One to six turns. The ids of each example are the beginning of what transformers makes of the
    conversation that it ends with; prompts are its prompts. What carries the loss, decoded, is each
    answer with the end of its turn."""
    if way == "strict" and system is not None:
        pytest.skip("this template refuses a system's turn")
    folder = folder_of(WAYS[way])
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for n in range(1, 7):
        turns = conversation(n, system)
        assert encoder(folder).prompt(turns) == their_ids(theirs, turns, ask=True)
        if n == 1:
            continue
        examples, _ = encoded(folder, [chat.record(turns)])
        last = max(i for i, (role, _) in enumerate(turns) if role == "assistant") + 1
        answers = [i for i in range(last) if turns[i][0] == "assistant"]
        apart = way == "starts" or way == "thinks" or (way == "moves" and system is not None)
        assert len(examples) == (len(answers) if apart else 1)
        found = []
        if way == "open":  # where nothing is said there is nothing to learn
            answers = [i for i in answers if turns[i][1].strip()]
        for k, (ids, trained) in enumerate(filter(None, examples)):
            expected = their_ids(theirs, turns[:answers[k] + 1] if apart else turns[:last])
            assert ids == expected[:len(ids)] or way == "starts"
            assert theirs.decode(expected[len(ids):]).strip() == "" or way == "open"
            assert ids[:2] != [theirs.bos_token_id] * 2
            found += [theirs.decode(ids[start:end]) for start, end in spans(ids, trained)]
        assert found == [TRAINED.get(way, "{}<|im_end|>").format(
            turns[i][1].strip() if way == "begins" else turns[i][1]).rstrip() for i in answers]


def test_a_template_that_wants_a_system_s_turn(folder_of):
    source = "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}"
    task = encoder(folder_of(source + WAYS["chatml"]))
    assert task.end == "<|im_end|>"


def test_the_template_of_a_real_model(folder_of):
    """SmolLM2's, which writes a system's turn where there is none."""
    source = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' "
              "%}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
              "Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
              "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
    folder = folder_of(source)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for n in range(2, 7, 2):
        for system in (None, "", "Be brief."):
            turns = conversation(n, system, seed=1)
            (example,), _ = encoded(folder, [chat.record(turns)])
            expected = their_ids(theirs, turns)
            assert example[0] == expected[:len(example[0])]
            assert theirs.decode(expected[len(example[0]):]) == "\n"


def test_an_answer_whose_beginning_the_template_drops(folder_of):
    """It is trained behind the beginning with which it will be asked for."""
    folder = folder_of(WAYS["starts"])
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    turns = conversation(4)
    examples, task = encoded(folder, [chat.record(turns)])
    assert task.apart == 1
    for (ids, start), k in zip(examples, (1, 3), strict=True):
        assert ids[:start] == their_ids(theirs, turns[:k], ask=True)
        assert theirs.decode(ids[start:]) == turns[k][1] + "<|im_end|>"


def test_the_loss_is_on_the_last_answer_alone_if_asked(folder_of):
    turns = conversation(6)
    (every,), task = encoded(folder_of(WAYS["chatml"]), [chat.record(turns)])
    (last,), _ = encoded(folder_of(WAYS["chatml"]), [chat.record(turns)], last_turn=True)
    assert len(every[1]) == 3 and last == (every[0], every[1][2][0])
    idx, targets, real = task.collate([every, last])
    for row, example in enumerate((every, last)):
        asked = {i for a, b in spans(*example) for i in range(a - 1, b - 1)}
        assert {i for i, t in enumerate(targets[row].tolist()) if t != -100} == asked
        assert all(targets[row, i] == example[0][i + 1] for i in asked)
    assert real.all()


def test_a_long_conversation_loses_its_last_turns(folder_of, capsys):
    """An answer that begins in the context is cut, later ones go, and both are said."""
    folder = folder_of(WAYS["chatml"])
    turns = ("user", "a"), ("assistant", "b c d e f g"), ("user", "h"), ("assistant", "i j k")
    (whole,), _ = encoded(folder, [chat.record(turns)])
    (a, b), (c, d) = whole[1]
    pair = chat.record(turns)
    for context in range(1, len(whole[0]) + 2):
        (example,), task = encoded(folder, [pair], context)
        if context <= a:
            assert example is None
            continue
        ids, trained = example
        assert ids == whole[0][:min(context + 1, d if context > c else b)]
        assert spans(ids, trained) == [(s, min(e, len(ids))) for s, e in whole[1] if s < context]
        task.where = {pair: "file, line 3"}
        assert len(task.prompt(task.rows([pair])[0][0])) <= context
        assert task.lost[-1:] == ([("file, line 3", 1)] if context <= c else [])


ROWS = [
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
     ((("user", "a"),), "b")),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
      "system": "s"}, ((("system", "s"), ("user", "a")), "b")),
    ({"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                        {"role": "user", "content": "c"}]}, ((("user", "a"),), "b")),
    ({"prompt": [{"role": "system", "content": ""}, {"role": "user", "content": "a"}],
      "completion": [{"role": "assistant", "content": "b"}]},
     ((("system", ""), ("user", "a")), "b")),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a "},
                                                {"type": "text", "text": "b"}]},
                   {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"},
                   {"role": "assistant", "content": ""}], "tools": [], "images": None},
     ((("user", "a b"), ("assistant", "c"), ("user", "d")), "")),
    ({"prompt": "a", "completion": "b"}, ((("user", "a"),), "b"))]


@pytest.mark.parametrize("row, pair", ROWS)
def test_conversations_as_others_write_them(row, pair):
    assert Pairs(chat=True).row(row, "here") == pair
    if "messages" in row or "conversations" in row:
        assert Pairs().row(row, "here") == pair


def turn(role, content="x", **more):
    return {"role": role, "content": content, **more}


Q, A = turn("user"), turn("assistant")


@pytest.mark.parametrize("row, message", [
    ({"messages": "hello"}, "messages must be a list of turns, not 'hello'"),
    ({"messages": ["hello"]}, "messages must be a list of turns"),
    ({"messages": []}, "the assistant has no turn, only nobody speaks"),
    ({"messages": [Q]}, "the assistant has no turn, only user speaks"),
    ({"messages": [turn("system"), A]}, "the assistant speaks first"),
    ({"messages": [A, Q, A]}, "the assistant speaks first"),
    ({"messages": [Q, turn("tool"), A]}, "role 'tool' is not one of system, .* tools"),
    ({"messages": [Q, turn("boss"), A]}, "role 'boss' is not one of system"),
    ({"messages": [turn(["user"]), A]}, "role .'user'. is not one of"),
    ({"messages": [Q, turn("assistant", "", tool_calls=[{}])]}, "tool_calls: tools are not"),
    ({"messages": [Q, A], "tools": [{}]}, "tools: tools are not"),
    ({"messages": [Q, A], "images": ["x.png"]}, "images: pictures and sounds are not"),
    ({"messages": [turn("user", [{"type": "image_url"}]), A]}, "a part of a turn is 'image_url'"),
    ({"messages": [turn("user", None), A]}, "content must be text, not None"),
    ({"messages": [turn("user", 3.5), turn("assistant", "\ud800")]}, "half a surrogate pair"),
    ({"prompt": [Q], "completion": "x"}, "completion must be a list of turns as prompt is"),
    ({"question": "x"}, "no columns prompt and completion, only question")])
def test_a_bad_conversation_is_a_line_with_its_place(tmp_path, row, message):
    good = {"messages": [Q, A]}
    with pytest.raises(ValueError, match=f"talks.jsonl, line 2: .*{message}"):
        Pairs(chat=True).load(write_rows(tmp_path / "talks.jsonl", [good, row, good]))


def rows_of(number):
    return [{"messages": [turn("user", f"Hello {i}"), turn("assistant", f"the pub {i}")]}
            for i in range(number)]


def start(folder, file, *flags, out):
    train.main(["--dataset", "chat", "--data-dir", str(file), "--model", str(folder), "--steps",
                "2", "--rank", "2", "--batch-size", "4", "--out", str(out), *flags])


@pytest.mark.parametrize("template, rows, message", [
    (None, rows_of(12), "has no chat template: --chatml writes the turns as ChatML"),
    ("{% if %}", rows_of(12), "chat_template.jinja is not a valid chat template: "),
    ("{{ raise_exception('no') }}", rows_of(12), "refuses the turns system, user, assistant: no"),
    ("{{ 1 / 0 }}", rows_of(12), "refuses the turns system, user, assistant: Zero"),
    ("{{ ().__class__.__bases__ }}", rows_of(12), "refuses the turns"),
    (WAYS["strict"], [*rows_of(12), {"messages": [Q, Q, A]}], "talks.jsonl, line 13: "),
    (WAYS["chatml"].replace("m['role']", "'word ' * 300"), rows_of(12),
     "every record of train leaves no room")])
def test_what_a_template_cannot_write_ends_in_one_line(folder_of, tmp_path, capsys, template, rows,
                                                       message):
    with pytest.raises(SystemExit) as e:
        start(folder_of(template), write_rows(tmp_path / "talks.jsonl", rows),
              out=tmp_path / "out")
    said = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2 and len(said) == 1 and message in said[0]
    assert not (tmp_path / "out").exists()


def test_pairs_and_conversations_in_one_file(tmp_path):
    """Of `pairs` the first row says which; chat reads both, and nothing is for the other."""
    plain = [{"prompt": f"a{i}", "completion": "b"} for i in range(12)]
    file = write_rows(tmp_path / "a.jsonl", [*plain, *rows_of(1)])
    with pytest.raises(ValueError, match="line 13: a conversation, and the rows before are pairs"):
        Pairs().load(file)
    assert sum(map(len, Pairs(chat=True).load(file).values())) == 13
    with pytest.raises(ValueError, match="--chatml is for conversations"):
        Pairs(chatml=True).load(write_rows(tmp_path / "b.jsonl", plain))


def test_a_template_where_transformers_looks_for_it(folder_of):
    """The file before tokenizer_config.json; of several the default."""
    folder = folder_of(None)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for said, source in (("{{ 1 }}", "{{ 1 }}"),
                         ([{"name": "rag", "template": "{{ 2 }}"},
                           {"name": "default", "template": "{{ 3 }}"}], "{{ 3 }}")):
        path.write_text(json.dumps({**config, "chat_template": said}))
        assert templates.of_folder(folder).source == source
        assert transformers.AutoTokenizer.from_pretrained(
            folder).apply_chat_template([Q], tokenize=False) == source[3]
    path.write_text(json.dumps({**config, "chat_template": [{"name": "rag", "template": "x"}]}))
    with pytest.raises(ValueError, match="several chat templates, and none is the default: rag"):
        templates.of_folder(folder)
    (folder / "chat_template.jinja").write_text("{{ 4 }}")
    assert templates.of_folder(folder).source == "{{ 4 }}"


def test_chatml_for_a_model_that_knows_no_turns(base, chat_base):
    """A turn ends with <|im_end|> where that is a token, else with what ends a text."""
    for folder, end in ((base, "<|endoftext|>"), (chat_base, "<|im_end|>")):
        (example,), task = encoded(folder, [chat.record(conversation(2))], chatml=True)
        assert task.tokenizer.decode(example[0][-1:]) == end == task.end
        assert task.stops == {task.tokenizer.eos, example[0][-1]}


@pytest.mark.parametrize("ends", [None, 323, [323, 5]])
def test_merged_answers_in_the_template_it_was_trained_in(folder_of, tmp_path, capsys, ends):
    """Our texts are those of transformers' pipeline on merged/, given the same messages; both stop
    at the end of a turn, and at what the base names."""
    folder = folder_of(WAYS["begins"])
    if ends is not None:
        (folder / "generation_config.json").write_text(
            json.dumps({"eos_token_id": ends, "do_sample": False, "pad_token_id": 7}))
    file, out = write_rows(tmp_path / "talks.jsonl", rows_of(40)), tmp_path / "out"
    start(folder, file, "--save-merged", "--lr", "3e-2", "--steps", "60", "--targets",
          "q,k,v,o,gate,up,down", out=out)
    capsys.readouterr()
    generate.main([str(out), "Hello 3", "--max-new", "12"])
    ours = capsys.readouterr().out.strip()
    assert not generate.is_file("a question longer than the name of a file may be " * 9)
    pipe = transformers.pipeline("text-generation", str(out / "merged"))
    said = pipe([turn("user", "Hello 3")], max_new_tokens=12, do_sample=False)
    assert said[0]["generated_text"][-1]["content"].strip() == ours != ""
    found = json.loads((out / "merged/generation_config.json").read_text())
    ids = set(map(tokenizers.load(folder, 324).backend.token_to_id, ("<|im_end|>", "</s>")))
    assert set(found["eos_token_id"]) == ids | ({5} if isinstance(ends, list) else set())
    assert found.get("pad_token_id") == (7 if ends is not None else None)
    assert json.loads((out / "result.json").read_text())["chat"] is True


def test_a_file_of_conversations_is_answered_turn_by_turn(folder_of, tmp_path, capsys, monkeypatch):
    """Each turn of the user is asked with what the file has before it, or with our own answer where
    the file has none."""
    folder, out = folder_of(WAYS["chatml"]), tmp_path / "out"
    start(folder, write_rows(tmp_path / "talks.jsonl", rows_of(40)), out=out)
    asked = []
    monkeypatch.setattr(generate, "write_one", lambda model, task, record, args:
                        asked.append(list(record)) or "MINE")
    file = write_rows(tmp_path / "ask.jsonl", [
        {"messages": [turn("system", "s"), turn("user", "a"), turn("assistant", "b"),
                      turn("user", "c"), turn("user", "d")]}])
    generate.main([str(out), str(file)])
    head = [("system", "s"), ("user", "a")]
    second = [*head, ("assistant", "b"), ("user", "c")]
    assert asked == [head, second, [*second, ("assistant", "MINE"), ("user", "d")]]
    pair = write_rows(tmp_path / "pair.jsonl", [{"prompt": "a", "completion": "b"}])
    generate.main([str(out), str(pair)])
    assert asked[3:] == [[("user", "a")]]
    bad = write_rows(tmp_path / "bad.jsonl", [{"messages": [turn("tool")]}])
    for name, message in ((bad, "bad.jsonl, line 1: role 'tool'"), ("no.jsonl", "no.jsonl is no")):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            generate.main([str(out), str(name)])
        assert message in capsys.readouterr().err


def test_a_run_on_records_is_asked_for_conversations(folder_of, tmp_path, capsys):
    """--dataset of another kind than the run's: its rows say whether they are conversations, and
    then the base's template asks."""
    out, file = tmp_path / "out", write_rows(tmp_path / "talks.jsonl", rows_of(20))
    plain = write_rows(tmp_path / "plain.jsonl", [{"prompt": f"a {i}", "completion": "b"}
                                                  for i in range(20)])
    folder = folder_of(WAYS["chatml"])
    train.main(["--dataset", "pairs", "--data-dir", str(plain), "--model", str(folder), "--steps",
                "2", "--rank", "2", "--batch-size", "4", "--out", str(out)])
    for dataset, records in (("pairs", 2), ("chat", 2)):
        generate.main([str(out), "--dataset", dataset, "--data-dir", str(file), "--max-new", "2"])
        assert f"{records} records" in capsys.readouterr().out
    row = json.loads((out / "predictions-test.jsonl").read_text().split("\n")[0])
    assert row["record"][0]["role"] == "user"


def test_the_base_of_other_targets_is_measured_anew(folder_of, tmp_path):
    """Beside a finished run: on the last answer, on all of them, in another form."""
    rows = [{"messages": [turn("user", f"a {i}"), turn("assistant", "b"), turn("user", "c"),
                          turn("assistant", f"the pub {i}")]} for i in range(20)]
    file, losses = write_rows(tmp_path / "talks.jsonl", rows), set()
    for name, flags in (("a", []), ("b", ["--last-turn"]), ("c", ["--chatml"])):
        start(folder_of(WAYS["begins"]), file, *flags, out=tmp_path / "runs" / name)
        result = json.loads((tmp_path / "runs" / name / "result.json").read_text())
        losses.add(result["metrics"]["base"]["loss"])
    assert len(losses) == 3
