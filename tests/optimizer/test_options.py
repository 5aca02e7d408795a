"""The options of `create_multi_node_optimizer` as text."""

from __future__ import annotations

import inspect

from smorms3_dist import create_multi_node_optimizer
from smorms3_dist.kernels.narrow import SENT_AS
from smorms3_dist.optimizer.options import COMMUNICATION_DTYPES, OPTIONS, read_options

import chainer
import pytest
from rank_threads import ThreadCollectives, run_ranks


def test_each_keyword_argument_is_an_option_and_takes_each_value_that_it_has() -> None:
    parameters = inspect.signature(create_multi_node_optimizer).parameters.values()
    own = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
    assert list(OPTIONS) == ["double_buffering", *own]

    kept_as = {"accumulate": "micro_batches"}

    def make(collectives: ThreadCollectives) -> None:
        for name, values in OPTIONS.items():
            for text, value in ({"1": 1, "4": 4} if values is None else values).items():
                options = read_options(f"{name}={text}")
                assert options == {name: value}
                optimizer = create_multi_node_optimizer(
                    chainer.optimizers.SMORMS3(), collectives, **options
                )
                assert getattr(optimizer, kept_as.get(name, name)) == value

    run_ranks(1, make)


def test_gradients_may_be_sent_as_what_the_kernels_pack() -> None:
    # Named once more there, because a launcher does without NumPy.
    assert tuple(SENT_AS) == COMMUNICATION_DTYPES


def test_several_are_separated_by_commas() -> None:
    assert read_options("") == {}
    expected = {"gradients": "replicated", "exact": True, "step_after_broadcast": False}
    assert read_options("gradients=replicated,exact=true,step_after_broadcast=false") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("accumulate=0", "accumulate must be a number from 1 on, not '0'"),
        ("accumulate=two", "accumulate must be a number from 1 on, not 'two'"),
        ("gradient=auto", f"'gradient' is none of the options {', '.join(OPTIONS)}"),
        ("zero_fill=true", "'zero_fill' is none of the options"),
        ("exact=true,", "'' is none of the options"),
        ("gradients", "gradients must be one of auto, replicated, sharded, not ''"),
        ("exact=1", "exact must be one of true, false, not '1'"),
        ("exact=true,exact=false", "exact is given twice"),
    ],
)
def test_what_is_wrong_is_said_with_what_there_is(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_options(text)
    assert message in str(caught.value)
