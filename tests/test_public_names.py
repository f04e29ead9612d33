import subprocess
import sys

import pytest

import llama_ray


@pytest.mark.parametrize("name", llama_ray.__all__)
def test_each_public_name_can_be_imported(name: str) -> None:
    assert getattr(llama_ray, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'llama_ray' has no attribute 'Lama'"):
        _ = llama_ray.Lama


def test_importing_the_package_waits_for_no_library() -> None:
    heavy = "{'torch', 'ray', 'mlflow', 'numpy'}"
    script = f"import sys, llama_ray; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[]"
