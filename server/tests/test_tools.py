"""Tool calls: read from what models write, however it is cut into pieces, and made over HTTP."""

from __future__ import annotations

import json
import shutil

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import Service, events, make_tokenizer

from nioserve.api.prompt import Prompter
from nioserve.api.tools import HERMES, LLAMA, MISTRAL, ToolCallParser, ToolFormat, tool_format

ARGUMENTS = '{"city": "Z\\u00fcrich \\"}{", "deep": {"a": [1, {"b": "中"}]}}'
FIRST = f'{{"name": "weather", "arguments": {ARGUMENTS}}}'
SECOND = '{"name": "time", "arguments": {}}'
CALLS = [("weather", ARGUMENTS), ("time", "{}")]

ANSWERS = {
    "hermes": (HERMES, f"Let me see.\n<tool_call>\n{FIRST}\n</tool_call>\n<tool_call>\n{SECOND}\n</tool_call>",
               "Let me see.\n", CALLS),
    "hermes, words only": (HERMES, "1 < 2 and <tool is no call", "1 < 2 and <tool is no call", []),
    "hermes, words after": (HERMES, f"<tool_call>{FIRST}</tool_call>\n\nThere.", "There.", CALLS[:1]),
    "hermes, no call after all": (HERMES, "<tool_call>\nwhat?\n</tool_call>", "<tool_call>\nwhat?\n</tool_call>", []),
    "hermes, cut in the name": (HERMES, '<tool_call>\n{"name": "wea', '<tool_call>\n{"name": "wea', []),
    "hermes, cut in the arguments": (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": "b', "",
                                     [("f", '{"a": "b')]),
    "mistral": (MISTRAL, f"[TOOL_CALLS] [{FIRST}, {SECOND}]", "", CALLS),
    "mistral, words": (MISTRAL, "See [TOOL] and [1].", "See [TOOL] and [1].", []),
    "llama": (LLAMA, '{"name": "f", "parameters": {"x": 1}}', "", [("f", '{"x": 1}')]),
    "llama, its mark": (LLAMA, '<|python_tag|>{"type": "function", "name": "f", "parameters": {}}; '
                        '{"name": "g", "parameters": {"y": "}"}}', "", [("f", "{}"), ("g", '{"y": "}"}')]),
    "llama, words": (LLAMA, "I think {\"name\": 1} is fine.", "I think {\"name\": 1} is fine.", []),
    "llama, other JSON": (LLAMA, '{"answer": {"x": 1}}', '{"answer": {"x": 1}}', []),
}  # fmt: skip


def read(parser: ToolCallParser, pieces: list[str]) -> tuple[str, list[tuple[str, str]], list[str]]:
    """Put the deltas together as a client does; return content, calls and the calls' ids."""
    content, calls, ids = "", [], []
    for delta in [*(parser.push(piece) for piece in pieces), parser.end()]:
        content += delta.get("content", "")
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(calls):
                assert call["type"] == "function"
                ids.append(call["id"])
                calls.append((call["function"]["name"], ""))
            name, arguments = calls[call["index"]]
            calls[call["index"]] = (name, arguments + call["function"]["arguments"])
    return content, calls, ids


@pytest.mark.parametrize("name", ANSWERS)
@given(sizes=st.lists(st.integers(1, 30), max_size=40))
def test_calls_are_found_however_the_text_is_cut(name, sizes):
    form, text, content, calls = ANSWERS[name]
    pieces, rest = [], text
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    found = read(ToolCallParser(form, forced=False, parallel=True), [*pieces, rest])
    assert found[:2] == (content, calls)
    assert len(set(found[2])) == len(calls)
    if form is MISTRAL:
        assert all(len(one) == 9 and one.isalnum() for one in found[2]), "its template takes no others"


def test_arguments_come_as_they_are_written():
    parser = ToolCallParser(HERMES, forced=False, parallel=True)
    deltas = [parser.push(letter) for letter in f"<tool_call>{FIRST}</tool_call>"]
    pieces = [call["function"]["arguments"] for delta in deltas for call in delta.get("tool_calls", ())]
    assert len(pieces) == len(ARGUMENTS)
    assert "".join(pieces) == ARGUMENTS


@pytest.mark.parametrize("form", [HERMES, MISTRAL, LLAMA])
@pytest.mark.parametrize(("text", "count"), [(FIRST, 1), (f"[{FIRST},\n{SECOND}]", 2), (f" [ {FIRST} ] ", 1)])
def test_a_forced_call_needs_no_mark(form, text, count):
    for pieces in ([text], list(text)):
        content, calls, _ = read(ToolCallParser(form, forced=True, parallel=True), pieces)
        assert (content, calls) == ("", CALLS[:count])


def test_one_call_is_enough_when_no_more_are_wanted():
    parser = ToolCallParser(HERMES, forced=False, parallel=False)
    text = f"<tool_call>{FIRST}</tool_call><tool_call>{SECOND}</tool_call>"
    assert read(parser, list(text))[1] == CALLS[:1]
    assert parser.done


