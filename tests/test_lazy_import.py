"""What arithmetic can answer must not wait for torch: its import takes seconds."""

import subprocess
import sys

import pytest

import minimoe


def modules_after(statement):
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(child.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import minimoe",
        "import minimoe; minimoe.HybridConfig.preset('tiny'); minimoe.ConfigError",
        "from minimoe import catalog; [catalog.model(name) for name in catalog.models()]",
        "from minimoe import catalog\nfrom minimoe.sizing import count_parameters, state_bytes\n"
        "spec = catalog.model('qwen3-30b-a3b').spec; count_parameters(spec); state_bytes(spec, 10)",
        "import os; os.environ['MINIMOE_PROFILE'] = 'ci'; import minimoe; minimoe.profile()",
        "import minimoe.cli, minimoe.doctor, minimoe.bench.host",
    ],
)
def test_no_torch(statement):
    loaded = modules_after(statement)
    assert "minimoe" in loaded
    assert not {"torch", "numpy", "transformers"} & loaded


def test_models_do_load_torch():
    assert "torch" in modules_after("from minimoe import HybridLM")


def test_every_public_name_loads():
    for name in minimoe.__all__:
        assert getattr(minimoe, name) is not None
    assert set(minimoe.__all__) <= set(dir(minimoe))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'HybridLLM'"):
        minimoe.HybridLLM  # noqa: B018
