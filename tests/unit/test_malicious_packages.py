"""Packages made to run code, to read other files or to fill the memory: each is refused before anything of it is loaded."""

from __future__ import annotations

import importlib
import io
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from skops import io as skops_io

from airflow_mlops.core.comparison.artifact import ArtifactLimits
from airflow_mlops.core.model.package import (
    MAXIMUM_MANIFEST_BYTES,
    MAXIMUM_PACKAGE_BYTES,
    file_digest,
    package_digest,
)
from airflow_mlops.core.model.signing import SigningKey, Trust
from airflow_mlops.exceptions import ArtifactIntegrityError
from airflow_mlops.integrations.onnx_file import asks_for_files
from airflow_mlops.serving import model as serving_model
from airflow_mlops.serving.model import PICKLED_MODELS_VARIABLE, TRUSTED_TYPES_VARIABLE, load_model
from airflow_mlops.serving.package import read_verified, write_signature
from airflow_mlops.serving.probe import check_artifact
from airflow_mlops.steps.monitoring.estimation import _estimation
from tests.packages import build_package


@pytest.fixture
def skops_package(tmp_path: Path) -> Path:
    build_package(tmp_path / "package", form="sklearn")
    return tmp_path / "package"


@pytest.fixture
def onnx_package(tmp_path: Path) -> Path:
    build_package(tmp_path / "package")
    return tmp_path / "package"


def replace_model(folder: Path, data: bytes) -> None:
    """Put another model in and make the manifest agree, as somebody with write access would."""
    manifest = json.loads((folder / "package.json").read_text())
    manifest["files"][manifest["model_file"]] = file_digest(data)
    (folder / manifest["model_file"]).write_bytes(data)
    (folder / "package.json").write_text(json.dumps(manifest))


def refused(folder: Path, words: str, digest: str | None = None) -> None:
    with pytest.raises(ArtifactIntegrityError, match=words):
        load_model(folder, digest)


class Touch:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.path,)


