"""A model file that tests alter."""

import io
import zipfile

import pytest
from models import build


@pytest.fixture(scope="module")
def model_file():
    file = io.BytesIO()
    build(n_epochs=1).learn(32).save(file)
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}
