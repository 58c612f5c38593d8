"""Download files over HTTPS; a file has its name only when it is complete, and its checksum is recorded with its first use.

Plain HTTP is allowed for servers on this computer alone.
"""

import contextlib
import gzip
import time
import zlib
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from tqdm import tqdm

from lib import records
from lib.files import check_unpacked, reading, writing

ATTEMPTS = 6
FIRST_WAIT_S = 1.0  # doubled after every attempt that received nothing new
TIMEOUT_S = 30
CHUNK_BYTES = 1 << 18
MAX_BYTES = 50e9  # of one file; the largest here (E-ANND-5) has a tenth of it
MAX_REDIRECTS = 5
LOOPBACK = ("127.0.0.1", "localhost", "::1")
OTHER_HOSTS = {  # host: hosts that it is known to redirect to
    "github.com": ("raw.githubusercontent.com", "media.githubusercontent.com"),
    "www.ebi.ac.uk": ("ftp.ebi.ac.uk",),
}


def fetch(url: str, path: Path) -> Path:
    """Download `url` to `path`, unless the file exists.

    An interrupted download continues where it stopped (HTTP Range), with increasing waits between the attempts; if the server
    ignores Range, it starts again. The part so far is kept as `<path>.part`, also for the next run.

    Raises
    ------
    ConnectionError
        If the download fails; the message says which file to save where by hand.
    ValueError
        If the server sends something else (an HTML page, a broken gzip file) or redirects to another host, if the address is not
        https, or if a file that was used before has changed.
    """
    if path.exists():
        check_file(path, path)
        with reading(path):
            records.check(path, "delete it and run this again to download it")
        if not records.record_path(path).exists():
            with contextlib.suppress(OSError):  # a folder that may not be written to
                records.add(path, source="first use")
        print(f"{path.name}: using the file in {path.parent}")
        return path
    partial = path.with_name(path.name + ".part")
    wait = FIRST_WAIT_S
    reason = ""
    for attempt in range(1, ATTEMPTS + 1):
        before = partial.stat().st_size if partial.exists() else 0
        try:
            _download(url, partial)
            check_file(partial, path)
            with writing(path):
                partial.replace(path)
                records.add(path, source=url)
            return path
        except requests.HTTPError as error:
            response = error.response
            assert response is not None
            reason = f"the server answered {response.status_code} {response.reason}"
            if response.status_code < 500 and response.status_code != 429:
                break
        except (requests.RequestException, urllib3.exceptions.HTTPError, ConnectionError, TimeoutError) as error:
            reason = f"{type(error).__name__}: {error}"
        except ValueError:
            partial.unlink(missing_ok=True)
            raise
        if partial.exists() and partial.stat().st_size > before:
            wait = FIRST_WAIT_S
        if attempt < ATTEMPTS:
            print(f"{path.name}: {reason}; attempt {attempt + 1} of {ATTEMPTS} in {wait:.0f} s")
            time.sleep(wait)
            wait *= 2
    raise ConnectionError(
        f"{url} could not be downloaded ({reason}). Without a network: download it elsewhere, save it as {path}, and run this again"
    )


def _download(url: str, partial: Path) -> None:
    """Make one attempt; append to `partial` if the server continues where the last attempt stopped."""
    have = partial.stat().st_size if partial.exists() else 0
    # Without "identity" a server may compress the file again, and byte ranges would refer to the compressed stream.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with _get(url, headers) as response:
        if response.status_code == 416:  # the server has no more: the part is complete, or belongs to another file
            whole = response.headers.get("Content-Range", "").rpartition("/")[2]
            if whole == str(have):
                return
            partial.unlink()
            raise requests.ConnectionError("the partial file does not fit the server's; starting again")
        response.raise_for_status()
        resumed = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        start = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length and length.isdigit() else None
        _check_size(url, total or start)
        with (
            writing(partial),
            open(partial, "ab" if resumed else "wb") as file,
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=url.rpartition("/")[2]) as progress,
        ):
            # not iter_content, which drops an incomplete chunk
            while chunk := response.raw.read(CHUNK_BYTES, decode_content=False):
                file.write(chunk)
                _check_size(url, file.tell())
                progress.update(len(chunk))
    if total is not None and partial.stat().st_size < total:
        raise requests.ConnectionError(f"the connection ended after {partial.stat().st_size:,} of {total:,} bytes")


def _get(url: str, headers: dict[str, str]) -> requests.Response:
    """The server's answer, after redirects to the same host or to one of `OTHER_HOSTS`.

    Raises
    ------
    ValueError
        For other redirects, and for addresses without https.
    """
    first = urlsplit(url).hostname
    for _ in range(MAX_REDIRECTS + 1):
        parts = urlsplit(url)
        if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOOPBACK):
            raise ValueError(f"{url} is not a secure address; expected https://...")
        if parts.hostname != first and parts.hostname not in OTHER_HOSTS.get(str(first), ()):
            raise ValueError(
                f"{first} redirects to another host, {parts.hostname}; expected the file from {first}: if you trust it, download {url} "
                "yourself and save it in data/raw"
            )
        response = requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S, allow_redirects=False)
        if not response.is_redirect:
            return response
        response.close()
        url = urljoin(url, response.headers["Location"])
    raise requests.ConnectionError(f"more than {MAX_REDIRECTS} redirects")


def _check_size(url: str, n_bytes: int) -> None:
    if n_bytes > MAX_BYTES:
        raise ValueError(
            f"{url} has {n_bytes:,} bytes or more, expected at most {MAX_BYTES:,.0f}: download it yourself"
        )


def check_file(file: Path, named: Path) -> None:
    """Refuse a file whose content does not fit its final name `named`.

    Raises
    ------
    ValueError
        If the file is an HTML page, empty, or a gzip file that is incomplete or has a wrong checksum.
    """
    with open(file, "rb") as stream:
        head = stream.read(512)
    if not head:
        raise ValueError(f"{named.name} is empty; delete {file} and run this again")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(
            f"{named.name} is a web page, not data (it starts with {head[:40]!r}); expected the data file: save it as {named}"
        )
    if named.suffix != ".gz":
        return
    try:
        with gzip.open(file) as stream:
            n_bytes = 0
            while piece := stream.read(1 << 22):
                n_bytes += len(piece)
                check_unpacked(file, n_bytes)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{named.name} is not a complete gzip file ({error}); delete {file} and run this again"
        ) from error
