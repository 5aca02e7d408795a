"""What each rank does when: trace events of Chrome's form, a file a rank, merged into one.

In reading order: `trace_file` is a file of events that is whole after each write, `rank_timeline`
what a rank writes into one, `merging` brings those of all ranks together, on one clock, and
`commands` is ``smorms3-dist timeline``. Nothing here needs NumPy or Chainer.
"""
