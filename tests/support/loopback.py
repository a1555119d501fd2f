""" A stand-in for the Hugging Face Hub and for plain download hosts, on 127.0.0.1, for the real clients.

It speaks as much of the hub's protocol as `huggingface_hub` needs to look up, download and upload models, and serves
plain files for `torch.hub`. Faults can be injected. The fixtures that use it are in `conftest.py`:

    def test_something(hub):
        hub.add_repo('someone/model', {'model.safetensors': data, 'config.json': b'{}'})
        url = hub.add_file('weights/model.pth', path)
        hub.fail('truncate', path='model.safetensors')
        ...
        assert hub.count('GET', 'model.safetensors') == 1

A client that runs in this process sees the server without any setting. One in a subprocess needs `env=client_env`.
"""
import base64
import hashlib
import json
import os
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Dict, List, Mapping, NamedTuple, Optional, Union
from urllib.parse import parse_qs, unquote, urlsplit

Content = Union[bytes, str, Path]

LFS_SUFFIXES = ('.safetensors', '.bin', '.pth', '.pt', '.h5', '.msgpack', '.onnx')
_DATE = '2024-01-01T00:00:00.000Z'


class _File:
    """Bytes or a file on disk, with the hashes that the hub reports."""

    def __init__(self, content: Content):
        self.path = content if isinstance(content, Path) else None
        self.data = content.encode() if isinstance(content, str) else content if self.path is None else b''
        self.size = self.path.stat().st_size if self.path else len(self.data)
        sha256, sha1 = hashlib.sha256(), hashlib.sha1(f'blob {self.size}\0'.encode())
        for chunk in self.chunks(0, self.size):
            sha256.update(chunk)
            sha1.update(chunk)
        self.sha256, self.git_oid = sha256.hexdigest(), sha1.hexdigest()

    def chunks(self, start: int, stop: int):
        if self.path is None:
            yield self.data[start:stop]
            return
        with open(self.path, 'rb') as f:
            f.seek(start)
            while start < stop:
                chunk = f.read(min(1 << 20, stop - start))
                if not chunk:
                    return
                start += len(chunk)
                yield chunk

    def read(self) -> bytes:
        return b''.join(self.chunks(0, self.size))


@dataclass
class _Repo:
    commits: Dict[str, Dict[str, _File]] = field(default_factory=dict)
    refs: Dict[str, str] = field(default_factory=dict)
    messages: Dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def find(self, revision: str) -> Optional[str]:
        revision = self.refs.get(revision, revision)
        return revision if revision in self.commits else None

    def commit(self, files: Dict[str, _File], message: str = '', sha: Optional[str] = None, ref: str = 'main') -> str:
        if sha is None:
            text = f'{len(self.commits)} {ref} {message} {sorted((k, v.git_oid) for k, v in files.items())}'
            sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        self.messages[sha] = message
        return sha


@dataclass
class _Fault:
    kind: Union[str, int]
    path: 're.Pattern[str]'
    method: Optional[str]
    left: Optional[int]


class Request(NamedTuple):
    method: str
    path: str
    headers: Mapping[str, str]


