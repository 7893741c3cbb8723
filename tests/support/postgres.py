"""A private PostgreSQL cluster in a temporary folder, on a unix socket, and ways to hurt it."""

import contextlib
import ctypes
import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import psutil
import psycopg
import pytest
from psycopg import sql

PORT = 5432
DEADLINE_S = 60.0
OWNER = "flplatform"
PR_SET_PDEATHSIG = 1
SYNC = b"S\0\0\0\4"
"""How the protocol says that a batch of statements is whole."""


def binaries() -> Path | None:
    """Return the folder with PostgreSQL's programs, the newest version's, if there is one."""
    debian = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    newest = sorted(debian, key=lambda path: int(path.parts[-3]))
    found = newest[-1] if newest else shutil.which("initdb")
    return Path(found).resolve().parent if found else None


def server_user() -> str | None:
    """Return as whom PostgreSQL can run here: it refuses to be root."""
    if os.geteuid():
        return pwd.getpwuid(os.geteuid()).pw_name
    with contextlib.suppress(KeyError):
        return pwd.getpwnam("postgres").pw_name
    return None


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGQUIT)


class Cluster:
    """One PostgreSQL server, its data and its socket below one folder.

    Attributes:
        folder: data, log and socket.
    """

    def __init__(self, programs: Path, user: str) -> None:
        self._programs = programs
        self._as: dict[str, Any] = {} if os.geteuid() else {"user": user, "extra_groups": []}
        self._names = itertools.count(1)
        self._process: subprocess.Popen[bytes] | None = None
        self.folder = Path(tempfile.mkdtemp(prefix="flpg-"))
        if self._as:
            entry = pwd.getpwnam(user)
            self._as["group"] = entry.pw_gid
            os.chown(self.folder, entry.pw_uid, entry.pw_gid)
        self._data = self.folder / "data"
        self._run(
            "initdb", "--no-sync", "--no-instructions", "--auth=trust", "--encoding=UTF8",
            "--no-locale", f"--username={OWNER}", f"--pgdata={self._data}",
        )  # fmt: skip
        version = int((self._data / "PG_VERSION").read_text())
        # One call for the whole file system after a crash, not one for each of 1000 files.
        self._quick = ["recovery_init_sync_method=syncfs"] if version >= 14 else []
        access = self._data / "pg_hba.conf"
        guarded = "local all guarded scram-sha-256\nlocal all guarded2 scram-sha-256\n"
        access.write_text(guarded + access.read_text())
        self.start()
        self.execute(f"CREATE DATABASE {OWNER}", database="postgres")

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._programs / program, *arguments],
            **self._as, cwd=self.folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self, *settings: str, prefix: tuple[str, ...] = ()) -> None:
        """Start the server and wait until it answers; `settings` are `name=value`.

        `prefix` is a command that becomes the server's user before it starts what follows it.
        """
        identity = {} if prefix else self._as
        given = ["listen_addresses=", f"unix_socket_directories={self.folder}", "fsync=on",
                 f"port={PORT}", "max_connections=50", *self._quick, *settings]  # fmt: skip
        options = [part for setting in given for part in ("-c", setting)]
        until = time.monotonic() + DEADLINE_S
        with (self.folder / "log").open("ab") as log:
            while True:
                self._process = subprocess.Popen(
                    [*prefix, self._programs / "postgres", "-D", self._data, *options],
                    **identity, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    preexec_fn=_end_with_parent,
                )  # fmt: skip
                while self._process.poll() is None and time.monotonic() < until:
                    with contextlib.suppress(psycopg.OperationalError):
                        self.execute("SELECT 1", database="postgres")
                        return
                    time.sleep(0.01)
                # After a kill, what is left of the former server ends within a moment.
                if time.monotonic() > until:
                    raise TimeoutError((self.folder / "log").read_text()[-3000:])
                time.sleep(0.02)

    def stop(self, mode: Literal["fast", "immediate", "kill"] = "fast") -> None:
        """End the server; `immediate` and `kill` leave it no time to finish anything."""
        numbers = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT, "kill": signal.SIGKILL}
        if self._process is not None:
            self._process.send_signal(numbers[mode])
            self._process.wait(DEADLINE_S)
            self._process = None

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop all its processes: what is connected stays so, and the kernel answers for it."""
        assert self._process is not None
        postmaster = psutil.Process(self._process.pid)
        stopped: list[psutil.Process] = []
        try:
            for process in (postmaster, *postmaster.children()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.suspend()
                    stopped.append(process)
            yield
        finally:
            for process in reversed(stopped):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

    def crash(self, mode: Literal["immediate", "kill"] = "immediate") -> None:
        """End the server without warning and start it again."""
        self.stop(mode)
        self.start()

    def remove(self) -> None:
        """End the server and remove the folder."""
        self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)

    def connect(self, database: str = OWNER, schema: str = "public") -> "psycopg.Connection[Any]":
        """Return a superuser's connection that commits each statement."""
        return psycopg.connect(
            host=str(self.folder), port=PORT, user=OWNER, dbname=database, autocommit=True,
            options=f"-c search_path={schema}",
        )  # fmt: skip

    def execute(self, text: str, database: str = OWNER, schema: str = "public") -> list[Any]:
        """Execute a statement as superuser; return its rows."""
        with contextlib.closing(self.connect(database, schema)) as connection:
            cursor = connection.execute(sql.SQL(text))  # type: ignore[arg-type]
            return cursor.fetchall() if cursor.description else []

    def new_schema(self) -> str:
        """Make an empty schema in the common database: quicker than a database."""
        name = f"s{next(self._names)}"
        self.execute(f"CREATE SCHEMA {name}")
        return name

    def url(
        self, schema: str = "public", *, user: str = OWNER, folder: Path | None = None, **more: str
    ) -> str:
        """Return a state URL for a schema; `folder` is where another socket lies."""
        given = {"host": folder or self.folder, "port": PORT, **more}
        query = "&".join(f"{key}={value}" for key, value in given.items())
        return f"postgresql+psycopg://{user}@/{OWNER}?{query}&options=-csearch_path%3D{schema}"

    def cut(self, schema: str) -> int:
        """End the sessions of servers that write a schema; return how many there were."""
        return len(
            self.execute(
                "SELECT pg_terminate_backend(l.pid) FROM pg_locks l "
                "JOIN pg_namespace n ON n.oid::bigint = l.objid::bigint "
                f"WHERE l.locktype = 'advisory' AND l.granted AND n.nspname = '{schema}'"
            )
        )


