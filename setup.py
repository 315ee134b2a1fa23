"""Package metadata lives in settings.ini; this file hands it to setuptools, and puts the sample corpus and a study into wheels."""
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
ending = "_requirements"
extras = {k.removesuffix(ending): v.split() for k, v in cfg.items() if k.endswith(ending)}
extras["all"] = sorted({r for name in cfg["all_extras"].split() for r in extras[name]})
lines = lambda key: [line.strip() for line in cfg[key].splitlines() if line.strip()]


class BuildWithSample(build_py):
    "A wheel carries some minutes of speech, the rows of the studies and three encoders; an editable install reads corpus/ and results/."

    def run(self):
        super().run()
        if not self.editable_mode and (here / "corpus").is_dir():
            sys.path.insert(0, str(here / "tools"))
            import sample

            data = Path(self.build_lib) / cfg["lib_name"] / "data"
            sample.build(data / "sample", here)
            sample.studies(data / "results", here)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license_expression=cfg["license"],
    license_files=["LICENSE", "corpus/licences/asterisk*", "corpus/licences/festvox*"],
    keywords=cfg["keywords"].split(),
    classifiers=lines("classifiers"),
    project_urls=dict(map(str.strip, line.split("=", 1)) for line in lines("urls")),
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["essl_nb", "essl_nb.*"]),
    package_data={"essl_nb": ["py.typed"]},
    cmdclass={"build_py": BuildWithSample},
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split()},
)
