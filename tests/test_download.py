"""Downloads against servers on this machine that stall, cut off, change their files, redirect, and refuse."""

import contextlib
import errno
import gzip
import hashlib
import http.client
import http.server
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from dataset import catalogue, download
from dataset.catalogue import FILES, PRESETS
from dataset.jsonl import records
from model.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = "".join(json.dumps({"text": f"story {number}" + " of a fox and an owl" * 20}) + "\n"
                    for number in range(1000)).encode()
CHATS = "".join(json.dumps({"conversations": [{"role": "user", "content": f"{number}?"},
                                              {"role": "assistant", "content": "yes"}]}) + "\n"
                for number in range(50)).encode()
TUTORIALS = f"/datasets/jingyaogong/minimind_dataset/resolve/{catalogue.TUTORIALS}"
TODAY = "/datasets/jingyaogong/minimind_dataset/resolve/main"
ON_MODELSCOPE = "/datasets/gongjy/minimind_dataset/resolve/master"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def etag(path, content):
    return f'"{hashlib.md5(path.encode() + content).hexdigest()}"'


class Server(http.server.ThreadingHTTPServer):
    """A file server with a script: `troubles[path]` is a list of what goes wrong, one item a request.

    An int is a status; ("cut", n) closes after n bytes of the body; ("stall", n) goes silent after them;
    ("slow", seconds) waits after every 10 kB; {"header": value} adds headers.
    """
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.troubles, self.moved, self.headers = {}, {}, {}, {}
        self.requests = []                   # (path, headers, bytes of body sent): what was really served
        self.ranges = self.if_range = self.etags = True
        self.shift = 0                       # how many bytes before the ones asked for it begins
        self.ended = threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def served(self, path):
        return [request[2] for request in self.requests if request[0] == path]

    def handle_error(self, *_):
        pass                                 # clients that go away are what is tested here

    def close(self):
        self.ended.set()
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server, path = self.server, self.path
        entry = [path, dict(self.headers), 0]
        server.requests.append(entry)
        trouble = server.troubles[path].pop(0) if server.troubles.get(path) else None
        if path in server.moved:
            to, headers = server.moved[path]
            return self.answer(302, {"Location": to, **headers}, b"", entry)
        if isinstance(trouble, int):
            return self.answer(trouble, server.headers, b"no", entry)
        if path not in server.files:
            return self.answer(404, {}, b"no such file", entry)
        body = server.files[path]
        headers = {"ETag": etag(path, body)} if server.etags else {}
        headers.update(server.headers)
        status, start = 200, 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = not server.if_range or self.headers.get("If-Range", headers.get("ETag")) == headers.get("ETag")
        if wanted and server.ranges and same:
            start = int(wanted[1]) - server.shift
            if start >= len(body):
                return self.answer(416, {"Content-Range": f"bytes */{len(body)}"}, b"", entry)
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.answer(status, headers, body[start:], entry, trouble)

    def answer(self, status, headers, body, entry, trouble=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        kind, amount = trouble or ("", 0)
        for start in range(0, len(body), 10_000):
            piece = body[start:start + 10_000]
            if kind in ("cut", "stall"):
                piece = piece[:amount - start]
            self.wfile.write(piece)
            entry[2] += len(piece)
            if kind == "slow":
                self.server.ended.wait(amount)
            if kind in ("cut", "stall") and start + 10_000 >= amount:
                if kind == "stall":
                    self.server.ended.wait(20)
                self.close_connection = True
                return


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def store():
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def surroundings(server, monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in ("HF_TOKEN", "HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
    monkeypatch.setattr(download, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(download, "SLACK", 0)
    gigabytes = types.SimpleNamespace(free=50 << 30)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: gigabytes)


def get(folder, **flags):
    return download.main(download.Config(**{"out": str(folder), "timeout": 5.0, "retries": 3, **flags}))


def url_of(server, name="docs.jsonl"):
    return f"{server.url}/{name}"


# ------------------------------------------------------------------------------------------------ what is fetched


def test_the_catalogue_has_what_the_tutorials_use_with_their_recommended_lengths():
    lengths = {"pretrain_hq": 320, "sft_mini_512": 340, "sft_512": 350, "sft_1024": 650, "sft_2048": 1400, "dpo": 0,
               "lora_identity": 0, "lora_medical": 0, "r1_mix_1024": 720, "rlaif-mini": 0}
    for name, max_len in lengths.items():
        assert FILES[name].max_len == max_len
        assert f"https://huggingface.co{TODAY}/{name}.jsonl" in FILES[name].urls
        assert f"https://www.modelscope.cn{ON_MODELSCOPE}/{name}.jsonl" in FILES[name].urls
    assert PRESETS["mini"][1] == ("pretrain_hq", "sft_mini_512")
    for use, names in PRESETS.values():
        assert use and names and all(name in FILES for name in names)
    for name, file in FILES.items():
        assert file.licence and file.use and file.size > 0 and file.holds in catalogue.SHAPES, name
        assert all(url.startswith("https://") for url in file.urls)
        assert file.sha256 == "" or download.is_sha256(file.sha256)


def test_a_preset_is_fetched_announced_checked_and_followed_by_the_next_commands(server, tmp_path, capsys, monkeypatch):
    server.files = {f"{TUTORIALS}/pretrain_hq.jsonl": DOCUMENTS, f"{TUTORIALS}/sft_mini_512.jsonl": CHATS}
    monkeypatch.chdir(tmp_path)
    paths = get("data", preset="mini")
    assert paths["pretrain_hq"].read_bytes() == DOCUMENTS and paths["sft_mini_512"].read_bytes() == CHATS
    assert {path.name for path in (tmp_path / "data").iterdir()} == {
        "pretrain_hq.jsonl", "pretrain_hq.jsonl.sha256", "sft_mini_512.jsonl", "sft_mini_512.jsonl.sha256"}
    assert (tmp_path / "data/pretrain_hq.jsonl.sha256").read_text() == f"{sha256(DOCUMENTS)}  pretrain_hq.jsonl\n"
    said = capsys.readouterr().out
    for word in ("CC-BY-NC-2.0", "1.62 GB", '{"text"}', "--max_len 320", TUTORIALS, sha256(DOCUMENTS)):
        assert word in said
    assert said.index("1.62 GB") < said.index(sha256(DOCUMENTS))
    assert "python trainer/train_pretrain.py --data data/pretrain_hq.jsonl --max_len 320\n" in said
    assert "python trainer/train_full_sft.py --data data/sft_mini_512.jsonl --max_len 340\n" in said

    count = len(server.requests)
    assert get("data", preset="mini") == paths                              # again: nothing is asked for
    assert len(server.requests) == count and "already there, sha256 as it should be" in capsys.readouterr().err


def test_a_file_that_was_changed_here_is_not_taken_and_not_touched(server, tmp_path):
    server.files[TUTORIALS + "/dpo.jsonl"] = DOCUMENTS
    path = get(tmp_path, preset="dpo")["dpo"]
    path.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"dpo.jsonl is there already, but its sha256 is .*move or delete it"):
        get(tmp_path, preset="dpo")
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize("flags, message", [
    ({}, "nothing to fetch"),
    ({"preset": "all"}, "--preset all: there is no such preset; the presets are mini, "),
    ({"file": "pretrain_hp"}, "--file pretrain_hp: there is no such file"),
    ({"url": "ftp://x/a.jsonl"}, "must start with http"),
    ({"url": "https://x/a.csv"}, "the name must end in"),
    ({"url": "https://x/a%2Fb%20.jsonl"}, "the name must end in"),
    ({"file": "dpo", "sha256": "12"}, "must be the 64 hexadecimal digits"),
    ({"file": "dpo,rlaif", "sha256": "0" * 64}, "of the one file"),
    ({"file": "gsm8k_train,dolly", "source": "modelscope"}, "--source modelscope: dolly is not there"),
    ({"file": "dpo", "timeout": 0.0}, "--timeout"),
])
def test_wrong_requests_are_told_in_one_line(tmp_path, flags, message, server):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        get(tmp_path, **flags)
    assert "\n" not in str(error.value) and not server.requests


def test_the_list_needs_no_network(capsys, server):
    get("/nowhere", list=True)
    said = capsys.readouterr().out
    assert all(name in said for name in [*FILES, *PRESETS]) and not server.requests


# ------------------------------------------------------------------------------------------------- interruptions


def test_a_cut_connection_is_continued_and_no_byte_comes_twice(server, tmp_path):
    server.files["/docs.jsonl"] = DOCUMENTS
    server.troubles["/docs.jsonl"] = [("cut", 100_003), ("cut", 50_000)]
    path = get(tmp_path, url=url_of(server))["docs.jsonl"]
    assert path.read_bytes() == DOCUMENTS
    assert server.served("/docs.jsonl") == [100_003, 50_000, len(DOCUMENTS) - 150_003]
    assert server.requests[1][1]["If-Range"] == etag("/docs.jsonl", DOCUMENTS)


def test_a_stall_ends_with_the_timeout_and_is_continued(server, tmp_path, capsys):
    server.files["/docs.jsonl"] = DOCUMENTS
    server.troubles["/docs.jsonl"] = [("stall", 120_000)]
    begin = time.monotonic()
    assert get(tmp_path, url=url_of(server), timeout=0.3)["docs.jsonl"].read_bytes() == DOCUMENTS
    assert time.monotonic() - begin < 5 and "sent nothing for 0.3 s; again in" in capsys.readouterr().err
    assert sum(server.served("/docs.jsonl")) == len(DOCUMENTS)


def test_many_interruptions_do_not_matter_as_long_as_something_comes(server, tmp_path):
    server.files["/docs.jsonl"] = DOCUMENTS
    server.troubles["/docs.jsonl"] = [("cut", 20_000)] * 15
    assert get(tmp_path, url=url_of(server), retries=1)["docs.jsonl"].read_bytes() == DOCUMENTS


def test_without_progress_it_gives_up_keeps_the_part_and_says_so(server, tmp_path):
    server.files["/docs.jsonl"] = DOCUMENTS
    server.troubles["/docs.jsonl"] = [("cut", 50_000), 503, 503, 503, 503]
    with pytest.raises(UserError, match=r"answers 503 .* given up after 4 tries .* 50 kB are kept; the same"):
        get(tmp_path, url=url_of(server), retries=3)
    assert not (tmp_path / "docs.jsonl").exists()
    assert get(tmp_path, url=url_of(server))["docs.jsonl"].read_bytes() == DOCUMENTS
    assert sum(server.served("/docs.jsonl")) == len(DOCUMENTS) + len(b"no") * 4


def test_killed_at_any_moment_it_continues_without_fetching_again_what_is_there(server, tmp_path):
    server.files["/docs.jsonl"] = DOCUMENTS
    server.troubles["/docs.jsonl"] = [("slow", 0.05), ("slow", 0.05)]
    command = [sys.executable, str(ROOT / "dataset/download.py"), "--url", url_of(server), "--out", str(tmp_path)]
    part = tmp_path / "docs.jsonl.part"
    for at_least in (60_000, 150_000):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while not part.exists() or part.stat().st_size < at_least:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
        process.communicate()
        assert not (tmp_path / "docs.jsonl").exists()
        have = part.stat().st_size
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "docs.jsonl").read_bytes() == DOCUMENTS and not part.exists()
    assert server.served("/docs.jsonl")[-1] == len(DOCUMENTS) - have


def test_ctrl_c_keeps_the_part_and_says_how_to_go_on(server, tmp_path, capsys, monkeypatch):
    server.files["/docs.jsonl"] = DOCUMENTS
    read, calls = download.read, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr(download, "read", interrupted)
    with pytest.raises(SystemExit) as stop:
        get(tmp_path, url=url_of(server))
    assert stop.value.code == 130 and "the same command continues" in capsys.readouterr().err
    have = (tmp_path / "docs.jsonl.part").stat().st_size
    assert 0 < have < len(DOCUMENTS)
    assert get(tmp_path, url=url_of(server))["docs.jsonl"].read_bytes() == DOCUMENTS
    assert server.requests[-1][2] == len(DOCUMENTS) - have


def test_stopped_after_the_last_byte_nothing_is_fetched_again(server, tmp_path, monkeypatch):
    server.files["/docs.jsonl"] = DOCUMENTS
    monkeypatch.setattr(download, "check_records", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit):
        get(tmp_path, url=url_of(server))
    monkeypatch.undo()
    with contextlib.redirect_stdout(io.StringIO()):
        assert get(tmp_path, url=url_of(server))["docs.jsonl"].read_bytes() == DOCUMENTS
    assert len(server.requests) == 1


# ------------------------------------------------------------------------------------------ the server's side changes


def started(server, tmp_path, **flags):
    """A download that ended after 50,000 bytes."""
    server.files["/docs.jsonl"] = DOCUMENTS
    server.troubles["/docs.jsonl"] = [("cut", 50_000)]
    with pytest.raises(UserError):
        get(tmp_path, url=url_of(server), retries=0, **flags)
    assert (tmp_path / "docs.jsonl.part").stat().st_size == 50_000


@pytest.mark.parametrize("length", [len(DOCUMENTS) + 37, 30_000], ids=["longer", "shorter"])
@pytest.mark.parametrize("if_range", [True, False], ids=["If-Range honoured", "If-Range ignored"])
def test_a_changed_file_is_begun_again_and_never_glued_on(server, tmp_path, capsys, if_range, length):
    server.if_range = if_range           # without it a server sends the rest of whatever it has, with its own ETag
    started(server, tmp_path)
    changed = (DOCUMENTS.replace(b"fox", b"cat") + b'{"text": "and one story more, at the end"}\n')[:length]
    changed = changed[:changed.rindex(b"\n") + 1]
    server.files["/docs.jsonl"] = changed
    assert get(tmp_path, url=url_of(server))["docs.jsonl"].read_bytes() == changed
    assert "another version of the file by now: starting over" in capsys.readouterr().err


def test_a_server_without_ranges_sends_everything_and_nothing_is_glued(server, tmp_path, capsys):
    server.ranges = False
    started(server, tmp_path)
    assert get(tmp_path, url=url_of(server))["docs.jsonl"].read_bytes() == DOCUMENTS
    assert server.served("/docs.jsonl") == [50_000, len(DOCUMENTS)]
    assert "sends whole files only: starting over" in capsys.readouterr().err


def test_a_rest_from_another_place_than_asked_for_is_not_glued_on(server, tmp_path):
    started(server, tmp_path)
    server.shift = 10
    with pytest.raises(UserError):
        get(tmp_path, url=url_of(server), retries=0)
    assert get(tmp_path, url=url_of(server))["docs.jsonl"].read_bytes() == DOCUMENTS


def test_without_any_sign_of_the_version_a_part_is_not_continued(server, tmp_path):
    server.etags = False
    started(server, tmp_path)
    server.files["/docs.jsonl"] = DOCUMENTS.replace(b"fox", b"cat")
    assert get(tmp_path, url=url_of(server))["docs.jsonl"].read_bytes() == server.files["/docs.jsonl"]
    assert server.served("/docs.jsonl")[-1] == len(DOCUMENTS) and "Range" not in server.requests[-1][1]


@pytest.mark.parametrize("note", [None, "{", "{}"], ids=["no note", "torn note", "empty note"])
def test_a_part_without_its_note_is_not_continued(server, tmp_path, note):
    started(server, tmp_path)
    path = tmp_path / "docs.jsonl.part.json"
    path.unlink() if note is None else path.write_text(note)
    assert get(tmp_path, url=url_of(server))["docs.jsonl"].read_bytes() == DOCUMENTS
    assert server.served("/docs.jsonl")[-1] == len(DOCUMENTS)


def test_two_downloads_of_one_file_do_not_mix(server, tmp_path):
    pytest.importorskip("fcntl")
    server.files["/docs.jsonl"] = DOCUMENTS
    with download.Part(tmp_path / "docs.jsonl.part"):
        with pytest.raises(UserError, match="another download is writing to it"):
            get(tmp_path, url=url_of(server))


# ------------------------------------------------------------------------------------------------------ checksums


def test_a_wrong_checksum_never_gets_the_name(server, tmp_path):
    server.files["/docs.jsonl"] = DOCUMENTS
    server.headers["X-Linked-Etag"] = f'"{sha256(b"something else")}"'
    with pytest.raises(UserError, match=f"its sha256 is {sha256(DOCUMENTS)}, not {sha256(b'something else')}; "):
        get(tmp_path, url=url_of(server))
    assert {path.name for path in tmp_path.iterdir()} == {"docs.jsonl.bad"}
    server.headers["X-Linked-Etag"] = f'"{sha256(DOCUMENTS)}"'              # the same command fetches it again
    assert get(tmp_path, url=url_of(server))["docs.jsonl"].read_bytes() == DOCUMENTS


def test_a_checksum_given_by_hand_is_held_against_what_comes(server, tmp_path):
    server.files["/docs.jsonl"] = DOCUMENTS
    with pytest.raises(UserError, match=f"not {'0' * 64}"):
        get(tmp_path, url=url_of(server), sha256="0" * 64)
    get(tmp_path, url=url_of(server), sha256=sha256(DOCUMENTS).upper())
    with pytest.raises(UserError, match="is there already, but"):
        get(tmp_path, url=url_of(server), sha256="0" * 64)


def test_what_the_server_announces_is_compared_before_anything_is_fetched(server, tmp_path):
    server.files["/docs.jsonl"] = DOCUMENTS
    server.headers["ETag"] = f'"{sha256(DOCUMENTS)}"'
    with pytest.raises(UserError, match="has another file under this name"):
        get(tmp_path, url=url_of(server), sha256="0" * 64)
    assert not list(tmp_path.iterdir())


def test_the_etag_of_a_store_is_no_checksum(server, store, tmp_path):
    store.files["/blob"], store.headers["ETag"] = DOCUMENTS, f'"{"ab" * 32}"'
    server.moved["/docs.jsonl"] = (f"http://localhost:{store.server_port}/blob", {})
    assert get(tmp_path, url=url_of(server))["docs.jsonl"].read_bytes() == DOCUMENTS


def test_a_file_of_the_catalogue_must_have_its_digest(server, tmp_path, monkeypatch):
    server.files["/input.txt"] = b"To be, or not to be"
    file = catalogue.PublicFile("text", "pretrain", "a play", "none", 19, (url_of(server, "input.txt"),), 256,
                                FILES["tinyshakespeare"].sha256)
    monkeypatch.setitem(FILES, "tinyshakespeare", file)
    with pytest.raises(UserError, match="not 86c4e6aa"):
        get(tmp_path, file="tinyshakespeare")
    path = get(tmp_path, file="tinyshakespeare", sha256=sha256(b"To be, or not to be"))["tinyshakespeare"]
    assert path.name == "tinyshakespeare.txt"
    get(tmp_path, file="tinyshakespeare")                                   # accepted once, it stays accepted


# -------------------------------------------------------------------------------------------- answers, hosts, token


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_passing_troubles_are_tried_again(server, tmp_path, status):
    server.files["/docs.jsonl"] = DOCUMENTS
    server.troubles["/docs.jsonl"] = [status, status]
    get(tmp_path, url=url_of(server))
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 501])
def test_refusals_are_not_tried_again(server, tmp_path, status):
    server.files["/docs.jsonl"] = DOCUMENTS
    server.troubles["/docs.jsonl"] = [status, status]
    with pytest.raises(UserError, match=f"answers {status}") as error:
        get(tmp_path, url=url_of(server))
    assert len(server.requests) == 1 and ("HF_TOKEN" in str(error.value)) == (status in (401, 403))


