"""AI Hub's client with requests that are safe to lose.

A request that makes something (a model, a data set, a job) is never simply repeated: when its reply is lost, the
service is first asked for what bears the name that was given. For that the client's own repeating is switched off,
which does not ask.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from lightning_quant.errors import (
    ConfigurationError,
    DeviceError,
    DeviceTimeoutError,
    DeviceUnavailableError,
    LightningQuantError,
)

T = TypeVar("T")

# How far back a lost submission is looked for among the newest models, data sets and jobs.
LOOK_BACK = 200
PAGE = 50


class Gone(DeviceError):
    """Something in the journal is no longer at the service."""


class Service:
    """The client, its requests made safe to lose.

    Args:
        profile: name of the configuration, see :class:`~lightning_quant.deploy.targets.aihub.target.AiHubTarget`.
        patience: seconds for which a failing request is tried again.
        deadline: :func:`time.monotonic` at which everything has to be done.
    """

    def __init__(self, profile: str | None, patience: float, deadline: float) -> None:
        import qai_hub
        from qai_hub import api_utils, public_rest_api
        from qai_hub.util import session

        session.MAX_RETRIES = 0  # it repeats POSTs whose reply is late or lost, and so makes things twice
        self.api = public_rest_api
        path = Path(api_utils.get_config_path(profile))
        try:
            self.config = api_utils.load_api_config_from_file(str(path))
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read: {error.strerror or 'not there'}.") from None
        except Exception:  # configparser's message quotes the line, token included
            raise ConfigurationError(
                f"{path} is not a valid configuration of AI Hub (not shown here, for it holds the token): expected "
                "[api] with api_token, api_url and web_url. Run `qai-hub configure --api_token <token>`."
            ) from None
        token = self.config.api_token
        if not token.isascii() or not token.isprintable() or " " in token:
            # an indented line after it belongs to it for configparser; requests would quote it in an error
            raise ConfigurationError(
                f"api_token in {path} holds spaces, line breaks or letters no token has (not shown here): expected one "
                "word. Run `qai-hub configure --api_token <token>` to write it again."
            )
        self.config.verbose = False
        self.client = qai_hub.Client(config=self.config)
        self.hub = qai_hub
        self.patience = patience
        self.deadline = deadline

    def read(self, what: str, request: Callable[[], T]) -> T:
        """Send a request that changes nothing; repeat it until it succeeds or patience ends."""
        return self._insist(what, request, lambda: None)

    def make(self, what: str, request: Callable[[], T], find: Callable[[], T | None]) -> T:
        """Send a request that makes something; before it is repeated, look for what it may have made."""
        return self._insist(what, request, find)

    def _insist(self, what: str, request: Callable[[], T], find: Callable[[], T | None]) -> T:
        from qai_hub import UserError

        give_up = min(time.monotonic() + self.patience, self.deadline)
        for attempt in count():
            try:
                if attempt and (found := find()) is not None:
                    return found
                return request()
            except UserError as error:
                if "could not be found" in str(error) or "expired dataset" in str(error):
                    raise Gone(f"AI Hub does not know {what} any more: {self._without_token(error)}") from None
                raise DeviceError(f"AI Hub refused {what}: {self._without_token(error)}") from None
            except LightningQuantError:
                raise
            except Exception as error:  # the client raises what its parts raise: AssertionError, DecodeError …
                wait = min(0.5 * 2**attempt, 20.0)
                if self._status(error) == 404:
                    raise Gone(f"AI Hub does not know {what} any more: {self._without_token(error)}") from None
                if self._is_final(error):
                    raise DeviceError(f"AI Hub refused {what}: {self._without_token(error)}") from None
                if time.monotonic() + wait > give_up:
                    self._give_up(what, error)
                time.sleep(wait)
        raise AssertionError

    def _status(self, error: Exception) -> int | None:
        return getattr(error, "status_code", None) or getattr(error.__cause__, "status_code", None)

    def _is_final(self, error: Exception) -> bool:
        status = self._status(error)
        return isinstance(status, int) and 400 <= status < 500 and status != 429

    def _give_up(self, what: str, error: Exception) -> NoReturn:
        reason = f"{type(error).__name__}: {self._without_token(error)}"
        if time.monotonic() >= self.deadline - 1:
            raise DeviceTimeoutError(
                f"AI Hub did not finish in time: {what} ({reason}). What was started is in the journal; run again to "
                "resume."
            ) from None
        raise DeviceUnavailableError(
            f"AI Hub failed for {self.patience:g} s in a row at {what} ({reason}). What was begun is in the journal; "
            "run again to resume."
        ) from None

    def _without_token(self, error: Exception) -> str:
        text, token = str(error).strip() or "no reason given", self.config.api_token
        for secret in (token, repr(token)[1:-1]):  # some messages quote what was sent
            text = text.replace(secret, "***")
        return text

    def find_by_name(self, name: str, page: Callable[[int], list[Any]]) -> Any | None:
        """Find the newest thing of that name among the newest ones; ``page`` lists those from an offset on."""
        for offset in range(0, LOOK_BACK, PAGE):
            items = page(offset)
            for item in items:
                if item.name == name:
                    return item
            if len(items) < PAGE:
                break
        return None
