"""What API workers, engine and supervisor say to each other: msgpack over ZeroMQ, typed and tagged.

Worker to engine: Submit, Cancel. Engine to worker: Accepted or Rejected, then Outputs. Both to the supervisor:
EngineReady, WorkerReady, Heartbeat. Supervisor to all workers: ServiceState, repeated, so that a late one learns it.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


class FinishReason(StrEnum):
    """Why an answer ended; the values are OpenAI's, but for the last two, which never reach a client."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Grammar(msgspec.Struct, frozen=True):
    """What an answer must look like: `kind` is json_object, json_schema, regex or structural_tag; `source` its text."""

    kind: str
    source: str = ""


class Sampling(msgspec.Struct, frozen=True):
    """How tokens are drawn. Temperature 0 is greedy; a seed makes the draws repeatable.

    Penalties are OpenAI's (presence, frequency: over the answer) and CTRL's (repetition: over prompt and answer).
    `logprobs` is the number of most likely tokens reported beside the chosen one; None reports nothing.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    grammar: Grammar | None = None


class Submit(msgspec.Struct, tag=True, frozen=True):
    """Generate up to `max_tokens` tokens after the prompt.

    `department` salts the prefix cache. `long_conversation` chooses the queue. With `embed`, `max_tokens` is 0 and the
    one output carries the mean of the prompt's final hidden states, of length 1.
    """

    request_id: str
    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    department: str = ""
    long_conversation: bool = False
    embed: bool = False


class Cancel(msgspec.Struct, tag=True, frozen=True):
    """Nobody reads this answer any more."""

    request_id: str


class Accepted(msgspec.Struct, tag=True, frozen=True):
    """The request is queued; outputs follow."""

    request_id: str


class Rejected(msgspec.Struct, tag=True, frozen=True):
    """The request is not queued. `reason` is a metric label."""

    request_id: str
    reason: str
    retry_after: int


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural logarithms of the probabilities at one position, before penalties, temperature and cuts."""

    chosen: float
    top: list[tuple[int, float]]


class Output(msgspec.Struct, frozen=True, omit_defaults=True):
    """New tokens of one request; the last one says why it ended. The first says how much of the prompt was cached."""

    request_id: str
    tokens: list[int]
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None
    cached_tokens: int = 0
    embedding: list[float] | None = None


class Outputs(msgspec.Struct, tag=True, frozen=True):
    """All a worker gets from one step, in one message."""

    outputs: list[Output]


class EngineReady(msgspec.Struct, tag=True, frozen=True):
    """The engine has loaded its model and warmed it up."""

    epoch: int


class WorkerReady(msgspec.Struct, tag=True, frozen=True):
    """An API worker accepts connections."""

    pid: int


class Heartbeat(msgspec.Struct, tag=True, frozen=True):
    """The engine's loop has come round. Sent from that loop and no other thread, so that a hang shows."""

    epoch: int


class ServiceState(msgspec.Struct, tag=True, frozen=True):
    """What workers need to know: which engine to talk to, and whether the service takes traffic."""

    epoch: int
    engine_ready: bool
    draining: bool
    started: bool
    detail: str


ToEngine = Submit | Cancel
FromEngine = Accepted | Rejected | Outputs
ToSupervisor = EngineReady | WorkerReady | Heartbeat

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
decode_to_supervisor = msgspec.msgpack.Decoder(ToSupervisor).decode
decode_state = msgspec.msgpack.Decoder(ServiceState).decode
