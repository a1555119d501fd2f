""" A stand-in for the Hugging Face Hub and for plain download hosts, on 127.0.0.1, for the real clients.

It supports the part of the hub's protocol that `huggingface_hub` needs to download and upload models, and serves plain
files for `torch.hub`. Faults can be injected. The fixtures that use it are in `conftest.py`. A client in this process
uses the server without any setting, a client in a subprocess needs `env=client_env`.
"""
import base64
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Tuple, Union
from urllib.parse import unquote, urlsplit

Content = Union[bytes, str, Path]
LFS_SUFFIXES = ('.safetensors', '.bin', '.pth')
BODY_FAULTS = ('truncate', 'short', 'garbage', 'html', 'claim', 'endless', 'part')


class _File:
    """The content of a file, with the hashes that the hub reports. They are computed when they are asked for."""

    def __init__(self, content: Content):
        content = content.read_bytes() if isinstance(content, Path) else content
        self.data = content.encode() if isinstance(content, str) else content
        self.size = len(self.data)

    @functools.cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @functools.cached_property
    def git_oid(self) -> str:
        return hashlib.sha1(b'blob %d\0' % self.size + self.data).hexdigest()


@dataclass
class _Repo:
    commits: Dict[str, Dict[str, _File]] = field(default_factory=dict)
    refs: Dict[str, str] = field(default_factory=dict)
    messages: List[str] = field(default_factory=list)
    private: bool = False

    def commit(self, files: Dict[str, _File], message: str = '', sha: Optional[str] = None, ref: str = 'main') -> str:
        sha = sha or hashlib.sha1(f'{len(self.commits)} {ref} {message}'.encode()).hexdigest()
        self.commits[sha], self.refs[ref] = files, sha
        self.messages.append(message)
        return sha


class LoopbackServer:
    """The server. It runs in threads of this process until `close`. See the docstring of the module."""

    def __init__(self):
        self.clear()
        handler = type('Handler', (_Handler,), dict(loopback=self))
        self._server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
        self._server.daemon_threads = True
        # By its other name it is the host of large files: the client does not follow a redirect to another host itself.
        port = self._server.server_address[1]
        self.url, self.cdn_url = f'http://127.0.0.1:{port}', f'http://localhost:{port}'
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def clear(self) -> None:
        """Forget all repositories, files, faults and requests."""
        self._repos: Dict[str, _Repo] = {}
        self._files: Dict[str, _File] = {}
        self._faults: List[list] = []  # kind, path, how often it is left
        self.requests: List[Tuple[str, str]] = []
        self.sent = 0  # bytes of endless files

    def add_repo(
            self, repo_id: str, files: Mapping[str, Content], commit: Optional[str] = None, ref: str = 'main') -> str:
        """Add a commit with exactly `files` (name to bytes, text, or path) to a model repository. Return its hash.

        The branch or tag `ref` then points to this commit.
        """
        files = {name: _File(content) for name, content in files.items()}
        return self._repos.setdefault(repo_id, _Repo()).commit(files, sha=commit, ref=ref)

    def repo_files(self, repo_id: str) -> Dict[str, bytes]:
        """Return the names and contents of the files in a repository, {} if there is no repository."""
        repo = self._repos.get(repo_id)
        return {name: f.data for name, f in repo.commits[repo.refs['main']].items()} if repo else {}

    def is_private(self, repo_id: str) -> bool:
        return self._repos[repo_id].private

    def has_repo(self, repo_id: str) -> bool:
        return repo_id in self._repos

    def commit_messages(self, repo_id: str) -> List[str]:
        """Return the messages of all commits of a repository, oldest first."""
        return list(self._repos[repo_id].messages)

    def add_file(self, path: str, content: Content) -> str:
        """Serve a plain file, and return its url."""
        path = '/' + path.lstrip('/')
        self._files[path] = _File(content)
        return self.url + path

    def fail(self, kind: Union[str, int], path: str = '', times: float = math.inf) -> None:
        """Inject a fault into requests that match.

        Args:
            kind: A status code, or
                'drop': close the connection without an answer;
                'truncate': send the headers of the whole file but only its first half, then close the connection;
                'short': send the first half as if it were the whole file;
                'garbage': send other bytes of the right length;
                'html': send a web page;
                'claim': declare a length of 10 TB;
                'endless': send the file again and again, without a length;
                'part': stop in the middle of a part of a file without a length.
            path: Regular expression that is searched in the path of a request. Requests for large files of a
                repository match by the path in the repository too, although the bytes come from /cdn/, as on the hub.
            times: Number of requests that fail.
        """
        assert isinstance(kind, int) or kind in ('drop', *BODY_FAULTS)
        self._faults.append([kind, path, times])

    def heal(self) -> None:
        """Remove all faults."""
        self._faults.clear()

    def count(self, method: str, path: str = '') -> int:
        """Return the number of requests with this method and with a path that matches the regular expression."""
        return sum(m == method and bool(re.search(path, p)) for m, p in self.requests)

    def _fault(self, method: str, path: str) -> Union[str, int, None]:
        for fault in self._faults:
            kind, pattern, left = fault
            if left and re.search(pattern, path) and (method == 'GET' or kind not in BODY_FAULTS):
                fault[2] -= 1
                return kind
        return None


