"""Jobs on a Ray cluster, over its job API: submit, list, follow, stop.

    jobs = Jobs("http://head:8265")
    job = jobs.submit(submission, Path("package.zip"))
    job = jobs.follow(job.id, print).run(); job.exit_code
    jobs.of("image-cnn"); jobs.stop(job)

The token is Ray's: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or a file that RAY_AUTH_TOKEN_PATH names.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dltrain.deploying.submission import RUN, RUN_DIRECTORY, Submission
from dltrain.errors import DltrainError, UserError

__all__ = ["Follower", "Job", "Jobs"]

_OVER = ("succeeded", "failed", "stopped")
_STOPPED_CODE = 143
_NO_COMMAND_CODE = 127
_REACH_SECONDS = 10.0
_POLL_SECONDS = 1.0
# A connection may be dead and silent: the job is asked for by other means this often.
_CHECK_SECONDS = 10.0
# How long a head may be out of reach before its jobs are not followed any more.
_PATIENCE_SECONDS = 120.0
# Ray lets these win over the address that it is given.
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


@dataclass(frozen=True)
class Job:
    """A run on a cluster.

    Attributes:
        id: Ray's submission id; directory: URL of the run's.
        status: pending, running, succeeded, failed or stopped.
        submitted, ended: Unix seconds; ended is 0 while it is not.
        code: what its command ended with, None where there is none.
        message: Ray's.
    """

    id: str
    run: str
    directory: str
    status: str
    submitted: float
    ended: float
    code: int | None
    entrypoint: str
    message: str

    @classmethod
    def of(cls, details: Any) -> Job:
        """From Ray's JobDetails."""
        metadata = details.metadata or {}
        return cls(
            id=str(details.submission_id),
            run=metadata[RUN],
            directory=metadata.get(RUN_DIRECTORY, ""),
            status=str(getattr(details.status, "value", details.status)).lower(),
            submitted=(details.start_time or 0) / 1000,
            ended=(details.end_time or 0) / 1000,
            code=details.driver_exit_code,
            entrypoint=details.entrypoint,
            message=details.message or "",
        )

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.status in _OVER

    @property
    def exit_code(self) -> int:
        """What `dltrain run` ended with; 143 when the job was stopped, 1 when it never ran."""
        if self.status == "stopped":
            return _STOPPED_CODE
        if self.code is None:
            return 0 if self.status == "succeeded" else 1
        return 128 - self.code if self.code < 0 else self.code

    @property
    def problem(self) -> str:
        """Why it failed before the run could say so itself; else empty."""
        if self.status != "failed":
            return ""
        if self.code == _NO_COMMAND_CODE:
            return "the cluster's head has no `dltrain` command on its PATH: install dltrain on every node"
        return "" if self.code is not None else self.message

    def to_dict(self, now: float) -> dict[str, Any]:
        """For --json."""
        known = asdict(self)
        return {
            "job": known.pop("id"),
            "run": known.pop("run"),
            "dir": known.pop("directory"),
            "job_status": known.pop("status"),
            "exit_code": self.exit_code if self.is_over else None,
            "seconds": round(max(0.0, (self.ended or now) - self.submitted), 1),
            "submitted": self.submitted,
            "entrypoint": self.entrypoint,
            "message": self.message,
        }


class Jobs:
    """The jobs of one cluster that are runs of dltrain.

    Args:
        address: of its dashboard, http://HEAD:8265.

    Raises:
        UserError: nobody answers there, or the token is refused.
    """

    def __init__(self, address: str) -> None:
        self.address = _normal(address)
        from ray.job_submission import JobSubmissionClient

        with asking(self.address):
            _reach(self.address)
            with _without(_ADDRESS_VARIABLES):
                self._client = JobSubmissionClient(self.address)

    def all(self) -> list[Job]:
        """Every one that the cluster remembers, oldest first."""
        with asking(self.address):
            found = self._client.list_jobs()
        jobs = [Job.of(details) for details in found if details.submission_id and RUN in (details.metadata or {})]
        return sorted(jobs, key=lambda job: job.submitted)

    def of(self, run: str) -> list[Job]:
        """Those of a run, by its name, the URL of its directory, or a job's id; oldest first."""
        name, jobs = run.rstrip("/"), self.all()
        return [job for job in jobs if name in (job.run, job.directory)] or [job for job in jobs if name == job.id]

    def newest(self, run: str) -> Job:
        """The last one of a run.

        Raises:
            UserError: there is none.
        """
        found = self.of(run)
        if not found:
            known = ", ".join(sorted({job.run for job in self.all()})) or "none"
            raise UserError(f"no job of {run!r} at {self.address}; there are jobs of: {known}")
        return found[-1]

    def get(self, job_id: str) -> Job:
        """How a job is now."""
        with asking(self.address):
            return Job.of(self._client.get_job_info(job_id))

    def log(self, job_id: str) -> str:
        """All that a job has printed."""
        with asking(self.address):
            return str(self._client.get_job_logs(job_id))

    def submit(self, submission: Submission, package: Path) -> Job:
        """Sends the package, unless the cluster has it, and starts the job.

        Raises:
            UserError: a job of this run is there already and has not ended.
        """
        earlier = self.of(submission.run)
        self._refuse_second(submission.run, earlier)
        job_id = _next_id(submission.run, [job.id for job in earlier])
        with asking(self.address):
            try:
                self._client.submit_job(
                    entrypoint=submission.entrypoint,
                    submission_id=job_id,
                    runtime_env={"working_dir": str(package), "env_vars": submission.env_vars},
                    metadata=submission.metadata,
                )
            except RuntimeError:
                # Who submitted the same run in this moment has taken the id.
                self._refuse_second(submission.run, self.of(submission.run))
                raise
        return self.get(job_id)

    def _refuse_second(self, run: str, jobs: list[Job]) -> None:
        for job in jobs:
            if not job.is_over:
                raise UserError(
                    f"{run} is {job.status} already, as job {job.id} at {self.address}; two would write into one run "
                    f"directory. Watch it with: dltrain logs {run} -f --address {self.address}, end it with: "
                    f"dltrain stop {run} --address {self.address}, or set another `name`"
                )

    def follow(self, job_id: str, out: Callable[[str], None]) -> Follower:
        """Gives `out` each line that a job prints, from the first."""
        return Follower(self, self._client, job_id, out)

    def stop(self, job: Job, wait: bool, sleep: Callable[[float], None] = time.sleep) -> Job:
        """Has a job end after the step it is in, with a checkpoint; waits until it has."""
        with asking(self.address):
            self._client.stop_job(job.id)
        job = self.get(job.id)
        while wait and not job.is_over:
            sleep(_POLL_SECONDS)
            job = self.get(job.id)
        return job