def test_the_wait_that_a_server_asks_for_is_kept(server, tmp_path, monkeypatch):
    server.files["/docs.jsonl"], server.troubles["/docs.jsonl"] = DOCUMENTS, [429]
    server.headers["Retry-After"] = "7"
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    get(tmp_path, url=url_of(server))
    assert waits == [7]


def test_waits_double(server, tmp_path, monkeypatch):
    server.files["/docs.jsonl"], server.troubles["/docs.jsonl"] = DOCUMENTS, [503] * 8
    waits = []
    monkeypatch.setattr(download, "FIRST_WAIT", 1.0)
    monkeypatch.setattr(download.time, "sleep", waits.append)
    get(tmp_path, url=url_of(server), retries=8)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]


def test_the_token_goes_to_hugging_face_only_and_is_never_shown(server, store, tmp_path, monkeypatch, capsys):
    """As on Hugging Face: a renamed repository redirects on the same host, the file lies on another one."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    store.files["/blob"], store.headers["ETag"] = DOCUMENTS, f'"{"ab" * 32}"'       # a store's own, no sha256
    server.moved[f"{TUTORIALS}/dpo.jsonl"] = ("/renamed/dpo.jsonl", {})
    linked = {"X-Linked-Etag": f'"{sha256(DOCUMENTS)}"', "X-Linked-Size": str(len(DOCUMENTS))}
    server.moved["/renamed/dpo.jsonl"] = (f"http://localhost:{store.server_port}/blob", linked)
    store.troubles["/blob"] = [("cut", 50_000)]
    assert get(tmp_path, preset="dpo")["dpo"].read_bytes() == DOCUMENTS
    assert [headers.get("Authorization") for _, headers, _ in server.requests] == ["Bearer hf_secret"] * 4
    assert [headers.get("Authorization") for _, headers, _ in store.requests] == [None, None]
    assert sum(store.served("/blob")) == len(DOCUMENTS)                     # continued through the redirects
    told = capsys.readouterr()
    assert "secret" not in told.out + told.err and f"{sha256(DOCUMENTS)}, as it should be" in told.out

    store.files["/docs.jsonl"] = DOCUMENTS
    store.headers.clear()
    get(tmp_path / "more", url=url_of(store))                               # any other host: no token
    assert store.requests[-1][1].get("Authorization") is None


def test_a_token_that_cannot_be_one_is_refused_without_being_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_se\ncret")
    with pytest.raises(UserError, match="HF_TOKEN") as error:
        get(tmp_path, preset="dpo")
    assert "cret" not in str(error.value)


def test_redirects_away_from_http_and_from_https_are_not_followed(server, tmp_path):
    server.moved["/docs.jsonl"] = ("file:///etc/hostname", {})
    with pytest.raises(UserError, match="answers 302"):
        get(tmp_path, url=url_of(server))
    said = (urllib.request.Request("https://a.invalid/x"), None, 302, "", http.client.HTTPMessage())
    assert download.Redirects().redirect_request(*said, "https://b.invalid/x").full_url == "https://b.invalid/x"
    with pytest.raises(urllib.error.HTTPError, match="away from https"):
        download.Redirects().redirect_request(*said, "http://b.invalid/x")


def test_a_changed_file_behind_redirects_is_told_by_its_linked_digest(server, store, tmp_path):
    """The store sends ranges of whatever it has under an ETag that never changes; only the digest tells."""
    changed = DOCUMENTS.replace(b"fox", b"cat")
    store.files["/blob"], store.headers["ETag"] = DOCUMENTS, '"same"'
    server.moved["/docs.jsonl"] = (url_of(store, "blob"), {"X-Linked-Etag": f'"{sha256(DOCUMENTS)}"'})
    store.troubles["/blob"] = [("cut", 50_000)]
    with pytest.raises(UserError):
        get(tmp_path, url=url_of(server), retries=0)
    store.files["/blob"] = changed
    server.moved["/docs.jsonl"] = (url_of(store, "blob"), {"X-Linked-Etag": f'"{sha256(changed)}"'})
    assert get(tmp_path, url=url_of(server))["docs.jsonl"].read_bytes() == changed


# ---------------------------------------------------------------------------------- mirrors, other sources, proxies


def test_a_mirror_named_by_the_environment_is_asked(server, store, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", store.url + "/")
    store.files[f"{TUTORIALS}/dpo.jsonl"] = CHATS
    get(tmp_path, preset="dpo")
    assert not server.requests
    store.files["/datasets/a/b/resolve/main/c.jsonl"] = CHATS
    get(tmp_path, url="https://huggingface.co/datasets/a/b/blob/main/c.jsonl")     # the page's address, too
    monkeypatch.setenv("HF_ENDPOINT", "hf-mirror.com")
    with pytest.raises(UserError, match="HF_ENDPOINT=hf-mirror.com: must start with http"):
        get(tmp_path / "more", preset="dpo")


def test_what_a_source_does_not_have_is_taken_from_the_next(server, store, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", store.url)
    store.files[f"{ON_MODELSCOPE}/dpo.jsonl"] = CHATS
    assert get(tmp_path, preset="dpo")["dpo"].read_bytes() == CHATS
    assert [path for path, _, _ in server.requests] == [f"{TUTORIALS}/dpo.jsonl", f"{TODAY}/dpo.jsonl"]
    assert "answers 404" in capsys.readouterr().err
    with pytest.raises(UserError, match="answers 404 .*Another --source or HF_ENDPOINT may have it"):
        get(tmp_path / "more", preset="dpo", source="hf")
    count = len(server.requests)
    get(tmp_path / "more", preset="dpo", source="modelscope")
    assert len(server.requests) == count


def test_a_host_that_does_not_answer_is_replaced_soon(server, store, tmp_path, monkeypatch):
    closed = Server()
    closed.close()
    monkeypatch.setenv("HF_ENDPOINT", closed.url)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", store.url)
    store.files[f"{ON_MODELSCOPE}/dpo.jsonl"] = CHATS
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    assert get(tmp_path, preset="dpo", retries=8)["dpo"].read_bytes() == CHATS
    assert len(waits) == 4                                                  # two for each address there


def test_what_was_begun_at_one_source_goes_on_there(server, store, tmp_path, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", store.url)
    store.files[f"{ON_MODELSCOPE}/dpo.jsonl"] = DOCUMENTS
    store.troubles[f"{ON_MODELSCOPE}/dpo.jsonl"] = [("cut", 50_000), 503]
    with pytest.raises(UserError, match="50 kB are kept"):
        get(tmp_path, preset="dpo", retries=0)
    server.files[f"{TODAY}/dpo.jsonl"] = CHATS                              # there by now, but another file
    store.troubles[f"{ON_MODELSCOPE}/dpo.jsonl"] = []
    assert get(tmp_path, preset="dpo")["dpo"].read_bytes() == DOCUMENTS
    assert sum(store.served(f"{ON_MODELSCOPE}/dpo.jsonl")) == len(DOCUMENTS)


def test_a_part_is_not_given_up_for_another_source(server, tmp_path):
    server.files = {f"{TUTORIALS}/dpo.jsonl": DOCUMENTS, f"{TODAY}/dpo.jsonl": CHATS}
    server.troubles[f"{TUTORIALS}/dpo.jsonl"] = [("cut", 50_000)] + [503] * 5
    with pytest.raises(UserError, match="50 kB are kept"):
        get(tmp_path, preset="dpo")
    server.troubles.clear()
    assert get(tmp_path, preset="dpo")["dpo"].read_bytes() == DOCUMENTS
    assert not server.served(f"{TODAY}/dpo.jsonl")


def test_the_same_bytes_at_another_address_continue_a_part(server, tmp_path):
    """The fixed revision stops answering in the middle, main has the same file by its digest."""
    server.headers["X-Linked-Etag"] = f'"{sha256(DOCUMENTS)}"'
    server.files = {f"{TUTORIALS}/dpo.jsonl": DOCUMENTS, f"{TODAY}/dpo.jsonl": DOCUMENTS}
    server.troubles[f"{TUTORIALS}/dpo.jsonl"] = [("cut", 50_000), 404]
    assert get(tmp_path, preset="dpo")["dpo"].read_bytes() == DOCUMENTS
    assert server.served(f"{TODAY}/dpo.jsonl") == [len(DOCUMENTS) - 50_000]


class Proxy(http.server.BaseHTTPRequestHandler):
    """Forwards plain http requests to the one server it knows, whatever host they name."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.asked.append(self.path)
        path = "/" + self.path.split("/", 3)[3]
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(self.server.to + path) as response:
            body = response.read()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_a_proxy_named_by_the_environment_is_used(server, tmp_path, monkeypatch):
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    proxy.asked, proxy.to = [], server.url
    threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    server.files[f"{TUTORIALS}/dpo.jsonl"] = CHATS
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")                 # only the proxy can reach it
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_port}")
    try:
        assert get(tmp_path, preset="dpo")["dpo"].read_bytes() == CHATS
        assert proxy.asked == [f"http://hub.invalid{TUTORIALS}/dpo.jsonl"]
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        get(tmp_path / "direct", preset="dpo")
        assert len(proxy.asked) == 1
    finally:
        proxy.shutdown()
        proxy.server_close()


