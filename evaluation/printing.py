"""What a run prints: what it is going to do, three examples, and the table of results."""
from data.tasks import Write
from evaluation.evaluate import decode, evaluate


def announce(run, processes=1):
    """Print what is about to be trained, on what, and how. run: a train.Run."""
    args, dataset = run.args, run.data
    sizes = ", ".join(f"{len(examples)} {split}" for split, examples in dataset.examples.items())
    cut = f"; {dataset.cut} texts cut at {args.context} tokens" * bool(dataset.cut)
    flags = "".join(f", {name} {','.join(map(str, value)) if isinstance(value, list) else value}"
                    for name, value in run.own.items() if value is not None)
    trainable, total = run.parameters.values()
    print(f"data     {args.dataset}: {sizes} examples{cut}")
    print(f"method   {args.method}{flags}; {trainable:,} of {total:,} parameters train ({trainable / total:.2%})")
    print(f"machine  {args.device}, {args.dtype}" + f", {processes} processes" * (processes > 1)
          + f"; {args.steps} steps of {args.batch_size * args.grad_accum * processes} examples, "
          f"learning rate {args.lr:g}")


def print_examples(model, dataset, device, amp):
    """Print what the trained model makes of three examples of the test split."""
    pairs = dataset.pairs["test"][:: max(1, len(dataset.pairs["test"]) // 3)][:3]
    if dataset.labels:
        _, logits = evaluate(model, dataset.task.encode(pairs)[0], dataset.task, device, amp)
        print()
        for (texts, truth), row in zip(pairs, logits, strict=True):
            predicted, true = ((f"{row.item():.2f}", f"{truth:.2f}") if len(dataset.labels) == 1 else
                               (dataset.labels[row.argmax()], dataset.labels[truth]))
            print(f"{' / '.join(texts)}\n  -> {predicted} ({true})")
    elif isinstance(dataset.task, Write):
        written = decode(model, pairs, dataset.tokenizer, amp, between=dataset.task.between)
        for prompt, text, (record, reference) in zip(*written, pairs, strict=True):
            print(f"\n{prompt}\n  -> {text}" + f"\n  ref {reference}" * bool(record))


def print_table(title, metrics):
    """{stage: {metric: value}} as a table."""
    widths = {name: max(12, len(name) + 2) for values in metrics.values() for name in values}
    print(f"\n{title:28}" + "".join(f"{name:>{width}}" for name, width in widths.items()))
    for stage, values in metrics.items():
        print(f"{stage:28}" + "".join(f"{values[name]:{width}.4f}" if name in values else " " * width
                                       for name, width in widths.items()))
