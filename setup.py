"""Two import packages from one tree: `llava15_fast/`, and `llava15_kernels` inside the source folder `kernels/`.

`kernels/` itself is no package: an import package of that name would hide Hugging Face's `kernels`.
"""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "llava15_fast/__init__.py").read_text(), re.M)[1]
PARTS = ("model", "fast", "patching", "tools", "assets")

setup(
    name="llava15-fast",
    version=VERSION,
    description="LLaVA-OneVision-1.5 on current transformers, with hand-written Triton kernels",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=["llava15_fast", *(f"llava15_fast.{part}" for part in PARTS), "llava15_kernels"],
    package_dir={"llava15_kernels": "kernels/llava15_kernels", "llava15_fast.assets": "assets"},
    package_data={"llava15_fast.assets": ["scenes_checkpoint/*", "samples/*"]},
    install_requires=[
        "torch>=2.11,<2.16",
        "triton>=3.6,<3.10",
        "transformers>=5.17,<5.25",
        "accelerate",  # device_map
        "safetensors",
        "pillow",
        "numpy",
        "rich",
    ],
    extras_require={
        "dev": ["pytest", "pytest-xdist>=3.6", "pytest-benchmark", "hypothesis", "ruff", "peft"],
        "benchmarks": ["matplotlib"],
    },
    entry_points={"console_scripts": ["llava15-fast = llava15_fast.tools.cli:main"]},
)