def test_a_socks_proxy_is_told_to_be_none_of_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "socks5://127.0.0.1:1080")
    with pytest.raises(UserError, match="SOCKS"):
        get(tmp_path, preset="dpo")


# ----------------------------------------------------------------------------------------------------------- disk


def test_too_little_room_is_told_with_numbers_before_anything_is_asked(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "SLACK", 256 << 20)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=3_000_000_000))
    with pytest.raises(UserError, match=r"needs 2.98 GB and 268 MB to spare, but .* has 3 GB; make room or choose"):
        get(tmp_path, preset="t2t")
    assert not server.requests


def test_too_little_room_for_the_size_that_the_server_names(server, tmp_path, monkeypatch):
    server.files["/docs.jsonl"] = DOCUMENTS
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=100_000))
    with pytest.raises(UserError, match=r"docs.jsonl needs .* has 100 kB"):
        get(tmp_path, url=url_of(server))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_what_came_and_is_one_line(server, tmp_path, monkeypatch):
    server.files["/docs.jsonl"] = DOCUMENTS
    opened = download.open_for_appending

    class Full:
        """A file on a disk with room for 70,000 bytes."""
        def __init__(self, file):
            self.file = file

        def write(self, data):
            room = 70_000 - self.file.tell()
            if not room:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data[:room])

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(download, "open_for_appending", lambda path: Full(opened(path)))
    with pytest.raises(UserError, match=r"the disk is full; what has arrived is kept: make room") as error:
        get(tmp_path, url=url_of(server))
    assert "\n" not in str(error.value) and (tmp_path / "docs.jsonl.part").stat().st_size == 70_000
    monkeypatch.setattr(download, "open_for_appending", opened)
    assert get(tmp_path, url=url_of(server))["docs.jsonl"].read_bytes() == DOCUMENTS
    assert server.requests[-1][2] == len(DOCUMENTS) - 70_000


