"""chat: conversations of your own.

A row has its turns in `messages`, [{"role": "user", "content": "…"}, …], or in `conversations`,
with these names or with ShareGPT's from and value, or as two lists in TRL's `prompt` and
`completion`. A content may be a list of parts that are text. What `pairs` reads, a prompt and its
completion, is one turn of the user and the answer. See `Converse` of tasks.py for what is trained.
"""
from data import files

ROLES = {"system": "system", "developer": "developer", "user": "user", "human": "user",
         "assistant": "assistant", "gpt": "assistant"}
# in a row or in a turn: what no text says
TOOLS = "tools", "functions", "tool_calls", "function_call", "tool_call_id"
MEDIA = "images", "image", "videos", "video", "audios", "audio"


def turns(row, where, asked=False):
    """A row -> ((role, content), …), or None for one that holds no conversation. ValueError for
    turns that are not to be trained on; asked: of a question, which nobody has answered yet."""
    name = next((name for name in ("messages", "conversations") if name in row), None)
    if name is None and not isinstance(row.get("prompt"), list):
        return None
    if name is None:
        name, listed = "prompt", row["prompt"]
        if isinstance(row.get("completion"), list):
            listed = listed + row["completion"]
        elif not asked:
            raise ValueError(f"{where}: completion must be a list of turns as prompt is, not "
                             f"{row.get('completion')!r:.60}")
    else:
        listed = row[name]
    if not isinstance(listed, list) or not all(isinstance(turn, dict) for turn in listed):
        raise ValueError(f"{where}: {name} must be a list of turns, not {listed!r:.60}")
    check_known(row, where)
    found = [turn_of(turn, where) for turn in listed]
    system = row.get("system")  # beside ShareGPT's turns
    if isinstance(system, str) and system and found and found[0][0] != "system":
        found.insert(0, ("system", system))
    roles = [role for role, _ in found]
    if next((role for role in roles if role != "system" and role != "developer"), "") == (
            "assistant"):
        raise ValueError(f"{where}: the assistant speaks first: no turn of the user to answer")
    if not asked and "assistant" not in roles or not roles:
        raise ValueError(f"{where}: the assistant has no turn, only {', '.join(roles) or 'nobody'} "
                         "speaks: nothing to train on")
    return tuple(found)


def turn_of(turn, where):
    """(role, content) of one turn."""
    check_known(turn, where)
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role not in tuple(ROLES):
        raise ValueError(f"{where}: role {role!r:.60} is not one of {', '.join(ROLES)}"
                         + ": tools are not trained here" * (role in ("tool", "function")))
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else part
            if kind != "text":
                raise ValueError(f"{where}: a part of a turn is {kind!r:.60}: only text is read")
        content = "".join(files.text_of(part, "text", where, empty=True) for part in content)
    return ROLES[role], files.text_of({"content": content}, "content", where, empty=True)


def check_known(holder, where):
    """ValueError for a row or a turn with more than text."""
    for names, what in ((TOOLS, "tools are"), (MEDIA, "pictures and sounds are")):
        for name in names:
            if holder.get(name):
                raise ValueError(f"{where}: {name}: {what} not trained here, only text")


def record(turns):
    """((role, content), …) -> (the turns before the last answer, that answer). What follows it
    cannot be trained on."""
    last = max(i for i, (role, _) in enumerate(turns) if role == "assistant")
    return turns[:last], turns[last][1]


def messages(record):
    """Turns as `transformers` has them; any other record as it is."""
    return record if isinstance(record, str) else [{"role": role, "content": content}
                                                   for role, content in record]


def answers(prompt, completion):
    """Every place in a record where the assistant speaks: [(turns before, answer), …]"""
    turns = (*prompt, ("assistant", completion))
    return [(turns[:i], content) for i, (role, content) in enumerate(turns)
            if role == "assistant"]


if __name__ == "__main__":
    import sys

    from data.pairs import Pairs
    for split, rows in Pairs(chat=True).load(*sys.argv[1:2]).items():
        print(f"{split:10} {len(rows):6} conversations; {rows[0]}")
