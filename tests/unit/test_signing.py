from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from airflow_mlops import cli
from airflow_mlops.core.model.signing import (
    SIGNATURE_FILE,
    PackageSignature,
    SigningKey,
    Trust,
    key_id_of,
    parse_public_keys,
)
from airflow_mlops.core.rollouts.desired_state import serve_alone
from airflow_mlops.exceptions import ArtifactIntegrityError, ConnectionConfigError
from airflow_mlops.hooks.services import services_from_connections
from airflow_mlops.hooks.signing import SigningHook
from airflow_mlops.operators.deploy import DeployModelOperator
from airflow_mlops.operators.register import RegisterModelOperator
from airflow_mlops.serving.app import EndpointApp
from airflow_mlops.serving.model import load_model
from airflow_mlops.serving.package import read_signature, write_signature
from airflow_mlops.serving.reconciler import DESIRED_FILE
from airflow_mlops.serving.settings import ServiceSettings
from tests.packages import build_package

KEY, OTHER = SigningKey.generate(), SigningKey.generate()
DIGEST = "sha256:" + "0" * 64


def trust(*keys: SigningKey, model_name: str = "fare") -> Trust:
    return Trust(model_name=model_name, keys={key_id_of(key.public_key): key.public_key for key in keys})


def require(signature: PackageSignature | None, trusted: Trust, digest: str = DIGEST) -> None:
    trusted.require(signature, package_digest=digest, where="the package")


class TestSignature:
    def test_what_one_signs_the_other_verifies_also_after_a_round_trip(self) -> None:
        signed = KEY.sign(model_name="fare", package_digest=DIGEST)
        assert signed == KEY.sign(
            model_name="fare", package_digest=DIGEST
        )  # so registering twice changes nothing
        require(PackageSignature.from_text(signed.to_text()), trust(OTHER, KEY))

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"model_name": "tips"}, "carries a signature for 'tips'"),
            (
                {"package_digest": "sha256:1"},
                "carries a signature for 'fare' sha256:1, not for 'fare' sha256:000",
            ),
            ({"key_id": "0" * 16}, "is signed with key 0000000000000000, which is not trusted here"),
            ({"signature": "AAAA"}, "has a signature that key"),
            ({"signature": "not base64!"}, "has a signature that key"),
        ],
    )
    def test_every_field_counts(self, change: dict[str, str], words: str) -> None:
        signed = replace(KEY.sign(model_name="fare", package_digest=DIGEST), **change)
        with pytest.raises(ArtifactIntegrityError, match=words) as caught:
            require(signed, trust(KEY))
        assert key_id_of(KEY.public_key) in str(caught.value)
        assert "register it again" in str(caught.value)

    def test_a_statement_can_not_be_relabeled(self) -> None:
        """The fields are changed so that they fit the reader; the signature is still about another model."""
        signed = replace(KEY.sign(model_name="tips", package_digest=DIGEST), model_name="fare")
        with pytest.raises(ArtifactIntegrityError, match="has a signature that key"):
            require(signed, trust(KEY))

    def test_another_key_under_a_trusted_id_is_found(self) -> None:
        forged = replace(
            OTHER.sign(model_name="fare", package_digest=DIGEST), key_id=key_id_of(KEY.public_key)
        )
        with pytest.raises(ArtifactIntegrityError, match="has a signature that key"):
            require(forged, trust(KEY))

    def test_none_at_all_is_said(self) -> None:
        with pytest.raises(ArtifactIntegrityError, match="the package is not signed as a version of 'fare'"):
            require(None, trust(KEY))

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"algorithm": "none"}', "nonsense"])
    def test_what_is_no_signature_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError):  # noqa: PT011 - JSON's own and ours
            PackageSignature.from_text(text)


class TestKeys:
    def test_lines_and_pem_are_one_key(self, tmp_path: Path) -> None:
        def openssl(*arguments: str) -> str:
            command = [str(shutil.which("openssl")), *arguments]
            return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout

        file = tmp_path / "key.pem"
        openssl("genpkey", "-algorithm", "ed25519", "-out", str(file))
        public = openssl("pkey", "-in", str(file), "-pubout")
        key = SigningKey.parse(file.read_text())
        assert SigningKey.parse(key.to_text()) == key
        both = parse_public_keys(f"{KEY.public_text()},\n{public} {key.public_text()}")
        assert list(both.values()) in ([key.public_key, KEY.public_key], [KEY.public_key, key.public_key])

    @pytest.mark.parametrize(
        "text",
        ["", "secret", "c2hvcnQ=", "-----BEGIN PRIVATE KEY-----\nsecret\n-----END PRIVATE KEY-----"],
    )
    def test_what_is_no_key_is_said_without_showing_it(self, text: str) -> None:
        with pytest.raises(ConnectionConfigError, match="no Ed25519 private key") as caught:
            SigningKey.parse(text)
        assert "secret" not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.value.__context__ is None

    def test_a_private_key_in_the_public_field_is_not_shown(self) -> None:
        with pytest.raises(ConnectionConfigError, match="no Ed25519 public key") as caught:
            parse_public_keys(KEY.to_text() + "AAAA")
        assert KEY.to_text() not in str(caught.value)

    def test_white_space_alone_is_no_key(self) -> None:
        with pytest.raises(ConnectionConfigError, match="none is given"):
            Trust.of("  \n", "fare")

    def test_no_keys_means_no_question(self) -> None:
        assert Trust.of(None, "fare") is None
        assert Trust.of("", "fare") is None

    def test_a_key_is_never_printed(self) -> None:
        assert KEY.to_text() not in repr(KEY)
        assert "seed" not in repr(KEY)


