"""Write, or classify, with what was trained: the base and the adapter of a run folder, merged
unless told otherwise.

    python generate.py out/<run> "name : The Mill | food : Italian | area : riverside"
        streams to the terminal
    python generate.py out/<run> "a text"
        of a classifier: its label and the probabilities; two texts: "a || b"
    python generate.py out/<run> "a question" talks.jsonl
        of a run on conversations: answers in its chat template; of a file each user's turn
    python generate.py out/<run> --dataset e2e --data-dir FOLDER --beams 10 --length-penalty .9
        a whole split, with BLEU, NIST, ROUGE-L against all references
"""
import functools
import itertools
import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from tqdm import tqdm

import data
import lora
from checkpoints import adapters, tokenizers
from checkpoints.files import check_new, read_json, read_text, write_text
from checkpoints.pretrained import load, locate
from data import chat, files
from data.tasks import Converse, Label
from evaluation import decoding, metrics
from methods import METHODS
from run.flags import Parser, command, path
from run.folder import adapters_of, fingerprint_base, load_best
from run.machine import pick_device
from run.owner import LOG, RESULTS, STATE, RunFolder

NONE = type(None)  # of full fine-tuning, or not given
SETTINGS = dict(model=[str], method=[str], dataset=[str], base_weights=[str], rs=[bool],
                rank=[int, NONE], alpha=[float, int, NONE], dropout=[float, int, NONE],
                targets=[str, NONE], data_dir=[str, NONE], init_from=[str, NONE], steps=[int],
                context=[int])


def parse(argv):
    """Flags -> a namespace; ValueError for what does not fit together."""
    parser = Parser("generate.py", __doc__, files=False)
    parser.add_argument("run", type=lambda text: Path(path(text)), help="a run folder of train.py")
    parser.add_argument("texts", nargs="*", help="records, beginnings of plain texts, texts to "
                        "classify, or questions and files of conversations")
    add = parser.add_argument_group("instead of texts").add_argument
    add("--dataset", help="write for every record of a split (that of the run)")
    add("--split", choices=("train", "validation", "test"), help="(test)")
    add("--data-dir", type=path, help="read the dataset from this folder")
    add("--first", type=int, help="only so many records")
    add("--out", type=lambda text: Path(path(text)), help="predictions, one JSON object a line "
        "(predictions-<split>.jsonl in the run folder)")
    add = parser.add_argument_group("base and adapter").add_argument
    add("--model", type=path, help="the base, if it has moved since")
    add("--unmerged", action="store_true", help="keep the adapter's layers: slower, to compare")
    add("--cut", type=int, help="a DyLoRA run: use this rank (that of the run)")
    add = parser.add_argument_group("decoding").add_argument
    add("--max-new", type=int, help="tokens at most (96, gsm8k 256)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token, 1 draws from "
        "the model (0)")
    add("--top-k", type=int, default=0, help="draw from this many tokens; 0: from all (0)")
    add("--beams", type=int, default=1, help="beam search; 1: none (1)")
    add("--length-penalty", type=float, default=1.0, help="beams are ranked by log P / length ** "
        "this (1)")
    add("--seed", type=int, default=0, help="of drawing")
    add("--batch-size", type=int, default=32, help="records at a time (32)")
    add("--device", default="auto", help="cpu, cuda, mps (cuda, else cpu)")
    args = parser.parse_args(argv)
    if args.texts and (args.dataset or args.split or args.out or args.first or args.data_dir):
        raise ValueError("give texts, or a dataset with --dataset, --split, --data-dir, --first "
                         "and --out, not both")
    for name in ("max_new", "beams", "batch_size", "first"):
        if (getattr(args, name) or 1) < 1 or getattr(args, name) == 0:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, not "
                             f"{getattr(args, name)}")
    if not 0 <= args.temperature < float("inf") or args.top_k < 0:
        raise ValueError(f"--temperature {args.temperature} and --top-k {args.top_k} must be 0 or "
                         "more")
    if args.beams > 1 and args.temperature:
        raise ValueError(f"--beams {args.beams} search, --temperature {args.temperature} draws: "
                         "choose one")
    if args.top_k and not args.temperature:
        raise ValueError(f"--top-k {args.top_k} says nothing without --temperature")
    if args.beams > 100:
        raise ValueError(f"--beams must be at most 100, not {args.beams}")
    if not 0 <= args.seed < 2**62:
        raise ValueError(f"--seed must be in 0..2^62 - 1, not {args.seed}")
    args.split = args.split or "test"
    if args.out is None:
        args.out = args.run / f"predictions-{args.split}.jsonl"
    elif args.out.is_dir() or not args.out.parent.is_dir():
        raise ValueError(f"--out {args.out} cannot be written there")
    if args.out.parent.resolve() == args.run.resolve() and args.out.name in (STATE, LOG, *RESULTS):
        if not args.out.name.startswith("predictions"):
            raise ValueError(f"--out {args.out} is a file of the run itself")
    else:
        check_new(args.out, predictions)
    if not -100 <= args.length_penalty <= 100:
        raise ValueError(f"--length-penalty {args.length_penalty} is not in -100..100")
    args.device, args.dtype, args.amp = pick_device(args.device, "auto")
    return args


