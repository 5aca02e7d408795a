"""``smorms3-dist demo``: trains on real digits, with nothing but what is installed.

In reading order: `commands` is the command line; `digits` gets and reads them; `train` is the
program, much as a user would write it. Tested by test_demo.py.
"""
