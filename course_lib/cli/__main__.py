"""`python -m course_lib.cli`: the same as `posttrain`, where its script is not on the path."""

from course_lib.cli import entry

entry()
