"""What the probes answer, on the API's port and on the metrics port alike.

live: the process answers. started: the engine has been warm once. ready: it takes traffic now; a busy engine is ready,
one that is loading, dead, hung or draining is not. A hung engine is restarted by the supervisor, so `livez` stays 200:
restarting everything would only take longer.
"""

from __future__ import annotations

from nioserve.engine.messages import ServiceState

PATHS = ("/livez", "/readyz", "/startupz", "/health")


def probe(path: str, state: ServiceState) -> tuple[int, dict[str, str]]:
    """Return the status and the body for one of PATHS."""
    ready = state.engine_ready and not state.draining
    good = {"/livez": True, "/startupz": state.started}.get(path, ready)
    return (200 if good else 503), {"status": "ok" if good else "unavailable", "detail": state.detail}
