"""Serves JSON over HTTP in threads of the test process, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], tuple[int, Any]]


@contextmanager
def json_server(answer: Answer, headers: dict[str, str] | None = None) -> Iterator[Any]:
    """Answer each request with a status and a body: bytes as they are, all else as JSON.

    What is yielded has the `url`, and of every request the content in `calls`, the path in `paths`
    and the headers in `headers`; `under_way` counts the requests that wait for an answer.
    """
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                running.calls.append(request)
                running.paths.append(self.path)
                running.headers.append(dict(self.headers))
                running.under_way += 1
            status, content = answer(request)
            with lock:
                running.under_way -= 1
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *_: object) -> None: ...

    running: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.calls, running.paths, running.headers, running.under_way = [], [], [], 0
    running.url = f"http://127.0.0.1:{running.server_address[1]}/v1"
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield running
    finally:
        running.shutdown()
        running.server_close()


def says(text: str) -> dict[str, Any]:
    """Make the body in which a server of a language model answers."""
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def text_of(request: dict[str, Any]) -> str:
    """Return what a language model is asked, without its images."""
    content = request["messages"][0]["content"]
    return content if isinstance(content, str) else str(content[-1]["text"])


def images_of(request: dict[str, Any]) -> int:
    """Count the images that a language model is shown."""
    content = request["messages"][0]["content"]
    return 0 if isinstance(content, str) else len(content) - 1
