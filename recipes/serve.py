"""Answer many clients through OpenAI's API, with a model whose keys and values are sharded over the ranks.

    python -m recipes.serve mesh.ring=2 port=8000

Requests are answered together: each step runs a chunk of new prompts, and decodes a token of every open answer.
SIGTERM answers the open requests, then ends the server.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from longctx.config import SPD, Sampling
from longctx.hf.config import tokenizer_of
from longctx.parallel.launch import Rank
from longctx.parallel.launcher import current_rank
from longctx.spd.plan import saved_plan
from recipes.common.cli import console, is_first, main, on_ranks, say, warm_up_ranks
from recipes.common.decode_choice import make_decode_chooser
from recipes.common.hardware_file import refuse_other_threads
from recipes.common.listening import listen, read_key, refuse_open_host
from recipes.common.lock import hold
from recipes.common.places import refuse_unwritable_folder
from recipes.common.predicted import ELEMENT_BYTES
from recipes.common.progress import Progress
from recipes.common.settings import section, top_level
from recipes.common.strategy_choice import make_strategy_chooser, read_constants
from recipes.common.target import Target, resolve_target, say_unapplied

if TYPE_CHECKING:
    from longctx.cost.hardware import Hardware
    from longctx.infer.continuous import ContinuousSession
    from longctx.infer.page_files import PageFiles
    from longctx.megatron.runtime import Runtime
    from longctx.serve.one_rank import OneRank
    from longctx.serve.page_folder import PageOrigin
    from longctx.serve.schedule import Limits
    from longctx.train.stop import StopRequest

RECIPE = "recipes.serve"
# Not this module: runpy, which runs it again in each rank, would warn that it is imported already.
WARM = ("longctx.infer.engine", "longctx.infer.generate", "recipes.common.progress", "longctx.serve.app", "uvicorn")
_SHORT = 320  # up to about this many tokens, one rank with the threads of all is faster (docs/results/serve.md)
_REPEAT_S = 0.5  # a request to stop is repeated, since a rank that is starting ignores it


@dataclass(frozen=True)
class ServeSettings:
    """Top-level settings of configs/serve.yaml."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: str | None = None
    max_sequences: PositiveInt = 16
    max_waiting: PositiveInt = 256
    cache_tokens: PositiveInt | None = None
    one_rank_tokens: NonNegativeInt | None = None
    max_request_bytes: PositiveInt = 4_000_000
    hardware: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port={self.port} is not a port: use 1 to {2**16 - 1}, or 0 for a free one")


@dataclass(frozen=True)
class PrefixSettings:
    """Settings of the section ``cache``: GB on each rank for shared prefixes of prompts, and tokens per page.

    ``save`` is a folder that keeps these pages for the next server.
    """

    gb: NonNegativeFloat = 1.0
    page: PositiveInt = 64
    save: str | None = None

    def __post_init__(self) -> None:
        if self.save and not self.gb:
            raise ValueError(f"cache.save={self.save} needs memory for pages: use cache.gb above 0, or cache.save=null")

    @property
    def folder(self) -> Path | None:
        """Folder of the saved pages, or None."""
        return Path(self.save).expanduser().absolute() if self.save else None


@dataclass(frozen=True)
class ServeJob:
    """Inputs of every rank: plain values, checked before any rank starts.

    ``key`` is the API key that clients need (None: they need none).  ``hardware`` has the constants for a rule of
    ``context.strategy`` (None: measure them).  ``origin`` says which model, dtype, mesh and page size the saved pages
    are for (None: no page is saved).
    """

    target: Target
    sampling: Sampling
    settings: ServeSettings
    cache: PrefixSettings
    key: str | None = field(repr=False)
    hardware: Hardware | None = None
    origin: PageOrigin | None = None

    def one_rank(self, rank: Rank) -> OneRank:
        """Return the rule that lets one ring rank run a short prefill pass alone.

        A pass is short up to ``one_rank_tokens`` tokens (None: 320 if all ranks are on one CPU machine, else 0).  On
        such a machine, the rank gets the CPU threads of the whole ring.
        """
        from longctx.serve.one_rank import OneRank

        lends = rank.local_world_size == rank.world_size and self.target.run.device == "cpu"
        tokens = self.settings.one_rank_tokens
        threads = self.target.threads(rank) * (self.target.mesh.ring if lends else 1)
        return OneRank(_SHORT * lends if tokens is None else tokens, threads)

    @property
    def limits(self) -> Limits:
        """Limits of the server: tokens of a step, sequences, and cached tokens and pages."""
        from longctx.serve.schedule import Limits

        most = self.target.shape.max_positions
        cached = self.settings.cache_tokens or self.settings.max_sequences * most
        pages = int(self.cache.gb * 1e9), self.cache.page
        return Limits(self.target.context.chunk or most, self.settings.max_sequences, cached, *pages)


