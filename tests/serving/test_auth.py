"""Keys: what is kept of them, whose they are, and when they end."""

import hashlib
import json
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_plug.errors import ConfigError
from persona_plug.serving.auth import Keyring, check_host, is_loopback, new_key, read_keys, revoke_key, store_key


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.jsonl"


def test_a_key_opens_its_own_tenant(path):
    secrets = {tenant: new_key(path, tenant)[1] for tenant in ("acme", "bolt", "acme-2")}
    ring = Keyring(path)
    for tenant, secret in secrets.items():
        assert ring.find(f"Bearer {secret}").tenant == tenant
        assert ring.find(f"bearer  {secret}").tenant == tenant


def test_only_hashes_are_kept(path, tmp_path):
    key, secret = new_key(path, "acme")
    for file in tmp_path.iterdir():
        assert secret.encode() not in file.read_bytes()
    assert key.sha256 == hashlib.sha256(secret.encode()).hexdigest()
    assert json.loads(path.read_text())["sha256"] == key.sha256
    assert len(secret) > 40
    assert new_key(path, "acme")[1] != secret


def test_only_the_owner_may_read_the_file(path):
    new_key(path, "acme")
    new_key(path, "bolt")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Bearer pp-guess", "Basic {}", "{}", "Bearer {}x", "Bearer {h}"]
)
def test_nothing_else_opens(path, header):
    key, secret = new_key(path, "acme")
    assert Keyring(path).find(header.format(secret, h=key.sha256)) is None


def test_every_key_is_compared_in_constant_time(path, monkeypatch):
    """A search that stops at the first match would tell by its time which keys there are."""
    import hmac

    secret = new_key(path, "acme")[1]
    new_key(path, "bolt")
    compared, real = [], hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(a) or real(a, b))
    ring = Keyring(path)
    assert ring.find(f"Bearer {secret}")
    assert not ring.find("Bearer x")
    assert len(compared) == 4


def test_a_running_gateway_sees_new_and_revoked_keys(path):
    first, secret = new_key(path, "acme")
    ring = Keyring(path)
    later = new_key(path, "bolt")[1]
    assert ring.find(f"Bearer {later}").tenant == "bolt"
    revoke_key(path, first.id)
    assert ring.find(f"Bearer {secret}") is None
    assert ring.find(f"Bearer {later}").tenant == "bolt"


@pytest.mark.parametrize("harm", ["remove", "damage"])
def test_a_key_file_that_cannot_be_read_opens_nothing(path, harm, caplog):
    secret = new_key(path, "acme")[1]
    ring = Keyring(path)
    if harm == "remove":
        path.unlink()
    else:
        path.write_text("{")
    assert ring.find(f"Bearer {secret}") is None
    assert "every key is refused" in caplog.text
    path.unlink(missing_ok=True)
    again = new_key(path, "acme")[1]
    assert ring.find(f"Bearer {again}").tenant == "acme"


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"id": "a"}', '{"id": "k", "tenant": "a/b", "sha256": "00", "created": ""}', ""]
)
def test_a_damaged_line_is_named(path, line):
    new_key(path, "acme")
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ConfigError, match=r"keys\.jsonl:2: not a key"):
        read_keys(path)


def test_missing_and_empty_files_are_refused(path):
    with pytest.raises(ConfigError, match="make one with `persona-plug keys new`"):
        Keyring(path)
    path.touch()
    with pytest.raises(ConfigError, match="holds no key"):
        Keyring(path)


def test_revoking_what_is_not_there(path):
    new_key(path, "acme")
    with pytest.raises(ConfigError, match="no key 'key-x'"):
        revoke_key(path, "key-x")


@pytest.mark.parametrize("tenant", ["", "a/b", "a b", "ä", "x" * 65, "a\n"])
def test_names_of_tenants(path, tenant):
    with pytest.raises(ConfigError, match="tenant"):
        new_key(path, tenant)


@given(st.text(), st.text(), st.text(), st.text())
def test_stored_names_of_two_users_are_never_the_same(tenant, user, other_tenant, other_user):
    same = (tenant, user) == (other_tenant, other_user)
    try:
        assert (store_key(tenant, user) == store_key(other_tenant, other_user)) == same
    except UnicodeEncodeError:  # half a character; requests with one are refused
        assert any("\ud800" <= c <= "\udfff" for c in tenant + user + other_tenant + other_user)


@pytest.mark.parametrize(
    ("tenant", "user", "stored"),
    [("acme", "ann", "acme/ann"), ("a", "b/../c", "a/b%2F..%2Fc"), ("a/b", "%2F", "a%2Fb/%252F")],
)
def test_stored_names(tenant, user, stored):
    assert store_key(tenant, user) == stored


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "[::1]", "localhost"])
def test_this_machine(host, path):
    assert is_loopback(host)
    check_host(host, None)


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", "", "127.0.0.1.nip.io"],  # noqa: S104
)
def test_without_keys_nobody_else_may_ask(host, path):
    assert not is_loopback(host)
    with pytest.raises(ConfigError, match="give --keys FILE"):
        check_host(host, None)
    check_host(host, path)
