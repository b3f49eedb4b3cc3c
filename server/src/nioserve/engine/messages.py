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


class Sampling(msgspec.Struct, frozen=True):
    """How tokens are drawn. Temperature 0 is greedy; a seed makes the draws repeatable."""

    temperature: float
    top_p: float
    seed: int | None = None
    ignore_eos: bool = False


class Submit(msgspec.Struct, tag=True, frozen=True):
    """Generate up to `max_tokens` tokens after the prompt."""

    request_id: str
    prompt: list[int]
    max_tokens: int
    sampling: Sampling


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


class Output(msgspec.Struct, frozen=True):
    """New tokens of one request; the last one says why it ended."""

    request_id: str
    tokens: list[int]
    finish_reason: FinishReason | None = None


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
