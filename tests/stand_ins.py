"""Gateways that do to a proxy what a real one can hardly be made to do."""

import contextlib
import socket
import socketserver
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Semaphore, Thread
from typing import Self

import grpc

from headrace.v1.inference_pb2 import GenerateDelta, GenerateRequest
from tests.proxies import Upstream


class StandIn:
    """Is ready, answers a POST with the length of its body, and Generate with "ok". A context."""

    def __init__(self, host: str = "127.0.0.1", http_port: int = 0, grpc_port: int = 0) -> None:
        self.ready = True
        self.posts = 0
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.send_response(200 if stand_in.ready else 503)
                self.send_header("content-length", "0")
                self.end_headers()

            def do_POST(self) -> None:
                stand_in.posts += 1
                stand_in.post(self, self.rfile.read(int(self.headers["content-length"])))

            def log_message(self, *of: object) -> None:
                pass

        self._http = ThreadingHTTPServer((host, http_port), Handler)
        self._grpc = grpc.server(ThreadPoolExecutor(4))
        generate = grpc.unary_stream_rpc_method_handler(
            self.generate, GenerateRequest.FromString, GenerateDelta.SerializeToString
        )
        service = grpc.method_handlers_generic_handler("headrace.v1.Inference", {"Generate": generate})
        self._grpc.add_generic_rpc_handlers((service,))
        self.http_port = self._http.server_port
        self.grpc_port = self._grpc.add_insecure_port(f"{host}:{grpc_port}")
        self.upstream = Upstream(f"{host}:{self.http_port}", f"{host}:{self.grpc_port}")

    def __enter__(self) -> Self:
        Thread(target=self._http.serve_forever, daemon=True).start()
        self._grpc.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._grpc.stop(None).wait()

    def answer(self, exchange: BaseHTTPRequestHandler, body: bytes) -> None:
        exchange.send_response(200)
        exchange.send_header("content-length", str(len(body)))
        exchange.end_headers()
        exchange.wfile.write(body)

    def post(self, exchange: BaseHTTPRequestHandler, body: bytes) -> None:
        self.answer(exchange, str(len(body)).encode())

    def generate(self, request: GenerateRequest, context: grpc.ServicerContext) -> Iterator[GenerateDelta]:
        yield GenerateDelta(text="ok")


class BreaksOff(StandIn):
    """Closes the connection of a POST that it has read."""

    def post(self, exchange: BaseHTTPRequestHandler, body: bytes) -> None:
        exchange.close_connection = True


class Starts(StandIn):
    """Refuses every call over gRPC, as a gateway that has no model yet."""

    def generate(self, request: GenerateRequest, context: grpc.ServicerContext) -> Iterator[GenerateDelta]:
        context.abort(grpc.StatusCode.UNAVAILABLE, "try again in a moment")
        yield GenerateDelta()


class Holds(StandIn):
    """Begins every call over gRPC, and ends none before it is closed."""

    def __init__(self) -> None:
        super().__init__()
        self._closed = Event()

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        super().__exit__(*error)

    def generate(self, request: GenerateRequest, context: grpc.ServicerContext) -> Iterator[GenerateDelta]:
        yield GenerateDelta(text="x")
        self._closed.wait()


class KeepsStep(StandIn):
    """Streams `events` events, each one only when the one before has been `seen`."""

    def __init__(self, events: int) -> None:
        super().__init__()
        self._events = events
        self.seen = Semaphore(1)

    def post(self, exchange: BaseHTTPRequestHandler, body: bytes) -> None:
        exchange.send_response(200)
        exchange.send_header("content-type", "text/event-stream")
        exchange.send_header("transfer-encoding", "chunked")
        exchange.end_headers()
        for _ in self._steps():
            exchange.wfile.write(b"9\r\ndata: x\n\n\r\n")
        exchange.wfile.write(b"0\r\n\r\n")

    def generate(self, request: GenerateRequest, context: grpc.ServicerContext) -> Iterator[GenerateDelta]:
        for _ in self._steps():
            yield GenerateDelta(text="x")

    def _steps(self) -> Iterator[int]:
        for step in range(self._events):
            assert self.seen.acquire(timeout=60), "the caller is gone"
            yield step


@contextlib.contextmanager
def out_of_reach() -> Iterator[str]:
    """An address that answers no connection, as that of a machine that is gone: the listener's queue is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as waiting:
        with contextlib.suppress(TimeoutError):
            while True:
                waiting.enter_context(socket.create_connection(listener.getsockname(), timeout=0.5))
        host, port = listener.getsockname()
        yield f"{host}:{port}"


class Names:
    """A DNS server to which every name has the addresses that it is given. A context."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses
        names = self

        class Handler(socketserver.DatagramRequestHandler):
            def handle(self) -> None:
                self.wfile.write(names.answer_to(self.rfile.read()))

        self._server = socketserver.ThreadingUDPServer(("127.0.0.1", 0), Handler)
        self.port = int(self._server.server_address[1])

    def __enter__(self) -> Self:
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer_to(self, query: bytes) -> bytes:
        """RFC 1035, sections 4.1.1 to 4.1.4: the head, the question again, and what there is of IPv4 addresses."""
        end = query.index(b"\0", 12) + 5
        (kind,) = struct.unpack("!H", query[end - 4 : end - 2])
        records = [socket.inet_aton(address) for address in self.addresses] if kind == 1 else []
        head = query[:2] + struct.pack("!5H", 0x8180, 1, len(records), 0, 0)
        return head + query[12:end] + b"".join(struct.pack("!3HIH", 0xC00C, 1, 1, 1, 4) + record for record in records)