class LoopbackServer:
    """The server, running in threads of this process until `close`. See the module's docstring."""

    TOKEN = 'hf_loopback'  # any other non-empty token may read and write too, none may only read

    def __init__(self):
        self._lock = threading.RLock()
        self.clear()
        server = self

        class Handler(_Handler):
            loopback = server

        # The second one is the host of large files: the client does not follow a redirect to another host by itself.
        self._servers = [ThreadingHTTPServer(('127.0.0.1', 0), Handler) for _ in range(2)]
        self.url, self.cdn_url = (f'http://127.0.0.1:{httpd.server_address[1]}' for httpd in self._servers)
        for httpd in self._servers:
            httpd.daemon_threads = True
            threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        for httpd in self._servers:
            httpd.shutdown()
            httpd.server_close()

    def clear(self) -> None:
        """Forget all repositories, files, faults and requests."""
        with self._lock:
            self._repos: Dict[str, _Repo] = {}
            self._files: Dict[str, _File] = {}
            self._redirects: Dict[str, str] = {}
            self._blobs: Dict[str, _File] = {}
            self._faults: List[_Fault] = []
            self.requests: List[Request] = []

    def add_repo(
            self,
            repo_id: str,
            files: Mapping[str, Content],
            commit: Optional[str] = None,
            ref: str = 'main',
            private: bool = False,
            gated: bool = False,
    ) -> str:
        """Add a commit with exactly `files` to a (new or present) model repository.

        Args:
            repo_id: 'owner/name'.
            files: Name in the repository to content: bytes, text, or the path of a file.
            commit: Full hash of the commit, made up if None.
            ref: Branch or tag that points to it.
            private: Only with a token, not found without.
            gated: Seen by all, files refused.

        Returns:
            The hash of the commit.
        """
        files = {name: _File(content) for name, content in files.items()}
        with self._lock:
            repo = self._repos.setdefault(repo_id, _Repo())
            repo.private, repo.gated = private, gated
            self._blobs.update({f.sha256: f for f in files.values()})
            return repo.commit(files, sha=commit, ref=ref)

    def repo_files(self, repo_id: str, revision: str = 'main') -> Dict[str, bytes]:
        """Contents of a repository, to look at what was uploaded. Empty if there is none."""
        with self._lock:
            repo = self._repos.get(repo_id)
            sha = repo.find(revision) if repo else None
            return {name: f.read() for name, f in repo.commits[sha].items()} if sha else {}

    def has_repo(self, repo_id: str) -> bool:
        return repo_id in self._repos

    def commit_messages(self, repo_id: str) -> List[str]:
        """Messages of all commits of a repository, oldest first."""
        return list(self._repos[repo_id].messages.values())

    def add_file(self, path: str, content: Content) -> str:
        """Serve a plain file, return its url."""
        path = '/' + path.lstrip('/')
        with self._lock:
            self._files[path] = _File(content)
        return self.url + path

    def add_redirect(self, path: str, target: str) -> str:
        """Answer `path` with a redirect to the url `target`, return the url of `path`."""
        path = '/' + path.lstrip('/')
        with self._lock:
            self._redirects[path] = target
        return self.url + path

    def fail(
            self,
            kind: Union[str, int],
            path: str = '',
            method: Optional[str] = None,
            times: Optional[int] = None,
    ) -> None:
        """Inject a fault into requests that match.

        Args:
            kind: A status code (404, 500, 503, ...); 'drop' closes the connection without an answer; 'truncate' sends
                the first half of a file under the headers of all of it, then closes; 'short' sends the first half as if
                it were all; 'garbage' sends other bytes of the right length; 'html' sends a web page instead.
            path: Regular expression that is searched in the path. A large file of a repository is found under the
                path of its repository too, although its bytes come from /cdn/, as on the real hub.
            method: Only this method. 'truncate', 'short', 'garbage' and 'html' concern bodies, so only GET.
            times: How often, None for always.
        """
        if not isinstance(kind, int) and kind not in ('drop', 'truncate', 'short', 'garbage', 'html'):
            raise ValueError(f'Unknown kind of fault {kind!r}.')
        if kind in ('truncate', 'short', 'garbage', 'html'):
            method = 'GET'
        with self._lock:
            self._faults.append(_Fault(kind, re.compile(path), method, times))

    def heal(self) -> None:
        """Remove all faults."""
        with self._lock:
            self._faults.clear()

    def count(self, method: str, path: str = '') -> int:
        """Number of requests with this method whose path matches the regular expression."""
        return sum(r.method == method and bool(re.search(path, r.path)) for r in self.requests)

    def _fault(self, method: str, path: str) -> Optional[Union[str, int]]:
        with self._lock:
            for fault in self._faults:
                if fault.method in (None, method) and fault.left != 0 and fault.path.search(path):
                    if fault.left is not None:
                        fault.left -= 1
                    return fault.kind
        return None


