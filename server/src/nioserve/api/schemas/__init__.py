"""What the API takes, as types. A parameter that would change the answer and is not supported is refused by name."""

from nioserve.api.schemas.chat import ChatRequest, Message, Tool
from nioserve.api.schemas.common import Body, Parameters, parse
from nioserve.api.schemas.completion import CompletionRequest
from nioserve.api.schemas.embedding import EmbeddingRequest

__all__ = ["Body", "ChatRequest", "CompletionRequest", "EmbeddingRequest", "Message", "Parameters", "Tool", "parse"]
