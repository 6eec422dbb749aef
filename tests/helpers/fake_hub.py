"""The part of the Hugging Face hub's HTTP interface that models need, on this machine.

As a program it prints its address and serves until its standard input ends.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

BRANCH = "main"


class FakeHub(ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
        commits: repository -> branch or commit -> commit (40 hex digits).
        trees: commit -> path -> content.
        blobs: SHA-256 -> content, of files that are stored by git-lfs.
        asked: "METHOD /path" of every request.
        damaged: paths whose content is sent with a bit turned over.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits: dict[str, dict[str, str]] = {}
        self.trees: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.damaged: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, repo_id: str, files: dict[str, bytes], branch: str = BRANCH) -> str:
        """Puts files into a repository; its other files stay."""
        refs = self.commits.setdefault(repo_id, {})
        tree = dict(self.trees.get(refs.get(branch, ""), {})) | files
        return self.set_tree(repo_id, branch, tree)

    def set_tree(self, repo_id: str, branch: str, tree: dict[str, bytes]) -> str:
        sha = hashlib.sha1(repr((repo_id, len(self.trees), sorted(tree))).encode()).hexdigest()
        self.trees[sha] = tree
        self.commits[repo_id] |= {branch: sha, sha: sha}
        return sha


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    # HTTP/1.0: a connection a request, so that none outlives the server.

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._get(with_body=False)

    def do_GET(self) -> None:
        self._get(with_body=True)

    def _get(self, with_body: bool) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.asked.append(f"{self.command} {path}")
        words = path.strip("/").split("/")
        if words[:2] == ["api", "models"] and len(words) >= 4:
            repo_id, kind = "/".join(words[2:4]), words[4] if len(words) > 4 else "revision"
            sha = self._sha(repo_id, words[5] if len(words) > 5 else BRANCH)
            if sha is None:
                return
            if kind == "revision":
                names = [{"rfilename": name} for name in hub.trees[sha]]
                self._json({"id": repo_id, "modelId": repo_id, "sha": sha, "siblings": names})
            else:
                self._json([_entry(name, data) for name, data in hub.trees[sha].items()])
        elif "resolve" in words:
            repo_id, at = "/".join(words[:2]), words.index("resolve")
            sha = self._sha(repo_id, words[at + 1])
            if sha is None:
                return
            name = "/".join(words[at + 2 :])
            content = hub.trees[sha].get(name)
            if content is None:
                self._error(404, "EntryNotFound")
                return
            headers = {"X-Repo-Commit": sha, "ETag": f'"{_etag(name, content)}"'}
            if name in hub.damaged:
                content = content[:-1] + bytes([content[-1] ^ 1])
            self._send(200, content, headers, with_body)
        else:
            self._error(404, "EntryNotFound")

    def do_POST(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.asked.append(f"POST {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        words = path.strip("/").split("/")
        if self.headers.get("Authorization") != "Bearer hf_good":
            self._error(401, None)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo_id = f"{asked['organization']}/{asked['name']}"
            known = repo_id in hub.commits
            hub.commits.setdefault(repo_id, {})
            if not known:
                hub.set_tree(repo_id, BRANCH, {".gitattributes": b"*.safetensors filter=lfs\n"})
            self._json({"url": f"{hub.url}/{repo_id}", "name": repo_id}, 409 if known else 200)
        elif path == "/api/validate-yaml":
            self._json({"warnings": [], "errors": []})
        elif "preupload" in words:
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for each in files
            ]
            self._json({"files": modes})
        elif path.endswith(".git/info/lfs/objects/batch"):
            upload = {
                each["oid"]: {"upload": {"href": f"{hub.url}/lfs/{each['oid']}"}}
                for each in json.loads(body)["objects"]
            }
            objects = [
                {"oid": each["oid"], "size": each["size"], "actions": upload[each["oid"]]}
                for each in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif "branch" in words:
            repo_id, branch = "/".join(words[2:4]), words[-1]
            hub.commits[repo_id][branch] = hub.commits[repo_id][BRANCH]
            self._json({})
        elif "commit" in words:
            repo_id, branch = "/".join(words[2:4]), words[-1]
            tree = dict(hub.trees[hub.commits[repo_id][branch]])
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    tree[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    tree[value["path"]] = hub.blobs[value["oid"]]
                elif line["key"] == "deletedFile":
                    del tree[value["path"]]
            sha = hub.set_tree(repo_id, branch, tree)
            self._json({"commitUrl": f"{hub.url}/{repo_id}/commit/{sha}", "commitOid": sha})
        else:
            self._error(404, "EntryNotFound")

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.blobs[oid] = content
        self._send(200, b"")

    def _sha(self, repo_id: str, revision: str) -> str | None:
        refs = self.server.commits.get(repo_id)
        if refs is None:
            self._error(401, "RepoNotFound")  # as the hub does: it may be private
            return None
        if revision not in refs:
            self._error(404, "RevisionNotFound")
            return None
        return refs[revision]

    def _json(self, content: Any, code: int = 200) -> None:
        self._send(code, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _error(self, code: int, name: str | None) -> None:
        headers = {"X-Error-Message": "no"} | ({"X-Error-Code": name} if name else {})
        self._send(code, b"{}", headers)

    def _send(
        self, code: int, body: bytes, headers: dict[str, str] | None = None, with_body: bool = True
    ) -> None:
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body and self.command != "HEAD":
            self.wfile.write(body)


def _etag(name: str, content: bytes) -> str:
    if name.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(name: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content)}
    entry["oid"] = hashlib.sha1(content).hexdigest()
    if name.endswith(".safetensors"):
        sha = _etag(name, content)
        entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 130}
    return entry


@contextmanager
def serve() -> Iterator[FakeHub]:
    """A hub for the block."""
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


if __name__ == "__main__":
    with serve() as running:
        print(running.url, flush=True)
        sys.stdin.read()
