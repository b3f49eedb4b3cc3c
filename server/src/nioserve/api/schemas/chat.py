"""What `/v1/chat/completions` takes."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from nioserve.api.errors import ApiError
from nioserve.api.schemas.common import MAX_LOGPROBS, Count, Parameters, Schema, without_empty

MAX_TOOLS = 128


class TextPart(Schema):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class FunctionCall(Schema):
    """A function's name, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Schema):
    """A call the model made in an earlier turn."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int = 0


class Message(Schema):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] = Field(default=[])
    tool_call_id: str | None = None

    def text(self) -> str:
        """Return the content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Function(Schema):
    """A function the model may call; `parameters` is a JSON schema."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Schema):
    """A tool; there are only functions."""

    type: Literal["function"]
    function: Function


class NamedFunction(Schema):
    """A function by its name."""

    name: str


class NamedTool(Schema):
    """The one tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Schema):
    """A JSON schema for the answer. It is kept to whether `strict` is set or not."""

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Schema):
    """What the answer's text must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Parameters):
    """A chat completion."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **Parameters.neutral,
        "functions": ([],),
        "function_call": ("none",),
        "modalities": (["text"],),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        "echo": (False,),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "add_special_tokens": (False,),
    }

    messages: Annotated[list[Annotated[Message, BeforeValidator(without_empty)]], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] = Field(default=[])
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True

    def check(self) -> None:
        """Refuse what contradicts itself."""
        super().check()
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            text = "`max_tokens` and `max_completion_tokens` differ; send one of them."
            raise ApiError(400, text, param="max_tokens")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "`top_logprobs` needs `logprobs`: true.", param="top_logprobs")
        if self.response_format and (self.response_format.type == "json_schema") != bool(
            self.response_format.json_schema
        ):
            text = "`response_format.json_schema` goes with the type `json_schema`, and that type needs it."
            raise ApiError(400, text, param="response_format")
        self._check_messages()
        self._check_tools()

    def _check_messages(self) -> None:
        for number, message in enumerate(self.messages):
            name = f"messages[{number}]"
            if message.content is None and not message.tool_calls:
                text = f"`{name}.content` must be a string or a list of text parts."
                raise ApiError(400, text, param=f"{name}.content", code="invalid_content")
            if message.tool_calls and message.role != "assistant":
                raise ApiError(400, "Only the assistant makes tool calls.", param=f"{name}.tool_calls")
            if (message.role == "tool") != (message.tool_call_id is not None):
                text = f"`{name}.tool_call_id` goes with the role `tool`, and that role needs it."
                raise ApiError(400, text, param=f"{name}.tool_call_id")

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ApiError(400, "Two tools have the same name.", param="tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            text = f"`tool_choice` names `{self.tool_choice.function.name}`, which is not among `tools`."
            raise ApiError(400, text, param="tool_choice")
        if self.tool_choice == "required" and not names:
            raise ApiError(400, "`tool_choice`: required needs `tools`.", param="tool_choice")
        strict = next((number for number, tool in enumerate(self.active_tools()) if tool.function.strict), None)
        if strict is not None and not self.forced_tools():
            text = "`strict` is kept where a call must be made (`tool_choice` required, or a name), and not with auto."
            raise ApiError(400, text, param=f"tools[{strict}].function.strict", code="unsupported_parameter")
        if self.active_tools() and self.response_format and self.response_format.type != "text":
            text = "`response_format` and `tools` cannot go together; leave one out, or set `tool_choice` to none."
            raise ApiError(400, text, param="response_format")

    def active_tools(self) -> list[Tool]:
        """Return the tools that the model may call in this answer."""
        return [] if self.tool_choice == "none" else self.tools

    def forced_tools(self) -> list[Tool]:
        """Return the tools of which one must be called; none when the model is free to answer in words."""
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools if tool.function.name == self.tool_choice.function.name]
        return self.tools if self.tool_choice == "required" else []

    @property
    def turns(self) -> int:
        """How many times the user has spoken: a turn is a question and its answer."""
        return sum(message.role == "user" for message in self.messages)

    @property
    def limit_name(self) -> str:
        """The name under which `token_limit` was sent."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def token_limit(self) -> int | None:
        """Return how many tokens were asked for at most, under either name."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def top_logprobs_wanted(self) -> int | None:
        """Return how many alternatives to report at each position; None reports nothing."""
        return self.top_logprobs if self.logprobs else None