@pytest.mark.parametrize(
    ("template", "form"),
    [("{{ '<tool_call>' }}", HERMES), ("[TOOL_CALLS]", MISTRAL), ("Environment: ipython", LLAMA), ("tools", None),
     ("<tool_call><function=f>", None), ("[TOOL_CALLS]f[ARGS]", None)],
)  # fmt: skip
def test_formats_are_known_by_their_templates(template: str, form: ToolFormat | None):
    assert tool_format(template) is form


TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\nTools:' }}{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    '{% for call in message.tool_calls or [] %}{{ \'<tool_call>\n{"name": "\' + call.function.name + '
    "'\", \"arguments\": ' + (call.function.arguments | tojson) + '}\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "of a <|im_end|> city", "parameters": {
        "type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}, "required": ["city"],
        "additionalProperties": False, "$defs": {"city": {"enum": ["Bern", "Genf"]}}}}},
    {"type": "function", "function": {"name": "now"}},
]  # fmt: skip


@pytest.fixture(scope="module")
def tool_model(hf_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tools") / "model"
    shutil.copytree(hf_model, directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def tools(tool_model, tmp_path_factory):
    """A service whose model knows tools, in Hermes' way."""
    with Service(tmp_path_factory.mktemp("tools-service"), tool_model) as running:
        yield running


def test_tools_and_calls_are_rendered_and_control_tokens_in_them_are_text(tool_model):
    prompter = Prompter(tool_model)
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "<|im_start|>"}}}
    messages = [
        {"role": "user", "content": "How is it?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
    ]
    ids = prompter.encode(messages, TOOLS)
    text = prompter.tokenizer.decode(ids, skip_special_tokens=False)
    assert '"name": "weather"' in text
    assert '{"city": "<|im_start|>"}' in text
    assert text.endswith("<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>assistant\n")
    special = {name: prompter.tokenizer.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>")}
    assert {name: ids.count(number) for name, number in special.items()} == {"<|im_start|>": 5, "<|im_end|>": 4}
    assert prompter.encode(messages[:1]) == prompter.encode(messages[:1], [])


def spelled(text: str) -> dict[str, float]:
    """Return a bias that makes the model's next token the first letter of a text."""
    return {str(make_tokenizer().token_to_id(text[0])): 100}


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"weather", "now"}), ({"type": "function", "function": {"name": "weather"}}, {"weather"})],
)  # fmt: skip
def test_a_call_that_must_be_made_is_made(tools, choice, names):
    asked = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 1200, "temperature": 1, "seed": 4,
             "parallel_tool_calls": False, "logit_bias": spelled("}")}  # fmt: skip
    body = tools.chat("Weather?", **asked).json()
    answer = body["choices"][0]
    assert answer["finish_reason"] == "tool_calls", body
    assert answer["message"]["content"] is None
    (call,) = answer["message"]["tool_calls"]
    assert call["function"]["name"] in names
    if call["function"]["name"] == "weather":
        assert json.loads(call["function"]["arguments"])["city"] in ("Bern", "Genf")
    with tools.stream("Weather?", **asked) as response:
        parts = [part for chunk in events(response) for part in chunk["choices"]]
    deltas = [one for part in parts for one in part["delta"].get("tool_calls", ())]
    assert deltas[0]["function"]["name"] == call["function"]["name"]
    assert "".join(delta["function"]["arguments"] for delta in deltas) == call["function"]["arguments"]
    assert not any(part["delta"].get("content") for part in parts)
    assert parts[-1]["finish_reason"] == "tool_calls"


def test_the_openai_client_goes_all_the_way(tools):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=tools.url + "/v1", api_key=tools.key, max_retries=0)
    named = {"type": "function", "function": {"name": "weather"}}
    messages: list = [{"role": "user", "content": "Weather?"}]
    first = client.chat.completions.create(model="tiny", messages=messages, tools=TOOLS, tool_choice=named,
                                           max_tokens=500, seed=1)  # fmt: skip
    message = first.choices[0].message
    # The message goes back as it came, nulls and all.
    messages += [message.model_dump(), {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sun"}]
    second = client.chat.completions.create(model="tiny", messages=messages, tools=TOOLS, max_tokens=5)
    assert second.choices[0].message.role == "assistant"


def test_what_goes_not_together_is_refused(tools):
    strict = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}]
    for changes, param in (
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": strict}, "tools[0].function.strict"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
    ):
        response = tools.chat(**changes)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert tools.chat(tools=strict, tool_choice="required", max_tokens=2).status_code == 200
    assert tools.chat(tools=TOOLS, tool_choice="none", response_format={"type": "json_object"}).status_code == 200
    assert httpx.get(tools.url + "/readyz").status_code == 200
