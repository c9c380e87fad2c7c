"""Fetch public data sets by name: checked, and in the shapes that the trainers read.

    python dataset/download.py --list                      what there is: size, use, licence
    python dataset/download.py --preset mini               MiniMind's small pair: a text and conversations
    python dataset/download.py --file gsm8k_train,dpo      single files
    python dataset/download.py --url https://…/chats.jsonl --sha256 HEX

writes  dataset/data/NAME.jsonl and, beside it, NAME.jsonl.sha256 (--out: another folder)
reads   HTTP_PROXY, HTTPS_PROXY, NO_PROXY; HF_ENDPOINT, MODELSCOPE_ENDPOINT (mirrors); HF_TOKEN (for gated files)

What has arrived lies in NAME.part, with a note of which version of which file it is the beginning of. However the
program ended, the same command goes on from there, or begins again if the server has another version by now. A file
gets its name only when its length, its sha256 (if the server or catalogue.py knows it) and its first records are right.
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])   # the project root, not dataset/

import errno
import gzip
import hashlib
import http.client
import json
import os
import re
import shutil
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass

from dataset.catalogue import FILES, HUGGING_FACE, MODELSCOPE, PRESETS, SHAPES, PublicFile
from model.cli import arg, parse_args
from model.errors import UserError, run

try:
    import fcntl
except ImportError:    # Windows: two downloads of one file at the same time go unnoticed there
    fcntl = None

# dataset.jsonl and pyarrow are imported where they are needed, so that --help answers at once.

ROOT = pathlib.Path(__file__).resolve().parents[1]
CHUNK = 1 << 20
SLACK = 256 << 20        # bytes of disk that stay free
CHECKED_LINES = 100      # how many records of a fetched file are read before it gets its name
FIRST_WAIT = 1.0         # seconds before the first retry; they double up to a minute
SAY_EVERY = 5.0          # seconds between progress lines in a log; a terminal's is renewed ten times as often
WORTH_RETRYING = {408, 425, 429, 500, 502, 503, 504}
KEPT, REWRITTEN = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz"), (".json", ".parquet")
MIRRORS = {HUGGING_FACE: "HF_ENDPOINT", MODELSCOPE: "MODELSCOPE_ENDPOINT"}


@dataclass
class Config:
    preset: str = arg("", "named sets of files, several by commas; --list shows them")
    file: str = arg("", "single files by name, several by commas")
    url: str = arg("", "any .jsonl, .txt (also .gz), .json or .parquet file")
    sha256: str = arg("", "the digest that the one file asked for must have")
    out: str = arg("dataset/data", "folder to write to")
    source: str = arg("auto", "where from: hf (Hugging Face), modelscope, or auto (the first that has it)",
                      choices=("auto", "hf", "modelscope"))
    timeout: float = arg(30.0, "seconds without a byte after which a connection is given up")
    retries: int = arg(8, "tries in a row that bring nothing before giving up")
    list: bool = arg(False, "show presets and files, and leave")


# --- what is asked for


def listing():
    """Lines of --list."""
    yield "presets (--preset)"
    for name, (use, files) in PRESETS.items():
        shown = ", ".join(files) if len(files) < 6 else f"{files[0]} to {files[-1]}"
        yield f"  {name:<18} {human(sum(FILES[file].size for file in files)):>8}  {use}: {shown}"
    yield "files (--file)"
    for name, file in FILES.items():
        yield f"  {name:<18} {human(file.size):>8}  {file.holds:<10}  {file.use}; {file.licence}"


def choose(cfg):
    """{name: PublicFile} of what the flags ask for. UserError: unknown names, or nothing."""
    names = [name.strip() for name in cfg.file.split(",") if name.strip()]
    for preset in (name.strip() for name in cfg.preset.split(",") if name.strip()):
        if preset not in PRESETS:
            raise UserError(f"--preset {preset}: there is no such preset; the presets are {', '.join(PRESETS)}")
        names += PRESETS[preset][1]
    for name in names:
        if name not in FILES:
            raise UserError(f"--file {name}: there is no such file; --list shows them, --url fetches any other")
    chosen = {name: FILES[name] for name in names}
    if cfg.url:
        chosen.update([file_at(cfg.url)])
    if not chosen:
        raise UserError("nothing to fetch: give --preset, --file or --url; --list shows what there is")
    if cfg.sha256 and (len(chosen) > 1 or not is_sha256(cfg.sha256)):
        raise UserError(f"--sha256 {cfg.sha256}: must be the 64 hexadecimal digits of the one file that is asked for")
    return chosen


def file_at(url):
    """(name, PublicFile) of any address."""
    parts = urllib.parse.urlsplit(url)
    path = pathlib.PurePosixPath(urllib.parse.unquote(parts.path))
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"--url {url}: must start with http:// or https://")
    if not path.name.endswith(KEPT + REWRITTEN) or not re.fullmatch(r"[\w.\-]+", path.name):
        raise UserError(f"--url {url}: the name must end in {', '.join(KEPT + REWRITTEN)}, without spaces or signs")
    if url.startswith(HUGGING_FACE + "/"):
        url = url.replace("/blob/", "/resolve/", 1)        # the address of the page about the file, which people copy
    name = path.name if path.name.endswith(KEPT) else f"{path.stem}.jsonl"
    return name, PublicFile("", "", "a file of your choice", "see where it is from", 0, (url,),
                            shape=dict if path.suffix in REWRITTEN else None)


def file_name(name, file):
    if name.endswith(KEPT):
        return name
    return f"{name}.txt" if file.holds == "text" else f"{name}.jsonl"


def sources(name, file, source):
    """The urls of a file that --source allows."""
    other = {"hf": MODELSCOPE, "modelscope": HUGGING_FACE}.get(source, "no other")
    urls = [url for url in file.urls if not url.startswith(other)]
    if not urls:
        raise UserError(f"--source {source}: {name} is not there; leave the flag away")
    return urls


# --- asking for it


class Interrupted(Exception):
    """The transfer ended early; the same request may well succeed later. `wait`: seconds that the server asks for."""

    def __init__(self, message, wait=0):
        super().__init__(message)
        self.wait = wait


class Changed(Interrupted):
    """What has arrived is not the beginning of what the server has by now."""


class Unavailable(Exception):
    """This address will not give the file, however often it is asked."""


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and remembers the digest and size that Hugging Face tells on the way to its store.

    The access token goes along only to the same host: urllib leaves "unredirected" headers behind.
    """

    def __init__(self):
        self.linked = {}

    def redirect_request(self, request, body, code, message, headers, url):
        old, new = urllib.parse.urlsplit(request.full_url), urllib.parse.urlsplit(url)
        if new.scheme not in ("http", "https") or (old.scheme, new.scheme) == ("https", "http"):
            raise urllib.error.HTTPError(request.full_url, code, "a redirect away from https", headers, body)
        self.linked.update({key: headers[key] for key in ("X-Linked-Etag", "X-Linked-Size") if headers[key]})
        there = super().redirect_request(request, body, code, message, headers, url)
        token = request.get_header("Authorization")
        if there and token and (old.scheme, old.netloc) == (new.scheme, new.netloc):
            there.add_unredirected_header("Authorization", token)
        return there