# -------------------------------------------------------------------------------------------------- what it holds


@pytest.mark.parametrize("content, message", [
    (b"<!DOCTYPE html><html><body>Please log in</body></html>", "a web page came instead of data"),
    (b"\n<html>\nno\n</html>\n", "a web page came instead of data"),
    (b'{"error": "not found"}\n', "it holds no data that we can read (line 1: no field that we know"),
    (b"\n\n", "it holds nothing but empty lines"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "it holds no data that we can read"),
])
def test_what_is_no_data_never_gets_the_name(server, tmp_path, content, message):
    server.files["/docs.jsonl"] = content
    with pytest.raises(UserError, match=re.escape(message)):
        get(tmp_path, url=url_of(server))
    assert not (tmp_path / "docs.jsonl").exists() and (tmp_path / "docs.jsonl.bad").read_bytes() == content


def test_an_empty_file_is_no_file(server, tmp_path):
    server.files["/docs.jsonl"] = b""
    with pytest.raises(UserError, match="has an empty file at"):
        get(tmp_path, url=url_of(server))
    assert not list(tmp_path.iterdir())


def test_sizes_are_told_in_three_digits():
    sizes = {0: "0 B", 999: "999 B", 22_789: "22.8 kB", 999_999: "1 MB", 1_620_000_000: "1.62 GB", 999_999_999: "1 GB"}
    assert {size: download.human(size) for size in sizes} == sizes


