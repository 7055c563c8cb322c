"""How the two shipped models were made: their texts, their vocabulary, the training.

    world.py, opinions.py           the texts, datasets like those in data/
    vocabulary.py                   the vocabulary
    base.sh, base_roberta.sh        data/tiny-gpt and data/tiny-roberta, from scratch
"""
