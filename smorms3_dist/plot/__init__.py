"""``smorms3-dist plot``: pictures of what runs have written.

In reading order, with the tests of each in ``tests/plot``: `commands` is the command line
(``test_commands_of_plot``); `records` reads logs, events and plans (``test_records``); `series`
picks out of them what a picture shows (``test_records``); `drawing` draws it (``test_drawing``).
Only `drawing` needs matplotlib, and nothing needs Chainer.
"""
