"""The limit: bare TLS sockets moving the same bytes, written and synced in the same places.

Each client takes the model, writes and syncs it, writes and syncs what it has trained, and sends
that back; the server writes and syncs each update, then a new model. Writing goes on while more
is received. No framing, no tasks, no checks, no digests, no aggregation.
"""

import os
import queue
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

CHUNK = 1 << 20
BUFFERS = 4
"""Chunks that may wait to be written."""


def measure(kits: Path, sites: tuple[str, ...], size: int, rounds: int) -> float:
    """Return the median seconds of a round with one process per site."""
    with tempfile.TemporaryDirectory(dir=kits.parent) as folder:
        return _measure(kits, sites, size, rounds, Path(folder))


def _measure(kits: Path, sites: tuple[str, ...], size: int, rounds: int, folder: Path) -> float:
    model = folder / "model"
    model.write_bytes(os.urandom(min(size, CHUNK)) * (size // CHUNK or 1))
    real = model.stat().st_size
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    startup = kits / "server" / "startup"
    context.load_cert_chain(startup / "participant.crt", startup / "participant.key")
    context.load_verify_locations(startup / "site_issuer.crt")
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        clients = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "benchmarks.bare_tls",
                    str(kits / site),
                    str(port),
                    str(real),
                    str(rounds),
                    str(folder / site),
                ]
            )  # fmt: skip
            for site in sites
        ]
        peers = [context.wrap_socket(listener.accept()[0], server_side=True) for _ in sites]
    times = []
    for _ in range(rounds):
        begun = time.monotonic()
        threads = [
            threading.Thread(target=_exchange, args=(peer, model, real, folder / f"update-{i}"))
            for i, peer in enumerate(peers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        _copy(folder / "update-0", folder / "next")
        times.append(time.monotonic() - begun)
    for peer in peers:
        peer.close()
    for client in clients:
        client.wait(60)
    return statistics.median(times[1:] or times)


def _exchange(peer: ssl.SSLSocket, model: Path, size: int, update: Path) -> None:
    send_file(peer, model)
    receive_file(peer, update, size)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(CHUNK):
            writer.write(chunk)
        writer.flush()
        os.fdatasync(writer.fileno())


def send_file(peer: ssl.SSLSocket, path: Path) -> None:
    """Send a whole file."""
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            peer.sendall(chunk)


def receive_file(peer: ssl.SSLSocket, path: Path, size: int) -> None:
    """Receive `size` bytes into a file, and sync it; a thread writes what has come."""
    full: queue.Queue[memoryview | None] = queue.Queue()
    free: queue.Queue[bytearray] = queue.Queue()
    for _ in range(BUFFERS):
        free.put(bytearray(CHUNK))

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            while (data := full.get()) is not None:
                file.write(data)
                assert isinstance(data.obj, bytearray)
                free.put(data.obj)
            os.fdatasync(file.fileno())

    writer = threading.Thread(target=write)
    writer.start()
    try:
        left = size
        while left:
            buffer = memoryview(free.get())[: min(CHUNK, left)]
            filled = 0
            while filled < len(buffer):
                count = peer.recv_into(buffer[filled:])
                if not count:
                    raise EOFError("the peer has gone")
                filled += count
            full.put(buffer)
            left -= filled
    finally:
        full.put(None)
        writer.join()


def client(kit: Path, port: int, size: int, rounds: int, path: Path) -> None:
    """Take the model and send it back, round after round."""
    startup = kit / "startup"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_cert_chain(startup / "participant.crt", startup / "participant.key")
    context.load_verify_locations(startup / "server_issuer.crt")
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as peer,
    ):
        for _ in range(rounds):
            receive_file(peer, path, size)
            trained = path.with_suffix(".trained")
            _copy(path, trained)
            send_file(peer, trained)


if __name__ == "__main__":
    client(
        Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5])
    )
