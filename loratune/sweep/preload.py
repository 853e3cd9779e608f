"""Imported once by the server that forks the processes of a sweep: all that a training needs."""

from loratune.runtime import silence_libraries

silence_libraries()

import loratune.sweep.work  # noqa: E402, F401 - what it imports would print
