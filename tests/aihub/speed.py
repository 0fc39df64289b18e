"""The real client, but impatient and away from the user's own settings."""

from __future__ import annotations

import inspect
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

from qai_hub import api_utils, client
from qai_hub.util import session


@contextmanager
def speed_up(
    *, retries: int = 6, timeout: float = 5.0, poll: float = 2**-5, longest_sleep: float = 0.125
) -> Iterator[None]:
    """Shorten the delays between the client's retries, and keep the machine's settings from it.

    The number of tries stays that of the real client unless set otherwise, so tests see its real requests.
    The environment has a home of its own, no ``.netrc`` (which would replace the token) and no proxy for this machine;
    child processes inherit that, but not the shorter delays.

    Args:
        retries: how often a request is repeated; each costs ``timeout`` when the service hangs.
        timeout: seconds to wait for an answer. Too short a time makes a busy machine repeat requests.
        poll: seconds between two looks at a job. A power of two: the client compares sums of it with ``%``.
        longest_sleep: upper bound of all pauses of ``client.py``, the minutes after HTTP 429 included.
    """
    with ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory())
        ours = ",".join(filter(None, ["127.0.0.1,localhost", os.environ.get("NO_PROXY", "")]))
        environment = {"HOME": home, "NETRC": os.devnull, "NO_PROXY": ours, "no_proxy": ours}
        stack.enter_context(mock.patch.dict(os.environ, environment))
        os.environ.pop("QAIHUB_CLIENT_INI", None)

        def replace(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        replace(session, "MAX_RETRIES", retries)
        replace(session, "BACKOFF_FACTOR", 0.002)
        replace(session, "MAX_WAIT", 0.01)
        replace(session, "REQUEST_TIMEOUT_SECONDS", timeout)
        replace(session, "EXTERNAL_RESPONSE_TIMEOUT_SECONDS", timeout)
        replace(session.create_session, "__defaults__", (True, timeout, "library"))
        for name in ("_try_upload_asset", "_download_to_verified_path"):  # they took the delays at import
            replace(api_utils, name, session.retry_with_backoff()(inspect.unwrap(getattr(api_utils, name))))
        replace(client.Job, "_polling_interval", poll)
        replace(client, "time", SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, longest_sleep))))
        yield
