"""What `/v1/embeddings` takes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from nioserve.api.schemas.common import Body, Count
from nioserve.api.schemas.completion import TokenIds, several

MAX_INPUTS = 2048
"""As OpenAI. They are computed some at a time."""

Text = Annotated[str, Field(min_length=1)]


class EmbeddingRequest(Body):
    """Vectors for one or several inputs, each a text or token ids."""

    input: Text | TokenIds | Annotated[list[Text], Field(max_length=MAX_INPUTS)] | Annotated[
        list[TokenIds], Field(max_length=MAX_INPUTS)
    ]  # fmt: skip
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = None

    def inputs(self) -> list[str | list[int]]:
        """Return the inputs one by one."""
        return several(self.input)
