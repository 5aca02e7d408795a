"""Children of an unmodified script train too, whatever the start method."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fresh import WITHOUT_SETUPTOOLS, passes, run

SCRIPTS = Path(__file__).parent / "scripts"

# Makes patches needed in any environment, and leaves the children alone, so that what they import
# is what they are made to.
NEEDY_PARENT = f"""
import multiprocessing
if multiprocessing.current_process().name == 'MainProcess':
    exec({WITHOUT_SETUPTOOLS!r})
"""
CHILD = """
if __name__ == '__main__':
    context = multiprocessing.get_context('{method}')
    process = context.Process(target=child, args=({arguments}))
    process.start()
    process.join()
    assert process.exitcode == 0
"""
METHODS = ("fork", "forkserver", "spawn")
ALIKE = [f"{method} trained alike" for method in METHODS]


@pytest.mark.parametrize(
    "arguments",
    [
        [SCRIPTS / "iterator_children.py"],
        [SCRIPTS / "training_children.py"],
        ["-m", "package.train"],
    ],
    ids=["iterator", "script", "module"],
)
def test_children_train(arguments: list[str | Path], tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    shutil.copy(SCRIPTS / "training_children.py", tmp_path / "package" / "train.py")
    status, output = run(tmp_path, "-m", "smorms3_dist", *arguments, *METHODS)
    assert status == 0, output
    assert [line for line in output.splitlines() if "trained" in line] == ALIKE, output


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_child_finds_the_package_where_its_parent_has_it(method: str, tmp_path: Path) -> None:
    """The parent's path is not yet the child's when the patches are applied there."""
    root = Path(__file__).parents[2]
    code = f"""
import multiprocessing, os, sys
if __name__ == '__main__':
    os.environ.pop('PYTHONPATH')
    sys.path.remove({str(root)!r})
    sys.path.append({str(root)!r})
    import smorms3_dist
import chainer

def child(answers):
    answers.put(sys.modules['smorms3_dist'].__file__)

if __name__ == '__main__':
    answers = multiprocessing.get_context({method!r}).SimpleQueue()
"""
    answer = "    assert answers.get() == smorms3_dist.__file__\n"
    code += CHILD.format(method=method, arguments="answers,") + answer
    passes(tmp_path, NEEDY_PARENT + code)


def test_a_fork_server_does_not_preload_the_main_script_without_the_patches(
    tmp_path: Path,
) -> None:
    """Newer versions of Python tell the server the script's path; here all of them do."""
    code = """
import multiprocessing, sys
if __name__ == '__main__':
    from multiprocessing import spawn
    original = spawn.get_preparation_data
    def get_preparation_data(name):
        data = original(name)
        return {**data, 'main_path': data['init_main_from_path']}
    spawn.get_preparation_data = get_preparation_data
    import smorms3_dist
import chainer

def child():
    pass
"""
    passes(tmp_path, NEEDY_PARENT + code + CHILD.format(method="forkserver", arguments=""))
