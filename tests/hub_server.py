"""A small Hub on 127.0.0.1 that speaks the protocol of huggingface_hub: repositories, commits, LFS, downloads.

It keeps every commit, so revisions can be read; files above `LFS_BYTES` go through LFS. Its attributes are the switches of
a test: `fail_after = n` drops every connection after n more requests, as a lost network does; `break_off = name` sends half of
a file that is asked for as a whole; `invalid_cards` refuses cards. `log` says what was asked for.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


LFS_BYTES = 1024
MAX_BODY = 64 << 20


@dataclass
class Repository:
    """Commits by id, each a whole tree of path → sha256 of the content; branches by name."""

    private: bool = False
    commits: dict[str, dict[str, str]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, tree: dict[str, str]) -> str:
        name = hashlib.sha1(f"{len(self.commits)} {branch} {sorted(tree.items())}".encode()).hexdigest()
        self.commits[name] = tree
        self.branches[branch] = name
        return name

    def find(self, revision: str) -> str:
        commit = self.branches.get(revision, revision)
        if commit not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def tree(self, revision: str) -> dict[str, str]:
        return self.commits[self.find(revision)]


class Refusal(Exception):
    """An answer with an error: its status, its message, what the Hub calls it in `X-Error-Code`, and more for its body."""

    def __init__(self, status: int, message: str, code: str = "", **more: object) -> None:
        super().__init__(message)
        self.status, self.code, self.content = status, code, {"error": message, **more}


class Hub(ThreadingHTTPServer):
    """The server and all it holds; `url` is what `HF_ENDPOINT` is set to."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.lock = threading.Lock()
        self.log: list[str] = []
        self.fail_after: int | None = None
        self.break_off: str | None = None
        self.invalid_cards = False

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """The content of a repository, such as "datasets/me/store", at a revision."""
        tree = self.repositories[name].tree(revision)
        return {path: self.objects[sha256] for path, sha256 in tree.items()}


