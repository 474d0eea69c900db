"""Print the line of the torch floor, and refuse skips that the tested torch does not have.

floor_result.py TORCH FLOOR_JUNIT [JUNIT]   (JUNIT: of the same tests with the tested torch)
"""

import sys
import xml.etree.ElementTree as ElementTree


def outcomes(path: str) -> tuple[set[str], set[str]]:
    """The tests of a junit file that passed, and those that were skipped."""
    cases = list(ElementTree.parse(path).iter("testcase"))
    skipped = {name(case) for case in cases if case.find("skipped") is not None}
    return {name(case) for case in cases} - skipped, skipped


def name(case: ElementTree.Element) -> str:
    return f"{case.get('classname')}::{case.get('name')}"


def main() -> int:
    torch, floor, *tested = sys.argv[1:]
    passed, skipped = outcomes(floor)
    for path in tested:
        if more := sorted(skipped & outcomes(path)[0]):
            print(f"torch floor {torch}: FAILED, skipped there and not with the tested torch:", *more, sep="\n  ")
            return 1
    if not passed:
        print(f"torch floor {torch}: FAILED, no test ran")
        return 1
    print(f"torch floor {torch}: {len(passed)} passed")
    return 0


sys.exit(main())
