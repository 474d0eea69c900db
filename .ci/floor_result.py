"""Print the line of the torch floor, and refuse it where a test that the tested torch passes did not run.

floor_result.py TORCH FLOOR_JUNIT [JUNIT]   (JUNIT: of the same tests with the tested torch)
"""

import sys
import xml.etree.ElementTree as ElementTree

WHOLE_RUNS = "tests.test_architectures"  # of which .ci/floor takes one family


def outcomes(path: str) -> tuple[set[str], set[str]]:
    """Read the tests of a junit file that passed, and those that were skipped."""
    cases = list(ElementTree.parse(path).iter("testcase"))
    skipped = {name(case) for case in cases if case.find("skipped") is not None}
    return {name(case) for case in cases} - skipped, skipped


def name(case: ElementTree.Element) -> str:
    return f"{case.get('classname')}::{case.get('name')}"


def main() -> int:
    torch, floor, *tested = sys.argv[1:]
    passed, skipped = outcomes(floor)
    for path in tested:
        files = {test.partition("::")[0] for test in passed | skipped} - {WHOLE_RUNS}
        expected = {test for test in outcomes(path)[0] if test.partition("::")[0] in files}
        if more := sorted(expected - passed):
            print(f"torch floor {torch}: FAILED, run with the tested torch and not there:", *more, sep="\n  ")
            return 1
    if not passed:
        print(f"torch floor {torch}: FAILED, no test ran")
        return 1
    print(f"torch floor {torch}: {len(passed)} passed")
    return 0


sys.exit(main())