def prepare(config: DictConfig) -> ServeJob:
    """Return the job that ``config`` asks for.  Raises ValueError, with what to set instead, if it cannot be run."""
    refuse_missing_packages()
    target = resolve_target(
        config,
        RECIPE,
        unused_axes=("dp", "pp"),
        strategy_by_turn=True,
        decode_by_batch=True,
        spd="ignore",
        fp8=("block",),
    )
    settings, sampling = top_level(config, ServeSettings), section(config, "sampling", Sampling)
    cache, key = section(config, "cache", PrefixSettings), read_key(settings.api_key_file)
    refuse_open_host(settings.host, key)
    if sampling.logprobs is not None:
        raise ValueError(
            f"sampling.logprobs={sampling.logprobs}: each request asks for its own; use sampling.logprobs=null"
        )
    if sampling.seed:
        raise ValueError(
            f"sampling.seed={sampling.seed}: a request without a seed gets a random one; leave it out, and set seed in "
            "the requests"
        )
    spd = section(config, "spd", SPD)
    if spd.drop != "none" and (saved_plan(target.folder) or spd != SPD()):
        raise ValueError("recipes.serve has not been tested with dropped reductions: use spd=none")
    if target.reduce:
        raise ValueError("recipes.serve has not been tested with rounded reductions: leave out reduce")
    target.shape.refuse_unknown_token(max(sampling.stop_tokens, default=0), "sampling.stop_tokens")
    say_unapplied(target.folder, sampling)
    refuse_useless_pages(target, cache)
    hardware = read_constants(settings.hardware, target.context.strategy)
    return ServeJob(target, sampling, settings, cache, key, hardware, origin_of(target, cache))


def refuse_useless_pages(target: Target, cache: PrefixSettings) -> None:
    """Raise ValueError if no sequence fills a page of ``cache``, or if a rank has no room for a whole page.

    In a prompt of many pages, most pages are whole on one ring rank.
    """
    shape, mesh = target.shape, target.mesh
    row = shape.cached_row_bytes(mesh.tp, mesh.ulysses, ELEMENT_BYTES[target.model.dtype])
    least = cache.page * row / 1e9  # in GB
    if cache.gb and cache.page > shape.max_positions:
        raise ValueError(
            f"cache.page={cache.page} is above the model's {shape.max_positions:,} positions, so that no page is ever "
            "full: use a smaller one, or cache.gb=0 for no pages"
        )
    if 0 < cache.gb < least:
        raise ValueError(
            f"cache.gb={cache.gb:g} has no room for a page, which has up to {least:.3g} GB on a rank with cache.page="
            f"{cache.page}: use more, a smaller cache.page, or cache.gb=0 for no pages"
        )


def origin_of(target: Target, cache: PrefixSettings) -> PageOrigin | None:
    """Return this server's model, dtype, mesh and page size, for the pages in ``cache.save``; None if that is not set.

    On the first rank, raises ValueError if the folder has other files or pages of another origin, or is not writable.
    """
    from longctx.serve.page_folder import PageOrigin, refuse_other_pages

    if cache.folder is None:
        return None
    setting = f"cache.save={cache.save}"
    origin = PageOrigin(target.fingerprint, target.model.precision, str(target.mesh), cache.page)
    if is_first():
        refuse_other_pages(cache.folder, origin, setting)
        refuse_unwritable_folder(str(cache.folder), "cache.save")
    return origin


