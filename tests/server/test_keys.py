"""Keys: kept as hashes, checked at every request, followed without a restart, never an open door when lost."""

import hmac
import json
import logging
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from server.commands.serving import welcome
from server.config import Config
from server.engines.fleet import Fleet
from server.engines.pool import Pool
from server.errors import KeyInvalid, KeyMissing, Refusal, envelope
from server.keys import LOOK_EVERY_S, Key, KeyFile, Keys
from server.listener import check_reach, listening_socket
from server.metrics import Metrics
from tests.server.conftest import Gateway
from tiers.errors import ConfigError


@dataclass
class Clock:
    """Time that passes when a test says so."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_a_look(self) -> None:
        self.now += LOOK_EVERY_S


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "home" / "keys.json")


def bearer(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"here"), (b"authorization", b"Bearer " + key.encode()), (b"accept", b"*/*")]


def known(keys: Keys, key: str) -> bool:
    try:
        return keys.authenticate(bearer(key)) is not None
    except KeyInvalid:
        return False


def test_a_key_is_known_again_with_all_that_it_allows(file: KeyFile) -> None:
    given = file.add(
        "alice", tiers=["Lite"], requests_per_minute=60, tokens_per_minute=10_000, concurrent_requests=4
    )
    file.add("bob")
    key = Keys(file.path).authenticate(bearer(given))
    assert key is not None
    assert (key.name, key.tiers) == ("alice", ("Lite",))
    assert (key.requests_per_minute, key.tokens_per_minute, key.concurrent_requests) == (60, 10_000, 4)
    assert key.created.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - key.created) < timedelta(minutes=1)


def test_nothing_of_the_secret_is_in_the_file_nor_in_what_a_log_would_show(file: KeyFile) -> None:
    key = file.add("alice")
    _, _, id_, secret = key.split("-", 3)
    text = file.path.read_text()
    assert id_ in text
    assert secret not in text
    assert secret.encode().hex() not in text
    (kept,) = file.read()
    assert kept.hash.hex() in text
    assert kept.hash.hex() not in f"{kept!r} {kept}"
    assert repr(kept.hash) not in f"{kept!r} {kept}"


def test_two_keys_share_neither_id_nor_salt_nor_secret(file: KeyFile) -> None:
    first, second = file.add("alice"), file.add("bob")
    assert first[-43:] != second[-43:]
    alice, bob = file.read()
    assert alice.id != bob.id
    assert alice.salt != bob.salt


def test_a_secret_fits_its_own_id_only(file: KeyFile) -> None:
    first, second = file.add("alice"), file.add("bob")
    keys = Keys(file.path)
    crossed = first[: -len(first.split("-", 3)[3])] + second.split("-", 3)[3]
    assert known(keys, first)
    assert not known(keys, crossed)


@pytest.mark.parametrize(
    ("allowed", "names"),
    [
        (None, {"Reference", "Turbo", "Lite"}),
        (("Lite",), {"Lite"}),
        (("SmolLM2-135M-Instruct-Turbo", "Reference"), {"Reference", "Turbo"}),
        (("Llama-3.1-8B-Instruct-Lite",), set()),
    ],
)
def test_a_key_may_use_the_tiers_it_names_and_no_other(
    file: KeyFile, allowed: tuple[str, ...] | None, names: set[str]
) -> None:
    file.add("alice", tiers=allowed)
    (key,) = file.read()
    assert {tier.kind.value for tier in Config().tiers if key.may_use(tier)} == names


def test_the_file_is_for_its_owner_alone_whatever_the_umask(file: KeyFile) -> None:
    before = os.umask(0)
    try:
        file.add("alice")
        file.path.chmod(0o644)
        file.add("bob")
    finally:
        os.umask(before)
    assert file.path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_others_can_read_is_warned_of(file: KeyFile, caplog: pytest.LogCaptureFixture) -> None:
    file.add("alice")
    file.path.chmod(0o640)
    assert [key.name for key in file.read()] == ["alice"]
    assert "is open to others (mode 640): run `chmod 600 " in caplog.text


def test_keys_added_at_once_are_all_kept(file: KeyFile) -> None:
    names = [f"caller-{number}" for number in range(12)]
    with ThreadPoolExecutor(len(names)) as threads:
        given = list(threads.map(file.add, names))
    keys = Keys(file.path)
    assert all(known(keys, key) for key in given)
    assert {key.name for key in file.read()} == set(names)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    file: KeyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.add("alice")
    before = file.path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"cannot be changed: No space left on device\."):
        file.add("bob")
    assert file.path.read_bytes() == before
    assert {path.name for path in file.path.parent.iterdir()} == {"keys.json", "keys.json.lock"}


def test_a_link_to_the_file_stays_a_link(file: KeyFile, tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(file.path)
    file.add("alice")
    KeyFile(link).add("bob")
    assert link.is_symlink()
    assert [key.name for key in file.read()] == ["alice", "bob"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can write for somebody else")
def test_root_adds_a_key_that_the_files_owner_can_still_read(file: KeyFile) -> None:
    file.add("alice")
    os.chown(file.path, 65534, 65534)
    file.add("bob")
    assert (file.path.stat().st_uid, file.path.stat().st_gid) == (65534, 65534)


@pytest.mark.parametrize("name", ["", "-alice", "a b", "alice\n", "a" * 65, "a\x1b[31m", "a/b"])
def test_a_name_that_could_spoil_a_log_or_a_table_is_refused(file: KeyFile, name: str) -> None:
    with pytest.raises(ConfigError, match="is no name for a key") as refusal:
        file.add(name)
    assert "\x1b" not in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not file.path.exists()


def test_a_name_is_given_once_and_an_unknown_one_is_told_those_there_are(file: KeyFile) -> None:
    file.add("alice")
    with pytest.raises(ConfigError, match="There is a key for 'alice' already"):
        file.add("alice")
    with pytest.raises(ConfigError, match=r"There is no key for 'bob' in .*keys\.json; those there are: alice\."):
        file.remove("bob")
    assert [key.name for key in file.read()] == ["alice"]


def _changed(change: Callable[[dict[str, Any]], None]) -> Callable[[str], str]:
    def apply(text: str) -> str:
        stored = json.loads(text)
        change(stored)
        return json.dumps(stored)

    return apply


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda text: text[:-20], "Invalid JSON"),
        (lambda text: "\udcff", "Invalid JSON"),
        (lambda text: "[]", "should be an object"),
        (_changed(lambda stored: stored.update(format=2)), "format: Input should be 1"),
        (_changed(lambda stored: stored.pop("keys")), "keys: Field required"),
        (_changed(lambda stored: stored["keys"][0].update(admin=True)), r"keys\.0\.admin: Extra inputs"),
        (_changed(lambda stored: stored["keys"][0].update(requests_per_minute=0)), "requests_per_minute"),
        (_changed(lambda stored: stored["keys"][0].update(tiers=[])), r"keys\.0\.tiers"),
        (_changed(lambda stored: stored["keys"][0].update(hash="00")), r"keys\.0\.hash"),
        (_changed(lambda stored: stored["keys"].append(stored["keys"][0])), "2 keys have the name alice"),
    ],
)
def test_a_file_that_is_no_file_of_keys_is_one_sentence_and_stops_a_start(
    file: KeyFile, damage: Callable[[str], str], sentence: str
) -> None:
    file.add("alice")
    file.path.write_text(damage(file.path.read_text()), errors="surrogateescape")
    for use in (file.read, lambda: file.add("bob"), lambda: Keys(file.path)):
        with pytest.raises(ConfigError, match=rf"keys\.json is no file of keys: .*{sentence}") as refusal:
            use()
        assert "\n" not in str(refusal.value)


def test_a_file_that_cannot_be_read_stops_a_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"The keys in .* cannot be read: Is a directory\."):
        Keys(tmp_path)


def test_without_a_file_nobody_needs_a_key(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    assert not keys.required
    assert keys.authenticate([]) is None
    assert keys.authenticate(bearer("unused")) is None


@pytest.mark.parametrize("text", ["", '{"format": 1, "keys": []}'])
def test_a_file_without_keys_lets_nobody_in(file: KeyFile, text: str, caplog: pytest.LogCaptureFixture) -> None:
    file.path.parent.mkdir()
    file.path.write_text(text)
    keys = Keys(file.path)
    assert keys.required
    assert "holds no key: nobody may call" in caplog.text
    with pytest.raises(KeyMissing):
        keys.authenticate([])


@pytest.mark.parametrize(
    "value",
    [None, b"", b"Bearer", b"Bearer ", b"Bearer    ", b"Basic YTpi", b"sk-assay-", b"\xff\xfe", b" Bearer x"],
)
def test_a_request_without_a_key_is_told_how_to_send_one(file: KeyFile, value: bytes | None) -> None:
    file.add("alice")
    headers = [(b"x-api-key", b"x")] + ([] if value is None else [(b"authorization", value)])
    with pytest.raises(KeyMissing, match="send it as `authorization: Bearer") as refusal:
        Keys(file.path).authenticate(headers)
    assert (refusal.value.status, refusal.value.code) == (401, "missing_api_key")
    assert refusal.value.headers == {"www-authenticate": "Bearer"}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda key: key[:-1],
        lambda key: key + b"A",
        lambda key: key[:-1] + (b"A" if key[-1:] != b"A" else b"B"),
        lambda key: key.replace(b"sk-assay-", b"sk-"),
        lambda key: key.upper(),
        lambda key: key[:21],
        lambda key: key[:-1] + b"\xff",
        lambda key: key + b", " + key,
        lambda key: key + b"\n" + key,
        lambda key: "clé".encode(),
        lambda key: b"\x00" * 65,
        lambda key: b"sk-assay-" + b"f" * 12 + b"-" + b"f" * 43,
        lambda key: b"sk-assay-" + b"0" * 12 + key[21:],
        lambda key: key * 100_000,
        lambda key: b" " * 1_000_000 + b"x",
    ],
)
def test_a_wrong_key_is_refused_and_never_repeated(
    file: KeyFile, wrong: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    given = wrong(file.add("alice").encode())
    with pytest.raises(KeyInvalid) as refusal:
        Keys(file.path).authenticate([(b"authorization", b"Bearer " + given)])
    assert (refusal.value.status, refusal.value.code) == (401, "invalid_api_key")
    assert str(refusal.value) == str(KeyInvalid())
    assert caplog.text == ""


def test_the_scheme_is_taken_in_any_case(file: KeyFile) -> None:
    key = file.add("alice").encode()
    for scheme in (b"bearer ", b"BEARER ", b"Bearer  "):
        assert Keys(file.path).authenticate([(b"authorization", scheme + key)]) is not None


def test_an_unknown_id_costs_the_same_comparison_as_a_wrong_secret(
    file: KeyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = file.add("alice")
    keys = Keys(file.path)
    compared: list[int] = []
    real = hmac.compare_digest

    def count(one: bytes, other: bytes) -> bool:
        compared.append(len(one))
        return real(one, other)

    monkeypatch.setattr("server.keys.hmac.compare_digest", count)
    wrong_secret = key[:22] + "A" * 43
    unknown_id = "sk-assay-" + "0" * 12 + key[21:]
    assert not known(keys, wrong_secret)
    assert not known(keys, unknown_id)
    assert compared == [32, 32]


def test_the_official_client_raises_its_authentication_error(file: KeyFile) -> None:
    import openai

    key = file.add("alice")
    keys = Keys(file.path)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in self.headers.items()]
            status, body, extra = 200, b'{"object": "list", "data": []}', dict[str, str]()
            try:
                keys.authenticate(headers)
            except Refusal as refusal:
                status, body, extra = refusal.status, envelope(refusal), refusal.headers
            self.send_response(status)
            for name, value in {"content-length": str(len(body)), **extra}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Keep quiet."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        serving.start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        try:
            assert openai.OpenAI(base_url=url, api_key=key, max_retries=0).models.list().data == []
            with pytest.raises(openai.AuthenticationError) as error:
                openai.OpenAI(base_url=url, api_key="sk-other", max_retries=0).models.list()
        finally:
            server.shutdown()
            serving.join()
    assert error.value.code == "invalid_api_key"
    assert error.value.type == "invalid_request_error"


def test_a_key_added_is_taken_at_the_next_look(file: KeyFile, clock: Clock) -> None:
    first = file.add("alice")
    keys = Keys(file.path, clock)
    second = file.add("bob")
    assert not known(keys, second)
    clock.pass_a_look()
    assert known(keys, second)
    assert known(keys, first)


def test_the_first_key_closes_a_server_that_ran_without(file: KeyFile, clock: Clock) -> None:
    keys = Keys(file.path, clock)
    assert keys.authenticate([]) is None
    key = file.add("alice")
    clock.pass_a_look()
    with pytest.raises(KeyMissing):
        keys.authenticate([])
    assert known(keys, key)
    assert keys.required


def test_a_revoked_key_stops_working_at_the_next_look(file: KeyFile, clock: Clock) -> None:
    alice, bob = file.add("alice"), file.add("bob")
    keys = Keys(file.path, clock)
    assert known(keys, alice)
    file.remove("alice")
    clock.pass_a_look()
    assert not known(keys, alice)
    assert known(keys, bob)
    file.remove("bob")
    clock.pass_a_look()
    assert not known(keys, bob)
    with pytest.raises(KeyMissing):
        keys.authenticate([])


@pytest.mark.parametrize("lose", [lambda path: path.unlink(), lambda path: path.write_text("")])
def test_a_file_that_is_lost_or_emptied_locks_everybody_out(
    file: KeyFile, clock: Clock, lose: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    key = file.add("alice")
    kept = file.path.read_bytes()
    keys = Keys(file.path, clock)
    lose(file.path)
    for _ in range(3):
        clock.pass_a_look()
        assert keys.required
        assert not known(keys, key)
        with pytest.raises(KeyMissing):
            keys.authenticate([])
    assert caplog.text.count("nobody may call until there is a key in it") == 1
    file.path.write_bytes(kept)
    clock.pass_a_look()
    assert known(keys, key)


def test_a_file_that_became_invalid_keeps_the_old_keys_and_says_so_once(
    file: KeyFile, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    alice = file.add("alice")
    keys = Keys(file.path, clock)
    whole = file.path.read_bytes()
    file.path.write_bytes(whole[:-10])
    for _ in range(3):
        clock.pass_a_look()
        assert known(keys, alice)
        assert not known(keys, alice[:-1] + "?")
    (record,) = caplog.records
    assert "Invalid JSON" in record.message
    assert "The keys known before stay as they are." in record.message
    file.path.write_bytes(whole)
    file.remove("alice")
    clock.pass_a_look()
    assert not known(keys, alice)


def test_a_file_that_cannot_be_read_for_a_while_is_tried_again_untouched(
    file: KeyFile, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when the process is out of file descriptors: a removed key must not live on for that."""
    alice = file.add("alice")
    keys = Keys(file.path, clock)
    file.remove("alice")

    def busy(path: Path, mode: str) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "open", busy)
        clock.pass_a_look()
        assert known(keys, alice)
    assert "Too many open files" in caplog.text
    clock.pass_a_look()
    assert not known(keys, alice)


