from pathlib import Path

from setuptools import setup

setup(
    name="adversarial-midibert",
    version="0.1.0",
    description="A BERT for symbolic music, pre-trained adversarially, on Triton kernels of its own",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    # Installed, the two lie in amb: `kernels` and `tokenizer` are names of other projects on PyPI.
    packages=["amb", "amb.kernels", "amb.tokenizer"],
    package_dir={"amb.kernels": "kernels", "amb.tokenizer": "tokenizer"},
    package_data={"amb": ["weights/*/*"]},
    entry_points={"console_scripts": ["amb = amb.__main__:main"]},
    install_requires=[
        "torch>=2.6",
        "triton>=3.3; platform_system == 'Linux'",
        "numpy>=1.26",
        "mido>=1.3",
        "einops>=0.8",
        "tqdm>=4.66",
    ],
    extras_require={
        "plot": ["matplotlib>=3.8"],
        "baselines": ["scikit-learn>=1.4"],
        "bench": ["transformers>=4.40,<5", "matplotlib>=3.8"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "transformers>=4.40,<5",
            "matplotlib>=3.8",
            "scikit-learn>=1.4",
        ],
    },
)
