"""The only room that touches what Chainer 7.8.1 keeps to itself.

A sharded optimizer does, at other moments and on parts of arrays, what Chainer does inside of
``Optimizer.update`` and ``UpdateRule.update``. Chainer has no public names for some of what it
needs for that: whether a gradient was finite, the fp32 master of a float16 parameter, the hooks
that are registered. All of it is read and written here, in words of this package, and nowhere else.

`optimizers`
    What optimizers, their hooks and their update rules keep: flags, states, masters.
`links`
    What links and their parameters keep: members by path, arrays, gradients.
`loss_scale`
    The loss scale: what an optimizer and its parameters note of it, and of its failures.
`trainers`
    What trainers, updaters, extensions, triggers, iterators and serializers keep.
`guards`
    Lets whoever asks a parameter for its array wait, whoever it is.
"""
