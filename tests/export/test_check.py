from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from quest_deploy.errors import ArtifactError, ExportError
from quest_deploy.export.check import check_file, read_onnx
from tests.export.conftest import Exported, unet_spec


def written(folder: Path, model: onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def copy(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.load_from_string(model.SerializeToString())


def layer_count(exported: Exported) -> int:
    from quest_deploy.quantize.insert import quantized_layers

    return len(quantized_layers(exported.module))


def test_accepts_what_was_exported(w4a4_unet: Exported, tmp_path: Path) -> None:
    path = written(tmp_path, w4a4_unet.proto)
    summary = check_file(path, w4a4_unet.spec, opset=21, quantized_layers=layer_count(w4a4_unet))
    assert summary.size_bytes == path.stat().st_size
    assert summary.nodes == sum(summary.operators.values()) == len(w4a4_unet.proto.graph.node)


def test_a_graph_in_which_nothing_is_quantized_is_refused(float_unet: Exported, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="0 products are quantized, expected 5"):
        check_file(written(tmp_path, float_unet.proto), float_unet.spec, quantized_layers=5)


def test_one_layer_left_in_float_is_refused(w4a4_unet: Exported, tmp_path: Path) -> None:
    layers = layer_count(w4a4_unet)
    with pytest.raises(ExportError, match=f"{layers} products are quantized, expected {layers + 1}"):
        check_file(written(tmp_path, w4a4_unet.proto), w4a4_unet.spec, quantized_layers=layers + 1)


def test_another_opset_is_refused(float_unet: Exported, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="got opset 21, expected 23"):
        check_file(written(tmp_path, float_unet.proto), float_unet.spec, opset=23)


def test_another_interface_is_refused(float_unet: Exported, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="got inputs .* expected"):
        check_file(written(tmp_path, float_unet.proto), unet_spec(channels=9))


def test_a_custom_domain_is_refused(float_unet: Exported, tmp_path: Path) -> None:
    model = copy(float_unet.proto)
    model.opset_import.append(onnx.helper.make_opsetid("quest_deploy", 1))
    model.graph.node[0].domain = "quest_deploy"
    with pytest.raises(ExportError, match="quest_deploy|refuses"):
        check_file(written(tmp_path, model), float_unet.spec)


@pytest.mark.parametrize(
    "path", [f"/{'home'}/someone/model.py", f'File "/{"work"}/x/model.py", line 3', "C:\\Users\\x"]
)
def test_an_absolute_path_is_refused(float_unet: Exported, tmp_path: Path, path: str) -> None:
    model = copy(float_unet.proto)
    model.graph.node[3].doc_string = path
    with pytest.raises(ExportError, match="absolute path"):
        check_file(written(tmp_path, model), float_unet.spec)


def test_a_dangling_input_is_refused(float_unet: Exported, tmp_path: Path) -> None:
    model = copy(float_unet.proto)
    model.graph.node[-1].input[0] = "nowhere"
    with pytest.raises(ExportError, match="onnx.checker refuses it"):
        check_file(written(tmp_path, model), float_unet.spec)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_an_artifact_error(float_unet: Exported, tmp_path: Path, share: float) -> None:
    path = written(tmp_path, float_unet.proto)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises((ArtifactError, ExportError), match=r"model\.onnx"):
        check_file(path, float_unet.spec)


def test_a_file_of_another_kind_is_an_artifact_error(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("<html>404</html>" * 20)
    with pytest.raises(ArtifactError, match="run `quest-deploy export` again"):
        read_onnx(path)


def test_a_missing_file_is_an_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        read_onnx(tmp_path / "model.onnx")
