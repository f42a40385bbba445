"""What pyproject.toml cannot say: assets and scripts are installed as packages beside the code."""

from setuptools import find_packages, setup

# The scripts in a package of their own: at the top, a module called `sample` would be anybody's.
SCRIPTS = ("train_distillation", "sample", "test_umt5_weights", "convert_lora")

setup(
    packages=[*find_packages(include=["wan_distill", "wan_distill.*"]), "wan_distill_assets"],
    py_modules=[f"wan_distill_scripts.{name}" for name in SCRIPTS],
    package_dir={"wan_distill_assets": "assets", "wan_distill_scripts": "."},
    package_data={
        "wan_distill": ["**/*.html", "**/*.css", "**/*.js"],
        "wan_distill_assets": ["**/*"],
    },
)
