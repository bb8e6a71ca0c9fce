"""Print a Markdown table of all finished runs under a folder, seeds of one configuration in one row.

    python scripts/results_table.py outputs/table

`make table` trains the runs of the README's table and calls this.
"""

import argparse

from hf_vpt.training.results import format_table, read_results


def main() -> None:
    parser = argparse.ArgumentParser(description="Print a Markdown table of all finished runs under a folder.")
    parser.add_argument("folder", help="Folder above the output folders of the runs.")
    print(format_table(read_results(parser.parse_args().folder)))


if __name__ == "__main__":
    main()
