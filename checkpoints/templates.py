"""Chat templates: how a checkpoint writes a conversation as one text.

    template = of_folder(folder)                 its own; None where it has none
    template = Template(CHATML, "ChatML", tokens)
    template.render(turns)                       [(role, content), …] -> text
    template.render(turns, ask=True)             the same, and the beginning of an answer

A template is a program, in jinja2's language, of whoever made the checkpoint. So it runs in
jinja2's sandbox, where it can reach nothing but the turns, as `transformers` runs it.
"""
import datetime
import functools
import json
from pathlib import Path

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from checkpoints.files import read_json, read_text

# for a checkpoint that has none; its own end of a text, where it has no <|im_end|>
CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + end + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


class Template:
    """source: the program. where: whose it is, for messages. tokens: {"bos_token": "<s>", …}, which
    a template may name. ValueError for one that is not valid."""

    def __init__(self, source, where, tokens):
        self.source, self.where, self.tokens = source, where, tokens
        try:
            self.program = environment().from_string(source)
        except jinja2.TemplateError as e:
            raise ValueError(f"{where} is not a valid chat template: {e}") from None

    def render(self, turns, ask=False):
        """The text; ValueError with what the template says where it refuses the turns."""
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            return self.program.render(messages=messages, add_generation_prompt=ask, tools=None,
                                       documents=None, **self.tokens)
        except Exception as e:  # a stranger's program may fail in any way
            what = str(e) if isinstance(e, jinja2.TemplateError) else f"{type(e).__name__}, {e}"
            raise ValueError(f"{self.where} refuses the turns "
                             f"{', '.join(role for role, _ in turns)}: {what}") from None


class Generation(Extension):
    """{% generation %} … {% endgeneration %}, with which some templates mark what an assistant
    says: here it stands as it is."""
    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


@functools.cache
def environment():
    """What a template finds: the filters and functions that `transformers` gives it."""
    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                          extensions=[Generation, loopcontrols])
    found.filters["tojson"] = to_json
    found.globals.update(raise_exception=refuse, strftime_now=now)
    return found


def to_json(value, ensure_ascii=False, **options):
    """jinja2's own would write < and > otherwise."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def refuse(message):
    raise jinja2.TemplateError(message)


@functools.cache
def now(form):
    """The date, which stays that of the first turn that was written."""
    return datetime.datetime.now().strftime(form)


def of_folder(folder):
    """The template of a checkpoint folder, or None: chat_template.jinja, else that of
    tokenizer_config.json, of several the one named default."""
    folder = Path(folder)
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    source = read_text(file) if file.exists() else None
    if source is None and config.exists():
        file, source = config, read_json(config).get("chat_template")
        if isinstance(source, list):
            named = {part.get("name"): part.get("template") for part in source
                     if isinstance(part, dict)}
            source = named.get("default")
            if source is None:
                raise ValueError(f"{file} has several chat templates, and none is the default: "
                                 f"{', '.join(map(str, named))}")
    if source is None:
        return None
    if not isinstance(source, str):
        raise ValueError(f"{file}: chat_template must be text, not {source!r:.60}")
    return Template(source, str(file), tokens_of(folder))


def tokens_of(folder):
    """{"bos_token": "<s>", …} of a checkpoint folder, which a template may name."""
    tokens = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        said = read_json(folder / name) if (folder / name).exists() else {}
        for key, token in said.items():
            token = token.get("content") if isinstance(token, dict) else token
            if key.endswith("_token") and isinstance(token, str):
                tokens[key] = token
    return tokens


def chatml(folder, tokenizer):
    """ChatML for a checkpoint that knows nothing of turns: a turn ends with <|im_end|> where that
    is a token, else with what ends a text."""
    end = "<|im_end|>"
    if tokenizer.backend.token_to_id(end) is None:
        end = tokenizer.backend.id_to_token(tokenizer.eos)
    return Template(CHATML.replace("end +", f"{end!r} +"), "ChatML", tokens_of(Path(folder)))
