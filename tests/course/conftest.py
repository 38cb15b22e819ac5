"""A course of one tiny lesson, for the tests of what builds and checks courses."""

from pathlib import Path

import pytest

TINY_LESSON = '''\
# ---
# jupyter:
#   moe_lab:
#     title: Tiny
#     minutes: 5
#     seconds: 60
#     hardware: CPU
# ---

# %% [markdown]
# # 90 · Tiny
#
# **What is twice a number?** You will have built a doubler. 5 minutes, CPU. Prerequisites: none.

# %%
def exercise(number):
    return lambda function: lambda x: 2 * x


# %% [markdown]
# ## Write it
# ●○○ 2 minutes
# <details><summary>Hint 1</summary>Add.</details>
# <details><summary>Hint 2</summary>Add it to itself.</details>


# %%
@exercise("90.1")
def double(x):
    """Twice x."""
    ### BEGIN SOLUTION
    return x + x
    ### END SOLUTION


# %%
print(double(21))

# %% [markdown]
# ## Recap
# Adding doubles. Next: 91.

# %%
show_progress = print
show_progress("one done")
'''


@pytest.fixture
def tiny_course(tmp_path: Path) -> Path:
    """The root of a course whose only lesson is 90_tiny; not built yet."""
    for folder in ("lessons", "notebooks", "solutions", "data", "docs/teaching"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "lessons" / "90_tiny.py").write_text(TINY_LESSON, encoding="utf-8")
    (tmp_path / "data" / "corpus.json").write_text("{}", encoding="utf-8")
    (tmp_path / "docs" / "teaching" / "90_tiny.md").write_text("# Teaching note\n", encoding="utf-8")
    return tmp_path
