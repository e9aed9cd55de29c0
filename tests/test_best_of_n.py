"""Cells of best-of-n: what they depend on."""

from pathlib import Path

import pytest

from experiments import best_of_n


def test_cells_are_of_a_file_and_of_how_it_ran(tmp_path):
    """Of the default settings nothing is said that older cells do not say."""
    path, other = (str(tmp_path / f'{name}.jsonl') for name in 'ab')
    Path(path).write_text('{}\n')
    Path(other).write_text('[]\n')
    config = lambda **more: best_of_n.Config(models=(), **more)  # noqa: E731
    plain = {'orders', 'questions', 'run_code', 'max_length', 'max_answer'}
    assert set(best_of_n.flags(config(unsafe=True), path)) == plain
    assert set(best_of_n.flags(config(run_code=True), path)) == plain
    run = best_of_n.flags(config(run_code=True, unsafe=True), path)
    assert (run['unsafe'], run['timeout']) == (True, 3.0)
    first = best_of_n.flags(config(dataset_name=(path,)), path)['sha256']
    assert best_of_n.flags(config(dataset_name=(other,)), other)['sha256'] != first
    assert best_of_n.by_name([path, other]) == {'a': path, 'b': other}
    with pytest.raises(ValueError, match='of which two have one name'):
        best_of_n.main(config(dataset_name=(path, 'elsewhere/a_candidates.jsonl.gz')))
