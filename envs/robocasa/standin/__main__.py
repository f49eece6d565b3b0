"""Writes stand-ins for the installed RoboCasa: python -m envs.robocasa.standin [--dir=FOLDER]"""

import argparse

from envs.robocasa import standin


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m envs.robocasa.standin", description=standin.LABEL)
    parser.add_argument("--dir", default=standin.folder(), help="folder to write to (%(default)s; or $Z1_STANDINS)")
    try:
        target = standin.prepare(parser.parse_args().dir)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    files = [path for path in target.rglob("*") if path.is_file()]
    print(f"{target}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB; {standin.LABEL}")


if __name__ == "__main__":
    main()
