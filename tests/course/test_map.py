from moe_lab.course.lesson import parse
from moe_lab.course.map import NOTEBOOKS
from moe_lab.paths import lessons_dir


def test_the_map_shows_the_minutes_of_the_lessons_that_are_written():
    written = {path.name[:2]: parse(path).minutes for path in sorted(lessons_dir().glob("[0-9][0-9]_*.py"))}
    assert written == {number: minutes for number, _, minutes in NOTEBOOKS if minutes is not None}
    assert [number for number, _, _ in NOTEBOOKS] == [f"{n:02d}" for n in range(15)]
