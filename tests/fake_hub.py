"""The part of the Hugging Face hub that `datasets` asks for a repository of files, from a folder on
this machine."""
import contextlib
import hashlib
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c0ffee" * 6 + "c0ff"


@contextlib.contextmanager
def serve(folder):
    """Inside, every repository of the hub at the address that this yields has the files of
    `folder`. Yields (address, [what was asked])."""
    asked = []

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            asked.append(self.path)

        def answer(self, code, body=b"", **head):
            self.send_response(code)
            for name, value in {"Content-Length": len(body), **head}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
            if "/tree/" in path:
                inside = path.split("/tree/")[1].partition("/")[2]
                inside = inside.removeprefix("convert/parquet").strip("/")
                found = [self.entry(file) for file in sorted((folder / inside).glob("*"))]
                self.answer(200 if found else 404, json.dumps(found).encode(),
                            Content_Type="application/json")
            elif "/resolve/" in path:
                file = folder / path.split("/resolve/")[1].partition("/")[2]
                if not file.is_file():
                    self.answer(404, X_Error_Code="EntryNotFound")
                    return
                body, start = (file.read_bytes(),
                               self.headers.get("Range", "bytes=0-").split("=")[1].split("-"))
                part = body[int(start[0]):int(start[1]) + 1 if start[1] else None]
                last = int(start[0]) + len(part) - 1
                range_ = {"Content_Range": f"bytes {start[0]}-{last}/{len(body)}"}
                self.answer(206 if "Range" in self.headers else 200, part,
                            ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=COMMIT,
                            Accept_Ranges="bytes", **(range_ if "Range" in self.headers else {}))
            else:
                said = {"id": "some/set", "sha": COMMIT, "siblings": [], "private": False,
                        "gated": False, "tags": []}
                self.answer(200, json.dumps(said).encode(), Content_Type="application/json")
        do_HEAD = do_GET

        def entry(self, file):
            kind = {"type": "directory", "oid": "0" * 40, "size": 0}
            if file.is_file():
                kind = {"type": "file", "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                        "size": file.stat().st_size}
            return {**kind, "path": str(file.relative_to(folder))}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