def refuse_missing_packages() -> None:
    """Raise ValueError if the packages of the web server are not installed."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"recipes.serve needs {error.name}: pip install 'longctx[serve]'") from error


def run_rank(rank: Rank, job: ServeJob) -> int:
    """Serve on one rank: the first rank answers the clients, and the others compute the steps that it plans.

    The first rank returns the number of requests that it cut off at the end, the others 0.
    """
    from longctx.infer.continuous import ContinuousSession
    from longctx.infer.page_files import PageFiles
    from longctx.serve.ranks import follow
    from longctx.train.stop import StopRequest

    stop, target = StopRequest(), job.target
    if current_rank():  # a launcher sends its ranks SIGTERM
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGUSR1))
    with target.runtime(rank) as runtime:
        with Progress(shown=rank.rank == 0) as progress:
            progress.start("loading", None)
            engine = target.load_engine(runtime)
            session = ContinuousSession(
                engine,
                target.context,
                Sampling(),
                make_strategy_chooser(runtime, target, engine, job.hardware),
                choose_decode=make_decode_chooser(runtime, target, engine),
            )
        files = PageFiles(job.cache.folder / f"rank{rank.rank}", console.print) if job.cache.folder else None
        cut = 0
        if rank.rank == 0:
            cut = speak(session, runtime, job, stop, files)
        else:
            follow(session, runtime.world, files, job.one_rank(rank))
        stop.over()
    return cut


def speak(
    session: ContinuousSession, runtime: Runtime, job: ServeJob, stop: StopRequest, files: PageFiles | None
) -> int:
    """Answer the clients on the first rank until a request to stop; then finish the open answers.

    ``files`` stores pages on disk (None: no page is saved).  Returns the number of requests that were cut off, since
    their clients did not send or read them to the end.
    """
    from longctx.serve.app import Front, make_app
    from longctx.serve.http import serve
    from longctx.serve.metrics import metrics_of
    from longctx.serve.request import Reader
    from longctx.serve.service import Service

    target, settings, limits = job.target, job.settings, job.limits
    service = Service(session, runtime.world, tokenizer_of(target.folder), limits, files, job.one_rank(runtime.rank))
    if files:
        say(f"cache.save={job.cache.save}: {service.restored}")
    name, tokenizer = target.model.name, tokenizer_of(target.folder)
    most = settings.max_sequences + settings.max_waiting
    reader = Reader(name, target.shape, tokenizer, job.sampling, limits.cached_tokens, most)
    front = Front(
        reader, service.submit, service.cancel, metrics_of(service), most, settings.max_request_bytes, job.key
    )
    with listen(settings.host, settings.port) as at:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        say(f"{name} answers at http://{host}:{at.getsockname()[1]}/v1")
        serve(service, front, make_app(front), at, lambda: stop.received)
    return front.cut


def stop_on_sigterm() -> None:
    """Let SIGTERM ask the local ranks to stop; a second one ends them at once."""

    def repeat() -> None:
        while True:
            os.kill(os.getpid(), signal.SIGUSR1)
            threading.Event().wait(_REPEAT_S)

    def receive(*_: object) -> None:
        signal.signal(signal.SIGTERM, at_once)
        threading.Thread(target=repeat, daemon=True).start()

    at_once = signal.signal(signal.SIGTERM, receive)


@contextmanager
def hold_pages(job: ServeJob) -> Iterator[None]:
    """Lock the folder of saved pages against other servers during the block, and write ``job.origin`` to it.

    Does nothing if no page is saved.  Raises ValueError if another server uses the folder.
    """
    from longctx.serve.page_folder import LOCK, write_origin

    if job.origin is None or job.cache.folder is None:
        yield
        return
    with hold(job.cache.folder / LOCK, f"cache.save={job.cache.save}"):
        if is_first():
            write_origin(job.cache.folder, job.origin)
        yield


def task(config: DictConfig) -> None:
    """Check the configuration, and serve on the ranks until a signal stops them."""
    warm_up_ranks(WARM)
    job = prepare(config)
    refuse_other_threads(job.settings.hardware, job.target.run.threads, job.target.mesh)
    if is_first():  # here, since a login node has other addresses and ports
        listen(job.settings.host, job.settings.port).close()
    if current_rank() is None:
        stop_on_sigterm()
    with hold_pages(job):
        cut = on_ranks(job.target.mesh, run_rank, job)
    slow = f"; {cut} more had a client that did not send all of it, or read all of its answer, in time" if cut else ""
    say(f"stopped, as asked: all requests were answered{slow}")


if __name__ == "__main__":
    main("serve", task)