def test_a_file_that_appears_broken_closes_a_server_that_ran_without(file: KeyFile, clock: Clock) -> None:
    keys = Keys(file.path, clock)
    file.path.parent.mkdir()
    file.path.write_text("{")
    clock.pass_a_look()
    with pytest.raises(KeyMissing):
        keys.authenticate([])


def test_the_file_is_looked_at_once_a_second_however_many_ask(
    file: KeyFile, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = file.add("alice")
    keys = Keys(file.path, clock)
    looks: list[Path] = []
    real = Path.stat

    def count(path: Path, **arguments: Any) -> os.stat_result:
        looks.append(path)
        return real(path, **arguments)

    monkeypatch.setattr(Path, "stat", count)
    monkeypatch.setattr(KeyFile, "read", lambda file: pytest.fail("an untouched file was read again"))
    for _ in range(1000):
        assert known(keys, key)
        clock.now += 0.003
    assert len(looks) == 2


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.7.6", "localhost", "::1"])
def test_without_keys_the_server_listens_on_loopback(host: str, file: KeyFile) -> None:
    if host == "::1" and not _has_ipv6():
        pytest.skip("no IPv6 here")
    with listening_socket(host, 0) as listener:
        check_reach(listener, Keys(file.path))


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::"])
def test_without_keys_others_cannot_reach_the_server(host: str, file: KeyFile) -> None:
    if host == "::" and not _has_ipv6():
        pytest.skip("no IPv6 here")
    with listening_socket(host, 0) as listener:
        with pytest.raises(ConfigError, match=r"run `assay keys add NAME` first, or listen on 127\.0\.0\.1"):
            check_reach(listener, Keys(file.path))
        file.add("alice")
        check_reach(listener, Keys(file.path))


def _has_ipv6() -> bool:
    try:
        listening_socket("::1", 0).close()
    except Exception:
        return False
    return socket.has_ipv6


async def test_the_greeting_says_who_may_call(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    replica = gateway.replica
    fleet = Fleet([Pool(replica.tier, replica.manifest, 2048, [replica], Metrics(), max_num_seqs=1)])
    welcome(fleet, "http://127.0.0.1:8000", with_keys=False)
    shown = capsys.readouterr().out
    assert "\nNo keys: whoever is on this machine may call. `assay keys add NAME` makes one.\n" in shown
    open_line = next(line for line in shown.splitlines() if line.startswith("curl "))
    assert "authorization" not in open_line
    welcome(fleet, "http://127.0.0.1:8000", with_keys=True)
    shown = capsys.readouterr().out
    assert "Callers need a key" in shown
    closed_line = next(line for line in shown.splitlines() if line.startswith("curl "))
    assert closed_line.replace(' -H "authorization: Bearer $ASSAY_API_KEY"', "", 1) == open_line
    assert closed_line != open_line


def test_every_field_of_a_key_says_what_it_is() -> None:
    for name, field in Key.model_fields.items():
        assert field.description, name
