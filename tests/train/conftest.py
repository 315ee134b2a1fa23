"""Sound that runs are trained on."""
import shutil

import pytest


@pytest.fixture(scope="module")
def clips(tmp_path_factory, root):
    "Some sentences of the corpus as anyone's folder, without a manifest."
    folder = tmp_path_factory.mktemp("clips")
    for clip in sorted((root / "corpus" / "prompts").glob("*/*/*.opus"))[::100]:
        shutil.copy(clip, folder)
    return folder
