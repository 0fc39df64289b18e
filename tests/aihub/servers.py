"""The stand-in's two ports: HTTP around the service, and the storage of files."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from requests_toolbelt import MultipartDecoder  # type: ignore[import-untyped]

from tests.aihub.faults import Fault, Faults
from tests.aihub.service import Call, Refusal, Service, etag
from tests.aihub.store import Request, Store

_PROTOBUF = "application/x-protobuf"


@dataclass(frozen=True)
class Behind:
    """What both ports work with.

    Args:
        store, faults, service: what is kept, what goes wrong, what is answered.
        token: gives the token that is let in.
        stopping: is set when no more is to be done.
        die: stops both ports.
    """

    store: Store
    faults: Faults
    service: Service
    token: Callable[[], str]
    stopping: threading.Event
    die: Callable[[], None]


class Server(ThreadingHTTPServer):
    daemon_threads = False  # so that closing waits for requests being answered
    request_queue_size = 64

    behind: Behind

    def __init__(self, port: int, handler: type[Handler]) -> None:
        super().__init__(("127.0.0.1", port), handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections break, of the client's or a fault's making; anything else shows as a thread's traceback."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """What both ports have in common: reading a request, logging it and the faults.

    HTTP/1.0, so that no connection outlives its request, and with it a stop.
    """

    server: Server
    timeout = 10  # seconds; a client that says nothing must not keep a stop waiting

    def do_GET(self) -> None:
        self._handle()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """The stand-in has a log of its own."""

    @property
    def behind(self) -> Behind:
        return self.server.behind

    def _handle(self) -> None:
        raise NotImplementedError

    def _refuse(self, status: int, detail: str, headers: dict[str, str]) -> None:
        raise NotImplementedError

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _wait(self, seconds: float | None = None) -> None:
        self.behind.stopping.wait(seconds)

    def _fail(self, fault: Fault) -> None:
        """All faults that prevent what was asked for."""
        match fault.effect:
            case "answer":
                wait = {"Retry-After": str(int(fault.seconds))} if fault.seconds else {}
                self._refuse(fault.status, fault.text, wait)
            case "hang":
                self._wait()
            case "die":
                self.behind.die()
            case "garbage":
                self._send(200, b"\xff\xfenot protobuf", _PROTOBUF)
            case "html":
                self._send(200, b"<html><body>Please log in.</body></html>", "text/html")
            case "empty":
                self._send(200, b"", _PROTOBUF)
            case "cut":
                pass
            case other:
                raise AssertionError(f"fault {other!r} does not fit {self.command} {self.path}")

    def _deliver(self, fault: Fault | None, send: Callable[[], None]) -> None:
        """Send an answer, unless a fault loses or delays it."""
        if fault is not None and fault.effect == "lose reply":
            return
        if fault is not None and fault.effect == "late":
            self._wait(fault.seconds)
        send()

    def _send(self, status: int, body: bytes, content_type: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)


class ApiHandler(Handler):
    """The interface: protobuf messages, and errors as JSON."""

    def _handle(self) -> None:
        call = Call(self.command, self.path, self._body())
        if self.behind.stopping.is_set():
            return
        try:
            self.behind.store.log(call.logged())
            fault = self.behind.faults.take(call.address)
            if fault is not None and fault.effect not in ("lose reply", "late", "status", "fail", "stuck"):
                self._fail(fault)
                return
            if self.headers.get("Authorization") != f"token {self.behind.token()}":
                raise Refusal(401, "Invalid token.")
            message = self.behind.service.answer(call, fault).SerializeToString()
        except Refusal as refusal:
            self._refuse(refusal.status, refusal.detail, {})
            return
        self._deliver(fault, lambda: self._send(201 if call.creates else 200, message, _PROTOBUF))

    def _refuse(self, status: int, detail: str, headers: dict[str, str]) -> None:
        self._send(status, json.dumps({"detail": detail}).encode(), "application/json", headers)


class BlobHandler(Handler):
    """The storage: files by URLs that need no token, and errors as XML, as S3 has them."""

    def _handle(self) -> None:
        path = urlsplit(self.path).path.strip("/")
        if self.behind.stopping.is_set():
            return
        self.behind.store.log(Request(self.command, f"/{path}", "blobs", ""))
        fault = self.behind.faults.take(f"{self.command} blobs/{path}")
        if fault is not None and fault.effect == "cut":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
        if fault is not None and fault.effect not in ("lose reply", "late", "no etag", "truncate"):
            if fault.effect == "answer":
                self._body()
            self._fail(fault)
            return
        if self.headers.get("Authorization"):
            self._refuse(400, "Only one way to authenticate is allowed.", {})
            return
        if self.command == "GET":
            self._download(path, fault)
        else:
            self._upload(path, self._body(), fault)

    def _download(self, path: str, fault: Fault | None) -> None:
        file = self.behind.store.blob(path.split("/")[-1])
        if not file.is_file():
            self._refuse(404, "The specified key does not exist.", {})
            return
        content = file.read_bytes()
        sent = content[: len(content) // 2] if fault is not None and fault.effect == "truncate" else content
        length = {"Content-Length": str(len(content))}
        self._deliver(fault, lambda: self._send(200, sent, "application/octet-stream", length))

    def _upload(self, path: str, body: bytes, fault: Fault | None) -> None:
        """``upload/<model>/<part>`` by PUT, ``upload/<dataset>`` as a form's field by POST."""
        store, place = self.behind.store, path.split("/")[1:]
        headers: dict[str, str] = {}
        if len(body) < int(self.headers.get("Content-Length", 0)):  # the client broke off
            return
        if self.command == "PUT" and len(place) == 2:
            store.write(store.blob(f"{place[0]}.part{place[1]}"), body)
            if fault is None or fault.effect != "no etag":
                headers["ETag"] = etag(body)
        else:
            form = {_field(part.headers): part.content for part in MultipartDecoder(body, self._content_type).parts}
            if form.get("key") != place[0].encode():
                self._refuse(403, "The form lacks the fields that came with the URL.", {})
                return
            store.write(store.blob(place[0]), form["file"])
        status = 200 if self.command == "PUT" else 204
        self._deliver(fault, lambda: self._send(status, b"", "application/xml", headers))

    @property
    def _content_type(self) -> str:
        return self.headers.get("Content-Type", "")

    def _refuse(self, status: int, detail: str, headers: dict[str, str]) -> None:
        code = {403: "AccessDenied", 404: "NoSuchKey", 503: "SlowDown"}.get(status, "InvalidRequest")
        error = f"<Error><Code>{code}</Code><Message>{detail}</Message></Error>"
        self._send(status, error.encode(), "application/xml", headers)


def _field(headers: Any) -> str:
    """The name of a form's field."""
    disposition: str = headers[b"Content-Disposition"].decode()
    return disposition.split('name="')[1].split('"')[0]
