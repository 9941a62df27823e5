"""Conversations as transformers renders and tokenises them, with what is learned marked."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from moe_trainer.config.errors import ConfigError
from moe_trainer.config.schema import PrepareConfig
from moe_trainer.data.chat import ChatTemplate, Rendered, encode_conversations
from moe_trainer.data.prepare import prepare
from moe_trainer.data.shards import TRAIN, map_shards
from moe_trainer.data.sources import Document
from moe_trainer.data.tokenizer import train_tokenizer

PLAIN = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
MARKED = """{% for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}{{ message.content }}<|im_end|>{% endgeneration %}
    {%- else %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
"""
THINKING = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.last %}{{- '<think>' + message.thought + '</think>' }}{% endif %}
    {{- message.content + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
CONVERSATION = [
    {"role": "system", "content": "be kind — é 漢"},
    {"role": "user", "content": " what is a river? "},
    {"role": "assistant", "content": "water that walks"},
    {"role": "user", "content": "and a stone?"},
    {"role": "assistant", "content": "what it carries, assistant"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with special tokens, as in a Hugging Face folder."""
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer = train_tokenizer(["what is a river? water that walks and a stone it carries"] * 3, 320)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>"])
    tokenizer.save(str(path / "tokenizer.json"))
    start = {"__type": "AddedToken", "content": "<s>", "normalized": False, "special": True}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": start, "eos_token": "<|im_end|>"}
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": PLAIN}))
    return path


def spoken(template: ChatTemplate, messages: list[dict[str, Any]]) -> list[str]:
    rendered = template.render(Document("here", messages=messages))
    return [rendered.text[start:end] for start, end in rendered.spans]


def test_text_and_tokens_are_those_of_transformers(folder: Path) -> None:
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    template = ChatTemplate.load(folder, None)
    rendered = template.render(Document("here", messages=CONVERSATION))
    assert rendered.text == theirs.apply_chat_template(CONVERSATION, tokenize=False)
    encoded = encode_conversations([rendered], Tokenizer.from_file(str(folder / "tokenizer.json")))[0]
    assert encoded.ids.tolist() == theirs.apply_chat_template(CONVERSATION, return_dict=True)["input_ids"]


def test_without_marks_the_assistant_speaks_beyond_the_prompt(folder: Path) -> None:
    template = ChatTemplate.load(folder, None)
    assert spoken(template, CONVERSATION) == [
        "water that walks<|im_end|>\n",
        "what it carries, assistant<|im_end|>\n",
    ]


def test_marks_of_the_template_are_those_of_transformers(folder: Path) -> None:
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    expected = theirs.apply_chat_template(
        CONVERSATION, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    template = ChatTemplate(MARKED, "marked", {})
    rendered = template.render(Document("here", messages=CONVERSATION))
    assert spoken(template, CONVERSATION) == ["water that walks<|im_end|>", "what it carries, assistant<|im_end|>"]
    encoded = encode_conversations([rendered], Tokenizer.from_file(str(folder / "tokenizer.json")))[0]
    assert encoded.ids.tolist() == expected["input_ids"]
    assert encoded.targets.astype(int).tolist() == expected["assistant_masks"]


def test_a_turn_that_stands_otherwise_than_it_is_said_is_left_out() -> None:
    template = ChatTemplate(THINKING, "thinking", {})
    thoughtful = [{**message, "thought": "hm"} for message in CONVERSATION]
    assert spoken(template, thoughtful) == ["<think>hm</think>what it carries, assistant<|im_end|>"]


def test_tokens_at_the_edge_belong_to_where_they_begin(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rendered = ChatTemplate.load(folder, None).render(Document("here", messages=CONVERSATION))
    encoded = encode_conversations([rendered], tokenizer)[0]
    runs = np.split(np.arange(len(encoded.ids)), np.flatnonzero(np.diff(encoded.targets)) + 1)
    learned = [
        tokenizer.decode(encoded.ids[run], skip_special_tokens=False) for run in runs if encoded.targets[run[0]]
    ]
    assert learned == spoken(ChatTemplate.load(folder, None), CONVERSATION)


def test_white_space_belongs_to_where_it_stands() -> None:
    """Also where the tokenizer trims it off the places that it tells, as many do."""
    tokenizer = train_tokenizer(["x"], 258)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    rendered = Rendered("q: a b", [(3, 5)])
    encoded = encode_conversations([rendered], tokenizer)[0]
    learned = [tokenizer.decode([token]) for token in encoded.ids[encoded.targets]]
    assert learned == ["a", " "]


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path, None) is None
    config = tmp_path / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "other"}, {"name": "default", "template": "{{ bos_token }}of the list"}]
    config.write_text(json.dumps({"chat_template": named, "bos_token": "<s>"}))
    assert ChatTemplate.load(tmp_path, None).source == "{{ bos_token }}of the list"
    (tmp_path / "chat_template.jinja").write_text("of the file")
    assert ChatTemplate.load(tmp_path, None).source == "of the file"
    (tmp_path / "mine.jinja").write_text("mine")
    assert ChatTemplate.load(tmp_path, str(tmp_path / "mine.jinja")).source == "mine"


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{% if %}", "x.jinja: is no chat template"),
        ("{{ raise_exception('roles must alternate') }}", r"here: x.jinja cannot be applied .roles must alternate"),
        ("{{ messages[0].nothing.at.all }}", "here: x.jinja cannot be applied"),
        ("{{ messages[0].content }}", "here: the assistant says nothing in what x.jinja makes of it"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "here: x.jinja cannot be applied .access to attribute"),
        ("{{ 1 // 0 }}", "here: x.jinja cannot be applied .integer division or modulo by zero"),
        ("{{ messages[0].content.encode('rot') }}", "here: x.jinja cannot be applied .unknown encoding: rot"),
        ("{{ strftime_now(messages) }}", "here: x.jinja cannot be applied"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "here: x.jinja cannot be applied .maximum recursion"),
        ("{{ " + "1" * 5000 + " }}", "x.jinja: is no chat template"),
        ("{{ '\\ud800' }}", "here: character 0 is not valid Unicode"),
        ("{{ messages.append(1) }}", "here: x.jinja cannot be applied .access to attribute 'append'"),
    ],
)
def test_a_bad_template_is_named(source: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        ChatTemplate(source, "x.jinja", {}).render(Document("here", messages=CONVERSATION))


def test_unreadable_settings(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ConfigError, match="tokenizer_config.json cannot be read"):
        ChatTemplate.load(tmp_path, None)


def test_what_templates_may_use() -> None:
    tools = [{"name": "<add>", "é": 1}]
    source = "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ tools | tojson }}{% endfor %}"
    template = ChatTemplate("{% generation %}" + source + "{% endgeneration %}", "x", {})
    document = Document("here", messages=CONVERSATION, tools=tools)
    assert template.render(document).text == '[{"name": "<add>", "é": 1}]'


def test_conversations_become_shards_with_targets(folder: Path, tmp_path: Path) -> None:
    lines = [{"messages": CONVERSATION}, {"text": "a river"}, {"messages": CONVERSATION[1:3]}]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cfg = PrepareConfig([str(tmp_path / "chat.jsonl")], tokenizer=str(folder / "tokenizer.json"))
    index = prepare(cfg, tmp_path / "out")
    (shard,) = map_shards(tmp_path / "out", index, TRAIN)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    targets = np.split(shard.targets, shard.ends[:-1])
    ids = np.split(shard.tokens, shard.ends[:-1])
    assert targets[1].all() and ids[1][-1] == tokenizer.token_to_id("<|endoftext|>")
    assert tokenizer.decode(ids[2][targets[2] == 1], skip_special_tokens=False) == "water that walks<|im_end|>\n"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == PLAIN