class TestPackage:
    @pytest.fixture
    def signed(self, tmp_path: Path) -> tuple[Path, str]:
        digest = build_package(tmp_path / "package")
        write_signature(tmp_path / "package", KEY.sign(model_name="fare", package_digest=digest))
        return tmp_path / "package", digest

    def test_a_signature_beside_the_manifest_is_read(self, signed: tuple[Path, str]) -> None:
        folder, digest = signed
        load_model(folder, digest, trust=trust(KEY))
        load_model(folder, digest)  # nobody asks for it: it does not disturb
        with pytest.raises(ArtifactIntegrityError, match="which is not trusted here"):
            load_model(folder, digest, trust=trust(OTHER))
        (folder / SIGNATURE_FILE).unlink()
        with pytest.raises(ArtifactIntegrityError, match="is not signed"):
            load_model(folder, digest, trust=trust(KEY))

    def test_a_changed_manifest_is_found_without_an_expected_digest(self, signed: tuple[Path, str]) -> None:
        folder, _ = signed
        manifest = folder / "package.json"
        manifest.write_bytes(manifest.read_bytes().replace(b'"for a test"', b'"for a heist"'))
        with pytest.raises(ArtifactIntegrityError, match="carries a signature for 'fare'"):
            load_model(folder, trust=trust(KEY))

    @pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"null"])
    def test_a_file_that_is_no_signature(self, signed: tuple[Path, str], content: bytes) -> None:
        folder, _ = signed
        (folder / SIGNATURE_FILE).write_bytes(content)
        with pytest.raises(ArtifactIntegrityError, match="is not a package signature"):
            load_model(folder, trust=trust(KEY))

    def test_a_signature_is_no_link(self, signed: tuple[Path, str], tmp_path: Path) -> None:
        folder, _ = signed
        (folder / SIGNATURE_FILE).rename(tmp_path / "elsewhere")
        (folder / SIGNATURE_FILE).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ArtifactIntegrityError, match="plain file"):
            read_signature(folder)

    def test_the_service_asks_for_it(self, signed: tuple[Path, str], tmp_path: Path) -> None:
        folder, digest = signed
        desired = serve_alone(None, model_name="fare", model_version="1", package_digest=digest)
        there = tmp_path / desired.folder(desired.stable)
        there.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(there)
        (tmp_path / DESIRED_FILE).write_bytes(desired.to_bytes())
        refusing = EndpointApp(ServiceSettings(serving_dir=tmp_path, public_keys=OTHER.public_text()))
        refusing.reconciler.reconcile()
        assert not refusing.ready
        assert "which is not trusted here" in str(refusing.status()["error"])
        serving = EndpointApp(
            ServiceSettings(serving_dir=tmp_path, public_keys=f"{OTHER.public_text()} {KEY.public_text()}")
        )
        serving.reconciler.reconcile()
        assert serving.status()["model_version"] == "1"


class TestConnection:
    @staticmethod
    def define(monkeypatch: pytest.MonkeyPatch, name: str = "signing_default", **fields: object) -> None:
        import json

        value = json.dumps({"conn_type": "airflow_mlops_signing", **fields})
        monkeypatch.setenv(f"AIRFLOW_CONN_{name.upper()}", value)

    def test_its_own_public_key_is_trusted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.define(monkeypatch, password=KEY.to_text(), extra={"public_keys": OTHER.public_text()})
        services = SigningHook().services()
        assert services.signing_key == KEY.to_text()
        assert set(parse_public_keys(str(services.signing_public_keys)).values()) == {
            KEY.public_key,
            OTHER.public_key,
        }
        assert KEY.to_text() not in repr(services)
        told = SigningHook().test_connection()
        assert told[0]
        assert key_id_of(OTHER.public_key) in told[1]

    def test_the_default_may_be_missing_a_named_one_not(self) -> None:
        assert SigningHook().services().signing_public_keys is None
        assert SigningHook().test_connection()[0] is False
        with pytest.raises(ConnectionConfigError, match="'mine' is not defined"):
            SigningHook(signing_conn_id="mine").services()

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({}, "none is given"),
            ({"password": "guess"}, "no Ed25519 private key"),
            ({"extra": {"public_keys": "guess"}}, "no Ed25519 public key"),
        ],
    )
    def test_what_is_wrong_is_said_with_its_name(
        self, monkeypatch: pytest.MonkeyPatch, fields: dict[str, object], words: str
    ) -> None:
        self.define(monkeypatch, **fields)
        with pytest.raises(ConnectionConfigError, match=f"connection 'signing_default': .*{words}"):
            SigningHook().services()

    def test_the_private_key_goes_only_where_packages_are_signed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.define(monkeypatch, password=KEY.to_text())
        self.define(monkeypatch, "mlflow_default", host="127.0.0.1", port=1)
        self.define(monkeypatch, "bentoml_default", host="127.0.0.1", port=1, extra={"serving_dir": "/x"})
        register = RegisterModelOperator(task_id="r", training={}).services()
        deploy = DeployModelOperator(task_id="d", model_name="fare").services()
        assert register.signing_key == KEY.to_text()
        assert deploy.signing_key is None
        assert deploy.signing_public_keys == KEY.public_text()
        assert services_from_connections().signing_public_keys is None


def test_the_command_makes_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["signing-key"]) == 0
    private, public, key_id = (line.rsplit(": ", 1)[1] for line in capsys.readouterr().out.splitlines())
    key = SigningKey.parse(private)
    assert list(parse_public_keys(public).items()) == [(key_id, key.public_key)]
