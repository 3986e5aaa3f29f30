"""Packaging of radonc_jax; tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="radonc_jax",
    version="0.1.0",
    description="LoRA fine-tuning of language models on radiation-oncology records in JAX, "
    "with paired evaluation of tuned against original models",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["radonc_jax", "radonc_jax.*"]),
    package_data={
        "radonc_jax.data": ["sites.json"],
        "radonc_jax.evaluation": ["page.css", "page.js"],
    },
    python_requires=">=3.11,<3.14",
    install_requires=[
        "absl-py>=2.1",
        "datasets>=4.0",
        "flax>=0.12.5",
        "grain>=0.2.14",
        "jax>=0.10.2",
        "matplotlib>=3.9",
        "ml_collections>=1.0",
        "numpy>=2.0",
        "openpyxl>=3.1.5,<3.2",  # data/workbook.py overrides parts of its reader
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12.5",
        "pandas>=2.2",
        "pyarrow>=17",
        "qwix>=0.1.8",
        "rouge-score>=0.1.2",
        "safetensors>=0.6",
        "scikit-learn>=1.5",
        "scipy>=1.14",
        "sentencepiece>=0.2.0",
        "simple_icd_10_cm>=1.5.0,<1.6",  # pins the ICD-10-CM release: 1.5.x carries April 2026
        "tensorboardX>=2.6",
        "tqdm>=4.66",
        "transformers>=5.0",
    ],
    extras_require={
        "test": [
            "hypothesis>=6",
            # libtpu compiles for TPUs on a machine without one.
            "jax[tpu]>=0.10.2; sys_platform == 'linux' and platform_machine == 'x86_64'",
            "peft>=0.18",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "ruff>=0.8",
            "selenium>=4.20",  # drives Chromium over the report, where both are installed
            "torch==2.13.0",
        ],
        "cuda": ["jax[cuda13]>=0.10.2"],
        "tpu": ["jax[tpu]>=0.10.2"],
    },
)
