"""Package metadata lives in settings.ini; this file hands it to setuptools, and puts a sample corpus into wheels."""
import sys
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
readme = here / "README.md"
extra = "_requirements"


class BuildWithSample(build_py):
    "A wheel carries at most 5 MB of speech; an editable install reads corpus/ itself."

    def run(self):
        super().run()
        if not self.editable_mode and (here / "corpus").is_dir():
            sys.path.insert(0, str(here / "tools"))
            import sample

            sample.build(Path(self.build_lib) / cfg["lib_name"] / "data" / "sample", here)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license=cfg["license"],
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["essl_nb", "essl_nb.*"]),
    cmdclass={"build_py": BuildWithSample},
    install_requires=cfg["requirements"].split(),
    extras_require={k.removesuffix(extra): v.split() for k, v in cfg.items() if k.endswith(extra)},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
)
