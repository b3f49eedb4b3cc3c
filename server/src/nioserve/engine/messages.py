"""What API workers, engine and supervisor say to each other: msgpack over ZeroMQ, typed and tagged.

Worker to engine: Submit, Cancel. Engine to worker: Accepted or Rejected, then Outputs; and Load, whenever a queue fills
up or has room again. Both to the supervisor: EngineReady, WorkerReady, Heartbeat. Supervisor to all workers:
ServiceState, repeated, so that a late one learns it.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


class FinishReason(StrEnum):
    """Why an answer ended; the values are OpenAI's, but for the last two, which never reach a client.

    ERROR: the engine gave the request up, because a grammar failed or memory ran out. It may be tried again.
    """

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Grammar(msgspec.Struct, frozen=True):
    """What an answer must look like: `kind` is json_object, json_schema or regex; `source` its text."""

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
    """The request is not queued, or was queued and will not run. `reason` is a metric label; `retry_after` in seconds.

    queue_full, queue_tokens: too many requests, or too many prompt tokens, wait already.
    queue_timeout: it was accepted, and waited too long; no output came before.
    too_long: prompt and answer are longer than the engine's context, so it can never run.
    invalid: a token or a grammar that the model does not know.
    """

    request_id: str
    reason: str
    retry_after: int


class Full(msgspec.Struct, frozen=True):
    """A queue that takes no more: the reason and the time that Rejected would give."""

    reason: str
    retry_after: int


class Load(msgspec.Struct, tag=True, frozen=True):
    """Which queues are full. Until the next Load a worker refuses requests for those itself, and asks nobody.

    The engine hears its workers between two steps only; this is how a refusal takes no longer than a look.
    """

    short: Full | None
    conversations: Full | None


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
    """The engine has loaded its model and warmed it up. `max_model_len` (tokens) is what memory allows; 0: unknown."""

    epoch: int
    max_model_len: int = 0


class WorkerReady(msgspec.Struct, tag=True, frozen=True):
    """An API worker accepts connections. Repeated twice a second from its event loop, so that a hang shows."""

    pid: int


class Heartbeat(msgspec.Struct, tag=True, frozen=True):
    """The engine's loop has come round. Sent from that loop and no other thread, so that a hang shows."""

    epoch: int


class ServiceState(msgspec.Struct, tag=True, frozen=True):
    """What workers need to know: which engine to talk to, and whether the service takes traffic.

    `hung`: the last engine stopped answering, and its successor is not ready yet. `max_model_len` is the engine's, in
    tokens; 0 until one was ready.
    """

    epoch: int
    engine_ready: bool
    draining: bool
    started: bool
    detail: str
    hung: bool = False
    max_model_len: int = 0


ToEngine = Submit | Cancel
FromEngine = Accepted | Rejected | Outputs | Load
ToSupervisor = EngineReady | WorkerReady | Heartbeat

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
decode_to_supervisor = msgspec.msgpack.Decoder(ToSupervisor).decode
decode_state = msgspec.msgpack.Decoder(ServiceState).decode
