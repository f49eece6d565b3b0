"""python -m z1_jax.report RUN_DIR: writes the page of a run anew, also of one that is under way."""

import sys

from z1_jax.config.command_line import Parser
from z1_jax.report.write import write_report


def main() -> int:
    parser = Parser(prog="python -m z1_jax.report", description="Writes RUN_DIR/report.html.")
    parser.add_argument("run_dir", metavar="RUN_DIR")
    try:
        print(write_report(parser.parse_args().run_dir))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
