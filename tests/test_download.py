"""Downloading CIFAR-10: checked, from the first mirror that has it, and never hanging. All of it on this machine."""

import hashlib
import http.server
import socket
import threading
import time

import pytest

from fromzero.data import cifar, download, load_images
from fromzero.errors import InputError

NAMES = ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz")
ADVICE = "put cifar-10-binary.tar.gz (or the python version) into"


@pytest.fixture(autouse=True)
def folder(bare_machine):
    """Where the download goes."""
    return bare_machine / "fromzero"


@pytest.fixture
def archives(bare_machine, monkeypatch, write_cifar, tar_cifar):
    """Name → bytes of a small archive in each layout, which counts as CIFAR-10."""
    made = {}
    for name, layout in zip(NAMES, ("binary", "python"), strict=True):
        source = write_cifar(bare_machine / layout, layout)
        made[name] = tar_cifar(source, bare_machine / name, cifar.FOLDERS[layout == "python"]).read_bytes()
        (bare_machine / name).unlink()
    monkeypatch.setattr(cifar, "CIFAR10_FINGERPRINTS", load_images(bare_machine / "binary").fingerprints)
    return made


@pytest.fixture
def serve():
    """serve(files): the address of a server that has these files; it notes what is asked of it."""
    servers = []

    def start(files):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.server.asked.append(self.path)
                body = files.get(self.path.rpartition("/")[2])
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *ignored):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}", server.asked

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def mirrors(monkeypatch):
    """mirrors((address, bytes expected there), …): what fromzero takes for the published places, in this order."""

    def place(*pairs):
        known = tuple((url, hashlib.sha256(data).hexdigest()) for url, data in pairs)
        monkeypatch.setattr(download, "MIRRORS", known)

    return place


