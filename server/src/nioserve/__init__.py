"""nioserve: an OpenAI-compatible model service for machines without internet.

A request's way, one direction only:

    client
      | HTTP(S), port 8000: one listening socket shared by N API workers
    api/gate.py          request id, body limit, security headers, log line
    api/identify.py      API key -> user and department            (policy/identity.py)
    api/schemas.py       JSON -> ChatRequest; what is not supported is refused by name
    api/prompt.py        chat template and tokeniser -> token ids
      | engine/messages.py: msgpack over ZeroMQ, in a private directory
    engine/process.py    the engine's own process and loop
    engine/scheduler.py  bounded queue -> running sequences, one token budget per step
    models/decoder.py    one flat batch through the model           (models/int8.py, models/cache.py)
    engine/sampler.py    logits -> tokens
      | tokens, as they come
    api/detokenize.py    tokens -> whole characters, stop strings
    api/chat.py          JSON, or server-sent events
      |
    client

supervisor/ is the parent of all these processes, and serves the metrics on port 8001. models/ knows no requests,
engine/ knows no text, and only api/ knows HTTP, JSON and chat templates.
"""

__version__ = "0.1.0"
