"""A server on loopback that speaks what huggingface_hub asks of the Hub: files of model repositories, and uploads.

with HubServer(folder) as hub: ... subprocess with env=hub.environment(home)

`folder` holds org/name/REVISION/files. `hub.requests` is what was asked ("HEAD /org/name/resolve/main/config.json"),
`hub.faults` what is to go wrong: {"delay": seconds before every answer, "status": of every answer, "truncate": bytes of
a body that are sent}. A process sets them for itself by a GET of /faults?JSON.
"""

import base64
import hashlib
import json
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


def commit_of(revision: Path) -> str:
    """A commit hash for the contents of a revision's folder."""
    digest = hashlib.sha1(revision.parent.name.encode())
    for path in sorted(revision.rglob("*")):
        digest.update(path.name.encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


class HubServer:
    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.requests: list[str] = []
        self.faults: dict = {}
        self.uploads: dict[str, bytes] = {}  # by SHA-256, before they are committed
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """For a process that has this server for a Hub and `home` for a cache."""
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()
        }
        return kept | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
            **more,
        }

    def files_asked(self, method: str = "GET") -> list[str]:
        """The files that were asked for so, in order."""
        return [line.rpartition("/")[2] for line in self.requests if line.startswith(method) and "/resolve/" in line]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.path.startswith("/faults?"):
            self.server_hub.faults = json.loads(unquote(self.path.partition("?")[2]))
            self._send(200, b"")
            return
        if self._begin():
            return
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)", self.path):
            self._file(*match.groups())
        elif match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/([\w.-]+))?(?:\?.*)?", self.path):
            self._info(match[1], match[2] or "main")
        else:
            self._error(404, "EntryNotFound")

    def do_POST(self) -> None:
        if self._begin():
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        if "Authorization" not in self.headers and self.path.startswith("/api/"):
            self._error(401, None)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            (self.server_hub.folder / name / "main").mkdir(parents=True, exist_ok=True)
            self._json({"url": f"{self.server_hub.endpoint}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/models/[\w.-]+/[\w.-]+/preupload/main(?:\?.*)?", self.path):
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": f, "uploadMode": "lfs" if f.endswith(".safetensors") else "regular"} for f in files]
            self._json({"files": [{**mode, "shouldIgnore": False, "oid": None} for mode in modes]})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            base = self.server_hub.endpoint + "/lfs/"
            objects = [
                {**o, "authenticated": True, "actions": {"upload": {"href": base + o["oid"], "header": {}}}}
                for o in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/main(?:\?.*)?", self.path):
            self._commit(match[1], [json.loads(line) for line in body.splitlines() if line])
        else:
            self._error(404, "RepoNotFound")

    def do_PUT(self) -> None:
        if self._begin():
            return
        data = self.rfile.read(int(self.headers["Content-Length"]))
        digest = hashlib.sha256(data).hexdigest()
        if self.path != f"/lfs/{digest}":
            self._error(400, None)
            return
        self.server_hub.uploads[digest] = data
        self._send(200, b"")

    def _begin(self) -> bool:
        """Notes the request; whether it was answered by a fault."""
        hub = self.server_hub
        hub.requests.append(f"{self.command} {self.path}")
        time.sleep(hub.faults.get("delay", 0))
        if "status" in hub.faults:
            self._error(hub.faults["status"], None)
        return "status" in hub.faults

    def _file(self, repo: str, revision: str, name: str) -> None:
        folder = self._revision(repo, revision)
        if folder is None:
            return
        path = folder / name
        if not path.is_file():
            self._error(404, "EntryNotFound", {"X-Repo-Commit": commit_of(folder)})
            return
        data = path.read_bytes()
        headers = {"X-Repo-Commit": commit_of(folder), "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        if name.endswith((".safetensors", ".pth", ".bin")):
            headers |= {
                "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Linked-Size": str(len(data)),
            }
        status = 200
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            headers["Content-Range"] = f"bytes {match[1]}-{len(data) - 1}/{len(data)}"
            data, status = data[int(match[1]) :], 206
        self._send(status, data, headers)

    def _info(self, repo: str, revision: str) -> None:
        folder = self._revision(repo, revision)
        if folder is not None:
            names = [{"rfilename": str(p.relative_to(folder))} for p in folder.rglob("*") if p.is_file()]
            self._json({"id": repo, "modelId": repo, "sha": commit_of(folder), "siblings": names, "private": False})

    def _revision(self, repo: str, revision: str) -> Path | None:
        """The folder of a revision, by its name or its commit; None after an answer that there is none."""
        root = self.server_hub.folder / repo
        if not root.is_dir():
            self._error(404, "RepoNotFound")
            return None
        for folder in root.iterdir():
            if revision in (folder.name, commit_of(folder)):
                return folder
        self._error(404, "RevisionNotFound")
        return None

    def _commit(self, repo: str, lines: list[dict]) -> None:
        folder = self.server_hub.folder / repo / "main"
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                (folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                (folder / value["path"]).write_bytes(self.server_hub.uploads[value["oid"]])
        oid = commit_of(folder)
        self._json({"commitUrl": f"{self.server_hub.endpoint}/{repo}/commit/{oid}", "commitOid": oid, "success": True})

    def _chunks(self) -> bytes:
        out = b""
        while size := int(self.rfile.readline(), 16):
            out += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return out

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str | None, headers: dict | None = None) -> None:
        self._send(status, b"", (headers or {}) | ({"X-Error-Code": code} if code else {}))

    def _send(self, status: int, body: bytes, headers: dict | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            cut = self.server_hub.faults.get("truncate", len(body))
            self.wfile.write(body[:cut])
            if cut < len(body):
                self.close_connection = True