@pytest.fixture
def dead_port():
    """The address of a port of this machine that nothing listens on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


def refused(**options):
    with pytest.raises(InputError) as caught:
        load_images("cifar10", **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert ADVICE in message
    return message


@pytest.mark.parametrize("name", NAMES)
def test_it_is_downloaded_unpacked_once_and_found_afterwards(name, archives, serve, mirrors, folder, monkeypatch):
    url, asked = serve(archives)
    mirrors((f"{url}/kriz/{name}", archives[name]))
    first = load_images("cifar10")
    unpacked = folder / cifar.FOLDERS[NAMES.index(name)]
    assert (folder / name).read_bytes() == archives[name]
    assert first.source == str(unpacked)
    assert sorted(folder.iterdir()) == sorted([folder / name, unpacked])
    monkeypatch.setattr(cifar, "_archive_files", None)  # no archive is read again
    assert load_images("cifar10", offline=True).fingerprints == first.fingerprints
    assert asked == [f"/kriz/{name}"]


def test_a_mirror_with_the_wrong_file_is_passed_over(archives, serve, mirrors, folder):
    (bad, _), (good, asked) = serve({NAMES[0]: b"not the archive"}), serve(archives)
    mirrors((f"{bad}/{NAMES[0]}", archives[NAMES[0]]), (f"{good}/{NAMES[1]}", archives[NAMES[1]]))
    assert load_images("cifar10").source == str(folder / "cifar-10-batches-py")
    assert asked == [f"/{NAMES[1]}"]


@pytest.mark.parametrize("body", [b"not the archive", b"", None])
def test_wrong_files_everywhere_are_one_clear_error_and_leave_nothing(body, archives, serve, mirrors, folder):
    url, _ = serve({} if body is None else dict.fromkeys(NAMES, body))
    mirrors(*((f"{url}/{name}", archives[name]) for name in NAMES))
    message = refused()
    assert all(f"{url}/{name}: " in message for name in NAMES)
    assert ("404" if body is None else "hash") in message
    assert not folder.exists() or not list(folder.iterdir())


def test_a_mirror_of_ones_own_is_asked_first(archives, serve, mirrors, folder, monkeypatch):
    (own, own_asked), (public, public_asked) = serve(archives), serve(archives)
    mirrors(*((f"{public}/{name}", archives[name]) for name in NAMES))
    monkeypatch.setenv("FROMZERO_CIFAR10_MIRROR", f"{own}/lab/")
    load_images("cifar10")
    assert own_asked == [f"/lab/{NAMES[0]}"]
    assert public_asked == []


@pytest.mark.parametrize("own", ["http://127.0.0.1:port", "http://[", "nonsense", "/mnt/mirror", "http://" + "x" * 99])
def test_a_mirror_that_is_no_address_is_passed_over_by_name(
    own, archives, serve, mirrors, dead_port, folder, monkeypatch
):
    monkeypatch.setenv("FROMZERO_CIFAR10_MIRROR", own)
    mirrors((f"{dead_port}/{NAMES[0]}", b""))
    assert own.removeprefix("http://") in refused()
    url, _ = serve(archives)
    mirrors((f"{url}/{NAMES[0]}", archives[NAMES[0]]))
    assert load_images("cifar10").source.startswith(str(folder))


@pytest.mark.parametrize("in_the_way", ["incomplete folder", "file"])
def test_what_cannot_be_unpacked_is_read_from_the_archive(in_the_way, archives, serve, mirrors, folder):
    place = folder / "cifar-10-batches-bin"
    folder.mkdir()
    if in_the_way == "file":
        place.touch()
    else:
        place.mkdir()
        (place / "data_batch_1.bin").touch()
    url, _ = serve(archives)
    mirrors((f"{url}/{NAMES[0]}", archives[NAMES[0]]))
    assert load_images("cifar10").source == str(folder / NAMES[0])
    assert sorted(folder.iterdir()) == sorted([folder / NAMES[0], place])


def test_a_folder_that_cannot_be_written_is_one_clear_error(archives, serve, mirrors, folder):
    folder.touch()
    url, _ = serve(archives)
    mirrors((f"{url}/{NAMES[0]}", archives[NAMES[0]]))
    assert "Error: " in refused()


# Without a network


def within(seconds):
    start = time.monotonic()
    message = refused()
    assert time.monotonic() - start < seconds
    return message


def test_a_dead_port_is_an_answer_at_once(dead_port, mirrors, folder):
    mirrors(*((f"{dead_port}/{name}", b"") for name in NAMES))
    message = within(2)
    assert f"{dead_port.removeprefix('http://')} cannot be reached" in message
    assert str(folder) in message


def test_a_host_that_does_not_exist_is_an_answer_within_five_seconds(mirrors):
    mirrors(*((f"https://fromzero.invalid/{name}", b"") for name in NAMES))
    assert "(fromzero.invalid cannot be reached)" in within(5)


def test_a_name_look_up_that_hangs_is_cut_off(mirrors, monkeypatch):
    over = threading.Event()

    def hang(*ignored, **options):
        over.wait(30)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    mirrors(*((f"https://host{n}.example/{NAMES[n % 2]}", b"") for n in range(6)))
    try:
        assert "host0.example cannot be reached; host1.example cannot" in within(5)
    finally:
        over.set()


def test_a_server_that_never_answers_is_given_up(archives, serve, mirrors, monkeypatch):
    assert download.SILENCE_SECONDS <= 60
    monkeypatch.setattr(download, "SILENCE_SECONDS", 0.3)
    url, _ = serve(archives)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        mirrors((f"{address}/{NAMES[0]}", b""))
        assert f"{address}/{NAMES[0]}: ReadTimeout" in within(3)
        mirrors((f"{address}/{NAMES[0]}", b""), (f"{url}/{NAMES[1]}", archives[NAMES[1]]))
        load_images("cifar10")


@pytest.mark.parametrize("scheme", ["http://", ""])
def test_behind_a_proxy_the_proxy_is_what_must_be_reached(scheme, archives, serve, mirrors, monkeypatch):
    url, asked = serve(archives)
    monkeypatch.setenv("http_proxy", url.replace("http://", scheme))
    mirrors((f"http://fromzero.invalid/{NAMES[0]}", archives[NAMES[0]]))
    load_images("cifar10")
    assert asked == [f"http://fromzero.invalid/{NAMES[0]}"]


def test_a_failure_without_words_is_reported_too(dead_port, mirrors, monkeypatch):
    def fail(*ignored):
        raise ConnectionError

    mirrors((f"{dead_port}/{NAMES[0]}", b""))
    monkeypatch.setattr(download, "_reachable", set)
    monkeypatch.setattr(download, "_retrieve", fail)
    assert "ConnectionError" in refused()


def test_offline_touches_no_socket(archives, serve, mirrors, monkeypatch):
    url, _ = serve(archives)
    mirrors((f"{url}/{NAMES[0]}", archives[NAMES[0]]))
    for name in ("create_connection", "getaddrinfo", "socket"):
        monkeypatch.setattr(socket, name, lambda *ignored, **options: pytest.fail("a socket was touched"))
    assert "--offline" in refused(offline=True)


def test_the_published_addresses_and_hashes_are_known():
    assert tuple(url.rpartition("/")[2] for url, _ in PUBLISHED) == NAMES
    assert [sha for _, sha in PUBLISHED] == [
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    ]


PUBLISHED = download.MIRRORS
