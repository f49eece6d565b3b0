"""Writes stand-ins for the installed RoboCasa: python -m envs.robocasa.standin --dir=~/.cache/z1/robocasa-standin"""

from absl import app, flags

from envs.robocasa import standin

_DIR = flags.DEFINE_string("dir", "~/.cache/z1/robocasa-standin", "Folder to write to.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: expected --dir=FOLDER")
    try:
        target = standin.prepare(_DIR.value)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    files = [path for path in target.rglob("*") if path.is_file()]
    print(f"{target}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB; {standin.LABEL}")


if __name__ == "__main__":
    app.run(main)
