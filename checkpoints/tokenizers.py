"""Tokenizers. A tokenizer is part of the checkpoint: the ids of a text come from the files of its
folder.

    for_model(folder, config) -> Tokenizer, or RobertaTokenizer, by the model_type of the config

Read are, the first that is there: tokenizer.json; vocab.json with merges.txt; tokenizer.tiktoken, a
line per token with base64 of its bytes and its rank. A vocab.json alone may number GPT-2's tokens
anew, as RoBERTa's does. A GPT-2 without any of these files has GPT-2's own vocabulary. The
`tokenizers` library does the encoding in all cases.

Special tokens are put around a text by us and never found in it: the letters <|endoftext|> in a
text are ordinary text.
"""
import base64
import functools
import re
from pathlib import Path

import tiktoken
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from checkpoints.files import read_json, read_text, write, write_json

# All that says how a text becomes ids, here or in `transformers`
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
         "vocab.json", "merges.txt", "tokenizer.tiktoken", "chat_template.jinja")
UNREADABLE = "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "merges.txt"
# How tokenizer.tiktoken cuts: a word with its leading space, one digit, a run of punctuation, white
# space
PATTERN = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LETTER_AND_LINE_END = re.compile(r"[^\W\d_](?=\n)")
PIECE = 2**18  # characters that are encoded at a time
ROBERTA = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}


def for_model(folder, config):
    """The tokenizer of a checkpoint folder, of the kind that its model_type needs."""
    if config.model_type == "roberta":
        return RobertaTokenizer(folder, config.vocab_size)
    return load(folder, config.vocab_size,
                first="<|endoftext|>" if config.model_type == "gpt2" else None)


def load(folder, vocab_size, first="<|endoftext|>"):
    """The tokenizer of a model that writes. A text begins with the token that the tokenizer itself
    puts there, as those of Llama and Mistral do, else with the one that ends a text, as with GPT-2
    and Qwen. first: the token that ends a text if there is such a token; else the files say it."""
    folder = Path(folder)
    tokenizer = Tokenizer(*read(folder, vocab_size, roberta=False), vocab_size)
    path, template = folder / "tokenizer_config.json", tokenizer.backend.post_processor
    names = read_json(path) if path.exists() else {}
    tokenizer.eos = ending(tokenizer, folder, names, vocab_size, first)
    added = from_file(tokenizer.where, lambda: tokenizer.backend.encode(
        "", add_special_tokens=True).ids) if template else []
    if names.get("add_bos_token") is True:
        added = [tokenizer.backend.token_to_id(content(names.get("bos_token")) or "")]
    begins = (added and names.get("add_bos_token") is not False and added[0] is not None
              and added[0] < vocab_size)
    tokenizer.bos = added[0] if begins else tokenizer.eos
    return tokenizer


def gpt2():
    """GPT-2's own tokenizer, from tiktoken."""
    tokenizer = Tokenizer(own_vocabulary(), "GPT-2", 50257)
    tokenizer.bos = tokenizer.eos = 50256
    return tokenizer


