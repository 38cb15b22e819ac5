import pytest

from moe_lab.viz import picture


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures behind the pictures, for looking at what they show."""
    figures = []
    original = picture.Picture.__init__
    monkeypatch.setattr(
        picture.Picture, "__init__", lambda self, figure, alt: (figures.append(figure), original(self, figure, alt))[1]
    )
    return figures