def test_a_few_bad_records_are_told_and_do_not_matter(server, tmp_path, capsys):
    server.files["/docs.jsonl"] = b'\xef\xbb\xbf{"text": "a"}\n{"text": 5}\n{"text": "b"}\n'
    get(tmp_path, url=url_of(server))
    assert 'of its first 3 records 1 cannot be read (train with --on_bad_record skip), the first: line 2: "text"' in (
        capsys.readouterr().out)


def test_packed_files_and_texts_are_looked_into(server, tmp_path):
    server.files = {"/a.jsonl.gz": gzip.compress(CHATS), "/b.txt": b"Once upon a time", "/c.jsonl.gz": b"\x1f\x8bno",
                    "/d.txt": b"<!doctype HTML>"}
    assert len(list(records(get(tmp_path, url=url_of(server, "a.jsonl.gz"))["a.jsonl.gz"]))) == 50
    assert get(tmp_path, url=url_of(server, "b.txt"))["b.txt"].read_text() == "Once upon a time"
    with pytest.raises(UserError, match="not a whole gzip file"):
        get(tmp_path, url=url_of(server, "c.jsonl.gz"))
    with pytest.raises(UserError, match="a web page came"):
        get(tmp_path, url=url_of(server, "d.txt"))


def fetch_rows(server, tmp_path, monkeypatch, name, path, content):
    """The records that become of a file of the catalogue with this content."""
    file = FILES[name]
    server.files[f"/{path}"] = content
    monkeypatch.setitem(FILES, name, catalogue.PublicFile(file.holds, file.stage, file.use, file.licence, 1,
                                                          (url_of(server, path),), shape=file.shape))
    target = get(tmp_path, file=name)[name]
    assert (tmp_path / f"{target.name}.sha256").read_text().split()[0] == sha256(target.read_bytes())
    assert {path.name for path in tmp_path.iterdir()} == {target.name, f"{target.name}.sha256"}
    get(tmp_path, file=name)                                                # again: by the digest of what was written
    return [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()], list(records(target))