class Tokenizer:
    """Texts <-> ids. More embeddings than tokens are fine: the rows that are left over belong to no
    text.

    bos, eos: the ids that begin and end a text. ValueError for files that are damaged, or have more
    tokens than the model has embeddings.
    """

    def __init__(self, backend, where, vocab_size):
        self.backend, self.where, self.size = backend, where, vocab_size
        # GPT-2's way to cut a text, and ours, never joins a letter with a line end behind it
        cut, added = repr(backend.pre_tokenizer), backend.get_added_tokens_decoder()
        known = "add_prefix_space=False, trim_offsets=True, use_regex=True" in cut or PATTERN in cut
        self.cuts_at_line_ends = known and all(token.special for token in added.values())
        backend.encode_special_tokens = True  # in a text they are ordinary text
        backend.no_truncation()  # a tokenizer.json may have been saved with both
        backend.no_padding()
        special = self.special = {i for i, token in added.items() if token.special}
        # those that a text can have
        self.ids = sorted(i for i in backend.get_vocab().values() if i not in special)
        if len(set(self.ids)) < len(self.ids):
            raise ValueError(f"{where} is damaged: two of its tokens have one number")
        if not self.ids or self.ids[-1] >= vocab_size:
            raise ValueError(f"{where} numbers its tokens up to {(self.ids or [0])[-1]}, and the "
                             f"model has {vocab_size} embeddings: they belong to different "
                             "checkpoints")

    def encode_ordinary(self, text):
        """text -> ids, without special tokens"""
        return self.encode_ordinary_batch([text])[0]

    def encode_ordinary_batch(self, texts):
        if max(map(len, texts), default=0) > PIECE and self.cuts_at_line_ends:
            # the library holds a hundred times as much as the ids that it finds: a book is encoded
            # in pieces
            return [[i for piece in pieces(text) for i in self.encode_whole([piece])[0]]
                    for text in texts]
        return self.encode_whole(texts)

    def encode_whole(self, texts):
        try:
            return [found.ids
                    for found in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        except TypeError:
            raise ValueError("a text holds half a surrogate pair, which no "
                             "tokenizer can encode") from None

    def encode_rendered(self, text):
        """(ids, [(its first character, the one behind it)] of each) of a text that a chat template
        has written: special tokens stand in it, the first one too."""
        self.backend.encode_special_tokens = False
        try:
            found = self.backend.encode(text, add_special_tokens=False)
        except TypeError:
            raise ValueError("a turn holds half a surrogate pair, which no tokenizer can "
                             "encode") from None
        finally:
            self.backend.encode_special_tokens = True
        if max(found.ids, default=0) >= self.size:
            token = max(found.ids)
            raise ValueError(f"{self.where} numbers {self.decode([token])} {token}, and the model "
                             f"has {self.size} embeddings: they belong to different checkpoints")
        return found.ids, found.offsets

    def decode(self, ids):
        return self.backend.decode(ids, skip_special_tokens=False)

    def save(self, folder, roberta):
        """Write tokenizer.json and tokenizer_config.json, which `transformers` reads."""
        specials = [token.content for token in self.backend.get_added_tokens_decoder().values()
                    if token.special]
        names = {"bos": "<s>", "eos": "</s>", "cls": "<s>", "sep": "</s>", "unk": "<unk>",
                 "pad": "<pad>", "mask": "<mask>"} if roberta else {"bos": "<|endoftext|>",
                                                                    "eos": "<|endoftext|>"}
        write(folder / "tokenizer.json", lambda part: self.backend.save(str(part)))
        if (folder / "tokenizer_config.json").exists():
            return
        # as the file says, without rules of a model_type's own
        write_json(folder / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{f"{name}_token": token for name, token in names.items() if token in specials}})


class RobertaTokenizer(Tokenizer):
    """RoBERTa's way: <s> text </s>, or <s> a </s></s> b </s>. ids: those that a text can have,
    without special tokens.
    """

    def __init__(self, folder, vocab_size):
        super().__init__(*read(Path(folder), vocab_size, roberta=True), vocab_size)
        self.bos, self.pad, self.eos, unk = ROBERTA.values()
        self.mask = self.backend.token_to_id("<mask>")
        for token, i in {"<s>": self.bos, "<pad>": self.pad, "</s>": self.eos,
                         "<mask>": self.mask}.items():
            if i is None or i >= vocab_size or self.backend.token_to_id(token) != i:
                raise ValueError(f"{self.where} has {token} as number "
                                 f"{self.backend.token_to_id(token)}: a RoBERTa needs <s> 0, <pad> "
                                 f"1, </s> 2 and a <mask> below {vocab_size}, its embeddings")
        self.ids = [i for i in self.ids if i not in (self.bos, self.pad, self.eos, unk, self.mask)]

    def build(self, a, b=None):
        """ids of one text or of two -> <s> a </s>, <s> a </s></s> b </s>"""
        return [self.bos, *a, self.eos] + ([] if b is None else [self.eos, *b, self.eos])


def pieces(text):
    """Cut a long text into pieces of about PIECE characters, each but the first beginning with the
    line end behind a letter."""
    start = 0
    while start < len(text):
        match = LETTER_AND_LINE_END.search(text, start + PIECE - 1)
        end = match.end() if match else len(text)
        yield text[start:end]
        start = end