def predictions(path):
    """Whether a file holds what `generate` writes, by its first line."""
    try:
        first = json.loads(read_text(path).partition("\n")[0])
        return list(first) == ["record", "text", "references"]
    except (ValueError, TypeError):
        return False


def load_run(folder, unmerged=False, cut=None, base=None, dtype=torch.float32):
    """(model in eval mode, settings, folder of the base) of a run folder.

    Merged: the base with the exported adapter folded in, or what full fine-tuning made of it.
    Unmerged, or with a cut: the method's own layers with the weights that the run kept. base: where
    the base is, if it has moved. ValueError for a folder without a finished run.
    """
    result = read_json(folder / "result.json")
    settings = result.get("settings")
    if not isinstance(settings, dict):
        raise ValueError(f"{folder / 'result.json'} holds no settings of a run")
    for name, kinds in SETTINGS.items():
        if type(settings.get(name)) not in kinds:
            raise ValueError(f"{folder / 'result.json'}: {name} {settings.get(name)!r} is no "
                             "setting of a run")
    if settings["method"] not in METHODS or settings["dataset"] not in data.DATASETS:
        raise ValueError(f"{folder} is a run of method {settings['method']!r} on "
                         f"{settings['dataset']!r}, which are not known here")
    method = METHODS[settings["method"]]
    settings = {**{name: None for name, spec in method.flags.items()
                   if spec.get("default") is None}, **settings}
    lacking = [name for name in ("rank", "alpha", "dropout", "targets")
               if settings.get(name) is None]
    lacking += [name for name in method.flags if name not in settings]
    if method.adapter and lacking and not settings.get("init_from"):
        raise ValueError(f"{folder / 'result.json'}: a run of {settings['method']} needs "
                         f"{lacking[0]}")
    labels = result.get("labels") or []
    texts = isinstance(labels, list) and all(isinstance(name, str) for name in labels)
    if not texts or bool(labels) != bool(data.about(settings["dataset"], "LABELS")):
        raise ValueError(f"{folder / 'result.json'}: labels {labels!r} are no labels of a run")
    if cut is not None and "cut" not in method.flags:
        raise ValueError(f"--cut {cut} is for a DyLoRA run, {folder} is one of "
                         f"{settings['method']}")
    try:
        source = locate(base or settings["model"])
    except ValueError as e:
        raise ValueError(f"{e}" if base else f"{e}; if the base has moved, --model gives its new "
                         "place") from None
    now = fingerprint_base(source)
    for name, what in (("base_weights", "other weights than those"),
                       ("base_files", "another config.json or tokenizer than that")):
        if settings.get(name, now[name]) != now[name]:
            raise ValueError(f"{source} has {what} that {folder} was trained on")
    with redirect_stdout(StringIO()):  # a head that the base lacks comes with the run
        model, _ = load(source, labels=labels, bits=settings.get("base_bits"),
                        dtype=torch.float32 if method.trains_base else dtype)
    # LoHa and LoKr are rebuilt from the run's state
    plain = method.adapter and method.adapter.peft_type == "LORA"
    if plain and not unmerged and cut is None:
        adapters.load_adapter(model, folder)
        lora.merge(model)
    else:
        init = settings.get("init_from")
        if init and adapters.fingerprint_adapter(init) != settings.get("init_weights"):
            raise ValueError(f"{init}, from which {folder} went on, has changed since")
        try:
            cuts = {} if cut is None else {"cut": cut}
            adapter, layers = adapters_of(model, {**settings, **cuts})
        except TypeError as e:
            raise ValueError(f"{folder / 'result.json'} holds a setting of the "
                             f"wrong kind: {e}") from None
        load_best(folder / STATE, model)
        if cut is not None:
            adapter.prepare_merge(model, cut, None)
        if method.adapter and not unmerged:
            lora.merge(model)
    talks = result.get("chat") is True and settings["dataset"] in ("pairs", "chat")
    settings = {**settings, "labels": labels, "chat": talks}
    return model.eval(), settings, source


