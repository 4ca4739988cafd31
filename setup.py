"""Packages of a distribution: karmma_dist and, as its data, the top-level folders in which commands look up names."""

from setuptools import find_packages, setup

FOLDERS = {"recipes": ["**/*"], "shards": ["*.yaml", "*.md"], "slurm": ["*"]}
"""Files of each folder; an installation has them in karmma_dist/share/. Packed datasets in shards/ are left out."""

packages = {f"karmma_dist.share.{name}": name for name in FOLDERS}
setup(
    packages=[*find_packages(include=["karmma_dist", "karmma_dist.*"]), *packages],
    package_dir=packages,
    package_data={
        "karmma_dist": ["py.typed", "**/*.j2"],
        **{package: FOLDERS[name] for package, name in packages.items()},
    },
)