class CommitCutter:
    """A proxy before a cluster's socket that breaks a connection at its next COMMIT.

    Attributes:
        before: break before the server has the COMMIT, once.
        after: break after the server has carried it out and before the client hears of it, once.
        ghost: break the client's side alone, once: the server's session stays, its COMMIT unsent.
        silent_before, silent_after: break nothing, but pass on nothing any more, once: neither the
            COMMIT, or only its answer.
        refusing: accept no connection.
        within: a schema; end the session that writes it when it has all rows of an INSERT and is
            not told yet that these are all, once; the client hears its last words, and not that
            the connection has ended.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="flpg-"))
        self.before = self.after = self.ghost = self.refusing = False
        self.silent_before = self.silent_after = False
        self.within = ""
        self._cluster = cluster
        self._ghosts: list[socket.socket] = []
        self.cuts = 0
        self._target = str(cluster.folder / f".s.PGSQL.{PORT}")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.folder / f".s.PGSQL.{PORT}"))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        """Accept no more; what is connected stays until one side ends it."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        for ghost in self._ghosts:
            ghost.close()
        for thread in self._threads:
            thread.join()
        shutil.rmtree(self.folder)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.refusing:
                client.close()
                continue
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._target)
            thread = threading.Thread(target=self._carry, args=(client, server), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _carry(self, client: socket.socket, server: socket.socket) -> None:
        muted, half_open, inserting = threading.Event(), threading.Event(), False
        pumped = (server, client, muted, half_open)
        pump = threading.Thread(target=self._pump, args=pumped, daemon=True)
        with contextlib.suppress(OSError), client, server:
            pump.start()
            while data := client.recv(65536):
                if b"COMMIT" in data and self.before:
                    self.before = False
                    self.cuts += 1
                    break
                if b"COMMIT" in data and self.after:
                    self.after = False
                    self.cuts += 1
                    client.shutdown(socket.SHUT_WR)  # the answer goes nowhere
                    server.sendall(data)
                    server.shutdown(socket.SHUT_WR)
                    break
                if b"COMMIT" in data and self.ghost:
                    self.ghost = False
                    self._ghosts.append(server.dup())
                    client.shutdown(socket.SHUT_RDWR)
                    self.cuts += 1
                    return
                if b"COMMIT" in data and (self.silent_before or self.silent_after):
                    muted.set()
                    self.cuts += 1
                    if self.silent_after:
                        server.sendall(data)
                    self.silent_before = self.silent_after = False
                inserting |= b"INSERT INTO events" in data
                if self.within and inserting and SYNC in data:
                    server.sendall(data[: data.index(SYNC)])
                    half_open.set()
                    self._cluster.cut(self.within)
                    self.within = ""
                    self.cuts += 1
                    while client.recv(65536):
                        pass  # nobody reads it any more
                    break
                if not muted.is_set():
                    server.sendall(data)
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_WR)
            pump.join()

    @staticmethod
    def _pump(
        source: socket.socket,
        sink: socket.socket,
        muted: threading.Event,
        half_open: threading.Event,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                with contextlib.suppress(OSError):
                    if muted.is_set():
                        continue
                    sink.sendall(data)
        with contextlib.suppress(OSError):
            if not half_open.is_set():
                sink.shutdown(socket.SHUT_RDWR)


def running_cluster() -> Iterator[Cluster]:
    """Yield a running cluster; skip where PostgreSQL is not installed."""
    programs, user = binaries(), server_user()
    if programs is None or user is None:
        pytest.skip("PostgreSQL is not installed (tools/install-test-tools.sh)")
    cluster = Cluster(programs, user)
    try:
        yield cluster
    finally:
        cluster.remove()
