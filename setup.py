"""The single place of the package's metadata and dependencies."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent

# The floors are the versions that the project was verified with where it leans on behaviour (torch, deepspeed, timm,
# DALI), and the first versions with the functions in use elsewhere.
REQUIRES = [
    "torch>=2.14",
    "torchvision>=0.29",  # timm imports it
    "deepspeed>=0.19.8",
    "timm>=1.0.31",
    "numpy>=1.26",
    "pillow>=10.3",
    "pyyaml>=6.0.1",
    "pydantic>=2.9",
    "safetensors>=0.5",
    "tensorboard>=2.16",
    "matplotlib>=3.8",
    "ffmpeg-python>=0.2",
    "tqdm>=4.66",
    "psutil>=5.9",
    "packaging>=23",
    "scikit-learn>=1.4,<1.11",  # 1.11 drops the probabilities of SVC
    "huggingface_hub>=0.23",  # where timm keeps weights
    "torch-fidelity>=0.4.0",  # Inception's features
    "scipy>=1.11",  # distances to a mask's border
    "scikit-image>=0.22",  # photographs of `prepare --sample photos`
    "lpips>=0.1.4",  # LPIPS' linear layers, a file of it; it is not imported
]
EXTRAS = {
    "test": ["pytest>=8", "pytest-xdist>=3.5", "ruff>=0.17,<0.18"],  # another ruff formats otherwise
    # Both DALI wheels hold the module nvidia.dali, so exactly one of them is installed.
    "cuda13": ["nvidia-dali-cuda130>=2.4"],
    "cuda12": ["nvidia-dali-cuda120>=2.4"],
}


def version() -> str:
    return re.search(r'__version__ = "(.+)"', (ROOT / "mage_ds" / "__init__.py").read_text())[1]


class BuildWithConfigs(build_py):
    """Puts ds_configs/, a sibling of the package in a checkout, into the package of a wheel."""

    def _configs(self) -> dict[str, Path]:
        target = Path(self.build_lib, "mage_ds", "ds_configs")
        return {f"ds_configs/{path.name}": target / path.name for path in sorted(ROOT.glob("ds_configs/*.json"))}

    def run(self):
        super().run()
        if not self.editable_mode:
            for source, target in self._configs().items():
                self.mkpath(str(target.parent))
                self.copy_file(source, str(target))

    def get_source_files(self):
        return [*super().get_source_files(), *self._configs()]  # so that a source archive holds them too


setup(
    name="mage_ds",
    version=version(),
    description="MAGE (masked generative encoder) with DeepSpeed: train, sample, represent",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["mage_ds", "mage_ds.*"]),
    package_data={"mage_ds": ["py.typed"], "mage_ds.recipes": ["*.yaml", "*/*.yaml", "*/curves/*.json"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mage-ds = mage_ds.cli:entry"]},
    cmdclass={"build_py": BuildWithConfigs},
    zip_safe=False,
)