class TestCode:
    def test_in_a_pickle(self, skops_package: Path, tmp_path: Path) -> None:
        marker = tmp_path / "ran"
        payload = pickle.dumps(Touch(marker))
        replace_model(skops_package, payload)
        refused(skops_package, "pickles are never loaded as one")
        assert not marker.exists()
        pickle.loads(payload)  # noqa: S301 - the payload works: it is the loading that refuses it
        assert marker.exists()

    def test_in_a_pickle_that_is_a_zip_too(self, skops_package: Path, tmp_path: Path) -> None:
        marker = tmp_path / "ran"
        replace_model(
            skops_package, pickle.dumps(Touch(marker)) + (skops_package / "model.skops").read_bytes()
        )
        load_model(skops_package)  # read as the zip it ends in; nothing is unpickled
        assert not marker.exists()

    @pytest.mark.parametrize("wrapped", [False, True])
    def test_in_a_function_of_the_pipeline(self, skops_package: Path, tmp_path: Path, wrapped: bool) -> None:
        """``partial`` is on our list; what it binds to must be on a list itself."""
        marker = tmp_path / "ran"
        function = partial(os.system, f"touch {marker}") if wrapped else os.system
        step = FunctionTransformer(function, kw_args=None)
        fitted = make_pipeline(FunctionTransformer(), LinearRegression()).fit([[0.0], [1.0]], [0.0, 1.0])
        fitted.steps[0] = ("run", step)
        replace_model(skops_package, skops_io.dumps(fitted))
        refused(skops_package, "types that are not allowed: .*posix.system")
        assert not marker.exists()

    def test_in_a_module_that_is_imported(
        self, skops_package: Path, tmp_path: Path, evil: tuple[str, Path]
    ) -> None:
        name, marker = evil
        module = importlib.import_module(name)
        payload = skops_io.dumps(module.Estimator())
        assert marker.exists()  # the payload works
        marker.unlink()
        del sys.modules[name]
        replace_model(skops_package, payload)
        refused(skops_package, f"types that are not allowed: .*{name}.Estimator")
        assert not marker.exists()
        assert name not in sys.modules

    @pytest.fixture
    def evil(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
        name, marker = "evil_module_for_a_test", tmp_path / "imported"
        (tmp_path / f"{name}.py").write_text(
            f"open({str(marker)!r}, 'w').close()\nclass Estimator:\n    def __init__(self): self.x = 1\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        yield name, marker
        sys.modules.pop(name, None)

    def test_a_list_in_the_package_does_not_allow_anything(self, skops_package: Path, tmp_path: Path) -> None:
        marker = tmp_path / "ran"
        replace_model(skops_package, skops_io.dumps(partial(os.system, f"touch {marker}")))
        manifest = json.loads((skops_package / "package.json").read_text())
        manifest["trusted_types"] = ["posix.system"]
        (skops_package / "package.json").write_text(json.dumps(manifest))
        refused(skops_package, "types that are not allowed")
        assert not marker.exists()

    @pytest.mark.parametrize("schema", ["[" * 100_000, '{"__class__": "x"}', "{}", "\xff"])
    def test_a_schema_that_is_none(self, skops_package: Path, schema: str) -> None:
        crafted = io.BytesIO()
        with zipfile.ZipFile(crafted, "w") as archive:
            archive.writestr("schema.json", schema)
        replace_model(skops_package, crafted.getvalue())
        refused(skops_package, r"model\.skops")


KEY, OTHER = SigningKey.generate(), SigningKey.generate()


def trust(*keys: SigningKey, model_name: str = "fare") -> Trust | None:
    return Trust.of(" ".join(key.public_text() for key in keys), model_name)


class TestPickles:
    """A pickle is loaded when a trusted key signed it, and this process was told to load pickles of this very model."""

    @pytest.fixture
    def pickled(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """An honest one, signed, and accepted here."""
        build_package(tmp_path / "pickled", form="pickle")
        self.sign(tmp_path / "pickled")
        monkeypatch.setenv(PICKLED_MODELS_VARIABLE, "other, fare")
        return tmp_path / "pickled"

    @pytest.fixture
    def armed(self, pickled: Path, tmp_path: Path) -> tuple[Path, Path]:
        """One that runs code; everything else about it is in order."""
        replace_model(pickled, pickle.dumps(Touch(tmp_path / "ran")))
        self.sign(pickled)
        return pickled, tmp_path / "ran"

    @staticmethod
    def sign(folder: Path, key: SigningKey = KEY, model_name: str = "fare") -> None:
        digest = package_digest((folder / "package.json").read_bytes())
        write_signature(folder, key.sign(model_name=model_name, package_digest=digest))

    @staticmethod
    def kept_out(
        folder: Path, marker: Path, words: str, wanted: Trust | None, digest: str | None = None
    ) -> None:
        with pytest.raises(ArtifactIntegrityError, match=words):
            load_model(folder, digest, trust=wanted)
        assert not marker.exists()

    def test_an_honest_one_is_loaded(self, pickled: Path, skops_package: Path) -> None:
        rows = [{"x": x, "kind": "a"} for x in (0.5, 3.0, 9.0, None)]
        model = load_model(pickled, trust=trust(KEY))
        assert model.predict_records(rows) == load_model(skops_package).predict_records(rows)

    def test_the_payload_works(self, armed: tuple[Path, Path]) -> None:
        """What keeps the others out is a rule, not a broken payload."""
        folder, marker = armed
        with pytest.raises(ArtifactIntegrityError, match="fails on the known rows"):
            load_model(folder, trust=trust(KEY))
        assert marker.exists()

    def test_nobody_asks_for_a_signature(self, armed: tuple[Path, Path]) -> None:
        digest = package_digest((armed[0] / "package.json").read_bytes())
        self.kept_out(
            *armed, "no key was there to verify a signature with: configure the signing connection", None
        )
        self.kept_out(*armed, "no key was there", None, digest)

    def test_it_is_not_signed(self, armed: tuple[Path, Path]) -> None:
        (armed[0] / "package.sig").unlink()
        self.kept_out(*armed, "is not signed as a version of 'fare'", trust(KEY))
        self.kept_out(*armed, "no key was there", None)

    def test_another_key_signed_it(self, armed: tuple[Path, Path]) -> None:
        self.sign(armed[0], OTHER)
        self.kept_out(*armed, "which is not trusted here", trust(KEY))

    def test_another_key_signed_it_in_the_name_of_a_trusted_one(self, armed: tuple[Path, Path]) -> None:
        folder, _ = armed
        self.sign(folder, OTHER)
        forged = json.loads((folder / "package.sig").read_text())
        forged["key_id"] = next(iter(trust(KEY).keys))  # type: ignore[union-attr]
        (folder / "package.sig").write_text(json.dumps(forged))
        self.kept_out(*armed, "did not make", trust(KEY))

    def test_it_is_signed_as_another_model(
        self, armed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.sign(armed[0], model_name="other")  # which is accepted here as well
        self.kept_out(*armed, "carries a signature for 'other'", trust(KEY))

    @pytest.mark.parametrize("change", ["model", "manifest"])
    def test_a_byte_was_changed_after_it_was_signed(self, pickled: Path, tmp_path: Path, change: str) -> None:
        marker = tmp_path / "ran"
        payload = pickle.dumps(Touch(marker))
        if change == "model":
            (pickled / "model.pkl").write_bytes(payload)
            self.kept_out(pickled, marker, r"model\.pkl was changed after packaging", trust(KEY))
        else:
            replace_model(pickled, payload)
            self.kept_out(pickled, marker, "carries a signature for", trust(KEY))

    def test_it_is_not_the_registered_one(self, armed: tuple[Path, Path]) -> None:
        self.kept_out(*armed, "not the package that was registered", trust(KEY), "sha256:" + "0" * 64)

    @pytest.mark.parametrize("accepted", [None, "", "other", "far", "fare2,Fare", "*", "true", "1"])
    def test_this_process_does_not_accept_it(
        self, armed: tuple[Path, Path], accepted: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv(PICKLED_MODELS_VARIABLE)
        if accepted is not None:
            monkeypatch.setenv(PICKLED_MODELS_VARIABLE, accepted)
        self.kept_out(*armed, "accepts no pickles of 'fare'.*AIRFLOW_MLOPS_PICKLED_MODELS", trust(KEY))

    def test_trusted_types_and_manifests_do_not_open_it(
        self, armed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder, _ = armed
        monkeypatch.setenv(PICKLED_MODELS_VARIABLE, "other")
        monkeypatch.setenv(TRUSTED_TYPES_VARIABLE, "fare,builtins.open,_io.open,*")
        manifest = json.loads((folder / "package.json").read_text())
        manifest["environment"][PICKLED_MODELS_VARIABLE] = "fare"
        manifest["allow_pickle"] = True
        (folder / "package.json").write_text(json.dumps(manifest))
        self.sign(folder)
        self.kept_out(*armed, "accepts no pickles of 'fare'|allow_pickle", trust(KEY))

    def test_a_pickle_in_place_of_a_skops_file(
        self, skops_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where pickles of the model are accepted, a package that says it holds none gets none unpickled."""
        monkeypatch.setenv(PICKLED_MODELS_VARIABLE, "fare")
        marker = tmp_path / "ran"
        replace_model(skops_package, pickle.dumps(Touch(marker)))
        self.sign(skops_package)
        self.kept_out(
            skops_package, marker, "is not a skops file; pickles are never loaded as one", trust(KEY)
        )

    def test_an_unsigned_skops_package_that_now_claims_a_pickle(
        self, skops_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(PICKLED_MODELS_VARIABLE, "fare")
        marker = tmp_path / "ran"
        manifest = json.loads((skops_package / "package.json").read_text())
        manifest["serving_form"] = "pickle"
        (skops_package / "package.json").write_text(json.dumps(manifest))
        replace_model(skops_package, pickle.dumps(Touch(marker)))
        self.kept_out(skops_package, marker, "no key was there", None)
        self.kept_out(skops_package, marker, "is not signed", trust(KEY))

    def test_a_second_model_in_a_package_is_never_a_pickle(self, pickled: Path) -> None:
        _, contents = read_verified(pickled, trust=trust(KEY))
        told = {"metric": "mae", "method": "error_model", "model_file": "model.pkl", "model_form": "pickle"}
        with pytest.raises(ArtifactIntegrityError, match="model_form"):
            _estimation({**contents, "estimation.json": json.dumps(told).encode()}, pickled)

    def test_the_process_that_measures_it_asks_for_the_same(
        self, pickled: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        limits = ArtifactLimits()
        keys = KEY.public_text()
        check, facts = check_artifact(pickled, limits, signed_as="fare", public_keys=keys)
        assert facts is not None, check.reason
        for wrong, words in (
            ({}, "no key was there"),
            ({"signed_as": "fare", "public_keys": OTHER.public_text()}, "is not trusted here"),
            ({"signed_as": "other", "public_keys": keys}, "carries a signature for 'fare'"),
        ):
            check, facts = check_artifact(pickled, limits, **wrong)  # type: ignore[arg-type]
            assert (facts, words in check.reason) == (None, True), check.reason
        monkeypatch.setenv(PICKLED_MODELS_VARIABLE, "other")
        check, facts = check_artifact(pickled, limits, signed_as="fare", public_keys=keys)
        assert (facts, "accepts no pickles of 'fare'" in check.reason) == (None, True), check.reason


class TestFiles:
    def test_another_model_under_the_registered_digest(self, onnx_package: Path, tmp_path: Path) -> None:
        digest = build_package(tmp_path / "registered", slope=3.0)
        refused(onnx_package, "not the package that was registered", digest)

    @pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", "..", ".hidden", "package.sig"])
    def test_a_manifest_that_lists_other_folders(self, onnx_package: Path, name: str) -> None:
        manifest = json.loads((onnx_package / "package.json").read_text())
        manifest["files"][name] = "0" * 64
        (onnx_package / "package.json").write_text(json.dumps(manifest))
        refused(onnx_package, "not the name of a file inside the package")

    @pytest.mark.parametrize("name", ["package.json", "model.onnx"])
    def test_a_link(self, onnx_package: Path, tmp_path: Path, name: str) -> None:
        (onnx_package / name).rename(tmp_path / "elsewhere")
        (onnx_package / name).symlink_to(tmp_path / "elsewhere")
        refused(onnx_package, f"{name} cannot be read as a plain file")

    def test_a_pipe_does_not_make_it_wait(self, onnx_package: Path) -> None:
        (onnx_package / "model.onnx").unlink()
        os.mkfifo(onnx_package / "model.onnx")
        refused(onnx_package, r"model\.onnx is not a plain file")

    @pytest.mark.parametrize(
        ("name", "size"),
        [("package.json", MAXIMUM_MANIFEST_BYTES + 1), ("model.onnx", MAXIMUM_PACKAGE_BYTES + 1)],
    )
    def test_more_than_the_memory_should_hold(self, onnx_package: Path, name: str, size: int) -> None:
        os.truncate(onnx_package / name, size)  # a hole: it takes no disk
        refused(onnx_package, f"{name} makes the package larger than")

    def test_a_manifest_nested_without_end(self, onnx_package: Path) -> None:
        (onnx_package / "package.json").write_text('{"files":' * 200_000)
        refused(onnx_package, "is not a package manifest")


class TestZip:
    @staticmethod
    def repacked(source: Path, extra: list[tuple[str, bytes]]) -> bytes:
        target = io.BytesIO()
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
            for name, data in extra:
                new.writestr(name, data)
        return target.getvalue()

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    @pytest.mark.parametrize(
        ("name", "words"),
        [("schema.json", "two files of one name"), ("../../outside.npy", "files in folders")],
    )
    def test_names_that_trick(self, skops_package: Path, name: str, words: str) -> None:
        replace_model(skops_package, self.repacked(skops_package / "model.skops", [(name, b"{}")]))
        refused(skops_package, words)

    def test_a_bomb(self, skops_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        data = self.repacked(skops_package / "model.skops", [("bomb.npy", bytes(10_000_000))])
        assert len(data) < 1_000_000
        replace_model(skops_package, data)
        monkeypatch.setattr(serving_model, "MAXIMUM_PACKAGE_BYTES", 5_000_000)
        refused(skops_package, "unpacks to .* bytes")


class TestOnnx:
    """Tensors in other files: the model names the file, so it could be any of the machine's."""

    @staticmethod
    def external(name: str, location: str) -> TensorProto:
        tensor = numpy_helper.from_array(np.ones(4, dtype=np.float32), name)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        return tensor

    def model(self, place: str, location: str) -> bytes:
        out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
        tensor = self.external("w", location)
        constant = helper.make_node("Constant", [], ["y"], value=tensor)
        if place == "initializer":
            graph = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "g", [], [out], [tensor])
        elif place == "node":
            graph = helper.make_graph([constant], "g", [], [out])
        else:
            branch = helper.make_graph([constant], "branch", [], [out])
            condition = numpy_helper.from_array(np.array(True), "c")
            node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
            graph = helper.make_graph([node], "g", [], [out], [condition])
        return helper.make_model(graph, ir_version=8).SerializeToString()

    @pytest.mark.parametrize("place", ["initializer", "node", "branch"])
    @pytest.mark.parametrize("location", ["../../secret", "weights.bin", "/etc/passwd"])
    def test_a_tensor_elsewhere(
        self, onnx_package: Path, place: str, location: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("the runtime must not see this model")

        monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
        replace_model(onnx_package, self.model(place, location))
        refused(onnx_package, "keeps tensors in other files")

    def test_a_whole_model_is_whole(self, onnx_package: Path) -> None:
        data = (onnx_package / "model.onnx").read_bytes()
        assert not asks_for_files(data)
        assert onnx.load_model_from_string(data).graph.node  # it is one, by onnx's own reader

    @pytest.mark.parametrize("data", [b"", b"garbage", pickle.dumps([1]), bytes(1000)])
    def test_what_is_no_model(self, onnx_package: Path, data: bytes) -> None:
        replace_model(onnx_package, data)
        refused(onnx_package, r"model\.onnx")
