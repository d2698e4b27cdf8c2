"""Getting CIFAR-10 when it is nowhere on the machine: mirrors, progress bar, SHA-256, and never hanging."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path

from fromzero.errors import InputError

BINARY_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
PYTHON_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
ORIGIN = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MIRRORS = (
    (ORIGIN, BINARY_SHA256),
    ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", PYTHON_SHA256),
)
REACH_SECONDS = 3.0  # for all mirrors together: without a network the answer comes within 5 seconds
SILENCE_SECONDS = 30.0  # a mirror that sends nothing for so long is given up


def fetch_cifar10(folder: Path, *, offline: bool = False) -> Path:
    """Download a published archive of CIFAR-10 into `folder` and return its path, its SHA-256 checked.

    Mirrors are tried in order; `FROMZERO_CIFAR10_MIRROR` names a folder on the web to try first (same file names).
    Raises InputError, saying where to put the file by hand, when `offline` or when no mirror answers.
    """
    advice = (
        f"put cifar-10-binary.tar.gz (or the python version) into {folder}, or name its folder by --data-dir, in Python"
        f" data_dir (it is at {ORIGIN}; digits need no download)"
    )
    if offline:
        raise InputError(f"CIFAR-10 is not on this machine and --offline forbids the download: {advice}")
    mirrors = list(MIRRORS)
    if own := os.environ.get("FROMZERO_CIFAR10_MIRROR"):
        mirrors = [(f"{own.rstrip('/')}/{url.rpartition('/')[2]}", sha) for url, sha in MIRRORS] + mirrors
    reachable = _reachable([url for url, _ in mirrors])
    failures = []
    for url, sha256 in mirrors:
        if url not in reachable:
            host = url.partition("://")[2].partition("/")[0].rpartition("@")[2]
            failures.append(f"{host or url} cannot be reached")
            continue
        try:
            return _retrieve(url, sha256, folder)
        except Exception as error:  # pooch lets through what requests, urllib3 and the file system raise
            failures.append(f"{url}: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
    raise InputError(f"CIFAR-10 could not be downloaded ({'; '.join(dict.fromkeys(failures))}): {advice}")


def _retrieve(url: str, sha256: str, folder: Path) -> Path:
    import pooch

    pooch.get_logger().setLevel(logging.WARNING)
    name = url.rpartition("/")[2]
    print(f"downloading {url} to {folder}", file=sys.stderr)
    downloader = pooch.HTTPDownloader(progressbar=True, timeout=(REACH_SECONDS, SILENCE_SECONDS))
    return Path(pooch.retrieve(url, f"sha256:{sha256}", fname=name, path=folder, downloader=downloader))


def _reachable(urls: list[str]) -> set[str]:
    """The addresses whose host (or proxy) takes a connection within REACH_SECONDS in all. Looked up in threads,
    because a name look-up has no time limit of its own."""
    proxies = urllib.request.getproxies()
    answered: set[str] = set()

    def try_to_connect(url: str) -> None:
        try:
            target = urllib.parse.urlsplit(url)
            proxy = proxies.get(target.scheme) or proxies.get("all")
            if proxy and not urllib.request.proxy_bypass(target.hostname or ""):
                target = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
            port = target.port or {"http": 80}.get(target.scheme, 443)
            socket.create_connection((target.hostname or "", port), timeout=REACH_SECONDS).close()
        except (OSError, ValueError):
            return
        answered.add(url)

    threads = [threading.Thread(target=try_to_connect, args=(url,), daemon=True) for url in urls]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + REACH_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return set(answered)
