"""The conformance kit: what every plugin must do, as named checks.

In a plugin's tests:

    from zoo.testing import parametrize_with_checks

    @parametrize_with_checks("acme")
    def test_conformance(check):
        check()

`zoo check acme` runs the same checks on the command line.
"""

from zoo.testing.kit import Check, checks, parametrize_with_checks, run_checks

__all__ = ["Check", "checks", "parametrize_with_checks", "run_checks"]