def test_school_problems_stay_as_they_are_and_can_be_read(server, tmp_path, monkeypatch):
    row = {"question": "48 and half of it?", "answer": "Half is 48/2 = <<48/2=24>>24.\nTogether 72.\n#### 72"}
    written, _ = fetch_rows(server, tmp_path, monkeypatch, "gsm8k_train", "t.jsonl", json.dumps(row).encode())
    assert written == [row]
    assert next(records(tmp_path / "gsm8k_train.jsonl", kind="prompt"))["answer"] == "72"


def test_spelled_chat_markers_become_line_ends(server, tmp_path, monkeypatch):
    texts = ["<|im_start|>你好?<|im_end|> <|im_start|>好 <b>的</b>。<|im_end|>", "<s>a</s> <s>b</s>", "one\n\ntwo <|"]
    content = "\n".join(json.dumps({"text": text}) for text in [*texts, "<|im_start|> <|im_end|>"]).encode()
    written, _ = fetch_rows(server, tmp_path, monkeypatch, "pretrain_hq", "p.jsonl", content)
    assert [row["text"] for row in written] == ["你好?\n好 <b>的</b>。", "a\nb", "one\n\ntwo <|"]


def test_stories_are_parted_at_their_separators(server, tmp_path, monkeypatch):
    text = "\nOne day\na fox came.\n<|endoftext|>\n\n<|endoftext|>\nThe end — really.\n"
    written, _ = fetch_rows(server, tmp_path, monkeypatch, "tinystories", "t.txt", text.encode())
    assert written == [{"text": "One day\na fox came."}, {"text": "The end — really."}]