class Handler(BaseHTTPRequestHandler):
    """One request: the route is looked up, the answer is JSON or the bytes of a file."""

    server: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 30
    log_message = staticmethod(lambda *args: None)

    def do_any(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        with hub.lock:
            hub.log.append(f"{self.command} {path}")
            if hub.fail_after is not None:
                hub.fail_after -= 1
                if hub.fail_after < 0:
                    self.close_connection = True
                    return self.connection.close()
        self.body = self.rfile.read(min(int(self.headers.get("Content-Length") or 0), MAX_BODY))
        try:
            for methods, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in methods.split():
                    with hub.lock:
                        found = answer(self, **match.groupdict())
                    return self.send(*found) if isinstance(found, tuple) else self.send(200, found, {})
            raise Refusal(404, f"no route for {self.command} {path}", "EntryNotFound")
        except Refusal as error:
            self.send(error.status, error.content, {"X-Error-Code": error.code, "X-Error-Message": str(error)})

    do_GET = do_HEAD = do_POST = do_PUT = do_any

    def send(self, status: int, content: object, headers: dict[str, str]) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for header in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(*header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def repository(self, name: str, write: bool = False) -> Repository:
        found, token = self.server.repositories.get(name), self.headers.get("Authorization")
        if found is None or (found.private and not token):
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        if write and not token:
            raise Refusal(403, "You don't have the rights to write here.")
        return found

    def put(self, content: bytes) -> str:
        name = hashlib.sha256(content).hexdigest()
        self.server.objects[name] = content
        return name

    def create(self):
        wanted = json.loads(self.body)
        kind, repo_id = f"{wanted.get('type', 'model')}s", f"{wanted['organization'] or 'me'}/{wanted['name']}"
        if not self.headers.get("Authorization"):
            raise Refusal(401, "Invalid username or password.")
        name = f"{kind}/{repo_id}"
        about = {"url": f"{self.server.url}/{name.removeprefix('models/')}", "name": repo_id}
        if name in self.server.repositories:
            raise Refusal(409, "You already created this repository", **about)
        self.server.repositories[name] = Repository(private=wanted.get("visibility") == "private")
        self.server.repositories[name].commit("main", {".gitattributes": self.put(b"*.npy filter=lfs\n")})
        return about

    def info(self, name: str, revision: str = "main"):
        repository = self.repository(name)
        commit = repository.find(revision)
        files = [{"rfilename": path} for path in repository.commits[commit]]
        return {"id": name.split("/", 1)[1], "sha": commit, "private": repository.private, "siblings": files}

    def tree(self, name: str, revision: str):
        entries = []
        for path, sha256 in self.repository(name).tree(revision).items():
            content = self.server.objects[sha256]
            entries.append({"type": "file", "path": path, "size": len(content), "oid": blob_id(content)})
            if len(content) > LFS_BYTES:
                entries[-1]["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
        return entries

    def branch(self, name: str, branch: str):
        repository = self.repository(name, write=True)
        if branch in repository.branches:
            raise Refusal(409, "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        return {}

    def squash(self, name: str, branch: str):
        repository = self.repository(name, write=True)
        tree = repository.tree(branch)
        repository.commits.clear()
        repository.commit(branch, tree)
        return {}

    def validate(self):
        if self.server.invalid_cards:
            raise Refusal(400, "no cards today", errors=[{"message": "no cards today"}])
        return {"errors": [], "warnings": []}

    def preupload(self, name: str, revision: str):
        tree, files = self.repository(name, write=True).tree(revision), []
        for file in json.loads(self.body)["files"]:
            mode, oid = "lfs" if file["size"] > LFS_BYTES else "regular", tree.get(file["path"])
            if oid is not None and mode == "regular":
                oid = blob_id(self.server.objects[oid])
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def batch(self, name: str):
        self.repository(name if name.startswith("datasets/") else f"models/{name}", write=True)
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in json.loads(self.body)["objects"]]
        for wanted in objects:
            if wanted["oid"] not in self.server.objects:
                address = f"{self.server.url}/lfs/{wanted['oid']}"
                wanted["actions"] = {"upload": {"href": address}, "verify": {"href": f"{address}/verify"}}
        return {"transfer": "basic", "objects": objects}

    def upload(self, oid: str):
        self.put(self.body)
        return self.verify(oid)

    def verify(self, oid: str):
        if oid not in self.server.objects:
            raise Refusal(404, f"no content with the sha256 {oid} has arrived")
        return {}

    def commit(self, name: str, revision: str):
        repository = self.repository(name, write=True)
        head = repository.find(revision)
        tree = dict(repository.commits[head])
        for item in map(json.loads, self.body.splitlines()):
            key, value = item["key"], item["value"]
            if key == "header" and value.get("parentCommit", head) != head:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            if key == "file":
                tree[value["path"]] = self.put(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                self.verify(value["oid"])
                tree[value["path"]] = value["oid"]
            elif key == "deletedFile" and tree.pop(value["path"], None) is None:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        commit = repository.commit(revision, tree)
        address = f"{self.server.url}/{name.removeprefix('models/')}/commit/{commit}"
        return {"commitUrl": address, "commitOid": commit, "success": True}

    def resolve(self, name: str, revision: str, path: str):
        repository = self.repository(name if name.startswith("datasets/") else f"models/{name}")
        commit = repository.find(revision)
        if path not in repository.commits[commit]:
            raise Refusal(404, f"{path} is not there", "EntryNotFound")
        sha256 = repository.commits[commit][path]
        content = self.server.objects[sha256]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob_id(content)}"'}
        if len(content) > LFS_BYTES:
            headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            self.server.log.append(f"RANGE {path}")
            headers["Content-Range"] = f"bytes {wanted[1]}-{len(content) - 1}/{len(content)}"
            return 206, content[int(wanted[1]) :], headers
        if self.server.break_off == path and self.command == "GET":
            self.close_connection = True
            return 200, content[: len(content) // 2], {**headers, "Content-Length": str(len(content))}
        return 200, content, headers


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


API = r"/api/(?P<name>(models|datasets)/[\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, Callable]] = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", API, Handler.info),
    ("GET", rf"{API}/revision/(?P<revision>.+)", Handler.info),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)", Handler.tree),
    ("POST", rf"{API}/branch/(?P<branch>.+)", Handler.branch),
    ("POST", rf"{API}/super-squash/(?P<branch>.+)", Handler.squash),
    ("POST", rf"{API}/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", rf"{API}/commit/(?P<revision>.+)", Handler.commit),
    ("POST", r"/(?P<name>(datasets/)?[\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", Handler.upload),
    ("POST", "/lfs/(?P<oid>[0-9a-f]{64})/verify", Handler.verify),
    ("GET HEAD", r"/(?P<name>(datasets/)?[\w.-]+/[\w.-]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub that runs in a thread while the block does."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join(5)
