"""The package compressed-tensors, where it is installed (with torch), unpacks our files to our numbers."""

import numpy as np
import pytest

from lowbit_jax.io import compressed_tensors
from tests.io import files
from tests.io.test_compressed_tensors import packed, raw

torch = pytest.importorskip("torch", reason="torch and compressed-tensors are not installed")
pytest.importorskip("compressed_tensors")
pytest.importorskip("safetensors")


@pytest.mark.parametrize("name", files.ALL)
def test_its_own_numbers(name, tmp_path):
    """MX and NVFP4 come as bfloat16, to which they unpack."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from safetensors.torch import load_file

    layer = packed(files.ALL[name])
    compressed_tensors.save(tmp_path, {"layer": layer})
    _, told = raw(tmp_path)
    group = told["quantization_config"]["config_groups"]["group_0"]
    own = {key.removeprefix("layer."): leaf for key, leaf in load_file(tmp_path / "model.safetensors").items()}
    found = BaseCompressor.get_value_from_registry(group["format"]).decompress(own, QuantizationScheme(**group))
    expected = torch.from_numpy(np.asarray(layer.dequantize(np.float32)).T.copy())
    dtype = found["weight"].dtype
    assert dtype in (torch.float32, torch.bfloat16)
    error = (found["weight"].float() - expected.to(dtype).float()).abs().max()
    bound = 0.01 * expected.abs().max() if name.startswith("nvfp4") else 0  # its scales meet their divisor in bfloat16
    assert error <= bound, f"{error} in {dtype}"
