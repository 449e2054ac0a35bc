"""Fuzzing of every parser of untrusted bytes in ``cloister.core``.

``python -m fuzz --list`` names the targets, ``python -m fuzz NAME --seconds 60`` runs one and
``python -m fuzz --all --seconds 60`` each. What holds for all of them: any bytes give a value or a
`CloisterError`, within the target's time, and where a format is exact the value is written as the bytes that
it was read from.

* `fuzz.targets`: the targets and the check.
* `fuzz.seeds`: valid inputs, made by the simulated platform; real evidence where ``../shared/vectors`` is.
* `fuzz.engine`: one run under atheris, coverage-guided.
* ``fuzz/findings/<target>/``: inputs that broke a check, as they were found; not kept in the repository.
* ``fuzz/corpus/<target>/``: inputs that are kept; ``tests/fuzz`` checks each, without atheris.

Mend what a finding shows, then move its file from findings to corpus. An input that grew out of real evidence
stays out of the repository: make it again with ``--no-vectors``, or by hand.
"""