def test_arrays_become_lines_however_they_are_cut_while_reading(server, tmp_path, monkeypatch):
    rows = [{"instruction": f"say {number}", "input": "", "output": '"}, {' * number} for number in range(1, 60)]
    monkeypatch.setattr(download, "CHUNK", 97)
    written, parsed = fetch_rows(server, tmp_path, monkeypatch, "alpaca_gpt4_zh", "a.json",
                                 json.dumps(rows, indent=2, ensure_ascii=False).encode())
    assert written == rows and len(parsed) == 59


def test_rows_that_are_no_records_are_left_out_and_counted(server, tmp_path, monkeypatch, capsys):
    good = {"instruction": "hi", "context": "you", "response": "hello"}
    rows = [good, {"instruction": None, "context": "", "response": "x"}, good, good, {**good, "response": "\ud800"},
            good, "what"]
    written, _ = fetch_rows(server, tmp_path, monkeypatch, "dolly", "d.jsonl",
                            "\n".join(json.dumps(row) for row in rows).encode())
    assert written == [{"instruction": "hi", "input": "you", "output": "hello"}] * 4
    assert "4 records (3 rows are none and left out)" in capsys.readouterr().out


def test_a_file_without_records_is_set_aside(server, tmp_path, monkeypatch):
    for content, message in ((b"<html>no</html>", "only 0 of its 1 rows are records"), (b"\xff[", "it is not UTF-8")):
        server.files["/x.json"] = content
        with pytest.raises(UserError, match=message):
            get(tmp_path, url=url_of(server, "x.json"))
        assert (tmp_path / "x.jsonl.bad").read_bytes() == content and not (tmp_path / "x.jsonl").exists()


