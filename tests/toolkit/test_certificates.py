"""Certificates as a TLS library sees them."""

import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.common.config import ConfigError
from services.common.tls import SERVICE_NAME, front_names
from tests.certificates import certificate
from toolkit.certificates import BadFolder, issuer_beside, make_certificates
from toolkit.main import app


def test_a_certificate_is_for_its_name_this_machine_and_what_is_given(tmp_path: Path) -> None:
    pair = certificate(tmp_path, "gateway", "llm.example.com", "10.1.2.3")
    names = {"gateway", SERVICE_NAME, "localhost", "127.0.0.1", "0:0:0:0:0:0:0:1", "llm.example.com", "10.1.2.3"}
    assert set(front_names(pair.cert, pair.key)) == names


def test_the_ca_stays_and_a_certificate_is_replaced(tmp_path: Path) -> None:
    first = certificate(tmp_path)
    ca, cert = first.ca.read_bytes(), first.cert.read_bytes()
    again = certificate(tmp_path)
    assert (again.ca.read_bytes() == ca, again.cert.read_bytes() == cert) == (True, False)
    front_names(again.cert, again.key)


def test_a_renewed_certificate_is_for_what_the_old_one_was_for_unless_told(tmp_path: Path) -> None:
    """The command of docs/tls.md."""
    old = certificate(tmp_path, "gateway", "llm.example.com", "10.1.2.3")
    before = front_names(old.cert, old.key)
    run = CliRunner().invoke(app, ["certs", "create", str(tmp_path), "--name", "gateway", "--days", "90"])
    assert run.exit_code == 0
    assert sorted(front_names(old.cert, old.key)) == sorted(before)
    certificate(tmp_path, "gateway", "other.example.com")
    assert {"llm.example.com", "10.1.2.3"}.isdisjoint(front_names(old.cert, old.key))


def test_a_broken_certificate_is_replaced(tmp_path: Path) -> None:
    old = certificate(tmp_path, "gateway", "llm.example.com")
    old.cert.write_text("no certificate")
    certificate(tmp_path)
    assert "llm.example.com" not in front_names(old.cert, old.key)


def test_the_ca_beside_a_certificate_counts_if_it_signed_it(tmp_path: Path) -> None:
    pair, stranger = certificate(tmp_path / "one"), certificate(tmp_path / "two")
    assert issuer_beside(pair.cert) == pair.ca
    pair.ca.write_bytes(stranger.ca.read_bytes())
    assert issuer_beside(pair.cert) is None
    pair.ca.unlink()
    assert issuer_beside(pair.cert) is None


def test_an_expired_certificate_can_be_made_and_is_expired(tmp_path: Path) -> None:
    pair = certificate(tmp_path, days=-1)
    with pytest.raises(ConfigError, match="certificate has expired"):
        front_names(pair.cert, pair.key)


def test_a_broken_ca_is_told(tmp_path: Path) -> None:
    certificate(tmp_path)
    (tmp_path / "ca.key").unlink()
    with pytest.raises(BadFolder, match=r"The CA in .* cannot be used: .*ca\.key"):
        make_certificates(tmp_path, ["worker"])


def test_the_command_makes_one_for_each_service_and_keys_are_private(tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["certs", "create", str(tmp_path), "--san", "llm.example.com"])
    assert told.exit_code == 0
    services = {"gateway", "scheduler", "cache", "worker"}
    assert {path.stem for path in tmp_path.glob("*.crt")} == {path.stem for path in tmp_path.glob("*.key")}
    assert {path.stem for path in tmp_path.glob("*.crt")} == {"ca", *services}
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("*.key")} == {0o600}
    assert "PRIVATE" not in told.output
    for service in services:
        assert "llm.example.com" in front_names(tmp_path / f"{service}.crt", tmp_path / f"{service}.key")


@pytest.mark.parametrize("name", ["ca", "../gateway", ""])
def test_a_name_that_is_no_file_is_refused(name: str, tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["certs", "create", str(tmp_path / "new"), "--name", name])
    assert (run.exit_code, (tmp_path / "new").exists()) == (2, False)


@pytest.mark.parametrize("option", ["--san", "--name"])
@pytest.mark.parametrize("name", ["zürich.example", "bad name!", "a..b", "-a", "10.1.2.300", "x" * 64, "a.*", "*"])
def test_what_no_certificate_can_be_for_is_one_sentence_and_changes_nothing(
    option: str, name: str, tmp_path: Path
) -> None:
    run = CliRunner().invoke(app, ["certs", "create", str(tmp_path / "new"), option, name])
    assert (run.exit_code, run.output.count("\n"), (tmp_path / "new").exists()) == (1, 1, False)
    assert repr(name) in run.output


@pytest.mark.parametrize("name", ["*.example.com", "my_service", "xn--zrich-kva.example", "fe80::1", "a-b.c"])
def test_what_a_certificate_can_be_for(name: str, tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["certs", "create", str(tmp_path), "--name", "x", "--san", name]).exit_code == 0
