"""A Cloud Storage in memory: as much of its JSON API as gcsfs, Google's own clients and TensorStore ask of it."""

import json
import os
import pathlib
import random
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlparse

BUCKET = "bucket"


class Bucket:
    """What lies in gs://bucket; `environment` makes another process find it."""

    def __init__(self, port: int) -> None:
        url = f"http://127.0.0.1:{port}"
        self.objects: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        self.uploads: list[tuple[str, bytearray, dict[str, str]]] = []
        self.lock = threading.RLock()
        self.fault_fraction, self.calls, self.faults = 0.0, 0, 0
        self._draw = random.Random(0)
        self.environment = {
            "STORAGE_EMULATOR_HOST": url,  # gcsfs and google-cloud-storage
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # ArrayRecord
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_CLOUD_PROJECT": "project",
            "NO_GCE_CHECK": "true",  # whether this machine is Google's is not asked
        }

    def put(self, name: str, data: bytes) -> None:
        """Writes one object, whole, as the real one does."""
        with self.lock:
            self.objects[name] = data
            self.generations[name] = self.generations.get(name, 0) + 1

    def fails(self) -> bool:
        """Whether this call is one of the `fault_fraction` that fail."""
        with self.lock:
            self.calls += 1
            is_fault = self._draw.random() < self.fault_fraction
            self.faults += is_fault
            return is_fault

    def below(self, prefix: str) -> list[str]:
        """The names that begin so, in order."""
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def about(self, name: str) -> dict[str, Any]:
        """An object's metadata."""
        time = "2026-01-01T00:00:00.000Z"
        return {
            "kind": "storage#object",
            "bucket": BUCKET,
            "name": name,
            "size": str(len(self.objects[name])),
            "generation": str(self.generations[name]),
            "metageneration": "1",
            "updated": time,
            "timeCreated": time,
        }