def is_sha256(text):
    return re.fullmatch(r"[0-9a-fA-F]{64}", text) is not None


def address(url):
    """The url to ask: on the mirror that the environment names, if it names one."""
    for home, variable in MIRRORS.items():
        mirror = os.environ.get(variable, "").strip().rstrip("/")
        if mirror and url.startswith(home + "/"):
            if not mirror.startswith(("http://", "https://")):
                raise UserError(f"{variable}={mirror}: must start with http:// or https://")
            return mirror + url[len(home):]
    return url


def host(url):
    return urllib.parse.urlsplit(address(url)).hostname


def build_request(url, have, note):
    """The request for the bytes from `have` on, of the version that `note` describes."""
    request = urllib.request.Request(address(url), headers={"User-Agent": "acorn", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        if note["url"] == url and note["validator"]:
            request.add_header("If-Range", note["validator"])
    token = os.environ.get("HF_TOKEN", "").strip()
    if token and url.startswith(HUGGING_FACE + "/"):
        if not re.fullmatch(r"[\x21-\x7e]+", token):
            raise UserError("HF_TOKEN: holds characters that no token has; set it again")
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return request


def open_url(url, have, note, timeout):
    """Ask. Returns (response, what it says of the file: see `describe`). Status 200 means all of it, 206 the rest."""
    redirects = Redirects()
    try:
        response = urllib.request.build_opener(redirects).open(build_request(url, have, note), timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            said = f"{host(url)} answers {error.code} {error.reason}"
            if error.code == 416 and have:                 # it has fewer bytes than we have
                raise Changed(f"{host(url)} has another version of the file by now: starting over") from None
            if error.code in WORTH_RETRYING:
                after = error.headers.get("Retry-After", "")
                raise Interrupted(said, min(int(after), 300) if after.isdigit() else 0) from None
            hint = "; is it gated? accept its terms on its page and set HF_TOKEN" if error.code in (401, 403) else ""
            raise Unavailable(f"{said} for {url}{hint}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise Unavailable(f"{host(url)}: its certificate cannot be verified ({reason.verify_message}); install the "
                              "certificates of the system or name them in SSL_CERT_FILE") from None
        raise Interrupted(f"{host(url)}: {reason or type(error).__name__}") from None
    if response.headers.get("Content-Encoding", "identity") != "identity":
        response.close()
        raise Unavailable(f"{host(url)} sends {url} compressed although asked not to")
    moved = host(url) != urllib.parse.urlsplit(response.url).hostname
    return response, describe(url, response, redirects.linked, moved)


def describe(url, response, linked, moved):
    """What a response tells about its file.

    total      bytes of the whole file, 0 if unknown
    sha256     its digest, "" if unknown: X-Linked-Etag, or an ETag of 64 digits, unless it is a store's own (`moved`)
    validator  what If-Range takes: a strong ETag or the time of change
    identity   equal in two responses about the same bytes; "" if nothing tells
    """
    headers = response.headers
    etag = headers.get("ETag", "")
    announced = linked.get("X-Linked-Etag") or headers.get("X-Linked-Etag") or ("" if moved else etag)
    announced = announced.removeprefix("W/").strip('"').lower()
    sha256 = announced if is_sha256(announced) else ""
    validator = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")
    whole = re.fullmatch(r"bytes \d+-\d+/(\d+)", headers.get("Content-Range", ""))
    total = whole[1] if whole else headers.get("Content-Length") if response.status == 200 else None
    total = total or linked.get("X-Linked-Size") or headers.get("X-Linked-Size") or 0
    identity = f"sha256 {sha256}" if sha256 else f"{url} {validator}" if validator else ""
    return {"url": url, "total": int(total), "sha256": sha256, "validator": validator, "identity": identity}


# --- getting it


class Part:
    """NAME.part, the beginning of a file, and NAME.part.json, the note of what it is the beginning of.

    Opened for appending, locked, without a buffer: what is counted has left this process.
    """

    def __init__(self, path):
        self.path, self.note_path = path, path.with_name(path.name + ".json")
        self.file = open_for_appending(path)
        try:
            if fcntl:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise UserError(f"{path}: another download is writing to it; wait for it or stop it") from None
        except OSError:
            pass                                           # a file system without locks
        try:
            self.note = json.loads(self.note_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.note = {}
        if not self.note.get("identity"):                  # nothing tells which version these bytes are from
            self.start_over({})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        empty = not len(self)
        self.file.close()
        if empty:
            self.remove()

    def __len__(self):
        return self.file.tell()

    def start_over(self, note):
        self.file.seek(0)
        self.file.truncate()
        self.note = note
        self.note_path.write_text(json.dumps(note), encoding="utf-8")

    def write(self, chunk):
        rest = memoryview(chunk)
        while rest:
            rest = rest[self.file.write(rest):]

    def remove(self):
        self.path.unlink(missing_ok=True)
        self.note_path.unlink(missing_ok=True)


def open_for_appending(path):
    return open(path, "ab", buffering=0)


def fetch(name, urls, part, expected, growth, cfg):
    """Bring `part` to its full length, from the first url that has the file."""
    begun, reasons = part.note.get("url"), []
    urls = sorted(urls, key=lambda url: url != begun)      # what was begun somewhere goes on there
    for url in urls:
        try:
            return fetch_from(name, url, part, expected, growth, cfg, last=url == urls[-1])
        except Unavailable as error:
            reasons.append(str(error))
            if url != urls[-1]:
                say(f"{error}; trying the next address")
    raise UserError(f"{name}: {'; '.join(reasons)}. Another --source or HF_ENDPOINT may have it; --list shows others")


def fetch_from(name, url, part, expected, growth, cfg, last):
    """The same from one url, with as many tries as bring something."""
    tries = cfg.retries if last else min(cfg.retries, 2)   # no minutes of waiting for a host that another can replace
    failures, furthest = 0, len(part)
    while True:
        try:
            return transfer(name, url, part, expected, growth, cfg.timeout)
        except Interrupted as error:
            failures = 1 if len(part) > furthest else failures + 1
            furthest = max(furthest, len(part))
            if isinstance(error, Changed):
                part.start_over({})
            if failures > tries and not last and not len(part):
                raise Unavailable(str(error)) from None
            if failures > tries:
                raise UserError(f"{name}: {error}; given up after {failures} tries that brought nothing, "
                                f"{human(len(part))} are kept; the same command continues") from None
            wait = max(error.wait, min(FIRST_WAIT * 2 ** (failures - 1), 60))
            say(f"{error}; again in {wait:.0f} s")
            time.sleep(wait)


def transfer(name, url, part, expected, growth, timeout):
    """One request: append what is missing to `part`. Interrupted: it ended early, and what came is kept."""
    have = len(part)
    if have and have == part.note["total"]:
        return                                             # stopped between the last byte and the new name
    response, found = open_url(url, have, part.note, timeout)
    with response:
        if expected and found["sha256"] and found["sha256"] != expected:
            raise Unavailable(f"{host(url)} has another file under this name, with sha256 {found['sha256']} instead of "
                              f"{expected} (--sha256 takes it as it is)")
        same = found["identity"] == part.note.get("identity")
        if response.status == 206 and not (same and first_byte(response) == have):
            raise Changed(f"{host(url)} has another version of the file by now: starting over")
        if response.status != 206:
            if have:
                why = "sends whole files only" if same else "has another version of the file by now"
                say(f"{host(url)} {why}: starting over")
            part.start_over(found)
        need_room(part.path.parent, name, found["total"] - len(part) + growth * found["total"])
        copy(name, url, response, part, found["total"], timeout)


def first_byte(response):
    """Where the bytes of a response belong in the file, None if it does not say."""
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def copy(name, url, response, part, total, timeout):
    """Append the body of a response to `part`."""
    progress = Progress(name, len(part), total)
    while chunk := read(response, url, timeout):
        part.write(chunk)
        progress.show(len(part))
    if total and len(part) < total:
        raise Interrupted(f"{host(url)} closed the connection at {human(len(part))} of {human(total)}")
    if total and len(part) > total:
        raise Changed(f"{host(url)} sent more than the {total} bytes that it named")
    if not len(part):
        raise Unavailable(f"{host(url)} has an empty file at {url}")
    progress.show(len(part), last=True)


def read(response, url, timeout):
    """The next bytes of a response as soon as there are some, b"" at the end."""
    try:
        return response.read1(CHUNK)
    except TimeoutError:
        raise Interrupted(f"{host(url)} sent nothing for {timeout:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise Interrupted(f"{host(url)}: {type(error).__name__}") from None


def need_room(folder, what, needed):
    """UserError unless `needed` bytes fit on the disk and some stay free."""
    free = shutil.disk_usage(folder).free
    if free < needed + SLACK:
        raise UserError(f"{what} needs {human(needed)} and {human(SLACK)} to spare, but {folder} has {human(free)}; "
                        "make room or choose another --out")


class Progress:
    """A line with speed and remaining time: renewed in place in a terminal, a new one now and then in a log."""

    def __init__(self, name, have, total):
        self.name, self.begun_at, self.total = name, have, total
        self.begun = self.said = time.monotonic()

    def show(self, have, last=False):
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if now - self.said < (SAY_EVERY / 10 if terminal else SAY_EVERY) and not last:
            return
        self.said = now
        speed = (have - self.begun_at) / max(now - self.begun, 1e-9)
        line = f"{self.name}  {human(have)}"
        if self.total:
            left = int((self.total - have) / max(speed, 1))
            line += f" of {human(self.total)}  {have / self.total:4.0%}  eta {left // 60}:{left % 60:02d}"
        say(f"{line}  {speed / 1e6:.1f} MB/s", fleeting=not last)


def say(message, fleeting=False):
    """A line about the course of things; in a terminal the next one takes the place of a fleeting one."""
    if sys.stderr.isatty():
        print(f"\r  {message!s:<76}", end="" if fleeting else "\n", file=sys.stderr, flush=True)
    else:
        print(f"  {message}", file=sys.stderr, flush=True)


def human(count):
    """Bytes in decimal units, '1.62 GB'."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


# --- checking it


def get(name, file, urls, folder, cfg):
    """Fetch one file into `folder` from one of `urls`, check it, bring it into shape. Returns its path."""
    target = folder / file_name(name, file)
    expected = cfg.sha256.lower() or file.sha256
    if target.exists():
        verify(target, file, cfg.sha256.lower())
        return target
    with Part(target.with_name(target.name + ".part")) as part:
        fetch(target.name, urls, part, expected, growth(file), cfg)
    expected = expected or part.note["sha256"]
    say(f"{target.name}: checking")
    digest, rewritten = sha256_of(part.path), target.with_name(target.name + ".rewritten")
    try:
        if expected and digest != expected:
            raise UserError(f"its sha256 is {digest}, not {expected}")
        if file.shape:
            finished, told = rewritten, rewrite(part.path, file, rewritten)
        else:
            finished, told = part.path, check_records(part.path, target.name)
    except UserError as problem:
        bad = target.with_name(target.name + ".bad")
        os.replace(part.path, bad)
        part.remove()
        rewritten.unlink(missing_ok=True)
        raise UserError(f"{target.name}: {problem}; what came is kept as {bad}, the same command fetches it again"
                        ) from None
    publish(finished, target, sha256_of(finished) if file.shape else digest)
    part.remove()
    print(f"  {target}: {human(target.stat().st_size)}{told}; sha256 of the download {digest}, "
          + ("as it should be" if expected else "which nobody had named"), flush=True)
    return target


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_path(target):
    """NAME.sha256, in the form that `sha256sum -c` reads."""
    return target.with_name(target.name + ".sha256")


def publish(finished, target, digest):
    """Flush a finished file and give it its name. The digest is written first: a file without one is not from here."""
    with open(finished, "r+b") as file:
        os.fsync(file.fileno())
    digest_path(target).write_text(f"{digest}  {target.name}\n", encoding="utf-8")
    os.replace(finished, target)


def verify(target, file, asked):
    """A file of this name is there: say whether it is what was fetched. UserError: it is not.

    `asked` and the catalogue's digest are of the file as it is fetched; a rewritten one has only the digest beside it.
    """
    beside = digest_path(target)
    expected = beside.read_text(encoding="utf-8").partition(" ")[0] if beside.exists() else ""
    if not file.shape:
        expected = asked or expected or file.sha256
    if not expected:
        say(f"{target}: already there, without a digest to compare it with")
        return
    digest = sha256_of(target)
    if digest != expected:
        raise UserError(f"{target} is there already, but its sha256 is {digest}, not {expected}; move or delete it to "
                        "fetch it again")
    say(f"{target}: already there, sha256 as it should be")


def check_records(path, name):
    """The beginning of a file must be records, or text: a page that says "please log in" must not pass for data.

    Returns what else is to be told of it. UserError: it is something else.
    """
    from dataset.jsonl import BadRecord, load_json, parse_record
    try:
        with gzip.open(path, "rb") if name.endswith(".gz") else open(path, "rb") as file:
            lines = []
            while len(lines) < CHECKED_LINES and sum(map(len, lines)) < 16 * CHUNK and (line := file.readline(1 << 26)):
                lines += [line] if line.strip() else []
    except (OSError, EOFError) as error:
        raise UserError(f"not a whole gzip file ({error})") from None
    if not lines:
        raise UserError("it holds nothing but empty lines")
    lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
    if re.match(rb"\s*<(!doctype html|html)\b", lines[0], re.IGNORECASE):
        raise UserError("a web page came instead of data")
    problems = []
    for number, line in enumerate(lines if name.endswith((".jsonl", ".jsonl.gz")) else [], start=1):
        try:
            parse_record(load_json(line))
        except BadRecord as error:
            problems.append(f"line {number}: {error}")
    if len(problems) > len(lines) / 2:
        raise UserError(f"it holds no data that we can read ({problems[0]})")
    return (f"; of its first {len(lines)} records {len(problems)} cannot be read (train with --on_bad_record skip), "
            f"the first: {problems[0]}" if problems else "")


# --- bringing it into shape


def growth(file):
    """Bytes of the rewritten file for each fetched one, about."""
    if not file.shape:
        return 0
    return 3 if file.urls[0].endswith(".parquet") else 1.1    # parquet is compressed


def rewrite(source, file, target):
    """Write the rows of a file, brought into shape, as JSON lines. One row at a time is in memory (of .parquet, 1000).

    Returns what is to be told of it. UserError: most of them are no records.
    """
    from dataset.jsonl import BadRecord, parse_record
    readers = {".parquet": parquet_rows, ".txt": stories}
    rows = readers.get(pathlib.PurePosixPath(urllib.parse.urlsplit(file.urls[0]).path).suffix, json_values)
    kept = dropped = 0
    say(f"{target.stem}: rewriting as records")
    try:
        with open(target, "w", encoding="utf-8", newline="\n") as out:
            for row in rows(source):
                try:
                    record = file.shape(row)
                    if record is None:
                        continue
                    parse_record(record)
                    line = json.dumps(record, ensure_ascii=False)
                    line.encode("utf-8")                   # half a surrogate pair is JSON, but no character
                except (BadRecord, KeyError, TypeError, AttributeError, ValueError):
                    dropped += 1
                    continue
                out.write(line + "\n")
                kept += 1
    except UnicodeDecodeError as error:
        raise UserError(f"it is not UTF-8 ({error.reason})") from None
    if kept <= dropped:
        raise UserError(f"only {kept} of its {kept + dropped} rows are records")
    return f", {kept:,} records" + (f" ({dropped:,} rows are none and left out)" if dropped else "")


def json_values(path):
    """Yield the values of a JSON array, or those that follow each other in a file, however long it is."""
    decode = json.JSONDecoder().raw_decode
    with open(path, encoding="utf-8-sig") as file:
        text, at = file.read(CHUNK), 0
        while True:
            while at < len(text) and text[at] in " \t\r\n,[]":
                at += 1
            try:
                value, at = decode(text, at)
                yield value
            except ValueError:                             # the value goes on in the next piece, or this is no JSON
                more = file.read(CHUNK)
                if not more or len(text) - at > 64 * CHUNK:
                    if at < len(text):
                        yield text[at:]                    # no record: it is counted as such
                    return
                text, at = text[at:] + more, 0


def parquet_rows(path):
    """Yield the rows of a .parquet file as dicts."""
    pyarrow = import_pyarrow()
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"it is no parquet file ({error})") from None


def import_pyarrow():
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("a .parquet file needs one more package: python -m pip install pyarrow") from None
    return pyarrow


def stories(path):
    """Yield what stands between the lines <|endoftext|> of a text as {"text"}."""
    lines = []
    with open(path, encoding="utf-8-sig") as file:
        for line in file:
            if line.strip() == "<|endoftext|>":
                yield {"text": "".join(lines).strip()}
                lines = []
            else:
                lines.append(line)
    yield {"text": "".join(lines).strip()}


# --- the program


def announce(name, file, url):
    """What is said before a file is fetched."""
    print(f"{name}: {file.use}")
    print(f"  from     {url}" + (f" by way of {host(url)}" if address(url) != url else ""))
    print(f"  licence  {file.licence}")
    print(f"  size     {human(file.size) if file.size else 'not known yet'}", flush=True)
    if file.holds:
        advice = f", recommended --max_len {file.max_len}" if file.max_len else ""
        print(f"  records  {SHAPES[file.holds]}{advice}", flush=True)


def next_commands(paths):
    """Lines to type next, of the stages that there are. paths: {name: path} of what lies there now."""
    groups = {}
    for name, path in paths.items():
        if name in FILES:
            file = FILES[name]
            stage = file.stage
            if stage in ("lora", "reason") and not has_trainer(stage):
                stage = "full_sft"                         # conversations all the same
            if has_trainer(stage):
                groups.setdefault((stage, file.max_len), {}).setdefault(file.part, []).append(str(shown(path)))
    for (stage, max_len), parts in groups.items():
        if "train" in parts:
            yield (f"python trainer/train_{stage}.py --data {','.join(parts['train'])}"
                   + (f" --val_data {','.join(parts['val'])}" if "val" in parts else "")
                   + (f" --max_len {max_len}" if max_len else ""))


def has_trainer(stage):
    return (ROOT / "trainer" / f"train_{stage}.py").exists()


def shown(path):
    """A path as the user would type it."""
    return path.relative_to(pathlib.Path.cwd()) if path.is_relative_to(pathlib.Path.cwd()) else path


def check_surroundings(chosen, folder, cfg):
    """UserError for what would end a download only later: flags, proxy, a missing package, the disk."""
    if cfg.timeout <= 0 or cfg.retries < 0:
        raise UserError(f"--timeout {cfg.timeout:g} --retries {cfg.retries}: must be above 0, and 0 or more")
    proxies = urllib.request.getproxies()
    if any(proxies.get(scheme, "").startswith("socks") for scheme in ("http", "https")):
        raise UserError("HTTP_PROXY or HTTPS_PROXY names a SOCKS proxy; give the http:// address of a proxy instead")
    needed = 0
    for name, file in chosen.items():
        target = folder / file_name(name, file)
        if not target.exists():
            if file.urls[0].endswith(".parquet"):
                import_pyarrow()
            part = target.with_name(target.name + ".part")
            needed += file.size * (1 + growth(file)) - (part.stat().st_size if part.exists() else 0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be made ({error.strerror}); choose another folder") from None
    need_room(folder, "what is asked for", max(needed, 0))


def main(cfg):
    """Fetch what the flags ask for. Returns {name: path}."""
    if cfg.list:
        print("\n".join(listing()))
        return {}
    chosen, paths = choose(cfg), {}
    folder = (ROOT / cfg.out if cfg.out == Config.out else pathlib.Path(cfg.out)).resolve()
    urls = {name: sources(name, file, cfg.source) for name, file in chosen.items()}
    check_surroundings(chosen, folder, cfg)
    try:
        for name, file in chosen.items():
            announce(name, file, urls[name][0])
            paths[name] = get(name, file, urls[name], folder, cfg)
    except KeyboardInterrupt:
        print("\nstopped; what has arrived is kept, the same command continues", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{folder}: the disk is full; what has arrived is kept: make room and give the same command"
                        ) from None
    commands = list(next_commands(paths))
    if commands:
        print("next:", *commands, sep="\n  ")
    return paths


if __name__ == "__main__":
    run(main, parse_args(Config, description=__doc__))
