"""A stand-in of the Hugging Face Hub: the part of its HTTP interface that pushing and pulling a model needs."""

import base64
import json
import threading
import urllib.parse
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "a-token"
COMMIT = "0123456789abcdef" * 2 + "01234567"


class HubStandIn:
    """Repositories as dicts of contents by file name.

    :param repos: by "organisation/name". A content may be an iterator of bytes: it is sent for as long as it lasts
    :param told_sizes: sizes that the hub tells in place of the real ones, by file name
    """

    def __init__(self, repos=None, told_sizes=None):
        self.repos = {} if repos is None else repos
        self.told_sizes = told_sizes or {}
        self.commits = []
        self.created = []
        self.requests = []

    def size(self, name, content):
        return self.told_sizes.get(name, len(content) if isinstance(content, bytes) else 1)

    def info(self, repo):
        siblings = [{"rfilename": name, "size": self.size(name, content)} for name, content in repo[1].items()]
        return {"id": repo[0], "_id": "1", "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}

    def commit(self, name, lines):
        repo = self.repos[name]
        for line in map(json.loads, lines):
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                repo[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "deletedFile"
                del repo[value["path"]]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code):
        self.answer({"error": "not found"}, 404, X_Error_Code=code, X_Error_Message="not found")

    def stream(self, chunks):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for chunk in chunks:
                self.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            # The client has had enough
            self.close_connection = True

    def parts(self):
        self.server.hub.requests.append(f"{self.command} {self.path}")
        return [urllib.parse.unquote(part) for part in self.path.partition("?")[0].strip("/").split("/")]

    def do_GET(self):
        hub, parts = self.server.hub, self.parts()
        if parts == ["api", "whoami-v2"]:
            is_known = self.headers["Authorization"] == f"Bearer {TOKEN}"
            self.answer({"name": "tester", "type": "user", "orgs": []}, 200 if is_known else 401)
        elif parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            if name in hub.repos:
                self.answer(hub.info((name, hub.repos[name])))
            else:
                self.missing("RepoNotFound")
        elif len(parts) == 5 and parts[2] == "resolve" and parts[4] in hub.repos.get("/".join(parts[:2]), {}):
            content = hub.repos["/".join(parts[:2])][parts[4]]
            if isinstance(content, bytes):
                self.answer(content, X_Repo_Commit=COMMIT, ETag='"1"')
            else:
                self.stream(content)
        else:
            self.missing("EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self):
        hub, parts = self.server.hub, self.parts()
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
        body = self.chunks() if chunked else self.rfile.read(int(self.headers["Content-Length"]))
        if parts == ["api", "validate-yaml"]:
            self.answer({"errors": [], "warnings": []})
        elif self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid credentials"}, 401)
        elif parts == ["api", "repos", "create"]:
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            hub.created.append(wanted)
            is_new = name not in hub.repos
            hub.repos.setdefault(name, {})
            url = f"http://{self.headers['Host']}/{name}"
            self.answer({"url": url, "id": name}, 200 if is_new else 409)
        elif parts[4] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        else:
            assert parts[4] == "commit"
            hub.commit("/".join(parts[2:4]), body.splitlines())
            url = f"http://{self.headers['Host']}/{'/'.join(parts[2:4])}/commit/{COMMIT}"
            self.answer(
                {"commitUrl": url, "commitOid": COMMIT, "pullRequestUrl": None, "hookOutput": "", "success": True}
            )

    def chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body


@contextmanager
def served(hub):
    """Serve a hub on this machine, and give its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = hub
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def reach(monkeypatch, address, token=TOKEN):
    """Let the hub's client in this process talk to an address, which it reads from HF_ENDPOINT when it is imported."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/no/such/file")
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
