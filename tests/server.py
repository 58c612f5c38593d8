"""A local web server for tests of downloads."""

import http.server
import threading
from urllib.parse import unquote


class Site(http.server.ThreadingHTTPServer):
    """Serves `files`; `answers` are functions that answer one request each, the last one all later requests."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.answers = [serve]
        self.ranges: list[str | None] = []  # the Range header of every request
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.ranges.append(self.headers.get("Range"))
        answer = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        answer(self, self.server.files.get(unquote(self.path)[1:]))

    def answer(self, status: int, body: bytes, announced: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if announced is None else announced))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def serve(handler: Handler, body: bytes | None) -> None:
    """Answers as a server should: 404 for an unknown file, 206 for a Range, 416 for a Range beyond the end."""
    if body is None:
        handler.answer(404, b"no such file")
        return
    asked = handler.headers.get("Range")
    if asked is None:
        handler.answer(200, body)
        return
    start = int(asked.removeprefix("bytes=").removesuffix("-"))
    if start < len(body):
        handler.answer(206, body[start:], Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")
    else:
        handler.answer(416, b"", Content_Range=f"bytes */{len(body)}")
