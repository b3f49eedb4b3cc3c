"""The sockets between supervisor, engine and API workers. ZeroMQ, its options and addresses are in this file only."""

from __future__ import annotations

from pathlib import Path

from zmq.asyncio import Context as AsyncContext
from zmq.asyncio import Socket as AsyncSocket
from zmq.constants import Errno, SocketOption, SocketType
from zmq.error import ZMQError
from zmq.sugar.context import Context
from zmq.sugar.socket import Socket

_FAREWELL_MS = 1000


class PeerGoneError(Exception):
    """The process a message is for has gone."""


class Addresses:
    """Where everybody listens, in the private runtime directory."""

    def __init__(self, runtime_dir: Path) -> None:
        self._dir = runtime_dir

    def engine(self, epoch: int) -> str:
        """Return the engine's address. Each engine has its own, so that no message of a dead one reaches the next."""
        return f"ipc://{self._engine(epoch)}"

    def forget_engine(self, epoch: int) -> None:
        """Remove the socket file that a dead engine left."""
        self._engine(epoch).unlink(missing_ok=True)

    def _engine(self, epoch: int) -> Path:
        return self._dir / f"engine-{epoch}.sock"

    def supervisor(self) -> str:
        """Return where the supervisor hears of readiness and heartbeats."""
        return f"ipc://{self._dir}/supervisor.sock"

    def state(self) -> str:
        """Return where the supervisor publishes the service's state."""
        return f"ipc://{self._dir}/state.sock"


class Inbox:
    """Where one process hears many, without answering."""

    def __init__(self, address: str) -> None:
        self._socket: Socket[bytes] = Context.instance().socket(SocketType.PULL)
        self._socket.bind(address)

    def receive(self, wait_ms: int) -> bytes | None:
        """Return the next message, or None when none comes in time."""
        return self._socket.recv() if self._socket.poll(wait_ms) else None


class Sender:
    """The other end of an inbox."""

    def __init__(self, address: str) -> None:
        self._socket: Socket[bytes] = Context.instance().socket(SocketType.PUSH)
        self._socket.setsockopt(SocketOption.LINGER, _FAREWELL_MS)
        self._socket.connect(address)

    def send(self, message: bytes) -> None:
        """Send a message."""
        self._socket.send(message)


class Broadcast:
    """From one process to whoever listens."""

    def __init__(self, address: str) -> None:
        self._socket: Socket[bytes] = Context.instance().socket(SocketType.PUB)
        self._socket.setsockopt(SocketOption.LINGER, 0)
        self._socket.bind(address)

    def send(self, message: bytes) -> None:
        """Send a message."""
        self._socket.send(message)


class Switchboard:
    """Where the engine hears its workers, and answers each of them."""

    def __init__(self, address: str) -> None:
        self._socket: Socket[bytes] = Context.instance().socket(SocketType.ROUTER)
        # Without a limit, because a full queue would drop tokens; what is queued is bounded by max_tokens.
        self._socket.set_hwm(0)
        # Sending to a worker that is gone fails instead of vanishing: that is how its requests are dropped.
        self._socket.setsockopt(SocketOption.ROUTER_MANDATORY, 1)
        self._socket.bind(address)

    def receive(self, wait_ms: int) -> tuple[bytes, bytes] | None:
        """Return the next worker's name and message, or None when none comes in time."""
        if not self._socket.poll(wait_ms):
            return None
        worker, message = self._socket.recv_multipart()
        return worker, message

    def send(self, worker: bytes, message: bytes) -> None:
        """Send a message to a worker; PeerGoneError when it is gone."""
        try:
            self._socket.send_multipart([worker, message])
        except ZMQError as error:
            if error.errno != Errno.EHOSTUNREACH:
                raise
            raise PeerGoneError from error


def listen_to(context: AsyncContext, address: str) -> AsyncSocket:
    """Return the receiving end of a broadcast."""
    socket: AsyncSocket = context.socket(SocketType.SUB)
    socket.subscribe(b"")
    socket.connect(address)
    return socket


def call(context: AsyncContext, address: str) -> AsyncSocket:
    """Return a worker's end of a switchboard."""
    socket: AsyncSocket = context.socket(SocketType.DEALER)
    socket.set_hwm(0)
    socket.setsockopt(SocketOption.LINGER, 0)
    socket.connect(address)
    return socket
