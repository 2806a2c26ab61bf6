"""`python -m course_lib.cli`: the same as `posttrain`, where its script is not on the path."""

import sys

from course_lib.cli import main

sys.exit(main())