# --------------------------------------------------------------------------------------------------
# From files to the library's objects

def read(folder, vocab_size, roberta):
    """(tokenizers.Tokenizer, the file that it is from)"""
    path, vocab, merges, ranks = (folder / name
                                  for name in ("tokenizer.json", "vocab.json", "merges.txt",
                                               "tokenizer.tiktoken"))
    if path.exists():
        return from_file(path, lambda: Backend.from_str(read_text(path))), path
    if vocab.exists() and merges.exists():
        ids, lines = read_json(vocab), read_text(merges).split("\n")
        pairs = [tuple(line.split()) for line in lines if line.strip()
                 and not line.startswith("#version")]
        return add_tokens(from_file(vocab, lambda: byte_level(ids, pairs, roberta)), folder), vocab
    if ranks.exists():
        return from_ranks(read_ranks(ranks), roberta), ranks
    if vocab.exists():  # RoBERTa's: GPT-2's tokens, with numbers of its own
        ids, tokens = read_json(vocab), gpt2_tokens()
        lacking = len(name_tokens(tokens).keys() - ids.keys())
        if lacking:
            raise ValueError(f"{folder} has a vocab.json without merges.txt, and it lacks "
                             f"{lacking} of GPT-2's tokens: how its texts are cut stands in "
                             "merges.txt, or in tokenizer.json")
        return add_tokens(from_file(vocab, lambda: byte_level(ids, gpt2_merges(), roberta)),
                          folder), vocab
    others = [name for name in UNREADABLE if (folder / name).exists()]
    if others or roberta or vocab_size < 50257:
        found = f"only {' and '.join(others)}" if others else "none"
        raise ValueError(f"{folder} needs a tokenizer.json, or a vocab.json and a merges.txt, and "
                         f"has {found}: which texts do its {vocab_size} embeddings stand for? In "
                         "transformers, AutoTokenizer.from_pretrained(…).save_pretrained(folder) "
                         "writes a tokenizer.json")
    print(f"tokens   {folder} has no tokenizer: its {vocab_size} embeddings are taken for GPT-2's "
          "vocabulary")
    return own_vocabulary(), folder


def from_ranks(tokens, roberta):
    """The tokenizer of a tokenizer.tiktoken: the special tokens that the model needs are not in the
    file. RoBERTa's stand before the tokens, <mask> and GPT-2's <|endoftext|> behind them."""
    first = list(ROBERTA) if roberta else []
    tokens_by_id = [*first, *name_tokens(tokens), "<mask>" if roberta else "<|endoftext|>"]
    return byte_level({token: i for i, token in enumerate(tokens_by_id)}, merges_of(tokens),
                      roberta, PATTERN)


def from_file(path, make):
    """make(), where the library's complaints name the file."""
    try:
        return make()
    except BaseException as e:  # its errors are plain Exceptions, or panics, which are none
        if isinstance(e, Exception) or type(e).__name__ == "PanicException":
            raise ValueError(f"{path} is damaged: {e}") from None
        raise


def byte_level(ids, merges, roberta, pattern=None):
    """A byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909, on bytes as in GPT-2). ids: {token,
    in letters that stand for bytes: id}. merges: [(left, right)], the first ones first. pattern:
    how a text is cut, GPT-2's way unless told."""
    backend = Backend(models.BPE(ids, merges))
    cut = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)])
    backend.decoder = decoders.ByteLevel()
    specials = (*ROBERTA, "<mask>") if roberta else ("<|endoftext|>",)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in specials
                                if token in ids])
    if roberta and {"<s>", "</s>"} <= ids.keys():
        backend.post_processor = processors.RobertaProcessing(
            ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), trim_offsets=True, add_prefix_space=False)
    return backend


