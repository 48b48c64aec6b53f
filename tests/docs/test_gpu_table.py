"""README's table of one GPU says what the committed data say: bench/gpu_table.py makes it."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("name", "language"), [("README.md", "en"), ("README.zh-CN.md", "zh")])
def test_readme_has_the_table_of_the_data(name, language):
    """Line for line."""
    table = "\n".join(runpy.run_path(str(ROOT / "bench" / "gpu_table.py"))["lines"](language))
    assert table in (ROOT / name).read_text(), f"python bench/gpu_table.py {language} prints what {name} should have"
