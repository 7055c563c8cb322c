"""What a run says: what it is going to do, three examples, a table of results, a model card."""
from pathlib import Path

from data.tasks import Write
from evaluation.evaluate import decode, evaluate


def announce(settings, splits, cut, parameters, processes=1):
    """Print what is about to be trained, on what, and how.

    settings: a flags.Settings. splits: {split: its examples}, of whose texts `cut` were cut at the
    context. parameters: {"trainable", "total"}."""
    sizes = ", ".join(f"{len(examples)} {split}" for split, examples in splits.items())
    cuts = f"; {cut} texts cut at {settings.context} tokens" * bool(cut)
    source = f" from {settings.data_dir}" if settings.data_dir else ""
    print(f"data     {settings.dataset}{source}: {sizes} examples{cuts}")
    flags = ""
    for name, value in settings.method_flags.items():
        if value is not None:
            flags += f", {name} {','.join(map(str, value)) if isinstance(value, list) else value}"
    trainable, total = parameters["trainable"], parameters["total"]
    print(f"method   {settings.method}{flags}; {trainable:,} of {total:,} parameters train "
          f"({trainable / total:.2%})")
    several = f", {processes} processes" * (processes > 1)
    print(f"machine  {settings.device}, {settings.dtype}{several}; {settings.steps} steps of "
          f"{settings.batch_size * settings.grad_accum * processes} examples, learning rate "
          f"{settings.lr:g}")


def print_examples(model, dataset, device, amp):
    """Print what the trained model makes of three examples of the test split."""
    pairs = dataset.pairs["test"]
    pairs = pairs[:: max(1, len(pairs) // 3)][:3]
    if dataset.labels:
        examples, _ = dataset.task.encode(pairs)
        _, logits = evaluate(model, examples, dataset.task, device, amp)
        print()
        for (texts, truth), row in zip(pairs, logits, strict=True):
            if len(dataset.labels) == 1:
                predicted, true = f"{row.item():.2f}", f"{truth:.2f}"
            else:
                predicted, true = dataset.labels[row.argmax()], dataset.labels[truth]
            print(f"{' / '.join(texts)}\n  -> {predicted} ({true})")
    elif isinstance(dataset.task, Write):
        written = decode(model, pairs, dataset.task, amp)[:2]
        for prompt, text, (record, reference) in zip(*written, pairs, strict=True):
            if isinstance(record, tuple):  # a conversation: what was said last
                prompt = record[-1][1]
            print(f"\n{prompt}\n  -> {text}" + f"\n  ref {reference}" * bool(record))


def print_table(title, metrics):
    """{stage: {metric: value}} as a table."""
    widths = {name: max(12, len(name) + 2) for values in metrics.values() for name in values}
    print(f"\n{title:28}" + "".join(f"{name:>{width}}" for name, width in widths.items()))
    for stage, values in metrics.items():
        cells = (f"{values[name]:{width}.4f}" if name in values else " " * width
                 for name, width in widths.items())
        print(f"{stage:28}" + "".join(cells))


def print_classes(classes):
    """{label: its figures} as a table, of at most 20 labels those that are recognised worst."""
    shown = sorted(classes, key=lambda name: classes[name]["f1"])[:20]
    print(f"\n{'of each label':28}{'precision':>12}{'recall':>12}{'f1':>12}{'texts':>8}")
    for name in classes:
        if name in shown:
            precision, recall, f1, texts = classes[name].values()
            print(f"{name:28.28}{precision:12.4f}{recall:12.4f}{f1:12.4f}{texts:8}")


def model_card(result, command):
    """The README.md of a run folder: PEFT's model card, for people and for the hub.

    result: the content of result.json. command: what starts the run."""
    settings, metrics = result["settings"], result["metrics"]
    method, model = settings["method"], settings["model"]
    head = [f"library_name: {'peft' if settings['rank'] else 'transformers'}",
            f"tags: [{', '.join(dict.fromkeys(['lora', method]))}]"]
    if model.count("/") == 1 and not Path(model).exists():
        head.insert(0, f"base_model: {model}")  # an id of the hub
    scale = ""
    if settings["rank"]:
        root = settings["rs"] or method == "rslora"
        scale = (f", r {settings['rank']}, scale alpha / {'sqrt(r)' if root else 'r'} with alpha "
                 f"{settings['alpha']:g}, on {settings['targets']}")
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    rows = [["", *names], ["---"] * (1 + len(names))] + [
        [stage, *(f"{values[name]:.4f}" if name in values else "" for name in names)]
        for stage, values in metrics.items()]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n".join(["---", *head, "---", "", f"# {method} on {settings['dataset']}", "",
                      f"{model}, adapted by {method}{scale}. The test split of "
                      f"{settings['dataset']}:", "", table, "", "```sh", command, "```", "",
                      f"Trained with {versions}.", ""]).encode(errors="replace").decode()