def add_tokens(backend, folder):
    """Tokens that somebody has added to vocab.json stand in tokenizer_config.json, or in
    added_tokens.json, with their ids. One that is no special token is found in a text as a whole.
    """
    config, names, added = (folder / name
                            for name in ("tokenizer_config.json", "special_tokens_map.json",
                                         "added_tokens.json"))
    config = read_json(config) if config.exists() else {}
    try:
        tokens = {int(i): AddedToken(**token)
                  for i, token in config.get("added_tokens_decoder", {}).items()}
        if not tokens and added.exists():
            special = str((read_json(names) if names.exists() else {}).values())
            tokens = {int(i): AddedToken(token, special=repr(token) in special, normalized=False)
                      for token, i in read_json(added).items()}
        for i, token in sorted(tokens.items(), key=lambda item: item[0]):
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
            if backend.token_to_id(token.content) != i:
                raise ValueError(f"{token.content} cannot have the number {i}")
    except (TypeError, AttributeError, ValueError) as e:
        raise ValueError(f"{folder}: the added tokens of tokenizer_config.json or "
                         f"added_tokens.json: {e}") from None
    if config.get("add_prefix_space") is True:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return backend


def read_ranks(path):
    """[bytes] of tokenizer.tiktoken, by rank."""
    try:
        pairs = [line.split() for line in read_text(path).splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError as e:
        raise ValueError(f"{path} is damaged: {e}") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path} is damaged: its ranks are not 0..{len(ranks) - 1}, each once")
    if any(bytes([b]) not in ranks for b in range(256)):
        raise ValueError(f"{path} is damaged: some of the 256 bytes are no token")
    return sorted(ranks, key=ranks.get)


def merges_of(tokens):
    """[(left, right)] for tokens, bytes by rank. tiktoken joins two neighbours whenever that gives
    a token, the one of lowest rank first: so each way to make a token of two others is a merge."""
    rank, letters = {token: i for i, token in enumerate(tokens)}, name_tokens(tokens)
    names = list(letters)
    return [(names[rank[token[:i]]], names[rank[token[i:]]]) for token in tokens
            for i in range(1, len(token)) if token[:i] in rank and token[i:] in rank]


def name_tokens(tokens):
    """{the token in letters that stand for its bytes: its rank}"""
    letters = byte_letters()
    return {"".join(letters[b] for b in token): rank for rank, token in enumerate(tokens)}


def byte_letters():
    """{byte: the letter that stands for it} in GPT-2's vocab.json: itself if it can be seen, else
    one from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
            *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in seen]
    return {b: chr(b) for b in seen} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def ending(tokenizer, folder, names, vocab_size, first):
    """The id of the token `first`, else of what tokenizer_config.json, which says `names`, or
    config.json call the end of a sequence. An instruction-tuned model may have several: the first
    one in config.json."""
    config, known = folder / "config.json", set(tokenizer.backend.get_vocab().values())
    end = read_json(config).get("eos_token_id") if config.exists() else None
    tokens = first, content(names.get("eos_token"))
    ids = [tokenizer.backend.token_to_id(token) for token in tokens if isinstance(token, str)]
    for i in (*ids, *(end if isinstance(end, list) else [end])):
        if type(i) is int and i in known and i < vocab_size:
            return i
    raise ValueError(f"{tokenizer.where} has no {first or 'token that ends a text'}, and neither "
                     "tokenizer_config.json nor config.json names another token that ends a text")


def content(token):
    """The letters of a token in tokenizer_config.json, which may be an object that says more."""
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, (str, type(None))):
        raise ValueError(f"tokenizer_config.json: a token is text, not {token!r}")
    return token


@functools.cache
def gpt2_tokens():
    """[bytes] of GPT-2's 50,256 tokens, by rank, from tiktoken: its cache or the network."""
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except OSError as e:
        raise ValueError(f"GPT-2's vocabulary cannot be downloaded ({type(e).__name__}): "
                         "set TIKTOKEN_CACHE_DIR to a folder that holds it") from None
    return [encoding.decode_single_token_bytes(rank) for rank in range(encoding.eot_token)]


@functools.cache
def gpt2_merges():
    return merges_of(gpt2_tokens())


def own_vocabulary():
    """GPT-2's own vocabulary as an object of the library."""
    tokens = gpt2_tokens()
    return byte_level({**name_tokens(tokens), "<|endoftext|>": len(tokens)}, gpt2_merges(),
                      roberta=False)