class _Handler(BaseHTTPRequestHandler):
    loopback: LoopbackServer
    protocol_version = 'HTTP/1.1'
    # (method, path, name of the method that answers)
    ROUTES = [(method, re.compile(path), name) for method, path, name in (
        ('GET', r'/api/models/(?P<repo>[^/]+/[^/]+)', 'model_info'),
        ('GET', r'/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)', 'model_info'),
        ('GET', r'/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<folder>.*))?', 'tree'),
        ('GET', r'/api/models/(?P<repo>[^/]+/[^/]+)/refs', 'refs'),
        ('GET', r'/api/whoami-v2', 'whoami'),
        ('POST', r'/api/models/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)', 'paths_info'),
        ('POST', r'/api/repos/create', 'create_repo'),
        ('POST', r'/api/validate-yaml', 'validate_yaml'),
        ('POST', r'/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)', 'preupload'),
        ('POST', r'/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)', 'commit'),
        ('POST', r'/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch', 'lfs_batch'),
        ('PUT', r'/lfs-upload/(?P<oid>[0-9a-f]{64})', 'lfs_put'),
        ('POST', r'/lfs-verify/(?P<oid>[0-9a-f]{64})', 'lfs_verify'),
        ('GET', r'/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)', 'resolve'),
        ('GET', r'/cdn/(?P<oid>[0-9a-f]{64})(?:/.*)?', 'cdn'),
    )]

    def log_message(self, *args):
        pass

    def setup(self):
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def answer(self):
        server = self.loopback
        url = urlsplit(self.path)
        self.route, self.query = url.path, parse_qs(url.query)
        method = 'GET' if self.command == 'HEAD' else self.command
        self.body = self.read_body()
        with server._lock:
            server.requests.append(Request(
                self.command, self.route, {k.title(): v for k, v in self.headers.items()}))
        self.fault = server._fault(self.command, self.route)
        if self.fault == 'drop':
            self.drop()
            return
        if isinstance(self.fault, int):
            self.send_error_json(self.fault, 'Injected fault')
            return
        path = unquote(self.route)
        if path in server._redirects:
            self.send(302, headers={'Location': server._redirects[path]})
            return
        if path in server._files:
            self.send_file(server._files[path])
            return
        for want, pattern, name in self.ROUTES:
            m = pattern.fullmatch(self.route)
            if m and want == method:
                getattr(self, name)(**{k: unquote(v) for k, v in m.groupdict().items() if v is not None})
                return
        self.send_error_json(404, 'Not found')

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    # answers

    def read_body(self) -> bytes:
        if 'chunked' in self.headers.get('Transfer-Encoding', ''):
            parts = []
            while True:
                size = int(self.rfile.readline().split(b';')[0], 16)
                parts.append(self.rfile.read(size))
                self.rfile.readline()
                if size == 0:
                    return b''.join(parts)
        return self.rfile.read(int(self.headers.get('Content-Length') or 0))

    def drop(self):
        self.close_connection = True
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def send(self, status: int, body: bytes = b'', headers: Mapping[str, str] = {}):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if 'Content-Length' not in headers:
            self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def send_json(self, value, status: int = 200, headers: Mapping[str, str] = {}):
        self.send(status, json.dumps(value).encode(), {'Content-Type': 'application/json', **headers})

    def send_error_json(self, status: int, message: str, code: str = '', **headers: str):
        headers = {k.replace('_', '-'): v for k, v in headers.items()}
        if code:
            headers.update({'X-Error-Code': code, 'X-Error-Message': message})
        self.send_json({'error': message}, status, headers)

    def send_file(self, file: _File, headers: Mapping[str, str] = {}):
        size, start, stop, status = file.size, 0, file.size, 200
        m = re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range', ''))
        if m and any(m.groups()):
            first, last = m.groups()
            start = int(first) if first else max(0, size - int(last))
            stop = min(size, int(last) + 1) if first and last else size
            if start >= size:
                self.send(416, headers={'Content-Range': f'bytes */{size}'})
                return
            status = 206
        headers = {
            'Content-Type': 'application/octet-stream', 'Accept-Ranges': 'bytes', 'ETag': f'"{file.sha256}"', **headers,
            **({'Content-Range': f'bytes {start}-{stop - 1}/{size}'} if status == 206 else {}),
        }
        fault = self.fault if self.command == 'GET' else None
        if fault == 'html':
            self.send(200, b'<!DOCTYPE html><html><title>Sign in</title></html>', {'Content-Type': 'text/html'})
            return
        half = max(start, size // 2)
        if fault == 'short':
            stop = half
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header('Content-Length', str(stop - start))
        self.end_headers()
        if self.command == 'HEAD':
            return
        try:
            for chunk in file.chunks(start, min(stop, half) if fault == 'truncate' else stop):
                self.wfile.write(bytes(len(chunk)) if fault == 'garbage' else chunk)
            self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
            return
        if fault == 'truncate':
            self.drop()

    # the hub

    def has_token(self) -> bool:
        return self.headers.get('Authorization', '').startswith('Bearer ')

    def find(self, repo: str, revision: str = 'main'):
        """Repository and commit, or None after an error was sent."""
        found = self.loopback._repos.get(repo)
        if found is None or (found.private and not self.has_token()):
            self.send_error_json(404 if self.has_token() else 401, 'Repository not found', 'RepoNotFound')
            return None
        sha = found.find(revision)
        if sha is None:
            self.send_error_json(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
            return None
        return found, sha

    def need_token(self) -> bool:
        if not self.has_token():
            self.send_error_json(401, 'Invalid username or password.')
        return self.has_token()

    def model_info(self, repo: str, revision: str = 'main'):
        found = self.find(repo, revision)
        if found is None:
            return
        repo_, sha = found
        siblings = []
        for name, f in sorted(repo_.commits[sha].items()):
            item = {'rfilename': name}
            if 'blobs' in self.query:
                item.update(size=f.size, blobId=f.git_oid)
                if name.endswith(LFS_SUFFIXES):
                    item['lfs'] = {'sha256': f.sha256, 'size': f.size, 'pointerSize': 134}
            siblings.append(item)
        self.send_json({
            '_id': sha[:24], 'id': repo, 'modelId': repo, 'author': repo.split('/')[0], 'sha': sha,
            'lastModified': _DATE, 'createdAt': _DATE, 'private': repo_.private, 'disabled': False,
            'gated': 'manual' if repo_.gated else False, 'tags': [], 'downloads': 0, 'likes': 0, 'siblings': siblings,
        })

    def _entry(self, name: str, f: _File):
        entry = {'type': 'file', 'oid': f.git_oid, 'size': f.size, 'path': name}
        if name.endswith(LFS_SUFFIXES):
            entry['lfs'] = {'oid': f.sha256, 'size': f.size, 'pointerSize': 134}
        return entry

    def tree(self, repo: str, revision: str, folder: str = ''):
        found = self.find(repo, revision)
        if found is None:
            return
        files = found[0].commits[found[1]]
        top = f'{folder.strip("/")}/' if folder.strip('/') else ''
        recursive = self.query.get('recursive', [''])[0].lower() in ('1', 'true')
        entries, folders = [], set()
        for name, f in sorted(files.items()):
            if not name.startswith(top):
                continue
            parts = name[len(top):].split('/')
            folders.update(top + '/'.join(parts[:n]) for n in range(1, len(parts) if recursive else min(2, len(parts))))
            if recursive or len(parts) == 1:
                entries.append(self._entry(name, f))
        if top and not entries and not folders:
            self.send_error_json(404, f'{folder} does not exist', 'EntryNotFound')
            return
        entries += [{'type': 'directory', 'path': d, 'oid': '0' * 40, 'size': 0} for d in sorted(folders)]
        self.send_json(entries, headers={'X-Repo-Commit': found[1]})

    def paths_info(self, repo: str, revision: str):
        found = self.find(repo, revision)
        if found is None:
            return
        text = self.body.decode()
        paths = json.loads(text)['paths'] if text.startswith('{') else parse_qs(text).get('paths', [])
        files = found[0].commits[found[1]]
        self.send_json([self._entry(p, files[p]) for p in paths if p in files])

    def refs(self, repo: str):
        found = self.find(repo)
        if found is not None:
            branches = [
                {'name': k, 'ref': f'refs/heads/{k}', 'targetCommit': v} for k, v in found[0].refs.items()]
            self.send_json({'branches': branches, 'tags': [], 'converts': []})

    def whoami(self):
        if self.need_token():
            self.send_json({'type': 'user', 'id': '0' * 24, 'name': 'loopback', 'fullname': 'Loop Back', 'orgs': [],
                            'auth': {'type': 'access_token', 'accessToken': {'role': 'write'}}})

    def resolve(self, repo: str, revision: str, name: str):
        found = self.find(repo, revision)
        if found is None:
            return
        repo_, sha = found
        if repo_.gated:
            self.send_error_json(
                403 if self.has_token() else 401, f'Access to model {repo} is restricted.', 'GatedRepo')
            return
        f = repo_.commits[sha].get(name)
        if f is None:
            self.send_error_json(404, 'Entry not found', 'EntryNotFound', X_Repo_Commit=sha)
            return
        headers = {'X-Repo-Commit': sha}
        if not name.endswith(LFS_SUFFIXES):
            self.send_file(f, {**headers, 'ETag': f'"{f.git_oid}"'})
            return
        headers.update({
            'X-Linked-Size': str(f.size), 'X-Linked-ETag': f'"{f.sha256}"',
            # the name in the address lets `fail` and `count` find the download by it
            'Location': f'{self.loopback.cdn_url}/cdn/{f.sha256}/{repo}/{name}',
        })
        self.send(302, b'Found. Redirecting', headers)

    def cdn(self, oid: str):
        f = self.loopback._blobs.get(oid)
        if f is None:
            self.send_error_json(404, 'Not found')
        else:
            self.send_file(f)

    # upload

    def create_repo(self):
        if not self.need_token():
            return
        args = json.loads(self.body)
        repo_id = f'{args.get("organization") or "loopback"}/{args["name"]}'
        with self.loopback._lock:
            exists = repo_id in self.loopback._repos
            if not exists:
                repo = self.loopback._repos[repo_id] = _Repo(
                    private=bool(args.get('private')) or args.get('visibility') == 'private')
                repo.commit({}, 'initial commit')
        url = f'{self.loopback.url}/{repo_id}'
        if exists:
            self.send_json({'error': 'You already created this model repo', 'url': url}, 409)
        else:
            self.send_json({'url': url, 'name': repo_id, 'id': '0' * 24})

    def validate_yaml(self):
        self.send_json({'errors': [], 'warnings': []})

    def preupload(self, repo: str, revision: str):
        if not self.need_token():
            return
        found = self.find(repo, revision)
        if found is None:
            return
        there = found[0].commits[found[1]]
        answer = []
        for f in json.loads(self.body)['files']:
            lfs = f['path'].endswith(LFS_SUFFIXES)
            item = {'path': f['path'], 'shouldIgnore': False, 'uploadMode': 'lfs' if lfs else 'regular'}
            if f['path'] in there:  # by which the client leaves out what has not changed
                item['oid'] = there[f['path']].sha256 if lfs else there[f['path']].git_oid
            answer.append(item)
        self.send_json({'files': answer})

    def lfs_batch(self, repo: str):
        if not self.need_token() or self.find(repo) is None:
            return
        objects = []
        for x in json.loads(self.body)['objects']:
            item = {'oid': x['oid'], 'size': x['size'], 'authenticated': True}
            if x['oid'] not in self.loopback._blobs:
                item['actions'] = {
                    'upload': {'href': f'{self.loopback.cdn_url}/lfs-upload/{x["oid"]}', 'header': {}},
                    'verify': {'href': f'{self.loopback.url}/lfs-verify/{x["oid"]}', 'header': {}},
                }
            objects.append(item)
        self.send_json(
            {'transfer': 'basic', 'objects': objects}, headers={'Content-Type': 'application/vnd.git-lfs+json'})

    def lfs_put(self, oid: str):
        f = _File(self.body)
        if f.sha256 != oid:
            self.send_error_json(400, f'Expected sha256 {oid}, got {f.sha256}')
            return
        with self.loopback._lock:
            self.loopback._blobs[oid] = f
        self.send(200)

    def lfs_verify(self, oid: str):
        f = self.loopback._blobs.get(oid)
        ok = f is not None and json.loads(self.body).get('size') == f.size
        self.send_json({}, 200 if ok else 404)

    def commit(self, repo: str, revision: str):
        if not self.need_token():
            return
        found = self.find(repo, revision)
        if found is None:
            return
        repo_, sha = found
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = next(x['value'] for x in lines if x['key'] == 'header')
        files = dict(repo_.commits[sha])
        for x in lines:
            value = x['value']
            if x['key'] == 'file':
                files[value['path']] = _File(base64.b64decode(value['content']))
            elif x['key'] == 'lfsFile':
                blob = self.loopback._blobs.get(value['oid'])
                if blob is None:
                    self.send_error_json(400, f'Missing LFS object {value["oid"]}')
                    return
                files[value['path']] = blob
            elif x['key'] == 'deletedFile':
                files.pop(value['path'], None)
            elif x['key'] == 'deletedFolder':
                files = {k: v for k, v in files.items() if not k.startswith(value['path'].rstrip('/') + '/')}
        with self.loopback._lock:
            self.loopback._blobs.update({f.sha256: f for f in files.values()})
            new = repo_.commit(files, header.get('summary', ''), ref=revision)
        self.send_json({
            'success': True,
            'commitOid': new,
            'commitUrl': f'{self.loopback.url}/{repo}/commit/{new}',
            'hookOutput': '',
        })


def isolate(root: Path, server: LoopbackServer, env: Optional[Mapping[str, str]] = None) -> Dict[str, str]:
    """Environment in which the hub's and torch's clients use `server` and keep their files under `root`."""
    env = dict(os.environ if env is None else env)
    for name in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE', 'TRANSFORMERS_CACHE',
                 'HUGGINGFACE_HUB_CACHE', 'TORCH_MODEL_ZOO', 'HF_HUB_ENABLE_HF_TRANSFER', 'TIMM_USE_OLD_CACHE'):
        env.pop(name, None)
    no_proxy = ','.join(filter(None, (env.get('NO_PROXY') or env.get('no_proxy'), '127.0.0.1', 'localhost')))
    env.update(
        HF_ENDPOINT=server.url,
        HF_HOME=str(root / 'hf'),
        HF_HUB_CACHE=str(root / 'hf' / 'hub'),
        HF_HUB_DISABLE_TELEMETRY='1',
        HF_HUB_DISABLE_PROGRESS_BARS='1',
        HF_HUB_DISABLE_XET='1',
        TORCH_HOME=str(root / 'torch'),
        NO_PROXY=no_proxy,
        no_proxy=no_proxy,
    )
    return env
