"""`POST /v1/chat/completions`."""

from __future__ import annotations

import asyncio
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pydantic_core
from fastapi import APIRouter, Request
from starlette.responses import Response

from nioserve.api.answer import Answer
from nioserve.api.choice import Choice
from nioserve.api.disconnect import EventStream, unless_gone
from nioserve.api.errors import ApiError, json_response
from nioserve.api.generate import begin, check_available, collect, tokenise
from nioserve.api.intake import Intake, take_in
from nioserve.api.message import AssistantMessage
from nioserve.api.prompt import PromptError
from nioserve.api.schemas import ChatRequest, Message
from nioserve.api.service import Service
from nioserve.api.stream import Chunks, stream
from nioserve.api.tools import ToolCallParser, ToolFormat, call_grammar
from nioserve.engine.grammar.check import check
from nioserve.engine.grammar.source import GrammarError
from nioserve.engine.messages import Grammar

router = APIRouter()

_GRAMMAR_CHECKS = ThreadPoolExecutor(max_workers=2, thread_name_prefix="grammar")
"""Threads of their own: a schema may take seconds, and long prompts are tokenised in the common ones."""


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Answer a conversation, whole or as a stream."""
    intake = await take_in(request, ChatRequest)
    return await (intake.service.relay or answer_chat)(intake)


async def answer_chat(intake: Intake[ChatRequest]) -> Response:
    """Answer a checked request by our own engine."""
    service, chat, receive = intake.service, intake.body, intake.request.receive
    answer = await unless_gone(receive, _begin(intake))
    messages = [_message(answer, choice, intake) for choice in answer.choices]
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.model_name}
    if chat.stream:
        chunks = Chunks({**head, "object": "chat.completion.chunk"}, include_usage=chat.include_usage)
        opening = b"".join([chunks.choice(message.opening()) for message in messages])

        def render(choice: Choice, text: str) -> bytes:
            return b"".join([chunks.choice(part) for part in messages[choice.index].chunks(text)])

        return EventStream(stream(service, answer, chunks, opening, render), lambda: answer.close(intake.record))
    await collect(intake, answer, lambda choice, text: messages[choice.index].push(text))
    choices = [message.whole() for message in messages]
    return json_response({**head, "object": "chat.completion", "choices": choices, "usage": answer.usage()})


def _message(answer: Answer, choice: Choice, intake: Intake[ChatRequest]) -> AssistantMessage:
    chat, form, parser = intake.body, intake.service.prompter.tool_format, None
    if form is not None and chat.active_tools():
        parser = ToolCallParser(form, forced=bool(chat.forced_tools()), parallel=chat.parallel_tool_calls)
    return AssistantMessage(answer, choice, parser, intake.service.token_texts if chat.logprobs else None)


async def _begin(intake: Intake[ChatRequest]) -> Answer:
    """Make the prompt, and get the request admitted."""
    service, chat, prompter = intake.service, intake.body, intake.service.prompter
    long_conversation = chat.turns > service.long_conversation_turns
    check_available(service, long_conversation=long_conversation)
    form = _tool_format(service, chat)
    grammar = _grammar(chat, form)
    if grammar is not None:
        await _check_grammar(grammar, "tools" if form else "response_format")
    messages = [_for_template(message) for message in chat.messages]
    tools = [tool.model_dump(exclude_none=True) for tool in chat.active_tools()]
    try:
        prompt = await tokenise(intake.request, lambda: prompter.encode(messages, tools))
    except PromptError as error:
        raise ApiError(400, f"The model does not take these messages: {error}.", param="messages") from error
    return await begin(
        intake, [prompt], "messages", grammar=grammar, spoken=prompter.spoken if form else None,
        long_conversation=long_conversation,
    )  # fmt: skip


def _for_template(message: Message) -> dict[str, Any]:
    """Return a message as chat templates know it: arguments of calls are objects there, and text in the API."""
    # Templates know `system`; OpenAI renamed it for some models.
    role = "system" if message.role == "developer" else message.role
    out: dict[str, Any] = {"role": role, "content": message.text()}
    if message.name is not None:
        out["name"] = message.name
    if message.tool_call_id is not None:
        out["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        out["tool_calls"] = [
            {"id": call.id, "type": "function",
             "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)}}
            for call in message.tool_calls
        ]  # fmt: skip
    return out


def _arguments(text: str) -> object:
    try:
        return pydantic_core.from_json(text)  # bounded in depth, unlike the json module
    except ValueError:
        return text  # what a model once wrote wrong is shown to it as it was


def _tool_format(service: Service, chat: ChatRequest) -> ToolFormat | None:
    form = service.prompter.tool_format
    history = any(message.tool_calls or message.role == "tool" for message in chat.messages)
    if form is None and (chat.active_tools() or history):
        name = "tools" if chat.active_tools() else "messages"
        text = f"The model `{service.model_name}` does not know tools: its chat template has no place for them."
        raise ApiError(400, text, param=name, code="unsupported_parameter")
    return form if chat.active_tools() else None


def _grammar(chat: ChatRequest, form: ToolFormat | None) -> Grammar | None:
    """Return what the answer must look like, if anything was asked."""
    if form is not None and chat.forced_tools():
        functions = [tool.function.model_dump() for tool in chat.forced_tools()]
        # A named tool is called once, as in OpenAI's API.
        return call_grammar(functions, form, parallel=chat.parallel_tool_calls and chat.tool_choice == "required")
    wanted = chat.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.json_schema is None:
        return Grammar("json_object")
    return Grammar("json_schema", msgspec.json.encode(wanted.json_schema.schema_).decode())


async def _check_grammar(grammar: Grammar, param: str) -> None:
    try:
        await asyncio.get_running_loop().run_in_executor(_GRAMMAR_CHECKS, check, grammar)
    except GrammarError as error:
        text = f"`{param}` has a schema that cannot be used: {error}."
        raise ApiError(400, text, param=param, code="invalid_schema") from error
