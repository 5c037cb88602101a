"""A web server on this machine, in place of those that files are published on."""
import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def serving(answer: Callable[[str], tuple[int, bytes, int]]) -> Iterator[str]:
    """The server's address; it asks `answer` for the status, the body and the promised length of a path.

    Like the Hub it names a revision and a version of each file.
    """
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, body, length = answer(self.path)
            self.send_response(status)
            for name, value in (("Content-Length", length), ("X-Repo-Commit", 40 * "0"), ("ETag", f'"{hash(self.path)}"')):
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815  the name that http.server looks for

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.handle_error = lambda *who: None  # a client that does not wait
        threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01)).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
