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

from airflow_mlops.core.package import MAXIMUM_MANIFEST_BYTES, MAXIMUM_PACKAGE_BYTES, file_digest
from airflow_mlops.exceptions import ArtifactIntegrityError
from airflow_mlops.integrations.onnx_file import asks_for_files
from airflow_mlops.serving import model as serving_model
from airflow_mlops.serving.model import load_model
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
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return open, (self.path, "w")


class TestCode:
    def test_in_a_pickle(self, skops_package: Path, tmp_path: Path) -> None:
        marker = tmp_path / "ran"
        payload = pickle.dumps(Touch(marker))
        replace_model(skops_package, payload)
        refused(skops_package, "pickles are never loaded")
        assert not marker.exists()
        pickle.loads(payload).close()  # noqa: S301 - the payload works: it is the loading that refuses it
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
