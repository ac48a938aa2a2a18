"""What pyproject.toml cannot say: the folder configs/ is installed as the package vit_dist.configs."""

from pathlib import Path

from setuptools import find_packages, setup

recipes = ["vit_dist.configs"] if Path("configs").is_dir() else []  # the Dockerfile installs the libraries before it
setup(packages=find_packages(include=["vit_dist*"]) + recipes, package_dir=dict.fromkeys(recipes, "configs"))
