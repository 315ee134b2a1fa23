"""The explorer as a hosted space: `python app.py`. All of it is in essl_nb.app; here is only what a host needs."""
import os
from pathlib import Path

here = Path(__file__).parent
study = next((p for p in (here / "results" / "small", here.parent / "results" / "small") if p.is_dir()), None)
if not (here.parent / "corpus" / "manifest.csv").is_file():
    os.environ.setdefault("ESSL_CORPUS", str(here / "examples"))

from essl_nb.app.explorer import create_app

demo = create_app(results=study)

if __name__ == "__main__":
    # A host's container is reached from outside itself, so it names its address; anywhere else this stays on loopback.
    demo.launch(server_name=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), server_port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")), quiet=False)
