"""What the probes answer, on the API's port and on the metrics port alike.

live: the process answers, and the engine does not hang. started: the engine has been warm once. ready: it takes traffic
now; a busy engine is ready, one that is loading, dead, hung or draining is not.

A dead engine is replaced at once, and `livez` stays 200: restarting everything would only take longer. A hung one is
replaced too, but what made it hang may hang the next: `livez` is 503 and says so from the moment it is noticed until a
new engine is ready. An orchestrator that allows for a start (some seconds) in its probe's threshold leaves that alone.
"""

from __future__ import annotations

from nioserve.engine.messages import ServiceState

PATHS = ("/livez", "/readyz", "/startupz", "/health")


def probe(path: str, state: ServiceState) -> tuple[int, dict[str, str]]:
    """Return the status and the body for one of PATHS."""
    ready = state.engine_ready and not state.draining
    good = {"/livez": not state.hung, "/startupz": state.started}.get(path, ready)
    return (200 if good else 503), {"status": "ok" if good else "unavailable", "detail": state.detail}