def write_one(model, task, record, args):
    """Print a continuation of a record, a plain text's beginning or turns, while it comes; returns
    it."""
    ids, shown, prompt, tokenizer = [], "", task.prompt(record), task.tokenizer
    if args.beams > 1:
        ids, = decoding.beam_search(model, [prompt], args.max_new, task.stops, args.beams,
                                    args.length_penalty)
        print(tokenizer.decode(ids).strip())
        return tokenizer.decode(ids).strip()
    for (token,) in decoding.stream(model, [prompt], args.max_new, task.stops, args.temperature,
                                    args.top_k, args.seed):
        if token is not None:
            ids.append(token)
            text = tokenizer.decode(ids).lstrip()
            # else the rest of a character comes with the next token
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                print(text[len(shown):], end="", flush=True)
                shown = text
    print(tokenizer.decode(ids).lstrip()[len(shown):])
    return tokenizer.decode(ids).strip()


def is_file(text):
    """Whether a text is the name of a file; a question may be too long to be one. ValueError for
    the name of one that is not there."""
    try:
        found = Path(text).is_file()
    except OSError:
        return False
    if not found and files.reader(Path(text)) and not any(c.isspace() for c in text):
        raise ValueError(f"{text} is no file here")
    return found


def answer_file(model, task, file, dataset, args):
    """Answer every turn of the user in a file of conversations. What the assistant says next is the
    file's, or where the file has nothing our own answer."""
    if not files.reader(file):
        raise ValueError(f"{file} is not one of {', '.join(files.READERS)}: is it a question?")
    for where, row in files.read_files([file]):
        turns = chat.turns(row, where, asked=True)
        if turns is None:  # a pair
            prompt, completion = dataset.pair(row, where)
            turns = ("user", prompt), ("assistant", completion)
        said = []
        for i, (role, content) in enumerate(turns):
            said.append((role, content))
            print(f"{role:10} {content}")
            if role == "user":
                print("answer     ", end="")
                answer = write_one(model, task, said, args)
                if turns[i + 1:i + 2] == () or turns[i + 1][0] == "user":
                    said.append(("assistant", answer))
        print()


def write_many(model, task, records, args):
    """[text] for records, those of similar length together."""
    seeds, stops = itertools.count(args.seed, args.batch_size), task.stops

    def write(batch):
        if args.beams > 1:
            return decoding.beam_search(model, batch, args.max_new, stops, args.beams,
                                        args.length_penalty)
        return decoding.generate(model, batch, args.max_new, stops, temperature=args.temperature,
                                 top_k=args.top_k, seed=next(seeds))
    prompts = [task.prompt(record) for record in records]
    bar = functools.partial(tqdm, disable=None, unit="batch")
    written = decoding.in_batches(prompts, args.batch_size, write, bar)
    return [task.tokenizer.decode(ids).strip() for ids in written]


def classify(model, tokenizer, texts, settings, args):
    """Print the label of each text, or of two texts with || between them, and the probabilities; of
    a regression the number."""
    labels = settings["labels"]
    task = Label(tokenizer, settings["context"], len(labels))
    for text in texts:
        examples, _ = task.encode([(text.split(" || ", 1), 0)])
        with args.amp:
            logits = model(task.collate(examples)[0].to(args.device))[0][0].float()  # (L,)
        answer = (f"{logits.item():.4f}" if len(logits) == 1 else labels[logits.argmax()] + "  ("
                + ", ".join(f"{name} {p:.4f}"
                            for name, p in zip(labels, logits.softmax(0).tolist(), strict=True))
                + ")")
        print(f"{text}\n  -> {answer}" if len(texts) > 1 else answer)


def judge(dataset, records, texts, references):
    """{metric: value}: the dataset's own, and where a record has references those of machine
    translation."""
    scorer = data.about(dataset, "score", None)
    pairs = [(record, group[0]) for record, group in zip(records, references, strict=True)]
    scores = scorer(pairs, texts) if scorer else {}
    if not data.about(dataset, "METRICS"):
        measures = {"BLEU": metrics.bleu, "NIST": metrics.nist, "ROUGE_L": metrics.rouge_l,
                 "CIDEr": metrics.cider, "METEOR": metrics.meteor}
        measures = {name: measure(texts, references) for name, measure in measures.items()
                 if name.lower() not in scores}
        scores.update({name: value for name, value in measures.items() if value is not None})
        for name, lack in (("CIDEr", "pip install pycocoevalcap"),
                           ("METEOR", "python -m nltk.downloader wordnet")):
            if measures.get(name, 0) is None:
                print(f"note     {name} is left out: {lack}")
    return scores


