"""A real MLflow server with users and passwords, over a throw-away PostgreSQL cluster; each can be stopped."""

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import pytest

from tests.tracking.waiting import wait_for

START_SECONDS = 240  # it takes more than a minute on two busy cores


class TrackingServer:
    """`with TrackingServer() as server`: it answers at `server.address`."""

    user = "admin"

    def __init__(self) -> None:
        # PostgreSQL's socket has a short path, and a user of its own has to reach it: not pytest's folder.
        self.folder = Path(tempfile.mkdtemp(prefix="osft-mlflow-"))
        self.password = secrets.token_urlsafe(16)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self.log = self.folder / "server.log"
        self._database = Postgres(self.folder / "postgres")
        self._process: subprocess.Popen[bytes] | None = None
        (self.folder / "auth.ini").write_text(
            f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {self._database.uri}\nadmin_username = {self.user}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            "grant_default_workspace_access = false\n"
        )

    def __enter__(self) -> "TrackingServer":
        try:
            self.folder.chmod(0o755)
            self._database.create()
            self.start_database()
            self.start()
            self.wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.stop_database()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        """Start the server without waiting until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", self.address.rpartition(":")[2]]
        command += ["--backend-store-uri", self._database.uri]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        environment |= {
            "MLFLOW_AUTH_CONFIG_PATH": str(self.folder / "auth.ini"),
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_urlsafe(16),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # a fresh server is busy with its job runners for a minute
        }
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, cwd=self.folder, start_new_session=True
            )

    def wait(self) -> None:
        """Until it answers."""
        wait_for(self.answers, seconds=START_SECONDS)

    def answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log.read_text()[-3000:]
        try:
            return bool(urllib.request.urlopen(f"{self.address}/health", timeout=2).status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        """End the server and its workers at once."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def start_database(self) -> None:
        self._database.control("start")

    def stop_database(self) -> None:
        self._database.control("stop", "--mode", "immediate")


class Postgres:
    """A cluster in a folder, reached by a socket there; it runs as another user where this one is root."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.uri = f"postgresql+psycopg2://mlflow@/postgres?host={folder}"
        self._as = {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid, "extra_groups": []}
        if os.getuid() != 0:
            self._as = {}

    def create(self) -> None:
        """Make the cluster. The test fails where PostgreSQL is not installed."""
        if _program("initdb") is None:
            pytest.fail("needs PostgreSQL: the package postgresql of Debian")
        self._folder.mkdir()
        if self._as:
            shutil.chown(self._folder, "nobody")
        self._run("initdb", "--pgdata", "data", "--username", "mlflow", "--auth", "trust", "--no-sync")

    def control(self, action: str, *options: str) -> None:
        if (self._folder / "data").is_dir():
            server_options = f"-k {self._folder} -c listen_addresses='' -c fsync=off"
            self._run("pg_ctl", action, "--pgdata", "data", "--wait", "--log", "log", "-o", server_options, *options)

    def _run(self, program: str, *arguments: str) -> None:
        path = _program(program)
        assert path is not None
        done = subprocess.run([path, *arguments], cwd=self._folder, capture_output=True, text=True, **self._as)
        assert done.returncode == 0, done.stdout + done.stderr


def _program(name: str) -> str | None:
    """Debian keeps the server's programs out of PATH, a folder for each release."""
    found = shutil.which(name)
    if found is None:
        for candidate in sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True):
            return str(candidate)
    return found
