"""Sound that runs are trained on."""
import shutil

import pytest


def some_prompts(folder, root, n):
    "Every n-th prompt of the corpus as anyone's folder, without a manifest."
    for clip in sorted((root / "corpus" / "prompts").glob("*/*/*.opus"))[::n]:
        shutil.copy(clip, folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory, root):
    "Some sentences."
    return some_prompts(tmp_path_factory.mktemp("clips"), root, 100)


@pytest.fixture(scope="module")
def folder_of_clips(tmp_path_factory, root):
    "Forty sentences."
    return some_prompts(tmp_path_factory.mktemp("clips"), root, 60)
