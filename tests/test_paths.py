import pytest

from moe_lab import paths


@pytest.fixture
def course(tmp_path):
    """A folder that looks like the course."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "corpus.json").write_text("{}")
    (tmp_path / "notebooks" / "deep").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("inside", [".", "notebooks", "notebooks/deep"])
def test_the_course_is_found_from_any_folder_in_it(course, monkeypatch, inside):
    monkeypatch.chdir(course / inside)
    assert paths.course_root() == course
    assert paths.progress_file() == course / "progress" / "progress.jsonl"


def test_elsewhere_it_is_the_course_that_the_package_belongs_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (paths.course_root() / "moe_lab" / "paths.py").is_file()


def test_where_there_is_none_it_says_so_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "__file__", str(tmp_path / "site" / "moe_lab" / "paths.py"))
    with pytest.raises(paths.CourseNotFound, match="Change into the folder that you cloned"):
        paths.course_root()
