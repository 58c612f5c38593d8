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
        self.n_requests = 0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.n_requests += 1
        answer = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        answer(self, self.server.files.get(unquote(self.path)[1:]))

    def answer(self, status: int, body: bytes, announced: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if announced is None else announced))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def serve(handler: Handler, body: bytes | None) -> None:
    handler.answer(*(404, b"no such file") if body is None else (200, body))