def run_on(store: Bucket, code: str, *arguments: str, cwd: pathlib.Path) -> str:
    """What Python code prints, in a process of its own that finds the bucket."""
    env = {**os.environ, **store.environment, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def bucket() -> Iterator[Bucket]:
    """An empty bucket that is there inside of the context."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.bucket = Bucket(server.server_port)  # type: ignore[attr-defined]
    serving = threading.Thread(target=server.serve_forever, daemon=True)
    serving.start()
    try:
        yield server.bucket  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        serving.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:  # who has read enough, or was killed, hangs up
            self.close_connection = True

    def handle_one_request(self) -> None:
        self.bucket: Bucket = self.server.bucket  # type: ignore[attr-defined]
        super().handle_one_request()

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        if not self.bucket.fails():
            return True
        self._body()
        self._answer(503, b"Service Unavailable")
        return False

    def do_GET(self) -> None:
        url, query = self._url()
        path = url.removeprefix("/download")
        if found := re.fullmatch(r"/storage/v1/b/[^/]+/o/(.+)", path):
            self._object(unquote(found[1]), is_media=query.get("alt") == "media")
        elif re.fullmatch(r"/storage/v1/b/[^/]+/o/?", path):
            self._list(query.get("prefix", ""), query.get("delimiter", ""))
        elif re.fullmatch(r"/storage/v1/b/[^/]+", path):
            self._answer(200, {"kind": "storage#bucket", "name": BUCKET, "location": "US"})
        elif found := re.fullmatch(rf"/{BUCKET}/(.+)", path):
            self._object(unquote(found[1]), is_media=True)
        else:
            self._answer(404)

    def do_POST(self) -> None:
        url, query = self._url()
        data = self._body()
        if "/b/" in url and f"/b/{BUCKET}/" not in url:
            self._answer(404)
        elif "upload_id" in query:
            self._chunk(int(query["upload_id"]), data)
        elif url.startswith(("/upload/", "/resumable/upload/")):
            self._upload(query, data)
        elif found := re.fullmatch(r"/storage/v1/b/[^/]+/o/(.+)/(moveTo|rewriteTo|copyTo)(?:/b/[^/]+)?/o/(.+)", url):
            self._copy(unquote(found[1]), unquote(found[3]), found[2])
        elif url.startswith("/batch"):
            self._batch(data)
        else:
            self._answer(404)

    def do_PUT(self) -> None:
        _, query = self._url()
        self._chunk(int(query["upload_id"]), self._body())

    def do_DELETE(self) -> None:
        url, _ = self._url()
        with self.bucket.lock:
            was = self.bucket.objects.pop(unquote(url.partition("/o/")[2]), None)
        self._answer(404 if was is None else 204)

    def _object(self, name: str, is_media: bool) -> None:
        with self.bucket.lock:
            data = self.bucket.objects.get(name)
            about = self.bucket.about(name) if data is not None else {}
        if data is None:
            self._answer(404)
        elif not is_media:
            self._answer(200, about)
        elif found := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first = int(found[1]) if found[1] else max(0, len(data) - int(found[2]))
            end = min(int(found[2]) + 1, len(data)) if found[1] and found[2] else len(data)
            if first >= len(data):
                self._answer(416, Content_Range=f"bytes */{len(data)}")
            else:
                place = f"bytes {first}-{end - 1}/{len(data)}"
                self._answer(206, data[first:end], Content_Range=place, x_goog_generation=about["generation"])
        else:
            self._answer(200, data, x_goog_generation=about["generation"])

    def _list(self, prefix: str, delimiter: str) -> None:
        items, prefixes = [], set()
        with self.bucket.lock:
            for name in self.bucket.below(prefix):
                inside, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                if found:
                    prefixes.add(prefix + inside + delimiter)
                else:
                    items.append(self.bucket.about(name))
        self._answer(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def _upload(self, query: dict[str, str], data: bytes) -> None:
        if query["uploadType"] == "resumable":
            self.bucket.uploads.append((json.loads(data or b"{}").get("name") or query["name"], bytearray(), query))
            place = f"http://{self.headers['Host']}/upload?upload_id={len(self.bucket.uploads) - 1}"
            self._answer(200, {}, Location=place)
        elif query["uploadType"] == "media":
            self._put(query["name"], data, query)
        else:
            _, about, content = self._parts(data)
            self._put(json.loads(about)["name"], content, query)

    def _parts(self, data: bytes) -> list[bytes]:
        """The bodies of a multipart request, after an empty one."""
        found = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])
        assert found
        parts = data.split(b"--" + found[1].encode())[:-1]
        bodies = [re.split(rb"\r?\n\r?\n", part, maxsplit=1)[-1] for part in parts]
        return [body.removesuffix(b"\n").removesuffix(b"\r") for body in bodies]

    def _chunk(self, number: int, data: bytes) -> None:
        name, received, query = self.bucket.uploads[number]
        received += data
        total = self.headers.get("Content-Range", "*").rpartition("/")[2]
        if total != "*" and len(received) >= int(total):
            self._put(name, bytes(received), query)
        else:
            self._answer(308, Range=f"bytes=0-{len(received) - 1}")

    def _put(self, name: str, data: bytes, query: dict[str, str]) -> None:
        with self.bucket.lock:
            is_there = name in self.bucket.objects
            expected = query.get("ifGenerationMatch", "")
            if expected and int(expected) != (self.bucket.generations[name] if is_there else 0):
                self._answer(412)
                return
            self.bucket.put(name, data)
            about = self.bucket.about(name)
        self._answer(200, about)

    def _copy(self, name: str, other: str, how: str) -> None:
        with self.bucket.lock:
            if name not in self.bucket.objects:
                self._answer(404)
                return
            self.bucket.put(other, self.bucket.objects[name])
            if how == "moveTo":
                del self.bucket.objects[name]
            about = self.bucket.about(other)
        rewritten = {"done": True, "resource": about, "totalBytesRewritten": about["size"], "objectSize": about["size"]}
        self._answer(200, rewritten if how == "rewriteTo" else about)

    def _batch(self, data: bytes) -> None:
        """Deletions, many in one request."""
        answers = []
        for number, name in enumerate(re.findall(rb"DELETE \S*?/o/([^\s?]+)", data), 1):
            with self.bucket.lock:
                was = self.bucket.objects.pop(unquote(name.decode()), None)
            status = "404 Not Found" if was is None else "204 No Content"
            answers.append(
                f"--of\r\nContent-Type: application/http\r\nContent-ID: <response-{number}>\r\n\r\n"
                f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n\r\n"
            )
        self._answer(200, "".join([*answers, "--of--"]).encode(), Content_Type="multipart/mixed; boundary=of")

    def _url(self) -> tuple[str, dict[str, str]]:
        url = urlparse(self.path)
        return url.path, dict(parse_qsl(url.query))

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _answer(self, status: int, body: bytes | dict[str, Any] = b"", **headers: str) -> None:
        if isinstance(body, dict):
            body, headers = json.dumps(body).encode(), {"Content_Type": "application/json", **headers}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
