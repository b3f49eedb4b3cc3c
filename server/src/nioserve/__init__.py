"""nioserve: an OpenAI-compatible model service for machines without internet.

A request's way, one direction only:

    client
      | HTTP(S), port 8000: one listening socket shared by N API workers
    api/gate.py          request id, body limit, security headers, log line
    api/identify.py      API key -> user and department            (policy/identity.py)
    api/schemas/         JSON -> ChatRequest and others; what is not supported is refused by name (api/intake.py)
    api/chat.py          and completions, embeddings: a checked request -> the engine, or an upstream (backends/)
    api/prompt.py        chat template and tokeniser -> token ids
    api/generate.py      does it fit, is there room
      | engine/messages.py: msgpack over ZeroMQ, in a private directory
    engine/process.py    the engine's own process and loop
    engine/scheduler.py  bounded queues -> running sequences, one token budget per step
    models/native/       one flat batch through the model           (or models/decoder.py on torch, models/hf/)
    engine/sampling/     logits -> tokens, what is asked for beside them (engine/grammar/)
      | tokens, as they come
    api/choice.py        tokens -> whole characters, stop strings   (api/detokenize.py, api/logprobs.py)
    api/message.py       text -> words and tool calls               (api/tools.py)
    api/stream.py        server-sent events, or JSON at once
    api/connection.py    and a client that does not read is cut off
      |
    client

supervisor/ is the parent of all these processes, and serves the metrics on port 8001. models/ knows no requests,
engine/ knows no text, and only api/ knows HTTP, JSON and chat templates.
"""

__version__ = "0.1.0"