def test_preferences_with_the_conversation_apart_from_the_replies(server, tmp_path, monkeypatch):
    row = {"conversations": [{"from": "system", "value": "be kind"}, {"from": "human", "value": "hi"}],
           "chosen": {"from": "gpt", "value": "hello"}, "rejected": {"from": "gpt", "value": "go"}}
    _, parsed = fetch_rows(server, tmp_path, monkeypatch, "dpo_en", "d.json", json.dumps([row]).encode())
    assert [message["content"] for message in parsed[0]["chosen"]] == ["be kind", "hi", "hello"]
    assert [message["content"] for message in parsed[0]["rejected"]] == ["be kind", "hi", "go"]


def test_parquet_becomes_lines(server, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table
    rows = [{"prompt": "hi", "prompt_id": "1",
             "chosen": [{"content": "hi", "role": "user"}, {"content": "hello", "role": "assistant"}],
             "rejected": [{"content": "hi", "role": "user"}, {"content": "go", "role": "assistant"}]}] * 3
    parquet.write_table(table.from_pylist(rows), tmp_path / "t.parquet", compression="zstd")
    content = (tmp_path / "t.parquet").read_bytes()
    _, parsed = fetch_rows(server, tmp_path / "data", monkeypatch, "ultrafeedback", "t.parquet", content)
    assert [message["content"] for message in parsed[2]["chosen"]] == ["hi", "hello"]
    server.files["/y.parquet"] = b"PAR1 no"
    with pytest.raises(UserError, match="it is no parquet file"):
        get(tmp_path, url=url_of(server, "y.parquet"))


def test_a_missing_package_is_told_before_the_download(server, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="python -m pip install pyarrow"):
        get(tmp_path, preset="fineweb")
    assert not server.requests


# ----------------------------------------------------------------------------------------------------- progress


def test_progress_tells_speed_and_remaining_time_and_is_quiet_in_a_log(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(download.time, "monotonic", lambda: now[0])
    progress = download.Progress("docs.jsonl", 500_000_000, 1_620_000_000)
    for tenth in range(1, 200):
        now[0] = tenth / 10
        progress.show(500_000_000 + tenth * 1_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3                                                  # at 5, 10 and 15 seconds
    assert lines[0] == "  docs.jsonl  550 MB of 1.62 GB   34%  eta 1:47  10.0 MB/s"
