"""Measure what data costs: preparing it, next to `datasets.map`, and packed against padded training.

    python -m benchmarks.data prepare MODEL ROWS [--rows N ...] [--processes N] [--without NAME ...]
    python -m benchmarks.data train MODEL ROWS [--steps N] [--batch-size N] …

Each part says at its top what it measures, and how.
"""

import argparse

from benchmarks import data_preparation, data_training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    for name, part in {"prepare": data_preparation, "train": data_training}.items():
        own = parts.add_parser(name, description=part.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        part.add_arguments(own)
        own.set_defaults(run=part.run)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
