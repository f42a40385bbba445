"""What pyproject.toml cannot say: the assets are installed as a package of data beside the code."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["wan_distill", "wan_distill.*"]), "wan_distill_assets"],
    package_dir={"wan_distill_assets": "assets"},
    package_data={"wan_distill": ["**/*.html"], "wan_distill_assets": ["**/*"]},
)
