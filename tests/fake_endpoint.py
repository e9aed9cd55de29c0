"""A chat endpoint on the loopback: answers as a judge that it is given, and fails as it is told."""

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import NamedTuple

TEMPLATE = '{respect}\n---\n{query}\n---\n{first}\n---\n{second}'


class Fault(NamedTuple):
    """What happens instead of an answer; status None cuts the connection."""

    status: int | None = 500
    headers: Mapping = MappingProxyType({})
    body: object = None


class Endpoint:
    """Everything that was asked, and the judge (respect, query, first, second) -> text.

    `faults` maps the number of a request, from 0, to a Fault; `gates` to an event that it waits
    for. `usage` False leaves the token counts out.
    """

    def __init__(self, judge, faults=None, gates=None, usage=True):
        self.judge, self.faults, self.gates = judge, faults or {}, gates or {}
        self.usage, self.url = usage, None
        self.asked, self.keys, self.lock = [], [], threading.Lock()
        self.active = self.most_active = 0
        self.arrived = threading.Condition(self.lock)

    def wait_for(self, count):
        """Until so many requests have come."""
        with self.lock:
            assert self.arrived.wait_for(lambda: len(self.asked) >= count, timeout=60)

    def take(self, body, key):
        with self.lock:
            number = len(self.asked)
            self.asked.append(body)
            self.keys.append(key)
            self.active += 1
            self.most_active = max(self.most_active, self.active)
            self.arrived.notify_all()
        return number

    def answer(self, number, body):
        """(status, body, headers)."""
        if gate := self.gates.get(number):
            gate.wait(60)
        fault = self.faults(number) if callable(self.faults) else self.faults.get(number)
        if fault is not None:
            return fault.status, fault.body, fault.headers
        text = self.judge(*body['messages'][-1]['content'].split('\n---\n'))
        message = {'role': 'assistant', 'content': text}
        out = {
            'id': 'x', 'object': 'chat.completion', 'created': 0, 'model': body['model'],
            'choices': [{'index': 0, 'message': message, 'finish_reason': 'stop'}],
        }  # fmt: skip
        if self.usage:
            out['usage'] = {'prompt_tokens': 100, 'completion_tokens': 2, 'total_tokens': 102}
        return 200, out, {}


class Handler(BaseHTTPRequestHandler):
    """Passes requests to the endpoint."""

    protocol_version = 'HTTP/1.1'

    def do_POST(self):
        endpoint = self.server.endpoint
        body = json.loads(self.rfile.read(int(self.headers['content-length'])))
        number = endpoint.take(body, self.headers.get('authorization'))
        try:
            status, out, headers = endpoint.answer(number, body)
        finally:
            with endpoint.lock:
                endpoint.active -= 1
        if status is None:
            self._cut()
            return
        data = out.encode() if isinstance(out, str) else json.dumps(out).encode()
        with contextlib.suppress(ConnectionError):  # who asked may be gone
            self.send_response(status)
            about = {'Content-Type': 'application/json', 'Content-Length': len(data), **headers}
            for name, value in about.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(data)

    def _cut(self):
        """A reset in the middle of the exchange."""
        self.close_connection = True
        linger = struct.pack('ii', 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.rfile.close()
        self.wfile.close()
        self.connection.close()

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass

    def shutdown_request(self, request):
        with contextlib.suppress(OSError):
            super().shutdown_request(request)


@contextlib.contextmanager
def served(endpoint):
    """The endpoint, with its address in `url`."""
    server = Server(('127.0.0.1', 0), Handler)
    server.endpoint = endpoint
    endpoint.url = f'http://127.0.0.1:{server.server_port}/v1'
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        for gate in endpoint.gates.values():
            gate.set()
        server.shutdown()
        thread.join()
        server.server_close()
