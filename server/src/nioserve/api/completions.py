"""`POST /v1/completions`: text after text, without a chat template."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from nioserve.api.answer import Answer
from nioserve.api.choice import Choice
from nioserve.api.disconnect import EventStream, unless_gone
from nioserve.api.errors import json_response
from nioserve.api.generate import begin, check_available, collect, encode_inputs
from nioserve.api.intake import Intake, take_in
from nioserve.api.schemas import CompletionRequest
from nioserve.api.stream import Chunks, stream

router = APIRouter()


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    """Continue one or several prompts, whole or as a stream."""
    intake = await take_in(request, CompletionRequest)
    return await (intake.service.relay or answer_completions)(intake)


async def answer_completions(intake: Intake[CompletionRequest]) -> Response:
    """Answer a checked request by our own engine."""
    service, body = intake.service, intake.body
    answer = await unless_gone(intake.request.receive, _begin(intake))
    echoes = [_echo(intake, prompt) if body.echo else "" for prompt in body.prompts() for _ in range(body.n)]
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()),
            "model": service.model_name}  # fmt: skip

    def written(choice: Choice, text: str) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": text,
            "logprobs": None if body.logprobs is None else service.token_texts.completion(
                choice.scored(), len(echoes[choice.index])
            ),
            "finish_reason": choice.finish_reason,
        }  # fmt: skip

    if body.stream:
        chunks = Chunks(head, include_usage=body.include_usage)
        opening = b"".join(
            [chunks.choice(written(c, echo)) for c, echo in zip(answer.choices, echoes, strict=True) if echo]
        )
        events = stream(service, answer, chunks, opening, lambda choice, text: chunks.choice(written(choice, text)))
        return EventStream(events, lambda: answer.close(intake.record))
    texts = [[echo] for echo in echoes]
    await collect(intake, answer, lambda choice, text: texts[choice.index].append(text))
    choices = [written(choice, "".join(texts[choice.index])) for choice in answer.choices]
    return json_response({**head, "choices": choices, "usage": answer.usage()})


async def _begin(intake: Intake[CompletionRequest]) -> Answer:
    check_available(intake.service)
    prompts = await encode_inputs(intake, intake.body.prompts(), "prompt")
    return await begin(intake, prompts, "prompt")


def _echo(intake: Intake[CompletionRequest], prompt: str | list[int]) -> str:
    if isinstance(prompt, str):
        return prompt
    return intake.service.prompter.tokenizer.decode(prompt, skip_special_tokens=False)