class _Error(Exception):
    """An error as an answer: status, message, the code that the hub's client reads, and the commit asked for."""


class _Handler(BaseHTTPRequestHandler):
    loopback: LoopbackServer
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True
    # (method, path, name of the method that answers)
    ROUTES = [(method, path.replace('REPO', '(?P<repo>[^/]+/[^/]+)').replace('REV', '(?P<revision>[^/]+)'), name)
              for method, path, name in (
        ('GET', '/api/models/REPO', 'model_info'),
        ('GET', '/api/models/REPO/revision/REV', 'model_info'),
        ('POST', '/api/repos/create', 'create_repo'),
        ('POST', '/api/validate-yaml', 'validate_yaml'),
        ('POST', '/api/models/REPO/preupload/REV', 'preupload'),
        ('POST', '/api/models/REPO/commit/REV', 'commit'),
        ('GET', '/REPO/resolve/REV/(?P<name>.+)', 'resolve'),
        ('GET', '/cdn/REV/REPO/(?P<name>.+)', 'cdn'),
    )]

    def log_message(self, *args):
        pass

    def answer(self):
        server = self.loopback
        path = urlsplit(self.path).path
        self.body = self.read_body()
        server.requests.append((self.command, path))
        self.fault = server._fault(self.command, path)
        if self.fault == 'drop':
            self.drop()
            return
        try:
            if isinstance(self.fault, int):
                raise _Error(self.fault, 'Injected fault')
            file = server._files.get(unquote(path))
            if file is not None:
                self.send_file(file)
                return
            for method, pattern, name in self.ROUTES:
                m = re.fullmatch(pattern, path)
                if m and method == self.command.replace('HEAD', 'GET'):
                    getattr(self, name)(**{k: unquote(v) for k, v in m.groupdict().items() if v is not None})
                    return
            raise _Error(404, 'Not found')
        except _Error as e:
            status, message, *more = e.args
            headers = {'X-Error-Message': message, **dict(zip(('X-Error-Code', 'X-Repo-Commit'), more))}
            self.send_json({'error': message}, status, headers)

    do_GET = do_HEAD = do_POST = answer

    def read_body(self) -> bytes:
        if 'chunked' not in self.headers.get('Transfer-Encoding', ''):
            return self.rfile.read(int(self.headers.get('Content-Length') or 0))
        parts = []
        while size := int(self.rfile.readline().split(b';')[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(parts)

    def drop(self):
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def send(self, status: int, body: bytes = b'', headers: Mapping[str, str] = {}):
        self.send_response(status)
        for key, value in {'Content-Length': str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(b'' if self.command == 'HEAD' else body)

    def send_json(self, value, status: int = 200, headers: Mapping[str, str] = {}):
        self.send(status, json.dumps(value).encode(), {'Content-Type': 'application/json', **headers})

    def send_file(self, file: _File, headers: Mapping[str, str] = {}):
        m = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))  # of a client that goes on after a fault
        start = int(m[1]) if m else 0
        body = file.data[start:]
        if self.fault in ('endless', 'part'):
            self.send_in_parts(body)
            return
        headers = {'Accept-Ranges': 'bytes', 'ETag': f'"{file.sha256}"', **headers}
        headers.update({'Content-Range': f'bytes {start}-{file.size - 1}/{file.size}'} if m else {})
        headers.update({'Content-Length': str(len(body))} if self.fault == 'truncate' else {})
        headers.update({'Content-Length': str(10 ** 13)} if self.fault == 'claim' else {})
        half = body[:max(0, file.size // 2 - start)]
        if self.fault == 'html':
            body, headers = b'<!DOCTYPE html><html><title>Sign in</title></html>', {'Content-Type': 'text/html'}
        self.send(206 if m else 200, {
            'short': half, 'truncate': half, 'garbage': bytes(len(body))}.get(self.fault, body), headers)
        if self.fault in ('truncate', 'claim'):
            self.drop()

    def send_in_parts(self, body: bytes):
        """Send `body` in parts that each give their length: again and again ('endless'), or half a part ('part')."""
        self.send_response(200)
        self.send_header('Transfer-Encoding', 'chunked')
        self.end_headers()
        part = b'%x\r\n%s\r\n' % (len(body), body)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if self.fault == 'part':
                self.wfile.write(part[:len(part) // 2])
            while self.fault == 'endless':
                self.wfile.write(part)
                self.loopback.sent += len(body)
        self.drop()

    # the hub

    def find(self, repo: str, revision: str) -> Tuple[_Repo, str]:
        """Return a repository and the hash of the commit."""
        found = self.loopback._repos.get(repo)
        if found is None:
            raise _Error(404, 'Repository not found', 'RepoNotFound')
        sha = found.refs.get(revision, revision)
        if sha not in found.commits:
            raise _Error(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return found, sha

    def model_info(self, repo: str, revision: str = 'main'):
        found, sha = self.find(repo, revision)
        self.send_json({'id': repo, 'sha': sha, 'siblings': [], 'private': found.private})

    def resolve(self, repo: str, revision: str, name: str):
        found, sha = self.find(repo, revision)
        f = found.commits[sha].get(name)
        if f is None:
            raise _Error(404, 'Entry not found', 'EntryNotFound', sha)
        headers = {'X-Repo-Commit': sha}
        if not name.endswith(LFS_SUFFIXES):
            self.send_file(f, {**headers, 'ETag': f'"{f.git_oid}"'})
            return
        self.send(302, b'Found. Redirecting', {
            **headers, 'X-Linked-Size': str(f.size), 'X-Linked-ETag': f'"{f.sha256}"',
            'Location': f'{self.loopback.cdn_url}/cdn/{sha}/{repo}/{name}'})

    def cdn(self, revision: str, repo: str, name: str):
        self.send_file(self.loopback._repos[repo].commits[revision][name])

    # upload

    def create_repo(self):
        args = json.loads(self.body)
        repo_id = f'{args["organization"]}/{args["name"]}'
        exists = self.loopback.has_repo(repo_id)
        if not exists:
            private = args.get('visibility') == 'private' or bool(args.get('private'))  # by newer and older clients
            self.loopback._repos[repo_id] = _Repo(private=private)
            self.loopback._repos[repo_id].commit({}, 'initial commit')
        self.send_json({'url': f'{self.loopback.url}/{repo_id}'}, 409 if exists else 200)

    def validate_yaml(self):
        self.send_json({'errors': [], 'warnings': []})

    def preupload(self, repo: str, revision: str):
        found, sha = self.find(repo, revision)
        there = {name: f.git_oid for name, f in found.commits[sha].items()}  # the client leaves out what is unchanged
        self.send_json({'files': [
            {'path': f['path'], 'shouldIgnore': False, 'uploadMode': 'regular', 'oid': there.get(f['path'])}
            for f in json.loads(self.body)['files']]})

    def commit(self, repo: str, revision: str):
        found, sha = self.find(repo, revision)
        header, *added = (line['value'] for line in map(json.loads, self.body.splitlines()))
        files = {f['path']: _File(base64.b64decode(f['content'])) for f in added}
        new = found.commit({**found.commits[sha], **files}, header['summary'], ref=revision)
        self.send_json({'success': True, 'commitOid': new, 'commitUrl': f'{self.loopback.url}/{repo}/commit/{new}'})


def isolate(root: Path, server: LoopbackServer) -> Dict[str, str]:
    """Return an environment in which clients of the hub and torch use `server`, with their files under `root`."""
    env = dict(os.environ)
    for name in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE', 'TRANSFORMERS_CACHE',
                 'HUGGINGFACE_HUB_CACHE', 'TORCH_MODEL_ZOO', 'HF_HUB_ENABLE_HF_TRANSFER', 'TIMM_USE_OLD_CACHE'):
        env.pop(name, None)
    no_proxy = ','.join(filter(None, (env.get('NO_PROXY') or env.get('no_proxy'), '127.0.0.1', 'localhost')))
    env.update(
        HF_ENDPOINT=server.url, HF_HOME=str(root / 'hf'), HF_HUB_CACHE=str(root / 'hf' / 'hub'),
        HF_HUB_DISABLE_TELEMETRY='1', HF_HUB_DISABLE_PROGRESS_BARS='1', HF_HUB_DISABLE_XET='1',
        TORCH_HOME=str(root / 'torch'), NO_PROXY=no_proxy, no_proxy=no_proxy)
    return env
