"""stdlib: the reference prose of the running Python (`pydoc_data.topics`), a far domain that every
machine has.

Plain text, language modelling: about 80 topics, every ninth of ten for validation, every tenth for
testing. The text differs a little from one Python version to the next: compare runs on the same one
(result.json names it).
"""

PLAIN = True


def load():
    """{split: [("", text of a topic)]}"""
    from pydoc_data.topics import topics

    splits = {"train": [], "validation": [], "test": []}
    # some stand there twice
    for i, text in enumerate(dict.fromkeys(topics[name].strip() for name in sorted(topics))):
        splits[{8: "validation", 9: "test"}.get(i % 10, "train")].append(("", text))
    return splits


if __name__ == "__main__":
    for split, pairs in load().items():
        print(f"{split:10} {len(pairs):3} topics {sum(len(t.split()) for _, t in pairs):6} words")
    # with Python 3.11: train 64 topics 60069 words, validation 7 and 1912, test 7 and 3431
