"""The web server, in a thread of the first rank's process, until the last request is answered."""

import asyncio
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any

import uvicorn

from longctx.serve.app import Front
from longctx.serve.service import Service

GRACE_S = 10  # after the last answer, for clients that have not read it, or that never send their whole request
_GOODBYE_S = 3.0  # after a failure, for the clients to get their errors


def serve(service: Service, front: Front, app: Any, at: socket.socket, stopping: Callable[[], bool]) -> None:
    """Answer requests at the socket ``at``, until ``stopping`` returns True and the requests so far are answered.

    Call this on the first rank.  ``stopping`` is called after each step.  Before this returns, it lets the other ranks
    leave `follow`.  After a failure, the open requests get an error; then this raises it: `LostPeer` if a rank is
    lost, RuntimeError if the web server ends before it is told to.

    A client that has not sent its whole request, or not read its whole answer, within `GRACE_S` seconds after the last
    answer loses its connection, and ``front.cut`` counts it.
    """
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=GRACE_S)
    server, logger = uvicorn.Server(config), logging.getLogger("uvicorn.error")
    thread = threading.Thread(target=server.run, args=([at],), daemon=True, name="http")
    thread.start()
    try:
        while thread.is_alive():
            service.step()
            if stopping():
                front.closed = "the server is stopping"
                if not service.busy:
                    logger.addFilter(_is_no_cut)
                    server.should_exit = True
        if not server.should_exit:
            raise RuntimeError("the web server has ended by itself; its error is above: start recipes.serve again")
        service.stop()
    except BaseException as failure:
        front.closed = f"the server has failed: {failure}"
        service.fail(front.closed)
        server.should_exit = True
        thread.join(_GOODBYE_S)
        raise
    finally:
        logger.removeFilter(_is_no_cut)


def _is_no_cut(record: logging.LogRecord) -> bool:
    """Return False for uvicorn's records of requests that it cuts: their number, and a traceback for each."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, asyncio.CancelledError) and not record.getMessage().startswith("Cancel ")
