import pytest

from tests.rewards.tiny import write_clip


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """A folder with a random CLIPModel, its tokenizer of 16 tokens and its processor of 32 pixels."""
    return write_clip(tmp_path_factory.mktemp("models") / "tiny-clip")
