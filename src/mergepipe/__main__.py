"""``python -m mergepipe`` is the command ``mergepipe``."""

from mergepipe.cli.main import start

if __name__ == "__main__":
    start()