def generate(args):
    """From flags to texts; returns the metrics of a split, else None."""
    model, settings, source = load_run(args.run, args.unmerged, args.cut, args.model,
                                       getattr(torch, args.dtype))
    if model.classifier:
        if not args.texts:
            raise ValueError(f"{args.run} is a classifier: give it texts")
        tokenizer = tokenizers.for_model(source, model.config)
        classify(model.to(args.device), tokenizer, args.texts, settings, args)
        return None
    if not model.causal:
        raise ValueError(f"{args.run} predicts masked tokens: it cannot write texts")
    dataset = args.dataset or settings["dataset"]
    if dataset not in data.DATASETS or data.about(dataset, "LABELS"):
        raise ValueError(f"--dataset {dataset} is not one of texts to write: choose "
                         + ", ".join(name for name in data.DATASETS
                                     if not data.about(name, "LABELS")))
    of_run = data.module(dataset)
    if dataset == settings["dataset"]:  # read as the run read it
        of_run = data.module(dataset, settings.get("columns"), settings.get("metric"), False,
                             False, settings.get("chatml") is True)
    model.to(args.device)
    if not args.texts:
        return write_split(model, settings, source, dataset, of_run, args)
    if settings["chat"]:  # no row of it is read here
        of_run.CHAT = True
    _, task = data.task(dataset, source, model, model.context, of_run)
    args.max_new = args.max_new or data.about(of_run, "MAX_NEW", 96)
    for text in args.texts:
        with args.amp:  # the adapter was merged outside of it
            if settings["chat"] and is_file(text):
                answer_file(model, task, Path(text), of_run, args)
            else:
                write_one(model, task, (("user", text),) if settings["chat"] else text, args)
    return None


def write_split(model, settings, source, dataset, of_run, args):
    """Write for the records of a split, of conversations for each place where the assistant speaks;
    returns the metrics."""
    if data.about(dataset, "PLAIN"):
        raise ValueError(f"{dataset} has no records to write for: give the beginnings of texts")
    of = {}  # record -> its references
    where = args.data_dir or (settings.get("data_dir") if dataset == settings["dataset"] else None)
    pairs = data.load(dataset, where, of_run)[args.split]
    tokenizer, task = data.task(dataset, source, model, model.context, of_run)
    given, args.max_new = args.max_new, args.max_new or data.about(of_run, "MAX_NEW", 96)
    for pair in pairs:
        for record, text in chat.answers(*pair) if isinstance(task, Converse) else [pair]:
            of.setdefault(record, []).append(text)
    if not given and data.about(of_run, "LONGEST", False):
        longest = max(map(len, tokenizer.encode_ordinary_batch(
            [f" {text}" for group in of.values() for text in group])))
        args.max_new = max(args.max_new, longest + 1)
    records = list(of)[:args.first]
    fits = [record for record in records if len(task.prompt(record)) < model.context]
    if not fits:
        raise ValueError(f"no record of {args.split} leaves room for a text in a context of "
                         f"{model.context} tokens")
    if len(fits) < len(records):
        print(f"note     {len(records) - len(fits)} of {len(records)} records leave no room in a "
              f"context of {model.context} tokens: left out")
    records = fits
    for name in ("sacrebleu", "nltk", "rouge_score"):
        metrics.library(name)  # said before anything is written
    with args.amp:
        texts = write_many(model, task, records, args)
    references = [of[record] for record in records]
    rows = [json.dumps(dict(record=chat.messages(record), text=text, references=group)) + "\n"
            for record, text, group in zip(records, texts, references, strict=True)]
    if args.out.parent.resolve() == args.run.resolve() and args.out.name in RESULTS:
        RunFolder(args.run).begin(args.out.name)
    write_text(args.out, "".join(rows))
    for record, text in list(zip(records, texts, strict=True))[:3]:
        said = record if isinstance(record, str) else record[-1][1]
        print(f"{said}\n  -> {text}")
    scores = judge(of_run, records, texts, references)
    sizes = f"{len(records)} records, {sum(map(len, references))} references"
    print(f"\n{dataset} ({args.split}): {sizes}; texts in {args.out}")
    print("".join(f"{name:>10}" for name in scores))
    print("".join(f"{value:10.4f}" for value in scores.values()))
    return scores


def main(argv=None):
    """The command line: bad input is one line and exit code 2."""
    with torch.inference_mode():
        return command("generate.py", parse, generate, argv)


if __name__ == "__main__":
    main()