class Follower:
    """Follows a job's log to its end, over connections that may break; may be run again after an interruption."""

    def __init__(self, jobs: Jobs, client: Any, job_id: str, out: Callable[[str], None]) -> None:
        self._jobs, self._client, self._id, self._out = jobs, client, job_id, out
        self._position = 0
        self._rest = ""

    def run(self) -> Job:
        """Until the job is over; returns it.

        Raises:
            DltrainError: the head can't be reached any more; the job may go on.
        """
        import aiohttp

        failing: float | None = None
        while True:
            try:
                asyncio.run(self._tail())
                job = self._jobs.get(self._id)
                if job.is_over:
                    self._take(0, self._jobs.log(self._id), last=True)
                    return job
                failing = None
            except BrokenPipeError:
                # Nobody reads on what is passed on.
                raise
            except (aiohttp.ClientError, OSError, RuntimeError, DltrainError) as error:
                failing = failing or time.monotonic()
                if time.monotonic() - failing > _PATIENCE_SECONDS:
                    raise DltrainError(
                        f"{self._jobs.address} has not answered for {_PATIENCE_SECONDS:g} s ({_first_line(error)}); "
                        f"job {self._id} goes on if the cluster does"
                    ) from None
            time.sleep(_POLL_SECONDS)

    async def _tail(self) -> None:
        reading = asyncio.create_task(self._read())
        while not reading.done():
            await asyncio.wait({reading}, timeout=_CHECK_SECONDS)
            if not reading.done() and self._jobs.get(self._id).is_over:
                await asyncio.wait({reading}, timeout=_CHECK_SECONDS)
                reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reading

    async def _read(self) -> None:
        begin = 0
        async for text in self._client.tail_job_logs(self._id):
            self._take(begin, text)
            begin += len(text)

    def _take(self, begin: int, text: str, last: bool = False) -> None:
        """Passes on what is new of a piece of the log that begins at a character; each connection starts anew."""
        new = text[max(0, self._position - begin) :]
        self._position = max(self._position, begin + len(text))
        *lines, self._rest = (self._rest + new).split("\n")
        if last and self._rest:
            lines, self._rest = [*lines, self._rest], ""
        for line in lines:
            self._out(line)


def _next_id(run: str, known: list[str]) -> str:
    """An id that no job of the run has had: Ray takes none a second time."""
    numbers = (job_id.removeprefix(f"{run}-") for job_id in known)
    return f"{run}-{1 + max((int(number) for number in numbers if number.isdigit()), default=0)}"


def _normal(address: str) -> str:
    url = address if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--address: found {address!r}; jobs are submitted to Ray's dashboard, http://HEAD:8265")
    return url.rstrip("/")


def _reach(address: str) -> None:
    """Raises OSError within seconds when nobody answers; Ray's client would wait for minutes."""
    parts = urlsplit(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    socket.create_connection((str(parts.hostname), port), timeout=_REACH_SECONDS).close()


@contextlib.contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    """Hides variables of the environment."""
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextlib.contextmanager
def asking(address: str) -> Iterator[None]:
    """Turns what Ray's client raises into errors of ours."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        found = (
            "refuses the token that RAY_AUTH_TOKEN holds" if "failed" in str(error).split(":")[0] else "wants a token"
        )
        raise UserError(
            f"{address} {found}. Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's token: what its head was "
            "started with, or ~/.ray/auth_token there; on Kubernetes the Secret named after the RayCluster"
        ) from None
    except OSError as error:
        raise UserError(
            f"--address: no Ray dashboard answers at {address} ({_first_line(error)}). Is the cluster up, and its "
            "dashboard reachable from here? On Kubernetes: kubectl port-forward service/NAME-head-svc 8265"
        ) from None
    except RuntimeError as error:
        raise DltrainError(f"{address} refused: {_last_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _last_line(error: BaseException) -> str:
    """Ray answers with a traceback, of which the last line says what it is."""
    lines = [line for line in str(error).splitlines() if line.strip(" .")]
    return lines[-1].strip() if lines else type(error).__name__
