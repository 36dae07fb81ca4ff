"""Conversations and completions: only what the assistant said is a target, exactly, or the sample is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from chunkflow.chat import Chat, checked_messages, encode_chat, encode_chats
from chunkflow.errors import SourceError
from chunkflow.sources_jsonl import JsonLines
from chunkflow.sources_tables import FromDataset
from tests.tokenizers_fixture import tiny_tokenizer

PLAIN = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<end>{% endgeneration %}{% else %}{{ m['content'] }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}<{{ m['role'] }}>{% if loop.last %}(thinks){% endif %}{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [
    {"role": "user", "content": "fox?"},
    {"role": "assistant", "content": "the quick brown fox"},
    {"role": "user", "content": "dog?"},
    {"role": "assistant", "content": "lazy"},
]


def tokenizer(template):
    # Tags of their own, as models' special tokens are: no token crosses from one into what is said.
    made = tiny_tokenizer.__wrapped__()
    made.add_tokens(["<user>", "<assistant>", "<system>", "<end>"], special_tokens=True)
    made.chat_template = template
    return made


def said(row, tok):
    """What the labels are, as text, turn by turn."""
    runs, current = [], []
    for i, label in zip(row.input_ids, row.labels, strict=True):
        assert label in (i, -100)
        if label == -100 and current:
            runs.append(tok.decode(current))
            current = []
        elif label != -100:
            current.append(int(i))
    return [*runs, tok.decode(current)] if current else runs


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_the_assistant_is_a_target(template):
    tok = tokenizer(template)
    row = encode_chat(Chat("x", TALK), tok)
    assert said(row, tok) == ["the quick brown fox<end>", "lazy<end>"]
    assert row.input_ids.tolist() == tok.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_many_at_once_are_each_as_alone(template):
    tok = tokenizer(template)
    chats = [Chat(f"{n}", TALK[: 2 + n % 3], prompt_messages=n % 2) for n in range(7)]
    for chat, row in zip(chats, encode_chats(chats, tok), strict=True):
        alone = encode_chat(chat, tok)
        assert (row.name, row.skip) == (alone.name, alone.skip)
        assert np.array_equal(row.input_ids, alone.input_ids)
        assert np.array_equal(row.labels, alone.labels)
    assert encode_chats([], tok) == []


def test_the_one_that_a_tokenizer_fails_on_is_named():
    tok = tokenizer(PLAIN)
    bad = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\ud800"}]  # no Unicode
    with pytest.raises(SourceError, match=r"^bad: the tokenizer failed: "):
        encode_chats([Chat("good", TALK), Chat("bad", bad), Chat("fine", TALK)], tok)


def test_both_ways_agree():
    plain, marked = (encode_chat(Chat("x", TALK), tokenizer(template)) for template in (PLAIN, MARKED))
    assert np.array_equal(plain.labels, marked.labels)


def test_a_template_that_rewrites_earlier_turns_is_refused():
    with pytest.raises(SourceError, match=r"x: this chat template renders message 1 differently when others follow"):
        encode_chat(Chat("x", TALK), tokenizer(FORGETFUL))


def test_a_token_across_the_border_leaves_the_sample_out():
    tok = tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    # "the" is one token of this vocabulary, and here begins with the user.
    row = encode_chat(Chat("x", [{"role": "user", "content": "th"}, {"role": "assistant", "content": "e"}]), tok)
    assert row.skip == "a token stands across the border of what the assistant says"


def test_templates_that_fail_are_named_with_the_sample():
    with pytest.raises(SourceError, match=r"x: messages, and .* has no chat template; set one"):
        encode_chat(Chat("x", TALK), tokenizer(None))
    with pytest.raises(SourceError, match=r"x: the chat template failed: .*no system here"):
        encode_chat(Chat("x", TALK), tokenizer("{{ raise_exception('no system here') }}"))


def lines(tmp_path: Path, records, tok) -> JsonLines:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return JsonLines(path, tok, cache_dir=tmp_path / "cache")


def test_lines_of_conversations_and_completions(tmp_path):
    tok = tokenizer(PLAIN)
    records = [
        {"messages": TALK},
        {"prompt": "the lazy", "completion": " dog"},
        {"prompt": TALK[:3], "completion": TALK[3:]},
        {"messages": [{"role": "user", "content": "hello"}]},
    ]
    source = lines(tmp_path, records, tok)
    targets = []
    for index in range(len(source)):
        sample = source.read(index)
        targets.append(tok.decode(sample.shift_labels[sample.loss_weights > 0]))
    assert targets == ["the quick brown fox<end>lazy<end>", " dog<eos>", "lazy<end>"]
    prompt = tok("the lazy")["input_ids"]
    assert source.read(1).input_ids[: len(prompt)].tolist() == prompt
    assert [(s.reason, s.count) for s in source.skipped] == [("no label is a target", 1)]


def test_a_message_of_tool_calls_alone_and_an_empty_one_are_messages():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    assert checked_messages("x", "messages", [call, {"role": "user", "content": ""}]) == [
        {key: value for key, value in call.items() if value is not None},
        {"role": "user", "content": ""},
    ]


def test_a_table_of_tool_calls_reads_as_its_lines_do(tmp_path):
    """Arrow gives every call the arguments of all of them, null where a call has none."""
    tok = tokenizer(
        "{{ tools | tojson }}{% for m in messages %}<{{ m['role'] }}>"
        "{{ m['content'] if m['content'] else m['tool_calls'] | tojson }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    records = [
        {
            "messages": [
                {"role": "user", "content": "go"},
                {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {argument: 1}}]},
            ],
            "tools": [{"name": "f", "parameters": {argument: "int"}}],
        }
        for argument in ("x", "y")
    ]
    table = FromDataset(Dataset.from_list(records), tok, cache_dir=tmp_path)
    plain = lines(tmp_path, records, tok)
    for n in range(2):
        assert tok.decode(table.read(n).input_ids) == tok.decode(plain.read(n).input_ids)
    assert "null" not in tok.decode(table.read(0).input_ids)
    with pytest.raises(SourceError, match=r"x\.jsonl:1: 'tools' is a str; it must be a list of objects"):
        lines(tmp_path, [{**records[0], "tools": "[]"}], tok)


def test_another_chat_template_is_another_data_set(tmp_path):
    assert lines(tmp_path, [{"messages": TALK}], tokenizer(PLAIN)).manifest != (
        lines(tmp_path, [{"messages": TALK}], tokenizer(MARKED)).manifest
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": "hi"}, r"x\.jsonl:1: 'messages' is 'hi'; it must be a list of messages"),
        ({"messages": []}, r"x\.jsonl:1: 'messages' is \[\]"),
        ({"messages": [{"role": "user", "content": 5}]}, r"x\.jsonl:1: the content of message 0 of .* is a number"),
        (
            {"messages": [*TALK, {"role": "assistant", "content": "no", "weight": 0}]},
            r"x\.jsonl:1: message \d of 'messages' has the weight 0, and every message of an assistant is trained",
        ),
        ({"messages": [{"role": "assistant", "content": "hi"}, *TALK]}, r"x\.jsonl:1: the assistant speaks first"),
        (
            {"messages": [{"role": "user", "content": None}]},
            r"x\.jsonl:1: message 0 of 'messages', of role 'user', has no content \(it is null or missing\)",
        ),
        (
            {"prompt": TALK[:3], "completion": [{"role": "assistant", "content": None, "tool_calls": []}]},
            r"x\.jsonl:1: message 0 of 'completion', of role 'assistant', has no content",
        ),
        ({"messages": [{"content": "hi"}]}, r"x\.jsonl:1: 'messages' holds .*a message has a role"),
        ({"prompt": "a", "completion": 3}, r"x\.jsonl:1: 'prompt' is 'a'; it must be a list of messages"),
        ({"prompt": "a"}, r"x\.jsonl:1: 'completion' is missing beside \['prompt'\]; a record has both, or a 'text'"),
        ({"prompt": "a", "completion": None}, r"x\.jsonl:1: 'completion' is null beside"),
        ({"body": "a"}, r"x\.jsonl:1: neither 'text' nor .* among its fields \['body'\]"),
    ],
)
def test_bad_conversations_are_named(tmp_path, record, message):
    with pytest.raises(SourceError, match=message):
        lines(tmp_path, [record], tokenizer(PLAIN))
